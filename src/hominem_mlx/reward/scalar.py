"""One number of all dimensions: what only the reply's length says taken out, weights that hang on the prompt, and how
sure a difference makes of the order.

Shapes: `N` replies, `K` dimensions, `M` pairs of replies to one prompt, `F` features of a prompt.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from pydantic import BaseModel, ConfigDict

from hominem_mlx import metrics
from hominem_mlx.models.seeding import seeded
from hominem_mlx.reward.examine import CLOSE
from hominem_mlx.reward.head import grouped_folds
from hominem_mlx.schema import COMMON, Manifold

MANY_PAIRS = 2000  # fewer cannot tell prompts apart, and weights would follow the loudest dimension (`science.md` 2.5)
HIDDEN, STEPS, PATIENCE, RATE, DECAY = 32, 400, 40, 3e-3, 1e-2
SURE, UNSURE = 1e-3, 1e3  # ends of the search for a temperature


class ScalarCard(BaseModel):
    """How the scalar is made: `slopes` of dimensions on log length (none: length is kept), measured from `log_length`.

    `temperature` T makes probabilities of differences: `P(a better than b) = sigmoid((R_a - R_b) / T)`. `gate` is what
    `fit_gate` said when weights that hang on the prompt were asked for, whether or not they were kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: float | None = None
    log_length: float = 0.0
    slopes: dict[str, float] = {}
    gate: dict[str, float] = {}


class Gate(nn.Module):
    """Weights of the dimensions from what the backbone makes of the prompt: `softmax(log w + MLP(x))`.

    It begins as the given weights and is the gating of ArmoRM (Wang et al. 2024, arXiv 2406.12845) on frozen heads.
    """

    def __init__(self, num_features: int, weights: Sequence[float]):
        super().__init__()
        self.mean, self.scale = mx.zeros((num_features,)), mx.ones((num_features,))
        self.start = mx.log(mx.maximum(mx.array(weights, mx.float32) / sum(weights), 1e-6))
        self.inner = nn.Linear(num_features, HIDDEN)
        self.outer = nn.Linear(HIDDEN, len(weights))
        self.outer.weight, self.outer.bias = mx.zeros_like(self.outer.weight), mx.zeros_like(self.outer.bias)
        self.freeze(keys=["mean", "scale", "start"], recurse=False)

    def __call__(self, features: mx.array) -> mx.array:
        """`[N, F]` to weights `[N, K]` that add up to 1."""
        z = (features - self.mean) / self.scale
        return mx.softmax(self.start + self.outer(nn.relu(self.inner(z))), axis=-1)


