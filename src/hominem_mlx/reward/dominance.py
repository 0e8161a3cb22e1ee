"""Does one dimension speak for all? How the scalar hangs on each dimension it is made of."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hominem_mlx import metrics

LARGEST = 0.35  # share of the scalar's variance that one of seven equal dimensions may have
RATIO = LARGEST / (1 - LARGEST) * 6  # the same, as its variance over the mean of the six others: 3.23


def dominance(predicted: np.ndarray, weights: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """How evenly the dimensions make up the scalar `R`, their weighted mean.

    Args:
        predicted: `[N, K]`, unclipped.
        weights: `[K]` of the scalar, >= 0.
        names: of the dimensions.

    Returns:
        `shares`: by name `w_i^2 Var(r_i)` over their sum; `share` the one farthest beyond what it may have, `share_of`
        its name and `allowed` that bound (see `allowed`). `without`: the lowest rank correlation of R with R without
        one dimension, `without_of` which. `follows`: the largest correlation of a dimension with R, less their median,
        `follows_of` which. A dimension whose weight is a declaration is left out of the last two. NaN and no name
        where nothing varies or nothing is left to ask.
    Source: `science.md` 2.10.
    """
    w = np.array(weights, float) / np.sum(weights)
    scalar = predicted @ w
    parts = w**2 * predicted.var(axis=0)
    shares = parts / parts.sum() if parts.sum() > 0 else np.full(len(w), math.nan)
    bounds, asked = allowed(w), ~declared(w)
    without = np.array([metrics.spearman(scalar, scalar - part) for part in (w * predicted).T])
    follows = np.array([metrics.pearson(scalar, r) for r in predicted.T])
    follows -= np.nanmedian(follows) if not np.isnan(follows).all() else 0.0
    share, share_of = _farthest(shares / bounds, np.ones(len(w), bool), names)
    value, without_of = _farthest(-without, asked, names)
    excess, follows_of = _farthest(follows, asked, names)
    at = names.index(share_of) if share_of else 0
    return {
        "shares": dict(zip(names, shares.tolist(), strict=True)),
        "share": share * bounds[at],
        "share_of": share_of,
        "allowed": float(bounds[at]),
        "declared": [name for name, free in zip(names, asked, strict=True) if not free],
        "without": -value,
        "without_of": without_of,
        "follows": excess,
        "follows_of": follows_of,
    }


def declared(weights: np.ndarray) -> np.ndarray:
    """Which dimensions `[K]` of equal spread would exceed the bound by their weight alone: somebody wanted that."""
    squares = np.asarray(weights, float) ** 2
    return squares / squares.sum() > LARGEST


def allowed(weights: np.ndarray) -> np.ndarray:
    """The share `[K]` that each dimension may have: 0.35, and of a declared one what 0.35 means at its weight.

    With seven equal weights a share of 0.35 is a variance 3.23 times the mean of the others'. A dimension with that
    variance and weight w among weights w_j has `3.23 w^2 / (3.23 w^2 + sum_j w_j^2)`.
    """
    squares = np.asarray(weights, float) ** 2
    own = RATIO * squares
    return np.where(declared(weights), own / np.maximum(own + squares.sum() - squares, 1e-12), LARGEST)


def _farthest(values: np.ndarray, asked: np.ndarray, names: Sequence[str]) -> tuple[float, str | None]:
    there = np.flatnonzero(asked & ~np.isnan(values))
    if not len(there):
        return math.nan, None
    at = there[values[there].argmax()]
    return float(values[at]), names[at]
