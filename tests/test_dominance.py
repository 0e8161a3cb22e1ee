"""No dimension may speak for all: shares, orders and correlations of the scalar, by hand."""

import math

import numpy as np
import pytest

from hominem_mlx.reward.dominance import allowed, declared, dominance

SEVEN = np.ones(7)
NAMES = list("abcdefg")


def test_shares_by_hand():
    # variances 1, 4 and 0.25 at weights 2, 1, 1: parts 4, 4, .25 of 8.25
    r = np.array([[1, 2, 0.5], [-1, 2, 0.5], [1, -2, -0.5], [-1, -2, -0.5]])
    found = dominance(r, [2, 1, 1], NAMES[:3])
    assert list(found["shares"].values()) == pytest.approx([4 / 8.25, 4 / 8.25, 0.25 / 8.25])
    # weight 2 among 1, 1 is declared (4 / 6) and may have 3.23 * 4 / (3.23 * 4 + 2); b may have .35 and is beyond it
    assert found["declared"] == ["a"] and found["share_of"] == "b"
    assert (found["share"], found["allowed"]) == (pytest.approx(4 / 8.25), 0.35)
    # R * 4 = 2a + b + c = 4.5, .5, -.5, -4.5; without b: 2.5, -1.5, 1.5, -2.5, so ranks 4 3 2 1 and 4 2 3 1
    assert found["without"] == pytest.approx(0.8) and found["without_of"] == "b"
    # corr(R, a) = 2 / s, corr(R, b) = corr(R, c) = 2.5 / s with s = sqrt(mean of 4.5^2 and .5^2) = sqrt(10.25)
    assert found["follows"] == pytest.approx(0.0) and found["follows_of"] in ("b", "c")


def test_the_bound_is_what_it_says_for_seven_equal_weights():
    assert allowed(SEVEN).tolist() == [0.35] * 7 and not declared(SEVEN).any()
    variance = np.array([3.2307692, 1, 1, 1, 1, 1, 1])
    assert variance[0] / variance.sum() == pytest.approx(0.35)


def test_a_weight_far_above_the_others_is_a_declaration_and_moves_its_own_bound_alone():
    weights = np.array([3.0, 1, 1, 1, 1, 1, 1])
    assert declared(weights).tolist() == [True] + [False] * 6  # 9 / 15
    assert allowed(weights)[0] == pytest.approx(3.2307692 * 9 / (3.2307692 * 9 + 6))
    assert allowed(weights)[1:].tolist() == [0.35] * 6
    assert not declared(np.array([1.5, 1, 1, 1, 1, 1, 1])).any()  # 2.25 / 8.25


def test_a_dominated_scalar_is_named_and_an_even_one_is_not():
    rng = np.random.default_rng(0)
    even = rng.normal(size=(400, 7)) + rng.normal(size=(400, 1))  # dimensions agree in part, as labels do
    found = dominance(even, SEVEN, NAMES)
    assert found["share"] < 0.2 and found["without"] > 0.9 and found["follows"] < 0.15
    ruled = even * np.array([1, 1, 6, 1, 1, 1, 1])
    found = dominance(ruled, SEVEN, NAMES)
    assert found["share_of"] == found["without_of"] == found["follows_of"] == "c"
    assert found["share"] > 0.8 and found["without"] < 0.9 and found["follows"] > 0.15
    wanted = dominance(even, [1, 1, 6, 1, 1, 1, 1], NAMES)
    assert wanted["share_of"] == "c" and wanted["share"] < wanted["allowed"]
    assert wanted["without"] > 0.9 and wanted["without_of"] != "c"


def test_what_cannot_be_told_is_not_a_number():
    found = dominance(np.ones((5, 3)), [1, 1, 1], NAMES[:3])
    assert all(math.isnan(found[key]) for key in ("share", "without", "follows")) and found["share_of"] is None
    alone = dominance(np.arange(5.0)[:, None], [1], ["a"])
    assert alone["share"] == 1.0 and alone["allowed"] == 1.0 and math.isnan(alone["without"])
