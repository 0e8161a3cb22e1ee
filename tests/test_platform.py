"""Attention, SwiGLU and log-sum-exp of the Linux CPU say what MLX's own say, gradients included."""

import itertools
import sys
import types

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention

from hominem_mlx.models import platform

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX's own are used")

MASKS = {
    "none": lambda: None,
    "causal": lambda: "causal",
    "seen": lambda: mx.random.uniform(shape=(7, 9)) > 0.4,
    "seen by row": lambda: mx.random.uniform(shape=(3, 1, 7, 9)) > 0.4,
    "seen by head": lambda: mx.random.uniform(shape=(3, 4, 7, 9)) > 0.3,
    "added": lambda: mx.random.normal((7, 9)),
}


def same(ours, theirs, primals, near=1e-6):
    """Values and gradients of two functions, relative to the largest of each array."""
    mx.random.seed(5)
    cotangent = mx.random.normal(theirs(*primals).shape)
    results = [itertools.chain(*mx.vjp(fn, primals, [cotangent])) for fn in (ours, theirs)]
    for our, their in zip(*results, strict=True):
        assert mx.abs(our - their).max().item() <= near * max(1.0, mx.abs(their).max().item())


@pytest.mark.parametrize("piece", [128, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_mlx_s_attention(mask, piece, monkeypatch):
    monkeypatch.setattr(platform, "PIECE", piece)
    mx.random.seed(4)
    queries, keys, values = (mx.random.normal((3, heads, length, 8)) for heads, length in ((4, 7), (2, 9), (2, 9)))
    mask = MASKS[mask]()
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
        mask = mask | (mx.arange(9) == 0)  # every place sees something
    same(
        lambda *qkv: platform.attention(scaled_dot_product_attention, *qkv, None, 0.3, mask),
        lambda *qkv: scaled_dot_product_attention(*qkv, None, 0.3, mask),
        [queries, keys, values],
    )


def test_a_place_that_sees_nothing_is_no_nan():
    """So it is with the padding on the left of answers that are generated together."""
    ones = mx.ones((1, 1, 3, 4))
    mask = mx.array([[False, False, False], [False, True, False], [False, True, True]])
    out, grads = mx.vjp(
        lambda q: platform.attention(scaled_dot_product_attention, q, ones, ones, None, 1.0, mask), [ones], [ones]
    )
    assert mx.isfinite(out[0]).all().item() and mx.isfinite(grads[0]).all().item()
    assert out[0][0, 0, 1:].tolist() == [[1.0] * 4] * 2


def test_swiglu_and_logsumexp_are_mlx_s_also_far_out():
    mx.random.seed(6)
    gate, x = mx.random.normal((5, 40)) * 60, mx.random.normal((5, 40))
    same(lambda *both: platform.swiglu(swiglu, *both), lambda *both: swiglu(*both), [gate, x])
    same(platform.logsumexp, lambda x: mx.logsumexp(x, axis=-1), [gate])


def test_a_gradient_is_made_on_the_lane_of_its_value():
    lane, seen = mx.new_stream(mx.cpu), []

    def backward(x, cotangent, output):
        seen.append(mx.default_stream(mx.cpu))
        return 2 * x * cotangent

    def square(x):
        with mx.stream(lane):
            return platform.with_gradient(lambda x: x * x, backward)(x)

    assert mx.grad(square)(mx.array(3.0)).item() == 6 and seen == [lane]


def test_other_types_and_other_devices_keep_mlx_s_own(monkeypatch):
    half = mx.ones((1, 1, 2, 4), mx.float16)
    assert platform.swiglu(lambda gate, x: "theirs", half, half) == "theirs"
    assert platform.attention(lambda *args, **rest: "theirs", half, half, half, None, 1.0, None) == "theirs"
    monkeypatch.setattr(platform.sys, "platform", "darwin")
    full = half.astype(mx.float32)
    assert platform.swiglu(lambda gate, x: "theirs", full, full) == "theirs"
    assert platform.logsumexp(mx.zeros((1, 4))).item() == pytest.approx(1.3863, abs=1e-4)


def test_a_family_is_quickened_once_and_not_on_a_mac(monkeypatch):
    family = types.ModuleType("a_family")
    family.swiglu = theirs = lambda gate, x: gate
    family.Model = type("Model", (nn.Module,), {"__module__": "a_family"})
    monkeypatch.setitem(sys.modules, "a_family", family)
    monkeypatch.setattr(platform.sys, "platform", "darwin")
    platform.quicken(family.Model())
    assert family.swiglu is theirs
    monkeypatch.setattr(platform.sys, "platform", "linux")
    platform.quicken(family.Model())
    once = family.swiglu
    platform.quicken(family.Model())
    assert family.swiglu is once is not theirs
