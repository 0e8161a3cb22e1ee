"""How far labels scatter about a prediction, reply by reply: quantiles of what the ridge head gets wrong.

What is said is little wrong about some replies and far wrong about others, and the head's own outputs tell some of it.
So each quantile is linear in them, as they are in the features. Shapes: `N` rows, `O` outputs of the ridge head, `K`
dimensions, `S = K + 1` numbers with a scatter (the dimensions and their scalar), `Q` levels.

Source: `science.md` 2.3; pinball loss: Koenker and Bassett 1978; as a reward head: Dorka 2024 (arXiv 2409.10164).
"""

from collections.abc import Sequence
from statistics import NormalDist

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from hominem_mlx.reward.examine import in_json

LEVELS = tuple(round(tenth / 10, 1) for tenth in range(1, 10))
FEWEST = 100  # rows with a label; of fewer every reply gets the same quantiles
PENALTY = 1e-3  # on squared slopes, of standardised numbers
CLOSE, MOST_ROUNDS = 1e-4, 200  # of `regress`: smoothing, as a share of the scatter
NORMAL = NormalDist()


class QuantileHead(nn.Module):
    """Outputs of the ridge head `[B, O]`, unclipped, to quantiles of the label about them, `[B, S, Q]`."""

    def __init__(self, num_outputs: int, num_dimensions: int):
        super().__init__()
        self.weight = mx.zeros((num_outputs, (num_dimensions + 1) * len(LEVELS)))
        self.bias = mx.zeros(((num_dimensions + 1) * len(LEVELS),))
        self.freeze()

    def __call__(self, values: mx.array) -> mx.array:
        """How far above the prediction each quantile lies. Where two have crossed they change places."""
        found = values @ self.weight + self.bias
        return mx.sort(found.reshape(len(values), -1, len(LEVELS)), axis=-1)


def fit(values: np.ndarray, labels: np.ndarray, scalar: np.ndarray, shares: Sequence[float]) -> QuantileHead:
    """Fit it on training rows.

    Args:
        values: the ridge head's outputs `[N, O]`, each with the row's fold left out: what was fitted lies too near.
        labels: `[N, O]`, NaN where there is none; the dimensions come first.
        scalar: the overall label `[N]`, NaN where there is none.
        shares: weights of the dimensions in it, `[K]`.
    """
    size = len(shares)
    said = np.concatenate([values[:, :size], values[:, :size] @ np.array(shares)[:, None] / np.sum(shares)], axis=1)
    off = np.concatenate([labels[:, :size], scalar[:, None]], axis=1) - said
    mean, scale = values.mean(axis=0), np.maximum(values.std(axis=0), 1e-9)
    z = (values - mean) / scale
    found = np.zeros((values.shape[1] + 1, size + 1, len(LEVELS)))
    for number, column in enumerate(off.T):
        there = ~np.isnan(column)
        if not there.any():  # nothing was left out, so nothing can be told
            continue
        unit = max(column[there].std(), 1e-9)
        slopes = z[there] if there.sum() >= FEWEST else z[there] * 0
        found[:, number] = regress(slopes, column[there] / unit, LEVELS, PENALTY).T * unit
    weight = found[:-1] / scale[:, None, None]
    head = QuantileHead(values.shape[1], size)
    arrays = {"weight": weight, "bias": found[-1] - np.tensordot(mean, weight, axes=1)}
    head.update(
        {name: mx.array(np.asarray(array, np.float32).reshape(head[name].shape)) for name, array in arrays.items()}
    )
    return head


def pinball(off: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Loss of quantiles that labels lie `off` above, >= 0: `off * level` above, `-off * (1 - level)` below."""
    return off * (levels - (off < 0))


def regress(x: np.ndarray, y: np.ndarray, levels: Sequence[float], penalty: float) -> np.ndarray:
    """Slopes and intercepts `[Q, D + 1]` of least mean pinball loss plus `penalty` times the squared slopes.

    Each round minimises a parabola that lies above the loss and touches it where the last round ended, so the loss
    falls, and nothing is drawn by chance (Hunter and Lange 2000, eq. 4: MM for quantile regression).

    Args:
        x: `[N, D]`; y: `[N]`, at least one row, of about unit scatter.
        levels: in (0, 1).
    """
    design, level = np.concatenate([x, np.ones((len(x), 1))], axis=1), np.array(levels)[:, None]
    price = np.diag([2 * len(x) * penalty] * x.shape[1] + [0.0])
    found = np.zeros((len(level), design.shape[1]))
    found[:, -1] = np.quantile(y, levels)
    pull, last = (2 * level - 1) * design.sum(axis=0), np.inf
    for _ in range(MOST_ROUNDS):
        weighed = design.T[None] / (CLOSE + np.abs(y - found @ design.T))[:, None]
        found = np.linalg.solve(weighed @ design + price, (weighed @ y + pull)[..., None])[..., 0]
        loss = pinball(y - found @ design.T, level).mean() + penalty * np.square(found[:, :-1]).sum(axis=1).mean()
        if last - loss < 1e-7:
            break
        last = loss
    return found


def examined(
    quantiles: np.ndarray, off: np.ndarray, promised: np.ndarray, levels: Sequence[float]
) -> dict[str, dict[str, float | None]]:
    """Intervals of the quantiles beside those of one width for all replies, on rows that neither was fitted on.

    Args:
        quantiles: `[N, K, Q]`; off: label minus prediction `[N, K]`, NaN where there is none.
        promised: half-widths `[levels, N, K]` of the others.

    Returns: by level `coverage` and mean `width` of the quantiles' intervals, and `equal_width` of the others.
    """
    found: dict[str, dict[str, float | None]] = {"coverage": {}, "width": {}, "equal_width": {}}
    there = ~np.isnan(off)
    for level, half in zip(levels, promised, strict=True):
        low, high = interval(quantiles, level)
        found["coverage"][str(level)] = float(((low <= off) & (off <= high))[there].mean())
        found["width"][str(level)] = float((high - low)[there].mean())
        found["equal_width"][str(level)] = float(2 * half[there].mean())
    return in_json(found)


def spread(quantiles: np.ndarray) -> np.ndarray:
    """The standard deviation that a normal would have with these outermost quantiles: `[..., Q]` to `[...]`."""
    return (quantiles[..., -1] - quantiles[..., 0]) / (2 * NORMAL.inv_cdf(LEVELS[-1]))


def interval(quantiles: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends between which the middle `level` of labels lies, from `[..., Q]`: between two quantiles in proportion,
    beyond the outermost as a normal goes on from the median.
    """
    ends, middle = [], quantiles[..., len(LEVELS) // 2]
    for chance, outermost in (((1 - level) / 2, 0), ((1 + level) / 2, -1)):
        within = float(np.clip(chance, LEVELS[0], LEVELS[-1]))
        place = np.interp(within, LEVELS, np.arange(len(LEVELS)))
        low = int(min(place, len(LEVELS) - 2))
        end = quantiles[..., low] + (place - low) * (quantiles[..., low + 1] - quantiles[..., low])
        if within != chance:
            end = middle + (end - middle) * NORMAL.inv_cdf(chance) / NORMAL.inv_cdf(LEVELS[outermost])
        ends.append(end)
    return ends[0], ends[1]
