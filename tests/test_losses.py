"""Losses against hand-worked numbers, a second implementation, and finite differences."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx import losses

DELTAS = st.lists(st.floats(-50, 50), min_size=1, max_size=8)


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
