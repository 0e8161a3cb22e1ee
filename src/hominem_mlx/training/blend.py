"""How much the channels of a training step count against each other (`science.md` 5). Numbers in, numbers out."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

KEPT = 0.95  # of a running mean, a step
LARGEST_FACTOR = 5.0


def availability(weights: Sequence[float], rows: Sequence[int], ideal: Sequence[int]) -> list[float]:
    """Weights of the channels by how much there is to learn in each.

    Args:
        weights: what each channel would weigh with rows enough, >= 0.
        rows: how many rows it has; without any it weighs nothing.
        ideal: from how many rows on it weighs all; 0: from the first.

    Returns: `weight * clip(sqrt(rows / ideal), 0.25, 1)`, divided by their sum; all 0 where there is nothing to learn.
    """
    weighed = [
        weight * min(1.0, max(0.25, math.sqrt(count / goal))) if count and goal else weight * bool(count)
        for weight, count, goal in zip(weights, rows, ideal, strict=True)
    ]
    return [weight / (sum(weighed) or 1.0) for weight in weighed]


def smoothed(before: float | None, now: float) -> float:
    """The running mean after one more value; the first value is its own mean."""
    return now if before is None else KEPT * before + (1 - KEPT) * now


def factors(norms: Mapping[str, float]) -> dict[str, float]:
    """What brings every channel to the same gradient norm, their geometric mean.

    Args:
        norms: running mean of each channel's gradient norm before its weight, >= 0.

    Returns: `geometric mean / norm`, kept in [0.2, 5]; all 1 where a norm is 0, since a channel that says nothing gives
        no measure for the others.
    """
    if not norms or min(norms.values()) <= 0:
        return dict.fromkeys(norms, 1.0)
    mean = math.exp(sum(map(math.log, norms.values())) / len(norms))
    return {name: min(LARGEST_FACTOR, max(1 / LARGEST_FACTOR, mean / norm)) for name, norm in norms.items()}


def turn(weights: Mapping[str, float], seed: int, step: int) -> str:
    """The one channel that learns in this step, drawn with its share of the weights from seed and step alone.

    Source: ALRIGHT, Fernando et al. 2024 (arXiv 2410.15483).
    """
    shares = np.array(list(weights.values())) / sum(weights.values())
    return list(weights)[np.random.default_rng([seed, step]).choice(len(shares), p=shares)]
