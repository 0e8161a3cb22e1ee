"""Which replies to label next: those from which most can be learnt. Pure functions of numbers; the judge is given.

Three things count alike: the reward model is unsure of the reply; the reply is unlike any that is labelled; its reward
lies in a corner of the manifold (say, kind and untrue) where few labels lie.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hominem_mlx.metrics import ranks
from hominem_mlx.schema import RewardOutput

NO_SIDE = 0.1  # values nearer to 0 are on neither side of a dimension


class Pick(NamedTuple):
    """One reply to label: its number among the candidates, and why. `novelty` is that at the moment it was picked."""

    candidate: int
    doubt: float
    novelty: float
    rarity: float


def select(
    count: int,
    outputs: Sequence[RewardOutput],
    features: np.ndarray,
    labelled_values: np.ndarray,
    labelled_features: np.ndarray,
) -> list[Pick]:
    """The `count` candidates to label, the most useful first.

    One at a time, the candidate whose ranks in doubt, novelty and rarity add up to most is picked; then novelty is
    measured again, so that like replies are not picked together (greedy k-centre: Sener and Savarese 2018, arXiv
    1708.00489).

    Args:
        count: how many, at most.
        outputs: the reward model's judgement of N candidates.
        features: theirs, `[N, F]`.
        labelled_values: labels, `[M, K]` in manifold order, NaN where there is none; M may be 0.
        labelled_features: `[M, F]`.
    """
    doubt = doubts(outputs)
    predicted = np.array([output.vector for output in outputs]).reshape(len(outputs), labelled_values.shape[1])
    rarity = rarities(predicted, labelled_values)
    fixed = _shares(doubt) + _shares(rarity)
    everything = np.concatenate([features, labelled_features]).astype(float)
    spread = everything.std(axis=0)
    scaled = everything / np.where(spread > 0, spread, 1.0)
    mine, known = scaled[: len(features)], scaled[len(features) :]
    away = _nearest(mine, known)
    left = np.ones(len(features), bool)
    picks: list[Pick] = []
    while len(picks) < count and left.any():
        score = np.where(left, fixed + _shares(away), -math.inf)
        index = int(score.argmax())
        picks.append(Pick(index, float(doubt[index]), float(away[index]), float(rarity[index])))
        left[index] = False
        away = np.minimum(away, np.linalg.norm(mine - mine[index], axis=1))
    return picks


def doubts(outputs: Sequence[RewardOutput]) -> np.ndarray:
    """Mean standard deviation over the dimensions, `[N]`; 0 where the model gives none."""
    return np.array(
        [
            sum(output.uncertainty.get(name, 0.0) for name in output.reward_vector) / len(output.reward_vector)
            for output in outputs
        ]
    )


def rarities(predicted: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """How few labels lie where each prediction lies, `[N]`, in nats.

    A corner is a pair of dimensions and a side of each. Its share of the labels is `(n + 1) / (N + 4)` (Laplace), and a
    prediction's rarity the mean over all pairs of -log of the share of its corner: log 4 without any labels, and for a
    pair in which it is on no side.

    Args:
        predicted: `[N, K]` in [-1, 1].
        labelled: `[M, K]`, NaN where there is no label.
    """
    sides, known = _sides(predicted), _sides(np.nan_to_num(labelled, nan=0.0))
    pairs = list(itertools.combinations(range(predicted.shape[1]), 2))
    total = np.full(len(predicted), math.log(4) * len(pairs))
    for i, j in pairs:
        in_any = (known[:, i] != 0) & (known[:, j] != 0)
        for a, b in itertools.product((-1, 1), repeat=2):
            share = ((known[:, i] == a) & (known[:, j] == b)).sum() + 1
            here = (sides[:, i] == a) & (sides[:, j] == b)
            total[here] += -math.log(share / (in_any.sum() + 4)) - math.log(4)
    return total / max(1, len(pairs))


def disagreements(one: Sequence[RewardOutput], other: Sequence[RewardOutput]) -> np.ndarray:
    """By how many standard deviations two judges differ on each of the same replies, `[N]`, >= 0.

    Each judge's scalar is taken in its own units over these replies: judges with other means and ranges than each other
    do not disagree by that. A judge that says the same of all has no opinion, 0.
    """
    return np.abs(_standard([output.scalar for output in one]) - _standard([output.scalar for output in other]))


def _standard(values: Sequence[float]) -> np.ndarray:
    array = np.array(values, float)
    spread = array.std() if len(array) else 0.0
    return (array - array.mean()) / spread if spread > 0 else np.zeros(len(array))


def _sides(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) >= NO_SIDE, np.sign(values), 0).astype(int)


def _shares(values: np.ndarray) -> np.ndarray:
    """Ranks as shares in (0, 1)."""
    return (ranks(values) - 0.5) / max(1, len(values))


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each of `[N, F]` to the nearest of `[M, F]`; infinite without any."""
    if not len(others):
        return np.full(len(points), math.inf)
    squares = (points**2).sum(1)[:, None] + (others**2).sum(1) - 2 * points @ others.T
    return np.sqrt(np.maximum(squares, 0).min(axis=1))
