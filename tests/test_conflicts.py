"""Conflicting objectives: worked by hand, against explicit vectors, and against a fine grid of all that is allowed."""

import numpy as np
import pytest

from hominem_mlx.training.conflicts import STRAY, cagrad, combine, mgda, pcgrad

EQUAL = np.array([0.5, 0.5])
METHODS = ["sum", "pcgrad", "cagrad", "mgda"]


def gram(*vectors):
    vectors = np.array(vectors, float)
    return vectors @ vectors.T


def torn(seed, k=3, size=5):
    """Gradients of which some point against others."""
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(k, size)) + 0.2
    vectors[0] -= 0.5 * vectors[1:].sum(axis=0)
    weights = draw.uniform(0.2, 1, k)
    return vectors, weights / weights.sum()


def simplex(k, steps):
    """All points of the simplex on a grid, `[n, k]`."""
    axes = np.meshgrid(*[np.arange(steps + 1)] * (k - 1), indexing="ij")
    points = np.stack([axis.reshape(-1) for axis in axes], axis=1)
    points = points[points.sum(axis=1) <= steps]
    return np.column_stack([points, steps - points.sum(axis=1)]) / steps


# --- PCGrad ---------------------------------------------------------------------------------------------------------


def test_pcgrad_by_hand():
    # (1, 0) less its part along (-1, 1) is (1/2, 1/2) = g1 + g2/2; (-1, 1) less its part along (1, 0) is g2 + g1
    assert pcgrad(gram([1, 0], [-1, 1]), np.ones(2)) == pytest.approx([2, 1.5])
    # with weights 2 and 1 the first part counts twice: 2 (g1 + g2/2) + (g2 + g1)
    assert pcgrad(gram([1, 0], [-1, 1]), np.array([2.0, 1.0])) == pytest.approx([3, 2])


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_that_of_explicit_vectors(seed):
    vectors, weights = torn(seed, k=5)
    order, step = np.random.default_rng([seed, 7]), np.zeros(5)
    for own in range(5):
        mine = weights[own] * vectors[own]
        for other in order.permutation(5):
            if other != own and mine @ vectors[other] < 0:
                mine = mine - mine @ vectors[other] / (vectors[other] @ vectors[other]) * vectors[other]
        step += mine
    found = pcgrad(gram(*vectors), weights, seed=[seed, 7])
    assert found @ vectors == pytest.approx(step, abs=1e-10) and (found >= weights - 1e-12).all()
    assert np.abs(found - weights).max() > 0.01, "there was something to project"


# --- MGDA -----------------------------------------------------------------------------------------------------------


