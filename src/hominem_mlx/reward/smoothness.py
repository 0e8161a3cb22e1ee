"""Is the reward steady? Under edits that mean nothing, and under noise on the tokens' own vectors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from hominem_mlx import metrics
from hominem_mlx.reward.examine import CLEAR
from hominem_mlx.reward.features import Backbone, Pair
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.rewording import EDITS, reword

WANTED = 200  # edits; fewer say little of the rare jump
NOISE = 0.02  # length of the smaller noise over that of each token's own vector
PROBES, DIRECTIONS = 32, 4
STEADY = 0.2  # by how much curvature may hang on the step it is measured with


def under_edits(
    judge: Callable[[Sequence[Pair]], np.ndarray],
    pairs: Sequence[Pair],
    before: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    wanted: int = WANTED,
    seed: int = 0,
) -> dict[str, Any]:
    """How far the scalar moves when replies are put in other dress (see `rewording`).

    Args:
        judge: scalars `[M]` of pairs.
        pairs, before: replies and their scalars `[N]`.
        labels: overall label `[N]`, NaN where there is none; groups: the prompt of each row.
        wanted: edits; all replies of as many prompts as that takes, and each again in another way where they are few.
        seed: of order and edits.

    Returns: `n`; `median` and `q95` of |change| in standard deviations of `before`; `flips`, the share of `pairs`
        (both replies edited, label margin from 0.3) whose order turned round; `kinds`, the median by kind.
    Source: `science.md` 2.10; reWordBench (arXiv 2503.11751), CheckList (arXiv 2005.04118).
    """
    rows: list[int] = []
    kinds, edited, rounds = [], [], []
    names, owner = np.unique(groups, return_inverse=True)
    order = np.random.default_rng([seed, 3]).permutation(len(names))
    for turn in range(len(EDITS)):
        for group in order:
            if len(rows) >= wanted:
                break
            for row in np.flatnonzero(owner == group).tolist():
                made = reword(pairs[row][1], row + turn, seed=seed)
                if made is not None:
                    rows.append(row)
                    kinds.append(made[0])
                    edited.append((pairs[row][0], made[1]))
                    rounds.append(f"{turn}/{group}")
    spread = float(np.std(before)) if len(before) else 0.0
    if not rows or spread <= 1e-12:
        return {"n": 0, "median": math.nan, "q95": math.nan, "flips": math.nan, "pairs": 0, "kinds": {}}
    after = judge(edited)
    moved = np.abs(after - before[rows]) / spread
    flips, count = flipped(before[rows], after, labels[rows], np.array(rounds))
    by_kind = {kind: float(np.median(moved[np.array(kinds) == kind])) for kind in EDITS if kind in kinds}
    return {
        "n": len(rows),
        "median": float(np.median(moved)),
        "q95": float(np.quantile(moved, 0.95)),
        "flips": flips,
        "pairs": count,
        "kinds": by_kind,
    }


def flipped(before: np.ndarray, after: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """Share of clear pairs (label margin from 0.3) that `before` and `after` `[N]` put in opposite orders, of how many.

    Ties on either side count as no flip.
    """
    first, _ = metrics.pair_margins(before, labels, groups, low=CLEAR)
    second, _ = metrics.pair_margins(after, labels, groups, low=CLEAR)
    return (float((first * second < 0).mean()), len(first)) if len(first) else (math.nan, 0)


def under_noise(model: RewardModel, pairs: Sequence[Pair], *, seed: int = 0) -> dict[str, Any] | None:
    """How the unclipped scalar answers to noise on the vectors of a reply's tokens; the prompt is held.

    Noise along a random direction `v`: at each token of the reply signs drawn evenly, of the length of that token's own
    vector, times 0.02 and 0.04, both ways, in 4 directions on at most 32 replies.

    Returns: see `steadiness`, with `n`. None for n-grams, which have no vectors.
    """
    backbone = model.features
    if not isinstance(backbone, Backbone):
        return None
    draw = np.random.default_rng([seed, 4])
    weights = mx.array([dimension.weight for dimension in model.manifold.dimensions])
    values, lengths = [], []
    for row in draw.permutation(len(pairs))[:PROBES]:
        passage = backbone.reader.passage(*pairs[row])
        first, last = passage.said
        if last <= first:
            continue  # nothing of it can be read
        x = backbone.reader.embed(mx.array(passage.tokens))
        signs = mx.array(draw.choice([-1.0, 1.0], (DIRECTIONS, *x.shape)).astype(np.float32))
        inside = ((mx.arange(len(x)) >= first) & (mx.arange(len(x)) < last))[:, None]
        size = mx.where(inside, mx.sqrt(mx.square(x).mean(-1, keepdims=True)), 0.0)
        ways = NOISE * signs * size
        points = mx.concatenate([x[None], *(x + step * ways for step in (1, -1, 2, -2))])
        said = model.judge_of(pairs[row])(backbone.features([passage] * len(points), points))[:, : len(weights)]
        values.append(np.array(said @ weights / weights.sum(), np.float64))
        lengths.append(float(mx.sqrt(mx.square(ways[0]).sum())))
    if not values:
        return None
    return {"n": len(values), **steadiness(np.array(values), np.array(lengths))}


def steadiness(values: np.ndarray, lengths: np.ndarray, *, step: float = NOISE) -> dict[str, Any]:
    """What values around each probe say.

    Args:
        values: `[P, 1 + 4 J]`: at the probe, then in J directions at +h, -h, +2h, -2h.
        lengths: Euclidean length `[P]` of the noise at h.
        step: h.

    Returns: `ratio` of the mean change at 2h to that at h (2 where it is smooth); `lipschitz`, the 95 % quantile of
        |change| per length at h; `curvature`, the mean over probes of `(f(+h) - 2 f + f(-h)) / h^2`, an estimate of
        the trace of the second derivative in units of each token's length; `curvature_variance` between probes,
        directions' own noise taken off; `is_steady`, whether twice the step changes the median |curvature| by less than
        a fifth, without which neither curvature means much.
    Source: `science.md` 2.10 and 1.5 (Hutchinson's estimator by central differences).
    """
    centre, at = values[:, :1], np.split(values[:, 1:], 4, axis=1)
    near, far = np.abs(at[0] - centre), np.abs(at[2] - centre)
    bent, wide = (at[0] - 2 * centre + at[1]) / step**2, (at[2] - 2 * centre + at[3]) / (2 * step) ** 2
    typical, wider = float(np.median(np.abs(bent))), float(np.median(np.abs(wide)))
    return {
        "ratio": float(far.mean() / near.mean()) if near.mean() > 0 else math.nan,
        "lipschitz": float(np.quantile(near / lengths[:, None], 0.95)),
        "curvature": float(bent.mean()),
        "curvature_variance": metrics.variance_between(bent),
        "is_steady": bool(abs(wider - typical) <= STEADY * typical),
    }
