"""B8: where the time of our step goes. Each part is computed by itself, at the step's own sizes and in its lanes."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from bench_models import SCALE, Pair, Shape
from bench_ours import Blended, use_blas_threads
from mlx.utils import tree_map
from mlx_lm.models import qwen3

from hominem_mlx.models.platform import lanes, logsumexp
from hominem_mlx.training.rows import Block, Rows

ROUNDS = 5


def timed(action: Callable[[], object]) -> float:
    """Fewest seconds of a few calls after a warm-up: whatever else the machine does can only add to them."""
    action()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def gemm_rate(size: int, dtype: mx.Dtype) -> float:
    """Floating-point operations a second of one square matrix product."""
    one, other = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    mx.eval(one, other)
    return 2 * size**3 / timed(lambda: mx.eval(one @ other))


class GemmRate:
    """Calling it gives the machine's own rate of float32 matrix products, in operations a second."""

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        use_blas_threads(os.cpu_count() or 1)

    def __call__(self) -> float:
        return gemm_rate(2048, mx.float32)


class GemmShare:
    """Calling it gives the share of the machine's own matrix rate that a bfloat16 step reaches, padding being work.

    A frozen base costs 4 operations a weight and token: 2 forward and 2 back to the input.
    """

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        self.shape, self.step = shape, Blended(shape, pairs, dtype=mx.bfloat16)

    def __call__(self) -> dict:
        batch = self.step.collate()
        tokens = sum(one.texts * one.length for one in _passes(batch))
        flops = 4 * self.shape.body * tokens + 4 * self.shape.head * batch.owner.size
        rate, seconds = gemm_rate(8192, mx.bfloat16), timed(self.step)
        return {"seconds": seconds, "rate": rate, "share": flops / seconds / rate}


class Part:
    """A function as it stands in the step: how often a layer pass computes it, and on arrays of which shapes."""

    def __init__(self, function: Callable[..., mx.array], *shapes: tuple[int, ...]):
        self.function = function
        self.primals = [mx.random.normal(shape) * 0.1 for shape in shapes]
        self.cotangent = mx.ones(function(*self.primals).shape)
        mx.eval(self.primals, self.cotangent)

    def run(self) -> list[mx.array]:
        """Forward and backward."""
        outputs, gradients = mx.vjp(self.function, self.primals, [self.cotangent])
        return outputs + gradients


class Profile:
    """Calling it gives the seconds of a step and of its parts.

    The prompt's pass through the last layer makes keys and values only; those are left out here.
    """

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        self.shape, self.step = shape, Blended(shape, pairs)
        self.model = self.step.lm.model
        self.batch = self.step.collate()

    def __call__(self) -> dict:
        bare = self._seconds(lambda one: self._linear(one, adapter=False))
        heads = [(block.lane, self._head(block), 1) for block in self.batch.blocks]
        parts = {
            "linear layers": bare,
            "LoRA": self._seconds(lambda one: self._linear(one, adapter=True)) - bare,
            "attention": self._seconds(self._attention),
            "SwiGLU": self._seconds(self._swiglu),
            "norms, rope, residuals": self._seconds(self._norms),
            "output layer, log-sum-exp": self._in_lanes(heads),
            "Adam": timed(self._adam),
            "collate": timed(self.step.collate),
            "graph in Python": timed(lambda: self.step.value_and_grad(self.batch)),
        }
        seconds = timed(self.step)
        return {"seconds": seconds, "parts": parts, "accounted": sum(parts.values()) / seconds}

    def _seconds(self, make: Callable[["Pass"], Iterator[Part]]) -> float:
        """Of one kind of part, over all layers of all passes in all lanes."""
        passes = list(_passes(self.batch))
        return self._in_lanes(
            [(one.lane, part, self.shape.layers - (not one.whole)) for one in passes for part in make(one)]
        )

    @staticmethod
    def _in_lanes(work: Sequence[tuple[int, Part, int]]) -> float:
        def run():
            made = []
            for lane, part, times in work:
                with mx.stream(lanes()[lane]):
                    made += [part.run() for _ in range(times)]
            mx.eval(made)

        return timed(run)

    def _linear(self, one: "Pass", *, adapter: bool) -> Iterator[Part]:
        block, size = self.model.layers[0], (one.texts, one.length)
        for layer in (*(block.self_attn[f"{name}_proj"] for name in "qkvo"), *block.mlp.children().values()):
            wide = layer.linear.weight.shape[1]
            if adapter:
                yield Part(
                    lambda x, a, b, layer=layer: layer.linear(x) + SCALE * ((x @ a) @ b),
                    (*size, wide),
                    layer.lora_a.shape,
                    layer.lora_b.shape,
                )
            else:
                yield Part(layer.linear, (*size, wide))

    def _attention(self, one: "Pass") -> Iterator[Part]:
        shape = self.shape
        mask = mx.ones((one.texts, 1, one.length, one.before + one.length), mx.bool_) if one.whole else "causal"

        def attend(queries, keys, values, *before):
            if before:
                keys, values = (mx.concatenate(both, axis=2) for both in zip(before, (keys, values)))
            return qwen3.scaled_dot_product_attention(queries, keys, values, None, shape.head_dim**-0.5, mask)

        mine, past = ((one.texts, shape.kv_heads, tokens, shape.head_dim) for tokens in (one.length, one.before))
        past = [past, past] if one.before else []
        yield Part(attend, (one.texts, shape.heads, one.length, shape.head_dim), mine, mine, *past)

    def _swiglu(self, one: "Pass") -> Iterator[Part]:
        wide = (one.texts, one.length, self.shape.ffn)
        yield Part(qwen3.swiglu, wide, wide)

    def _norms(self, one: "Pass") -> Iterator[Part]:
        block, size = self.model.layers[0], (one.texts, one.length)
        attention, wide = block.self_attn, (*size, self.shape.hidden)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            yield Part(lambda x, y, norm=norm: x + norm(y), wide, wide)
        for norm, heads in ((attention.q_norm, self.shape.heads), (attention.k_norm, self.shape.kv_heads)):
            yield Part(
                lambda x, norm=norm: attention.rope(norm(x).transpose(0, 2, 1, 3)), (*size, heads, self.shape.head_dim)
            )

    def _head(self, block: Block) -> Part:
        def logp(hidden):
            logits = self.model.model.embed_tokens.as_linear(hidden)
            return mx.take_along_axis(logits, block.targets[:, None], axis=-1)[:, 0] - logsumexp(logits)

        return Part(logp, (block.targets.size, self.shape.hidden))

    def _adam(self) -> None:
        parameters = self.model.trainable_parameters()
        self.step.optimizer.update(self.model, tree_map(mx.ones_like, parameters))
        mx.eval(self.model.trainable_parameters(), self.step.optimizer.state)


@dataclass(frozen=True)
class Pass:
    """So many texts of some length go through the body, with keys and values of `before` tokens in front of them.

    whole: through all of every layer; of prompts that others go on from the last layer makes keys and values only.
    """

    lane: int
    texts: int
    length: int
    before: int
    whole: bool


def _passes(batch: Rows) -> Iterator[Pass]:
    read = set()
    for block in batch.blocks:
        before = 0
        if block.prompts:
            texts, before = block.prompts.tokens.shape
            if not block.spread:
                yield Pass(block.lane, texts, before, 0, False)
            elif id(block.prompts.tokens) not in read:
                read.add(id(block.prompts.tokens))
                for lane, piece in enumerate(np.array_split(np.arange(before), len(lanes()))):
                    yield Pass(lane, texts, len(piece), int(piece[0]), False)
        yield Pass(block.lane, *block.tokens.shape, before, True)
