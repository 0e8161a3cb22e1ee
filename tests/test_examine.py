"""What a reward model is said to be worth: calibration, promised intervals, contrasts; by hand, against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx import metrics
from hominem_mlx.reward import examine
from hominem_mlx.reward.examine import LEVELS, calibration, contrasts, widths
from hominem_mlx.schema import MANIFOLD

SIZE = len(MANIFOLD.names)


def test_calibration_error_by_hand():
    predicted, label = np.array([0.4, 0.1, 0.3, 0.2]), np.array([0.5, 0.0, 0.5, 0.0])
    said, given_, counts = metrics.reliability(predicted, label, bins=2)
    assert said.tolist() == pytest.approx([0.15, 0.35]) and given_.tolist() == [0.0, 0.5] and counts.tolist() == [2, 2]
    assert metrics.calibration_error(predicted, label, bins=2) == pytest.approx(0.15)
    assert metrics.calibration_error(label, label) == 0.0
    assert math.isnan(metrics.calibration_error(np.array([np.nan]), np.array([1.0])))


def test_bins_hold_equally_many_rows_and_missing_labels_none():
    rng = np.random.default_rng(0)
    predicted, label = rng.normal(size=103), rng.normal(size=103)
    label[:3] = np.nan
    said, given_, counts = metrics.reliability(predicted, label)
    assert counts.tolist() == [10] * 10 and (np.diff(said) > 0).all()
    order = np.argsort(predicted[3:])
    assert given_[0] == pytest.approx(label[3:][order[:10]].mean())


@pytest.mark.parametrize(("level", "expected"), [(0.5, 0.3), (0.8, 0.4), (0.9, math.inf)])
def test_conformal_width_is_the_error_of_that_rank(level, expected):
    # of 4 errors the ceil(5 x level)-th: the 3rd, the 4th, and a 5th there is not
    assert metrics.conformal_width(np.array([-0.4, 0.1, np.nan, 0.3, -0.2]), level) == expected


@given(st.integers(20, 80), st.sampled_from(LEVELS), st.integers(0, 1000))
def test_the_next_error_is_held_as_often_as_promised(size, level, seed):
    errors = np.random.default_rng(seed).standard_normal((300, size + 1)) ** 3
    held = [abs(row[-1]) <= metrics.conformal_width(row[:-1], level) for row in errors]
    assert np.mean(held) >= level - 4 * math.sqrt(level * (1 - level) / 300)


def test_coverage_counts_errors_within_their_width():
    error = np.array([[0.1, -0.3], [np.nan, 0.2]])
    assert metrics.coverage(error, np.array([0.2, 0.2])) == pytest.approx(2 / 3)
    assert math.isnan(metrics.coverage(np.array([np.nan]), np.array([1.0])))


def test_calibration_of_honest_and_of_boastful_predictions():
    rng = np.random.default_rng(1)
    truth = rng.uniform(-0.5, 0.5, (400, SIZE + 2))
    noise = rng.normal(0, 0.1, truth.shape)
    promised = np.broadcast_to(widths(noise[200:])[:, None], (len(LEVELS), 400, SIZE + 2))
    honest = calibration(truth, truth + noise, promised)
    assert honest["error"] < 0.02 and honest["worst"] < 0.03
    assert [honest["coverage"][str(level)] for level in LEVELS] == pytest.approx(LEVELS, abs=0.05)
    boastful = calibration(2 * truth, truth + noise, promised)
    assert boastful["error"] == pytest.approx(0.25, abs=0.02) and boastful["coverage"]["0.9"] < 0.6


def test_a_contrast_counts_when_its_own_dimension_falls_and_farthest():
    predicted = np.zeros((6, SIZE + 2))
    predicted[0] = 0.5
    predicted[1, 2] = -0.5  # from 0: all fall by half, the third by all
    predicted[3, 4] = 0.9  # from 2: the fifth rises
    predicted[5] = [0.1, -0.2, *[0.0] * SIZE]  # from 4: the second falls
    z = predicted[:, :SIZE] / predicted[:, :SIZE].std(axis=0)
    assert np.abs(z[0] - z[1]).argmax() == 2
    groups = np.array(["a", "a", "b", "b", "c", "c"])
    found = contrasts(predicted, [(1, 0, 2), (3, 2, 4), (5, 4, 1)], groups)
    assert found["n"] == 3 and found["share"] == pytest.approx(2 / 3) and found["low"] <= 2 / 3 <= found["high"]
    assert math.isnan(contrasts(predicted, [], groups)["share"])


def test_dimensions_are_found_one_by_one():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(120, SIZE + 2))
    predicted = rng.normal(size=labels.shape)
    predicted[:, :2] = labels[:, :2] + 0.3 * rng.normal(size=(120, 2))
    groups = np.repeat(np.arange(30), 4)
    found = examine.measure(predicted, labels, labels[:, :SIZE].mean(axis=1), groups)
    p_values = [found["outputs"][name]["residual_p"] for name in MANIFOLD.names]
    assert max(p_values[:2]) < 0.01 and min(p_values[2:]) > 0.01 and found["residual"]["certain"] == 2
    one = metrics.residuals(predicted[:, :SIZE])[:, 0], metrics.residuals(labels[:, :SIZE])[:, 0]
    alone = metrics.permutation_p(lambda rows: metrics.pearson(one[0], rows), one[1], groups)
    assert p_values[0] == pytest.approx(alone)
    assert found["outputs"]["empathy"]["spread"] == pytest.approx(predicted[:, 0].std() / labels[:, 0].std())
