"""How channels share a step: weights, equal gradient norms, turns; by hand, and in the loop on known gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx.training import blend, loop

POSITIVE = st.floats(1e-6, 1e6)


def test_availability_by_hand():
    # 50 of 200 rows: sqrt(1/4) = 0.5, so 0.4 against 0.3, of 0.7
    assert blend.availability([0.4, 0.6], [500, 50], [500, 200]) == pytest.approx([0.4 / 0.7, 0.3 / 0.7])
    # 1 of 200 would be 0.07: a quarter at least; more than enough counts as enough
    assert blend.availability([0.4, 0.6], [9000, 1], [500, 200]) == pytest.approx([0.4 / 0.55, 0.15 / 0.55])
    assert blend.availability([0.4, 0.6], [0, 3], [500, 200]) == [0, 1]
    assert blend.availability([0.4, 0.6], [7, 50], [0, 200]) == pytest.approx([0.4 / 0.7, 0.3 / 0.7])
    assert blend.availability([0.4, 0.6], [0, 0], [500, 200]) == [0, 0]


@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 999), st.integers(0, 999)), min_size=2, max_size=3))
def test_available_weights_add_up_to_one_and_one_more_row_never_weighs_less(channels):
    weights, rows, ideal = (list(column) for column in zip(*channels))
    before = blend.availability(weights, rows, ideal)
    after = blend.availability(weights, [rows[0] + 1, *rows[1:]], ideal)
    assert sum(before) == pytest.approx(1) and after[0] >= before[0] - 1e-12


def test_factors_by_hand():
    # norms 8 and 2: their geometric mean is 4; 1 and 1e4 would need 100 and 0.01, 5 and 0.2 are the limits
    assert blend.factors({"a": 8.0, "b": 2.0}) == pytest.approx({"a": 0.5, "b": 2.0})
    assert blend.factors({"a": 1.0, "b": 1e4}) == {"a": 5.0, "b": 0.2}
    assert blend.factors({"a": 3.0}) == pytest.approx({"a": 1.0})
    assert blend.factors({"a": 3.0, "b": 0.0}) == {"a": 1.0, "b": 1.0} and blend.factors({}) == {}


@given(POSITIVE, st.floats(0.05, 20))
def test_factors_make_two_norms_equal_while_they_are_within_25_of_each_other(norm, ratio):
    norms = {"a": norm, "b": norm * ratio}
    found = blend.factors(norms)
    assert found["a"] * norms["a"] == pytest.approx(found["b"] * norms["b"])
    assert found["a"] * found["b"] == pytest.approx(1)


def test_a_running_mean_begins_at_its_first_value_and_keeps_a_95th_part():
    assert blend.smoothed(None, 3.0) == 3.0
    assert blend.smoothed(1.0, 3.0) == pytest.approx(1.1)


def test_turns_come_by_weight_and_from_seed_and_step_alone():
    weights = {"a": 0.2, "b": 0.3, "none": 0.0}
    turns = [blend.turn(weights, 7, step) for step in range(2000)]
    assert turns == [blend.turn(weights, 7, step) for step in range(2000)]
    assert turns != [blend.turn(weights, 8, step) for step in range(2000)]
    assert turns.count("a") / 2000 == pytest.approx(0.4, abs=0.04) and "none" not in turns  # 3.7 standard errors


class Point(nn.Module):
    """Two numbers; a linear loss `slope * x` has the gradient `slope` wherever they are."""

    def __init__(self):
        super().__init__()
        self.x = mx.array([1.0, 2.0])


MEMORY, PREFERENCE, ANCHOR = [8.0, 0.0], [1.2, -1.6], [0.0, 1.0]  # norms 8, 2, 1; cosine of the first two 0.6


def learn(tmp_path, monkeypatch, kind, steps=1, weights=(0.4, 0.6, 2.0), die_at=None, none_at=()):
    """Gradients as they reach the clipping, the batches each channel was asked for, the summary, the weights."""
    model, gradients, asked = Point(), [], {"memory": [], "preference": [], "anchor": []}
    clip = loop.optim.clip_grad_norm

    def seen(gradient, limit):
        gradients.append(gradient["x"].tolist())
        return clip(gradient, limit)

    monkeypatch.setattr(loop.optim, "clip_grad_norm", seen)

    def channel(name, weight, slope, follows=""):
        def batch_at(place):
            asked[name].append(place)
            return None if (name, place) in none_at else place

        def loss(place):
            return (mx.array(slope) * (1 + 0.1 * place) * model.x).sum(), {}

        return loop.Channel(name, weight, batch_at, loss, follows=follows)

    channels = [
        channel("memory", weights[0], MEMORY),
        channel("preference", weights[1], PREFERENCE),
        channel("anchor", weights[2], ANCHOR, "memory"),
    ]

    def progress(event):
        if event["step"] == die_at:
            raise KeyboardInterrupt

    plan = loop.Plan(steps=steps, learning_rate=0.1, clip_norm=1e9, save_every=3, blend=kind, seed=1)
    try:
        summary = loop.train(model, channels, plan, tmp_path, progress=progress)
    except KeyboardInterrupt:
        summary = None
    finally:
        monkeypatch.undo()
    return gradients, asked, summary, np.array(model.x)


def test_a_sum_is_the_weighted_gradients_added(tmp_path, monkeypatch):
    [gradient], _, summary, _ = learn(tmp_path, monkeypatch, "sum")
    # 0.4 * (8, 0) + 0.6 * (1.2, -1.6) + 2 * (0, 1)
    assert gradient == pytest.approx([3.92, 1.04])
    assert summary["mean_gradient_cosine"] == pytest.approx(0.6) == summary["interference"]


def test_normalised_channels_pull_by_weight_alone_and_a_follower_keeps_its_proportion(tmp_path, monkeypatch):
    [gradient], _, summary, _ = learn(tmp_path, monkeypatch, "normalised")
    # factors 4/8 and 4/2: 0.4 * 0.5 * (8, 0) + 0.6 * 2 * (1.2, -1.6) + 2 * 0.5 * (0, 1)
    assert gradient == pytest.approx([1.6 + 1.44, -1.92 + 1.0])
    shares = {name: channel["share_of_update"] for name, channel in summary["channels"].items()}
    assert shares == pytest.approx({"memory": 1.6 / 5, "preference": 2.4 / 5, "anchor": 1 / 5})


def test_normalising_is_by_running_means(tmp_path, monkeypatch):
    gradients, _, _, _ = learn(tmp_path, monkeypatch, "normalised", steps=2, weights=(0.4, 0.6, 0.0))
    # both slopes grow by a tenth, so the factors stay
    assert gradients[1] == pytest.approx([1.1 * 3.04, 1.1 * -1.92])
    gradients, *_ = learn(
        tmp_path / "b", monkeypatch, "normalised", 2, weights=(0.4, 0.6, 0.0), none_at={("memory", 1)}
    )
    # memory has nothing to say: its mean stays 8, the other's goes from 2 to 0.95 * 2 + 0.05 * 2.2
    factor = (8 * 2.01) ** 0.5 / 2.01
    assert gradients[1] == pytest.approx([0.6 * factor * 1.1 * 1.2, 0.6 * factor * 1.1 * -1.6])


def test_alternating_channels_have_a_step_each_with_all_of_its_gradient_and_go_through_their_batches_in_order(
    tmp_path, monkeypatch
):
    gradients, asked, summary, _ = learn(tmp_path, monkeypatch, "alternate", steps=40)
    turns = [blend.turn({"memory": 0.4, "preference": 0.6}, 1, step) for step in range(40)]
    counts = {name: turns.count(name) for name in ("memory", "preference")}
    assert min(counts.values()) > 5
    assert asked == {name: list(range(counts.get(name, counts["memory"]))) for name in asked}
    assert {name: channel["steps"] for name, channel in summary["channels"].items()} == {
        **counts,
        "anchor": counts["memory"],
    }
    places = {"memory": 0, "preference": 0}
    for turn, gradient in zip(turns, gradients, strict=True):
        # the weight is the share of the turns, so it is not in the gradient; the anchor is 2 / 0.4 of its memory
        whole = {"memory": [8.0, 5.0], "preference": PREFERENCE}[turn]
        assert gradient == pytest.approx([(1 + 0.1 * places[turn]) * value for value in whole])
        places[turn] += 1


@pytest.mark.parametrize("dies_at", [2, 5, 9])
@pytest.mark.parametrize("kind", ["sum", "normalised", "alternate"])
def test_a_resumed_blend_ends_bit_for_bit_where_the_straight_run_does(tmp_path, monkeypatch, kind, dies_at):
    *_, straight, weights = learn(tmp_path / "straight", monkeypatch, kind, steps=11)
    learn(tmp_path / "killed", monkeypatch, kind, steps=11, die_at=dies_at)
    *_, resumed, again = learn(tmp_path / "killed", monkeypatch, kind, steps=11)
    assert np.array_equal(weights, again) and straight == resumed


def test_gradients_are_compared_in_one_order_in_every_process():
    # in float32 the ones are lost beside 1e8, so any other order gives another sum
    slopes = {"first": 1e8, **{f"weight {i}": 1.0 for i in range(12)}, "last": -1e8}
    one = {name: mx.array([value]) for name, value in slopes.items()}
    assert loop._inner(one, {name: mx.array([1.0]) for name in reversed(slopes)}) == 0.0