def test_mgda_by_hand():
    # nearest to 0 between (1, 0) and (-1, 1): at ((g2 - g1) g2) / |g1 - g2|^2 = 3/5 it is (.2, .4)
    assert mgda(gram([1, 0], [-1, 1]), EQUAL) == pytest.approx([0.6, 0.4], abs=1e-8)
    # the longer of two that agree is left out
    assert mgda(gram([1, 0], [3, 1]), EQUAL) == pytest.approx([1, 0], abs=1e-8)
    # (1, 0) worth twice as much: between (1, 0) and (-2, 2) nearest to 0 at ((-3, 2) (-2, 2)) / 13 = 10/13
    weights = np.array([1.0, 0.5])
    share = (np.array([-3, 2]) @ np.array([-2, 2])) / 13  # of g1 / w1
    wanted = np.array([share, (1 - share) / 0.5])
    assert mgda(gram([1, 0], [-1, 1]), weights) == pytest.approx(wanted * 1.5 / wanted.sum(), abs=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_mgda_is_the_nearest_point_of_a_fine_grid_and_none_falls(seed):
    vectors, weights = torn(seed)
    found = mgda(gram(*vectors), weights)
    scaled = vectors / weights[:, None]
    grid = simplex(3, 400)
    lengths = np.linalg.norm(grid @ scaled, axis=1)
    share = found * weights / (found @ weights)
    ours = np.linalg.norm(share @ scaled)
    assert ours <= lengths.min() + 1e-9 and ours == pytest.approx(lengths.min(), abs=0.05)
    gains = vectors @ (found @ vectors) / weights
    assert gains.min() >= -1e-9 and gains[share > 1e-6] == pytest.approx(gains.min(), abs=1e-6)
    assert found.sum() == pytest.approx(weights.sum())


# --- CAGrad ---------------------------------------------------------------------------------------------------------


def test_cagrad_by_hand():
    # orthogonal and as long: both gain as much, the step is 1 + c times the mean
    assert cagrad(gram([1, 0], [0, 1]), EQUAL, stray=0.5) == pytest.approx([0.75, 0.75], abs=1e-6)
    # (4, 0) and (0, 2): mean (2, 1), ball of radius .5 sqrt 5 = 1.118; straight up the second gains 2 * 2.118 < 4 * 2
    assert cagrad(gram([4, 0], [0, 2]), EQUAL, stray=0.5) == pytest.approx([0.5, 0.5 + 1.1180340 / 2], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_cagrad_is_the_best_of_a_fine_grid_and_of_all_steps_nearby(seed):
    vectors, weights = torn(seed)
    found = cagrad(gram(*vectors), weights)
    mean, step = weights @ vectors, found @ vectors
    radius = STRAY * np.linalg.norm(mean)
    assert np.linalg.norm(step - mean) == pytest.approx(radius, rel=1e-6)
    hull = simplex(3, 400) @ vectors
    bound = (hull @ mean + radius * np.linalg.norm(hull, axis=1)).min()
    worst = (vectors @ step).min()
    assert worst <= bound + 1e-9 and worst == pytest.approx(bound, abs=0.03)  # the bound holds for every step nearby
    away = np.random.default_rng(seed).normal(size=(20000, 5))
    nearby = mean + radius * away / np.linalg.norm(away, axis=1, keepdims=True)
    assert worst >= (nearby @ vectors.T).min(axis=1).max() - 1e-9
    assert worst > (vectors @ mean).min() + 0.01, "the mean leaves one behind"


def test_cagrad_without_room_is_the_weighted_sum():
    vectors, weights = torn(0)
    assert cagrad(gram(*vectors), weights, stray=0) == pytest.approx(weights)


# --- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_objectives_that_agree_or_cancel_or_are_silent_give_numbers(method):
    weights = np.full(3, 1 / 3)
    for vectors in ([[1, 2]] * 3, [[1, 0], [-1, 0], [0, 0]], [[1, 0], [-1, 0], [0, 1]], [[0, 0]] * 3, [[1e-9, 0]] * 3):
        found = combine(method, gram(*vectors), weights)
        assert np.isfinite(found).all() and (found >= 0).all()
    assert combine(method, gram(*[[1, 2]] * 3), weights) / weights == pytest.approx(
        [1.4 if method == "cagrad" else 1] * 3, abs=1e-6
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_silent_objective_and_one_of_no_weight_take_no_part(method):
    vectors, weights = torn(1)
    alone = combine(method, gram(*vectors), weights)
    more = [*vectors, 1e-3 * np.ones(5), -5 * np.ones(5)]
    found = combine(method, gram(*more), np.array([*weights, 0.3, 0.0]))
    assert found[:3] == pytest.approx(alone) and found[3:].tolist() == [0.3, 0.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_unit_of_gradients_does_not_matter(method, factor):
    vectors, weights = torn(2)
    there = combine(method, factor * gram(*vectors), weights)
    assert there == pytest.approx(combine(method, gram(*vectors), weights), rel=1e-5)


def test_seven_dimensions_take_milliseconds():
    import time

    vectors, weights = torn(3, k=7, size=20)
    began = time.perf_counter()
    for method in METHODS:
        assert np.isfinite(combine(method, gram(*vectors), weights)).all()
    assert time.perf_counter() - began < 2
