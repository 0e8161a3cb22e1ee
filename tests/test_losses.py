"""Losses against hand-worked numbers, a second implementation, and finite differences."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx import losses

DELTAS = st.lists(st.floats(-50, 50), min_size=1, max_size=8)


def softplus(x):
    return np.logaddexp(0.0, np.asarray(x, np.float64))


def numpy_dpo(delta, beta, target):
    sigmoid = 1 / (1 + np.exp(-beta * np.asarray(delta, np.float64)))
    return -(target * np.log(sigmoid) + (1 - target) * np.log(1 - sigmoid))


def test_dpo_loss_is_log_two_when_policy_equals_reference():
    assert losses.dpo(mx.zeros(3), beta=0.1).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)


def test_dpo_by_hand():
    # delta 2, beta 0.5: -log sigmoid(1) = log(1 + e^-1) = 0.313262; with target 0.8: + 0.2 * 1 = 0.513262
    assert losses.dpo(mx.array([2.0]), beta=0.5).item() == pytest.approx(0.313262, abs=1e-6)
    assert losses.dpo(mx.array([2.0]), beta=0.5, target=0.8).item() == pytest.approx(0.513262, abs=1e-6)


def test_dpo_gradient_at_the_golden_point():
    gradient = mx.grad(lambda delta: losses.dpo(delta, beta=0.1).sum())(mx.array([0.7]))
    assert gradient.item() == pytest.approx(-0.0482507, abs=1e-6)


@given(DELTAS, st.floats(0.05, 1.0), st.floats(0.5, 1.0))
def test_dpo_equals_the_numpy_formula(delta, beta, target):
    wanted = numpy_dpo(delta, beta, target) if max(map(abs, delta)) * beta < 30 else None
    got = losses.dpo(mx.array(delta), beta=beta, target=target)
    assert mx.isfinite(got).all().item()
    if wanted is not None:
        assert np.array(got) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@given(st.floats(-5, 5), st.floats(0.5, 0.99))
def test_dpo_gradient_equals_finite_differences(delta, target):
    gradient = mx.grad(lambda value: losses.dpo(value, beta=0.3, target=target).sum())(mx.array([delta])).item()
    step = 1e-5
    difference = (numpy_dpo(delta + step, 0.3, target) - numpy_dpo(delta - step, 0.3, target)) / (2 * step)
    assert gradient == pytest.approx(difference, abs=1e-4)


@given(DELTAS)
def test_swapping_a_pair_turns_the_sign_of_delta_round(delta):
    forward, backward = losses.dpo(mx.array(delta), beta=0.1), losses.dpo(-mx.array(delta), beta=0.1)
    # -log s(x) + log s(-x) = -x
    assert np.array(forward - backward) == pytest.approx(-0.1 * np.array(delta), abs=1e-4)


def test_soft_targets_have_their_minimum_at_logit_over_beta():
    best = math.log(0.9 / 0.1) / 0.1
    assert best == pytest.approx(21.97, abs=0.01)
    around = losses.dpo(mx.array([best - 0.5, best, best + 0.5]), beta=0.1, target=0.9).tolist()
    assert around[1] < around[0] and around[1] < around[2]


def test_dpo_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[B\]"):
        losses.dpo(mx.zeros((2, 2)), beta=0.1)


# Each loss of pairs by what the chosen and the rejected reply gained (or, for simpo, have a token), with other numbers
# made up; and the same in numpy, written from the definition: target * loss + (1 - target) * loss turned round.
EXTRA, SCORES = [3.0, -2.0, 0.0], [0.5, 1.0, 2.5]
FAMILY = {
    "dpo": (
        lambda won, lost, p: losses.dpo(won - lost, beta=0.3, target=p),
        lambda won, lost, p: p * softplus(-0.3 * (won - lost)) + (1 - p) * softplus(0.3 * (won - lost)),
    ),
    "ipo": (
        lambda won, lost, p: losses.ipo(won - lost, beta=0.3, target=p),
        lambda won, lost, p: p * (won - lost - 1 / 0.6) ** 2 + (1 - p) * (lost - won - 1 / 0.6) ** 2,
    ),
    "simpo": (
        lambda won, lost, p: losses.simpo(won - lost, beta=2.0, gamma=0.7, target=p),
        lambda won, lost, p: softplus(-2 * (won - lost) + 0.7) + (1 - p) * (2 * (won - lost) - 0.7),
    ),
    "dpop": (
        lambda won, lost, p: losses.dpop(won, lost, beta=0.3, penalty=5.0, target=p),
        lambda won, lost, p: (
            p * softplus(-0.3 * (won - lost - 5 * np.where(won < 0, -won, 0)))
            + (1 - p) * softplus(-0.3 * (lost - won - 5 * np.where(won < 0, -won, 0)))
        ),
    ),
    "odpo": (
        lambda won, lost, p: losses.odpo(won - lost, mx.array(SCORES), beta=0.3, alpha=1.5, target=p),
        lambda won, lost, p: (
            softplus(-0.3 * (won - lost) + 1.5 * np.log(SCORES)) + (1 - p) * (0.3 * (won - lost) - 1.5 * np.log(SCORES))
        ),
    ),
    "rdpo": (
        lambda won, lost, p: losses.rdpo(won - lost, mx.array(EXTRA), beta=0.3, alpha=0.2, target=p),
        lambda won, lost, p: (
            softplus(-0.3 * (won - lost) - 0.2 * np.array(EXTRA))
            + (1 - p) * (0.3 * (won - lost) + 0.2 * np.array(EXTRA))
        ),
    ),
    "npo": (
        lambda won, lost, p: losses.npo(won, beta=0.3) + losses.npo(lost, beta=0.3),
        lambda won, lost, p: 2 / 0.3 * (np.log1p(np.exp(won) ** 0.3) + np.log1p(np.exp(lost) ** 0.3)),
    ),
}
THREE = st.lists(st.floats(-8, 8), min_size=3, max_size=3)


@pytest.mark.parametrize("name", FAMILY)
@given(won=THREE, lost=THREE, target=st.floats(0.5, 1))
def test_a_loss_equals_its_numpy_twin(name, won, lost, target):
    ours, twin = FAMILY[name]
    got = np.array(ours(mx.array(won), mx.array(lost), target))
    assert got == pytest.approx(twin(np.array(won), np.array(lost), target), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("target", [0.7, 1.0])
@pytest.mark.parametrize("name", FAMILY)
def test_a_gradient_equals_finite_differences_of_the_twin(name, target):
    ours, twin = FAMILY[name]
    won, lost, step = np.array([0.4, -1.3, 2.0]), np.array([-0.7, 0.9, 1.5]), 1e-6
    got = mx.grad(lambda *sides: ours(*sides, target).sum(), argnums=(0, 1))(mx.array(won), mx.array(lost))
    wanted = (
        (twin(won + step, lost, target) - twin(won - step, lost, target)) / (2 * step),
        (twin(won, lost + step, target) - twin(won, lost - step, target)) / (2 * step),
    )
    for side in range(2):
        assert np.array(got[side]) == pytest.approx(wanted[side], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_a_loss_refuses_what_is_not_one_value_a_pair(name):
    with pytest.raises(ValueError, match=r"\[B\]"):
        FAMILY[name][0](mx.zeros((3, 3)), mx.zeros((3, 3)), 1.0)


def test_ipo_by_hand():
    # beta 0.1 asks for a margin of 5: (2 - 5)^2 = 9, at the reference 25; target 0.8: 0.8 * 9 + 0.2 * 7^2 = 17
    assert losses.ipo(mx.array([2.0, 0.0, 5.0]), beta=0.1).tolist() == pytest.approx([9, 25, 0], abs=1e-5)
    assert losses.ipo(mx.array([2.0]), beta=0.1, target=0.8).item() == pytest.approx(17, abs=1e-5)


def test_simpo_by_hand():
    # nats a token -1 and -1.5: 2 * 0.5 - 0.3 = 0.7, log(1 + e^-0.7) = 0.403186
    margin = mx.array([-1.0]) - mx.array([-1.5])
    assert losses.simpo(margin, beta=2.0, gamma=0.3).item() == pytest.approx(0.403186, abs=1e-6)


def test_dpop_by_hand():
    # gained -2 and -3: 0.5 * (1 - 4 * 2) = -3.5, log(1 + e^3.5) = 3.529750; turned round 0.5 * (1 + 4 * 2) = 4.5,
    # log(1 + e^4.5) = 4.511048
    won, lost = mx.array([-2.0]), mx.array([-3.0])
    assert losses.dpop(won, lost, beta=0.5, penalty=4.0).item() == pytest.approx(3.529750, abs=1e-5)
    soft = losses.dpop(won, lost, beta=0.5, penalty=4.0, target=0.8).item()
    assert soft == pytest.approx(0.8 * 3.529750 + 0.2 * 4.511048, abs=1e-5)


@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(0.5, 1))
def test_dpop_is_dpo_where_the_chosen_reply_has_not_lost_and_never_less(won, lost, target):
    dpop = losses.dpop(mx.array([won]), mx.array([lost]), beta=0.3, penalty=5.0, target=target).item()
    dpo = losses.dpo(mx.array([won - lost]), beta=0.3, target=target).item()
    assert dpop == pytest.approx(dpo, abs=1e-5) if won >= 0 else dpop >= dpo - 1e-5


def test_odpo_by_hand():
    # 0.5 * 3 - 2 * log(e) = -0.5, log(1 + e^0.5) = 0.974077; a margin of 1 is plain DPO
    delta = mx.array([3.0, 3.0])
    loss = losses.odpo(delta, mx.array([math.e, 1.0]), beta=0.5, alpha=2.0).tolist()
    assert loss == pytest.approx([0.974077, losses.dpo(delta, beta=0.5)[0].item()], abs=1e-6)


def test_rdpo_by_hand_and_a_longer_chosen_reply_pulls_less():
    # 0.5 * 3 + 0.1 * 5 = 2, log(1 + e^-2) = 0.126928
    assert losses.rdpo(mx.array([3.0]), mx.array([5.0]), beta=0.5, alpha=0.1).item() == pytest.approx(
        0.126928, abs=1e-6
    )
    extra = mx.array([50.0, 0.0, -50.0])
    pull = -mx.grad(lambda delta: losses.rdpo(delta, extra, beta=0.1, alpha=0.02).sum())(mx.zeros(3))
    # beta * sig(-alpha * extra): sig(-1) = 0.268941
    assert pull.tolist() == pytest.approx([0.0268941, 0.05, 0.0731059], abs=1e-6)


def test_wpo_weight_is_the_likelihood_of_both_sides_and_passes_no_gradient():
    assert losses.wpo_weight(mx.array([-0.5]), mx.array([-1.5])).item() == pytest.approx(math.exp(-2), abs=1e-7)
    gradient = mx.grad(lambda chosen: losses.wpo_weight(chosen, mx.array([-1.0])).sum())(mx.array([-0.5]))
    assert gradient.item() == 0.0


def test_npo_by_hand():
    # 4 * log(1 + e^1) = 5.253047; at the reference 4 * log 2
    assert losses.npo(mx.array([2.0, 0.0]), beta=0.5).tolist() == pytest.approx([5.253047, 4 * math.log(2)], abs=1e-5)


@given(st.floats(-300, 300))
def test_the_pull_of_npo_is_bounded(gained):
    pull = mx.grad(lambda value: losses.npo(value, beta=0.1).sum())(mx.array([gained])).item()
    assert 0 <= pull <= 2 and pull == pytest.approx(2 / (1 + math.exp(-0.1 * gained)), abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "best"),
    [
        (lambda delta: losses.dpo(delta, beta=0.1, target=0.9), math.log(9) / 0.1),
        (lambda delta: losses.ipo(delta, beta=0.1, target=0.9), 0.8 / 0.2),
        (lambda delta: losses.simpo(delta, beta=2.0, gamma=0.5, target=0.9), (math.log(9) + 0.5) / 2),
        (lambda delta: losses.dpop(delta, 0 * delta, beta=0.1, penalty=50.0, target=0.9), math.log(9) / 0.1),
        (
            lambda delta: losses.odpo(delta, mx.array([2.0]), beta=0.1, alpha=1.5, target=0.9),
            (math.log(9) + 1.5 * math.log(2)) / 0.1,
        ),
        (
            lambda delta: losses.rdpo(delta, mx.array([7.0]), beta=0.1, alpha=0.05, target=0.9),
            (math.log(9) - 0.35) / 0.1,
        ),
    ],
)
def test_soft_targets_put_the_minimum_where_the_docstring_says(loss, best):
    slope = mx.grad(lambda delta: loss(delta).sum())
    assert slope(mx.array([best])).item() == pytest.approx(0, abs=1e-5)
    assert slope(mx.array([0.7 * best])).item() < 0 < slope(mx.array([1.3 * best])).item()


def numpy_kto(gained, good, baseline, beta):
    value = 1 / (1 + np.exp(-beta * (np.asarray(gained, np.float64) - baseline)))  # of a good reply
    return np.where(good, 1 - value, value)


def test_kto_by_hand():
    # beta 0.5, baseline 1: a good reply that gained 3 has 1 - sig(1) = 0.268941, a bad one 1 - sig(-1) = 0.731059
    loss = losses.kto(mx.array([3.0, 3.0, 1.0]), mx.array([True, False, False]), mx.array(1.0), beta=0.5)
    assert loss.tolist() == pytest.approx([0.268941, 0.731059, 0.5], abs=1e-6)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=2), st.floats(0, 20), st.floats(0.05, 1))
def test_kto_equals_its_numpy_twin_and_stays_between_0_and_1(gained, baseline, beta):
    good = np.array([True, False])
    loss = np.array(losses.kto(mx.array(gained), mx.array(good), mx.array(baseline), beta=beta))
    assert loss == pytest.approx(numpy_kto(gained, good, baseline, beta), rel=1e-4, abs=1e-6)
    assert (loss >= 0).all() and (loss <= 1).all()


def test_the_gradient_of_kto_equals_finite_differences_and_none_goes_through_the_baseline():
    gained, good, step = np.array([0.4, -1.3, 2.0, 0.9]), np.array([True, True, False, False]), 1e-6

    def loss(values, baseline):
        return losses.kto(values, mx.array(good), baseline, beta=0.3).sum()

    by_gained, by_baseline = mx.grad(loss, argnums=(0, 1))(mx.array(gained), mx.array(0.7))
    twin = [numpy_kto(gained + sign * step, good, 0.7, 0.3) for sign in (1, -1)]
    assert np.array(by_gained) == pytest.approx((twin[0] - twin[1]) / (2 * step), rel=1e-4)
    assert by_baseline.item() == 0.0
    assert ((np.array(by_gained) < 0) == good).all()  # good replies are made likelier, bad ones less likely


@given(st.floats(-500, 500), st.booleans())
def test_the_pull_of_kto_is_bounded(gained, good):
    slope = mx.grad(lambda value: losses.kto(value, mx.array([good]), mx.array(0.0), beta=0.1).sum())(
        mx.array([gained])
    ).item()
    assert 0 <= (-slope if good else slope) <= 0.1 / 4 + 1e-7


def test_the_baseline_of_kto_is_a_mean_not_below_0_and_passes_no_gradient():
    assert losses.kto_baseline(mx.array([3.0, -1.0])).item() == pytest.approx(1.0)
    assert losses.kto_baseline(mx.array([1.0, -3.0])).item() == 0.0
    assert mx.grad(losses.kto_baseline)(mx.array([3.0, -1.0])).tolist() == [0.0, 0.0]


def test_kto_refuses_what_is_not_one_value_a_reply():
    with pytest.raises(ValueError, match=r"\[B\]"):
        losses.kto(mx.zeros((2, 2)), mx.array([True, False]), mx.array(0.0), beta=0.1)


def test_nll_is_nats_a_token():
    assert losses.nll(mx.array([-6.0, -1.0]), mx.array([3.0, 2.0])).tolist() == [2.0, 0.5]


def test_gate_by_hand_and_never_falling():
    safety = mx.array([-1.0, -0.2, 0.0, 0.1, 0.2, 1.0])
    gates = losses.safety_gate(safety, low=-0.2, high=0.2).tolist()
    assert gates == pytest.approx([0, 0, 0.5, 0.75, 1, 1])
    with pytest.raises(ValueError, match="low < high"):
        losses.safety_gate(safety, low=0.2, high=0.2)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_gate_is_monotone(values):
    ordered = sorted(values)
    gates = losses.safety_gate(mx.array(ordered), low=-0.2, high=0.2).tolist()
    assert gates == sorted(gates) and all(0 <= gate <= 1 for gate in gates)


def test_intensity_is_relative_clipped_and_never_negative():
    weights = losses.intensity_weight(mx.array([0.0, 0.1, 0.4, 0.8, 4.0]), mean=0.4).tolist()
    assert weights == pytest.approx([0.25, 0.25, 1.0, 2.0, 4.0])
    assert min(losses.intensity_weight(mx.array([-1.0]), mean=0.4).tolist()) > 0
