"""One number of all dimensions: length taken out, temperature, and weights that hang on the prompt."""

import math

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx import metrics
from hominem_mlx.reward import scalar as scalars
from hominem_mlx.reward.scalar import Gate, fit_gate, length_slopes, log_length, ordered_pairs, pair_temperature
from hominem_mlx.schema import MANIFOLD, Dimension, Manifold


def test_length_by_hand():
    assert log_length("") == 0.0 and log_length("a" * 20) == pytest.approx(math.log(20))


def test_slopes_leave_no_rank_correlation_with_length():
    rng = np.random.default_rng(0)
    lengths = rng.normal(4.0, 0.7, 400)
    values = np.stack([0.3 * lengths + rng.normal(0, 0.1, 400), rng.normal(size=400), -lengths, np.ones(400)], axis=1)
    slopes = length_slopes(values, lengths)
    assert slopes == pytest.approx([0.3, 0.0, -1.0, 0.0], abs=0.08)
    for column, slope in zip(values.T[:2], slopes[:2], strict=True):
        assert abs(metrics.spearman(column - slope * lengths, lengths)) < 0.01


def test_a_missing_value_takes_no_part_in_a_slope():
    lengths = np.arange(10.0)
    values = (2 * lengths + np.tile([0.5, -0.5], 5))[:, None]
    values[3] = np.nan
    assert length_slopes(values, lengths)[0] == pytest.approx(2.0, abs=0.2)


def test_an_own_dimension_without_a_label_and_a_row_without_one_change_no_temperature():
    rng = np.random.default_rng(0)
    dimensions, groups, replies = rng.normal(size=(40, 7)), np.arange(40) // 4, ["yes", "no, never"] * 20
    weights = np.array([dimension.weight for dimension in MANIFOLD.dimensions])
    said = dimensions @ weights / weights.sum()
    wanted = said + rng.normal(0, 0.3, 40)
    pairs = ordered_pairs(wanted, groups)
    card, gate = scalars.fit(dimensions, wanted, groups, replies, MANIFOLD, keep_length=True)
    assert card.temperature == pytest.approx(pair_temperature(said[pairs[:, 0]] - said[pairs[:, 1]])) and gate is None
    assert card.log_length == pytest.approx((math.log(3) + math.log(9)) / 2) and card.slopes == {}

    own = Dimension(name="directness", question="Is it direct?", low="veiled", high="plain", weight=0.5)
    grown = Manifold(dimensions=(*MANIFOLD.dimensions, own))
    more = np.concatenate([dimensions, np.full((40, 1), np.nan)], axis=1)
    more, its = np.concatenate([more, np.full((1, 8), np.nan)]), [*groups, 0]
    found, _ = scalars.fit(more, np.array([*wanted, 5.0]), its, [*replies, "yes"], grown, keep_length=True)
    assert found.temperature == pytest.approx(card.temperature)


def test_temperature_is_where_the_likelihood_is_highest():
    margins = np.random.default_rng(0).normal(0.2, 0.3, 500)
    found = pair_temperature(margins)
    grid = np.geomspace(0.02, 20, 2000)
    losses = [np.logaddexp(0, -margins / t).mean() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)


def test_temperature_recovers_the_one_that_made_the_order():
    rng = np.random.default_rng(1)
    gaps = rng.normal(0, 1, 20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-gaps / 0.4)), gaps, -gaps)
    assert pair_temperature(margins) == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize(("margins", "temperature"), [([0.1, 0.5], 1e-3), ([-0.1, -0.5], 1e3)])
def test_temperature_keeps_its_bounds(margins, temperature):
    assert pair_temperature(np.array(margins)) == pytest.approx(temperature)


def test_pairs_are_of_one_prompt_better_first_and_never_too_close():
    pairs = ordered_pairs(np.array([0.1, 0.5, 0.12, 0.9, np.nan]), ["a", "a", "a", "b", "b"])
    assert pairs.tolist() == [[1, 0], [1, 2]]
    assert ordered_pairs(np.array([0.1]), ["a"]).shape == (0, 2)


def test_a_new_gate_gives_the_fixed_weights_to_every_prompt():
    gate = Gate(4, [1.0, 3.0])
    weights = np.array(gate(mx.random.normal((5, 4))))
    np.testing.assert_allclose(weights, np.tile([0.25, 0.75], (5, 1)), atol=1e-6)


def problem(*, gated: bool, prompts: int = 260):
    """Replies whose order follows one dimension or the other, by what the prompt is about; or both all the time."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(prompts), 6)
    features = rng.normal(size=(prompts, 3))[groups]
    values = rng.normal(size=(len(groups), 2))
    picked = np.where(features[:, 0] > 0, values[:, 0], values[:, 1]) if gated else values.mean(axis=1)
    return features, values, picked + rng.normal(0, 0.2, len(groups)), groups


def test_weights_that_hang_on_the_prompt_are_found():
    features, values, scalar, groups = problem(gated=True)
    gate, said = fit_gate(features, values, scalar, groups, [1.0, 1.0])
    assert gate is not None and said["gain"] > 5 * said["error"] and said["gated"] < said["fixed"] - 0.1
    left, right = np.array(gate(mx.array([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]], mx.float32)))
    assert left[0] > 0.8 and right[1] > 0.8


def test_a_gate_that_gains_nothing_is_not_kept():
    features, values, scalar, groups = problem(gated=False)
    gate, said = fit_gate(features, values, scalar, groups, [1.0, 1.0])
    assert gate is None and said["gain"] <= 2 * said["error"]


def test_few_pairs_teach_no_gate():
    features, values, scalar, groups = problem(gated=True, prompts=20)
    gate, said = fit_gate(features, values, scalar, groups, [1.0, 1.0])
    assert gate is None and said["pairs"] < said["wanted"] == 2000


def test_a_gate_is_the_same_each_time():
    features, values, scalar, groups = problem(gated=True)
    one, other = (fit_gate(features, values, scalar, groups, [1.0, 1.0])[0] for _ in range(2))
    assert mx.array_equal(one.outer.weight, other.outer.weight)


def test_pairs_from_a_handful_of_prompts_teach_no_gate():
    features, values, scalar, groups = problem(gated=True, prompts=20)
    gate, said = fit_gate(features, values, scalar, groups // 10, [1.0, 1.0])
    assert gate is None and said["wanted_prompts"] == 5
