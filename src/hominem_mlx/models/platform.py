"""What MLX's CPU backend needs to be quick on Linux. On a Mac, or with a GPU, everything here is the usual.

Lanes: element by element MLX works on one core of the CPU, and only matrix products spread over several. So a batch is
cut into blocks, each block is computed on a stream of its own, and the products inside a block keep to one core
(`hominem_mlx.__init__` tells OpenBLAS). MLX keeps the threads of a lane as long as the process lives.

Exponentials: MLX's `exp` on x86 takes 15 to 20 ns a number, its `power` 6. Attention, SwiGLU and log-sum-exp are
written here with the latter, and keep for the backward pass what MLX would compute again.
"""

import functools
import math
import os
import sys
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

MOST = 8  # lanes; among more of them too few rows are left for each
PIECE = 128  # queries of a causal text at a time: half of a long text's scores would be masked


def _on_linux_cpu() -> bool:
    return sys.platform == "linux" and mx.default_device() == mx.cpu


@functools.cache
def _streams() -> tuple[mx.ThreadLocalStream, ...]:
    cores = len(os.sched_getaffinity(0))
    return tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(min(cores, MOST)))


def lanes() -> tuple[mx.Stream | mx.ThreadLocalStream, ...]:
    """Streams that can work at the same time: where a Linux CPU computes one a core, at most `MOST`; else one."""
    return _streams() if _on_linux_cpu() else (mx.default_stream(mx.default_device()),)


def with_gradient(forward: Callable, backward: Callable) -> Callable:
    """`forward` with a gradient of its own, made on the lane on which the function is made.

    MLX calls `backward` when all lanes have been written down, on the default stream, which would be the lane of all.

    Args:
        forward: arrays to an array or several.
        backward: as `mx.custom_function.vjp` wants it: `(primals, cotangents, outputs)` to one gradient a primal.
    """
    lane = mx.default_stream(mx.default_device())
    function = mx.custom_function(forward)

    @function.vjp
    def _(*given):
        with mx.stream(lane):
            return backward(*given)

    return function


def pad_to() -> int:
    """Lengths are padded to a multiple of this: on an accelerator few shapes are worth some padding, here none is."""
    return 1 if _on_linux_cpu() else 16


def compiles() -> bool:
    """Whether a compiled gradient may be quicker: on a Linux CPU it is not, and each kind of batch costs seconds."""
    return not _on_linux_cpu()


def a_pass(weights: int) -> float:
    """What a pass through the blocks of a model costs beside its tokens, in tokens.

    Args:
        weights: of all its blocks.

    On a Linux CPU as measured. On an accelerator a pass of few tokens leaves it idle; 64 is a guess.
    """
    return 4e8 / weights if _on_linux_cpu() else 64.0


def quicken(model: nn.Module) -> None:
    """Let models of this one's family compute attention and SwiGLU as this page does; changes nothing off a Linux CPU.

    mlx-lm's families reach both through names of their module, so the module is where they are exchanged.
    """
    family = sys.modules[type(model).__module__]
    for name, ours in (("scaled_dot_product_attention", attention), ("swiglu", swiglu)):
        theirs = getattr(family, name, None)
        if _on_linux_cpu() and theirs and not isinstance(theirs, functools.partial):
            setattr(family, name, functools.partial(ours, theirs))


def attention(
    theirs, queries: mx.array, keys: mx.array, values: mx.array, cache, scale: float, mask, sinks=None
) -> mx.array:
    """`softmax(queries @ keys.T * scale + mask) @ values` with grouped heads, `[B, heads, T, head size]`.

    Args:
        theirs: called in the cases that are not handled here.
        mask: None, "causal", a boolean array (true: seen) or an array that is added.
    """
    quantised = hasattr(cache, "bits")
    if quantised or sinks is not None or queries.dtype != mx.float32 or not _on_linux_cpu():
        return theirs(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    batch, heads, length, size = queries.shape
    groups = keys.shape[1]
    queries = (queries * scale).reshape(batch, groups, heads // groups, length, size)
    keys, values = keys[:, :, None], values[:, :, None]
    if isinstance(mask, str):
        attended = _causal(queries, keys, values)
    else:
        if mask is not None and mask.ndim == 4:  # [B, 1 or heads, T, S]
            each = (batch, groups, heads // groups, *mask.shape[2:])
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(each)
        attended = _attended(queries, keys, values, mask)
    return attended.reshape(batch, heads, length, -1)


def _causal(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Each query looks up to its own place, the last at the last key; a piece of them at nothing behind it."""
    length, seen = queries.shape[-2], keys.shape[-2]
    parts = []
    for start in range(0, length, PIECE):
        stop = min(start + PIECE, length)
        until = seen - length + stop
        mask = mx.arange(until - stop + start, until)[:, None] >= mx.arange(until)
        parts.append(_attended(queries[..., start:stop, :], keys[..., :until, :], values[..., :until, :], mask))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2)


def causal_scores(length: int) -> int:
    """Attention scores a head that are there at once when a text of so many tokens reads itself."""
    if not _on_linux_cpu():
        return length * length
    return sum((min(start + PIECE, length) - start) * min(start + PIECE, length) for start in range(0, length, PIECE))


def _attended(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    scores = queries @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    return with_gradient(_softmax, _softmax_backward)(scores) @ values


def swiglu(theirs, gate: mx.array, x: mx.array) -> mx.array:
    """`gate * sigmoid(gate) * x`, element by element."""
    if gate.dtype != mx.float32 or not _on_linux_cpu():
        return theirs(gate, x)
    return with_gradient(_swiglu, _swiglu_backward)(gate, x)[0]


def logsumexp(x: mx.array) -> mx.array:
    """`log(sum(exp(x)))` over the last axis: `[..., V]` float32 to `[...]`."""
    if not _on_linux_cpu():
        return mx.logsumexp(x, axis=-1)
    return with_gradient(_logsumexp, _logsumexp_backward)(x)[0]


def _exp(x: mx.array) -> mx.array:
    return mx.power(mx.array(math.e), x)  # float32's e is 3e-8 off: no more than rounding a product by log2(e) would be


def _exp_below_max(x: mx.array) -> tuple[mx.array, mx.array]:
    most = mx.maximum(mx.max(x, axis=-1, keepdims=True), -1e30)  # of nothing but -inf it would make NaN
    return _exp(x - most), most


def _softmax(scores):
    shares, _ = _exp_below_max(scores)
    return shares / mx.maximum(shares.sum(-1, keepdims=True), 1.0)  # below 1 only where all is masked, as in padding


def _softmax_backward(scores, cotangent, shares):
    weighted = cotangent * shares
    return weighted - shares * weighted.sum(-1, keepdims=True)


def _swiglu(gate, x):
    sigmoid = 1 / (1 + _exp(-mx.maximum(gate, -80.0)))  # below, float32 would overflow; the product is 0 all the same
    return gate * sigmoid * x, sigmoid


def _swiglu_backward(primals, cotangents, outputs):
    (gate, x), cotangent, sigmoid = primals, cotangents[0], outputs[1]
    silu, scaled = gate * sigmoid, cotangent * sigmoid
    return scaled * x * (1 + gate - silu), cotangent * silu


def _logsumexp(x):
    shares, most = _exp_below_max(x)
    total = shares.sum(-1, keepdims=True)
    return (mx.log(total) + most)[..., 0], shares, total


def _logsumexp_backward(x, cotangents, outputs):
    _, shares, total = outputs
    return cotangents[0][..., None] / total * shares
