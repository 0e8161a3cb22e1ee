"""One step for several objectives that pull against each other: how much of each one's gradient to take.

The gradients are seen through their Gram matrix alone: `gram[i, j] = <g_i, g_j>`, float64 `[k, k]`, where `g_i` is the
direction in which objective i rises. What comes out are coefficients `a`, `[k]`, of the step `sum_i a_i g_i`. `weights`
are what each objective is worth, `[k]`: plain addition takes them as they are. `science.md` 3.5.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Method = Literal["sum", "pcgrad", "cagrad", "mgda"]
STRAY = 0.4  # how far CAGrad may leave the weighted sum, as a share of its length
FAINT = 1e-3  # of the median squared length: an objective with a shorter gradient has nothing to say
RIDGE = 1e-10  # of the mean squared length, so that gradients which are each other's multiples share their weight


def combine(method: Method, gram: np.ndarray, weights: np.ndarray, *, seed: Sequence[int] = (0,)) -> np.ndarray:
    """The coefficients by `method`; objectives of weight 0, or with nothing to say, keep their weight and take no part.

    Args:
        method: "sum" gives the weights back; else one of the functions below.
        gram, weights: as in the head of this file; weights >= 0, one at least above 0.
        seed: of PCGrad's order.
    """
    squared, found = np.diag(gram), weights.astype(float)
    active = weights > 0
    active &= squared > FAINT * np.median(squared[active])
    if method == "sum" or active.sum() < 2:
        return found
    part = gram[np.ix_(active, active)], found[active]
    found[active] = pcgrad(*part, seed=seed) if method == "pcgrad" else {"cagrad": cagrad, "mgda": mgda}[method](*part)
    return found


def pcgrad(gram: np.ndarray, weights: np.ndarray, *, seed: Sequence[int] = (0,)) -> np.ndarray:
    """Each gradient loses what points against another one, in random order; then they are added.

    Coefficients are never below the weights. With two objectives neither falls; with more this is not promised.
    Source: Yu et al. 2020, algorithm 1 (arXiv 2001.06782).
    """
    draw, total = np.random.default_rng(seed), np.zeros(len(weights))
    for own, weight in enumerate(weights):
        mine = weight * np.eye(len(weights))[own]
        for other in draw.permutation(len(weights)):
            along = gram[other] @ mine
            if other != own and along < 0:
                mine[other] -= along / gram[other, other]
        total += mine
    return total


def mgda(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The step on which every objective gains at least in proportion to its weight: no objective falls.

    It is the point nearest to 0 in the convex hull of the `g_i / w_i`, whose product with each of them is at least its
    own squared length. Coefficients are >= 0 and add up to what the weights do; where they make nothing of the
    gradients, no step helps all. Equal weights give the papers' formula.
    Source: Desideri 2012 (doi 10.1016/j.crma.2012.03.014); Sener & Koltun 2018 (arXiv 1810.04650).
    """
    found = _on_simplex(gram / np.outer(weights, weights), np.zeros(len(weights))) / weights
    return found * (weights.sum() / found.sum())


def cagrad(gram: np.ndarray, weights: np.ndarray, *, stray: float = STRAY) -> np.ndarray:
    """The step on which the objective that gains least gains most, among those near the weighted sum `g`.

    Near: no further from `g` than `stray * |g|`, stray in [0, 1). It is `g + stray |g| h / |h|`, where `h`, in the
    convex hull of the gradients, has the least `<h, g> + stray |g| |h|`. Where `h` is nothing no step helps all, and
    the weights stay. Source: Liu et al. 2021, eq. 3 and 4 (arXiv 2110.14048), there with equal weights.
    """
    pull = gram @ weights
    radius, low, high = stray * max(0.0, weights @ pull) ** 0.5, 0.0, np.diag(gram).max() ** 0.5
    nothing, share, length = 1e-6 * high, np.zeros(len(weights)), 0.0
    for _ in range(50 if radius > stray * nothing else 0):
        # |h| is the least of (|h|^2 / t + t) / 2 over t, so what is to be found is convex in t, and t = |h| there
        middle = (low + high) / 2
        share = _on_simplex(radius * gram, middle * pull)
        length = max(0.0, share @ gram @ share) ** 0.5
        low, high = (middle, high) if length > middle else (low, middle)
    return weights + radius / length * share if length > nothing else weights.astype(float)


def _on_simplex(quadratic: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """The least `x' Q x / 2 + l' x` over x >= 0 with sum 1, exactly: each of the 2^k - 1 faces is looked at."""
    k = len(linear)
    size = np.trace(quadratic) / k
    quadratic, linear = quadratic / size + RIDGE * np.eye(k), linear / size
    faces = (np.arange(1, 2**k)[:, None] >> np.arange(k) & 1).astype(float)
    # on a face all slopes are alike, off it x is 0
    system = np.zeros((len(faces), k + 1, k + 1))
    system[:, :k, :k] = quadratic * faces[:, :, None] * faces[:, None, :] + (1 - faces)[:, :, None] * np.eye(k)
    system[:, :k, k] = system[:, k, :k] = faces
    right = np.concatenate([-linear * faces, np.ones((len(faces), 1))], axis=1)
    points = np.linalg.solve(system, right[:, :, None])[:, :k, 0]
    points = points[points.min(axis=1) >= 0]
    return points[(np.einsum("fi,ij,fj->f", points, quadratic, points) / 2 + points @ linear).argmin()]
