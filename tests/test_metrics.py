"""Measures against hand-worked numbers and slow second implementations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx import metrics

NAN = float("nan")
values = st.lists(st.integers(-50, 50), min_size=3, max_size=12)


def test_errors_by_hand():
    # differences 1, -1, 2: squares 1 + 1 + 4 = 6, mean 2; absolute mean 4/3
    assert metrics.rmse([2, 1, 5], [1, 2, 3]) == pytest.approx(math.sqrt(2))
    assert metrics.mae([2, 1, 5], [1, 2, 3]) == pytest.approx(4 / 3)


def test_missing_labels_are_left_out_not_read_as_zero():
    assert metrics.rmse([2, 9, 5], [1, NAN, 5]) == pytest.approx(math.sqrt(1 / 2))
    assert metrics.pearson([1, 2, 3, 9], [1, 3, 2, NAN]) == pytest.approx(0.5)


def test_pearson_by_hand():
    # centred: (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2)
    assert metrics.pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


@pytest.mark.parametrize("a", [[1, 1, 1], [0.1 + 0.2, 0.3, 0.3]])
def test_no_spread_gives_no_correlation(a):
    assert math.isnan(metrics.pearson(a, [1, 2, 3]))


def test_spearman_shares_ranks_between_ties():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: centred (-1.5, 0, 0, 1.5) . (-1.5, -.5, .5, 1.5) = 4.5 of sqrt(4.5 * 5)
    assert metrics.spearman([1, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@given(values)
def test_spearman_ignores_any_rising_transform(a):
    b = np.arange(len(a)) % 4
    first, second = metrics.spearman(a, b), metrics.spearman(np.exp(np.array(a) / 10), b)
    assert first == pytest.approx(second, nan_ok=True)


def test_arrays_of_different_length_are_refused():
    with pytest.raises(ValueError, match="one length"):
        metrics.pearson([1, 2, 3], [1, 2])


def test_residuals_take_the_mean_of_the_dimensions_away():
    assert metrics.residuals([[1.0, 2.0, 6.0]]).tolist() == [[-2.0, -1.0, 3.0]]


def test_residual_correlation_sees_through_halo():
    # one axis moves everything; what is left of the dimensions goes against the prediction
    common = np.array([0.0, 1, 2, 3, 4, 5])[:, None]
    own = np.array([1.0, -1, 1, -1, 1, -1])[:, None] * np.array([[1.0, -1.0]])
    label, predicted = common + 0.1 * own, common - 0.1 * own
    assert metrics.pearson(predicted[:, 0], label[:, 0]) > 0.95
    assert metrics.residual_correlations(predicted, label) == pytest.approx([-1.0, -1.0])


def test_residual_correlation_leaves_out_rows_that_lack_a_dimension():
    label = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [5.0, NAN]])
    predicted = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [-9.0, 9.0]])
    assert metrics.residual_correlations(predicted, label) == pytest.approx([1.0, 1.0])


def test_participation_ratio_by_hand():
    assert metrics.participation_ratio(np.eye(7)) == pytest.approx(7)
    assert metrics.participation_ratio(np.ones((7, 7))) == pytest.approx(1)
    half = np.full((3, 3), 0.5) + 0.5 * np.eye(3)  # 9 / (3 + 6 / 4)
    assert metrics.participation_ratio(half) == pytest.approx(2)


def test_participation_ratio_is_that_of_the_eigenvalues():
    matrix = metrics.correlation_matrix(np.random.default_rng(0).normal(size=(40, 5)) @ np.ones((5, 5)) + np.eye(40, 5))
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert metrics.participation_ratio(matrix) == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def test_area_by_hand():
    # positives .9 and .4, negatives .5, .4, .1: of 6 pairs 3 + 1 are right and one is a tie
    assert metrics.auroc([0.9, 0.4, 0.5, 0.4, 0.1], [1, 1, 0, 0, 0]) == pytest.approx(4.5 / 6)
    assert np.isnan(metrics.auroc([0.1, 0.2], [1, 1]))
    assert metrics.auroc([3, 1, 2], [1, NAN, 0]) == 1.0


@given(st.integers(0, 1000))
def test_area_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    score, positive = rng.integers(0, 6, 20), np.arange(20) % 3 == 0
    won = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert metrics.auroc(score, positive) == pytest.approx(np.mean(won))


def test_f1_by_hand():
    # 2 of 3 said are right, 2 of 4 positives are found: 2 * (2/3 * 1/2) / (2/3 + 1/2)
    assert metrics.f1([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]) == pytest.approx(4 / 7)
    assert metrics.f1([0, 0], [1, 0]) == 0.0
    assert np.isnan(metrics.f1([1, 0], [0, 0]))


def test_pairs_stay_within_their_prompt_and_margin():
    label = np.array([0.9, 0.6, 0.1, 0.5, 0.2])  # prompt p: margins .3 .8 .5; prompt q: .3
    groups = np.array(["p", "p", "p", "q", "q"])
    predicted = np.array([3.0, 2.0, 2.5, 1.0, 1.0])
    outcomes, owners = metrics.pair_outcomes(predicted, label, groups, low=0.3)
    assert sorted(zip(owners.tolist(), outcomes.tolist(), strict=True)) == [
        ("p", 0.0),  # .6 over .1, predicted 2 under 2.5
        ("p", 1.0),
        ("p", 1.0),
        ("q", 0.5),  # equal predictions are a coin
    ]
    assert metrics.pair_accuracy(predicted, label, groups, low=0.3) == pytest.approx(2.5 / 4)
    assert metrics.pair_accuracy(predicted, label, groups, low=0.3, high=0.5) == pytest.approx(1.5 / 2)  # .5 is above


def test_a_decimal_margin_of_three_tenths_is_three_tenths():
    assert 0.7 - 0.4 < 0.3  # what floats make of it
    assert metrics.pair_accuracy([1, 0], [0.7, 0.4], ["p", "p"], low=0.3) == 1.0


def test_pairs_without_a_label_do_not_count():
    outcomes, _ = metrics.pair_outcomes([1, 2, 3], [0.5, NAN, 0.0], ["p"] * 3, low=0.1)
    assert outcomes.tolist() == [0.0]


def test_a_pair_needs_a_margin():
    with pytest.raises(ValueError, match="above 0"):
        metrics.pair_outcomes([1, 2], [1, 2], ["p", "p"], low=0.0)


@given(values, st.integers(0, 1000))
def test_turned_predictions_turn_the_accuracy(label, seed):
    predicted = np.random.default_rng(seed).normal(size=len(label))
    groups = np.arange(len(label)) % 2
    there = metrics.pair_accuracy(predicted, label, groups, low=1)
    back = metrics.pair_accuracy(-predicted, label, groups, low=1)
    assert there == pytest.approx(1 - back, nan_ok=True)


def test_pair_accuracy_is_that_of_two_loops():
    rng = np.random.default_rng(1)
    predicted, label, groups = rng.normal(size=30), rng.uniform(-1, 1, 30), rng.integers(0, 5, 30)
    right = [
        (predicted[i] > predicted[j]) == (label[i] > label[j])
        for i, j in itertools.combinations(range(30), 2)
        if groups[i] == groups[j] and 0.05 <= abs(label[i] - label[j]) < 0.3
    ]
    assert metrics.pair_accuracy(predicted, label, groups, low=0.05, high=0.3) == pytest.approx(np.mean(right))


def test_a_statistic_that_is_a_mean_has_the_interval_of_a_mean():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=90), rng.integers(0, 30, 90)
    known = metrics.bootstrap(values, groups, resamples=2000, seed=3)
    found = metrics.bootstrap_statistic(lambda rows: values[rows].mean(), groups, resamples=2000, seed=3)
    assert found == pytest.approx(known, abs=1e-9)


def test_a_statistic_is_drawn_by_whole_groups_and_bears_draws_without_one_class():
    interval = metrics.bootstrap_statistic(
        lambda rows: metrics.auroc(np.array([1, 2, 3, 4])[rows], np.array([0, 0, 1, 1])[rows]), ["p", "p", "q", "q"]
    )
    assert interval == (1.0, 1.0, 1.0)  # draws of one prompt alone have no area and are left out
    nothing = metrics.bootstrap_statistic(lambda rows: NAN, np.arange(3))
    assert np.isnan(nothing).all()


def test_bootstrap_draws_whole_groups():
    # two prompts whose rows agree: a mean is 0, 1/2 or 1, at chances 1/4, 1/2, 1/4; drawing rows would be far narrower
    interval = metrics.bootstrap([0.0] * 50 + [1.0] * 50, ["p"] * 50 + ["q"] * 50, resamples=400)
    assert interval == (0.5, 0.0, 1.0)


def test_bootstrap_weighs_rows_not_groups():
    assert metrics.bootstrap([0, 0, 0, 1], ["p", "p", "p", "q"], resamples=200).mean == pytest.approx(0.25)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        groups = np.repeat(np.arange(40), 3)
        values = rng.normal(size=40)[groups] + rng.normal(size=120)
        interval = metrics.bootstrap(values, groups, seed=trial, resamples=300)
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_paired_bootstrap_profits_from_pairing():
    a = np.tile([0.0, 10.0], 20)
    groups = np.arange(40)
    assert metrics.paired_bootstrap(a + 1, a, groups, resamples=200) == (1.0, 1.0, 1.0)
    assert metrics.bootstrap(a, groups, resamples=200).low < metrics.bootstrap(a, groups, resamples=200).high


def test_nothing_to_compare_is_nan():
    assert all(math.isnan(number) for number in metrics.bootstrap([], []))
    assert math.isnan(metrics.pair_accuracy([1], [1], ["p"], low=0.1))


def test_permutation_p_is_smallest_for_a_perfect_match():
    truth = np.arange(20.0)
    assert metrics.permutation_p(lambda rows: metrics.pearson(rows, truth), truth, resamples=99) == pytest.approx(0.01)


def test_permutation_within_groups_ignores_what_groups_share():
    groups = np.repeat(np.arange(10), 3)
    truth = groups.astype(float)  # only the prompt tells, so swapping replies changes nothing
    p = metrics.permutation_p(lambda rows: metrics.pearson(rows, truth), truth, groups, resamples=50)
    assert p == 1.0
    assert metrics.permutation_p(lambda rows: metrics.pearson(rows, truth), truth, resamples=50) < 0.05


def test_permutation_keeps_each_group_its_own_rows():
    rows, groups = np.array([10.0, 20, 11, 21, 12]), np.array([1, 2, 1, 2, 1])
    seen = []
    metrics.permutation_p(lambda order: seen.append(order.copy()) or 0.0, rows, groups, resamples=20)
    assert all(sorted(order[groups == 1]) == [10, 11, 12] for order in seen)
    assert len({tuple(order) for order in seen}) > 4


def test_distinct2_by_hand():
    # 1 2 1 2: (1 2) (2 1) (1 2) -> 2 of 3; with 2 1: 2 of 4
    assert metrics.distinct2([[1, 2, 1, 2]]) == pytest.approx(2 / 3)
    assert metrics.distinct2([[1, 2, 1, 2], [2, 1]]) == pytest.approx(2 / 4)
    assert metrics.distinct2([[1], []]) == 0.0