def fit(
    dimensions: np.ndarray,
    wanted: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    responses: Sequence[str],
    manifold: Manifold,
    *,
    keep_length: bool,
    prompts: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[ScalarCard, Gate | None]:
    """How dimensions become one number.

    Args:
        dimensions: `[N, K]` as predicted with the reply's fold left out, NaN where it has no label.
        wanted: overall labels `[N]`, NaN where there is none.
        groups: the prompt of each reply.
        responses: the replies, whose length is taken out unless it is kept.
        prompts: features of their prompts `[N, F]` where weights may hang on them.
        seed: of the gate.
    """
    weights = np.array([dimension.weight for dimension in manifold.dimensions])
    lengths = np.array([log_length(response) for response in responses])
    told: dict[str, Any] = {"log_length": float(lengths.mean())}
    if not keep_length:
        slopes = length_slopes(dimensions, lengths)
        dimensions = dimensions - np.outer(lengths - lengths.mean(), slopes)
        told["slopes"] = dict(zip(manifold.names, slopes.tolist(), strict=True))
    seven = np.array([name in COMMON for name in manifold.names])
    of_them = dimensions[:, seven] @ weights[seven] / weights[seven].sum()
    # A row without a label in the person's own dimension: left out of the mean, it changes nothing.
    dimensions = np.where(np.isnan(dimensions) & ~seven, of_them[:, None], dimensions)
    gate, shares = None, weights / weights.sum()
    if prompts is not None:
        gate, told["gate"] = fit_gate(prompts, dimensions, wanted, groups, weights.tolist(), seed=seed)
        shares = shares if gate is None else np.array(gate(mx.array(prompts)))
    scalar = (dimensions * shares).sum(axis=1)
    pairs = ordered_pairs(np.where(np.isnan(scalar), np.nan, wanted), groups)
    if len(pairs):
        told["temperature"] = pair_temperature(scalar[pairs[:, 0]] - scalar[pairs[:, 1]])
    return ScalarCard(**told), gate


def log_length(response: str) -> float:
    """Natural logarithm of the number of characters, at least one."""
    return math.log(max(1, len(response)))


def length_slopes(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Slopes `[K]` that leave `values - slope * lengths` without rank correlation with the length.

    Args:
        values: `[N, K]`.
        lengths: log lengths `[N]`.

    The rank correlation falls as the slope rises, so that halving finds where it is 0. Source: `science.md` 2.5.
    """
    return np.array([_slope(column, lengths) for column in np.asarray(values, float).T])


def _slope(values: np.ndarray, lengths: np.ndarray) -> float:
    there = ~np.isnan(values)
    y, x = values[there], np.asarray(lengths, float)[there]
    if len(y) < 3 or np.ptp(x) <= 1e-12 or np.ptp(y) <= 1e-12:
        return 0.0
    far = 4 * float(y.std() / x.std())
    low, high = -far, far
    for _ in range(50):
        middle = (low + high) / 2
        if metrics.spearman(y - middle * x, x) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def pair_temperature(margins: np.ndarray) -> float:
    """The T that makes `sigmoid(margin / T)` likeliest, for margins `[M]` of the better reply over the other.

    Between 0.001 (every pair in order) and 1,000 (the margins say nothing). Source: `science.md` 2.4.
    """
    low, high = math.log(1 / UNSURE), math.log(1 / SURE)
    for _ in range(60):  # the slope of the log-likelihood in 1 / T falls
        middle = (low + high) / 2
        with np.errstate(over="ignore"):
            slope = (margins / (1 + np.exp(margins * math.exp(middle)))).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp(-low)


def ordered_pairs(scalar: np.ndarray, groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Places `[M, 2]` of replies to one prompt, the better first, whose labels `[N]` differ by at least 0.05."""
    _, owner = np.unique(np.asarray(groups), return_inverse=True)
    order, found = np.argsort(owner, kind="stable"), []
    for rows in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
        for a, b in itertools.combinations(rows.tolist(), 2):
            gap = scalar[a] - scalar[b]
            if abs(gap) >= CLOSE:
                found.append((a, b) if gap > 0 else (b, a))
    return np.array(found, int).reshape(-1, 2)


def fit_gate(
    features: np.ndarray,
    values: np.ndarray,
    scalar: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    weights: Sequence[float],
    *,
    seed: int = 0,
) -> tuple[Gate | None, dict[str, Any]]:
    """A gate learnt by Bradley-Terry on pairs of replies, kept where it is better than fixed weights.

    Three fifths of the prompts are learnt from, one says when to stop, and the last one decides: the gate must lower
    its log loss by more than two standard errors.

    Args:
        features: of each reply's prompt `[N, F]`.
        values: dimensions `[N, K]` as predicted with the reply's fold left out.
        scalar: labels `[N]`; groups: the prompt of each reply.
        weights: fixed weights `[K]`, where the gate starts.
        seed: of folds and of the first layer.

    Returns: the gate or None, and what decided: `pairs`, and where there are enough `fixed`, `gated` (log loss a pair),
        `gain` and its standard error `error`.
    """
    known = ordered_pairs(np.where(np.isnan(values).any(axis=1), np.nan, scalar), groups)
    if len(known) < MANY_PAIRS:
        return None, {"pairs": len(known), "wanted": MANY_PAIRS}
    fold = grouped_folds(groups, 5, seed=seed)[known[:, 0]]
    learnt, stopping, deciding = known[fold > 1], known[fold == 0], known[fold == 1]
    if not (len(learnt) and len(stopping) and len(deciding)):
        return None, {"pairs": len(known), "wanted_prompts": 5}
    with seeded(seed):
        gate = Gate(features.shape[1], weights)
    inside = np.unique(learnt)
    spread = features[inside].std(axis=0)
    gate.mean = mx.array(features[inside].mean(axis=0), mx.float32)
    gate.scale = mx.array(np.where(spread < 1e-6, 1.0, spread), mx.float32)
    x, r = mx.array(features, mx.float32), mx.array(np.nan_to_num(values), mx.float32)
    fixed = np.array(weights, float) / np.sum(weights)
    temperature = pair_temperature((values[learnt[:, 0]] - values[learnt[:, 1]]) @ fixed)

    def losses(gate: Gate, pairs: np.ndarray) -> mx.array:
        first, second = mx.array(pairs[:, 0]), mx.array(pairs[:, 1])
        margin = (gate(x[first]) * r[first] - gate(x[second]) * r[second]).sum(-1)  # each as it will be scored
        return mx.logaddexp(0.0, -margin / temperature)

    optimizer = optim.AdamW(learning_rate=RATE, weight_decay=DECAY)
    step = nn.value_and_grad(gate, lambda gate: losses(gate, learnt).mean())
    start = np.array(losses(gate, deciding))
    best, kept, waited = losses(gate, stopping).mean().item(), dict(gate.parameters()), 0
    for _ in range(STEPS):
        _, gradients = step(gate)
        optimizer.update(gate, gradients)
        mx.eval(gate.parameters(), optimizer.state)
        now = losses(gate, stopping).mean().item()
        best, kept, waited = (now, dict(gate.parameters()), 0) if now < best else (best, kept, waited + 1)
        if waited > PATIENCE:
            break
    gate.update(kept)
    end = np.array(losses(gate, deciding))
    owner = np.asarray(groups)[deciding[:, 0]]
    gains = [(start - end)[owner == prompt].sum() / len(start) for prompt in np.unique(owner)]
    gain, error = float(np.sum(gains)), float(np.std(gains) * math.sqrt(len(gains)))
    said = {"pairs": len(known), "fixed": float(start.mean()), "gated": float(end.mean()), "gain": gain, "error": error}
    return (gate if gain > 2 * error else None), said
