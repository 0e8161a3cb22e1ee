"""The anchor: replies that memories must leave alone.

L = |h - h_base|^2 / |h_base|^2, of the final hidden states where the replies are predicted.

Not a divergence of the words: an adapter on the output layer reads directions that the base's words hang on but little,
and memories would move those for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from hominem_mlx.models import lora
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Order, Parts, Row, Rows


@dataclass(frozen=True)
class AnchorBatch:
    """Replies, and the base's final hidden states there, float32 `[N, D]`."""

    rows: Rows
    base: mx.array


class Anchor:
    """Replies to be held, ready to be cut into batches.

    Args:
        rows: one a reply.
        parts: what `batch_at` counts.
        batch: replies a batch.
        seed: of their order.
    """

    measures: tuple[str, ...] = ()  # what `loss` tells beside the loss, by name

    def __init__(self, logprobs: LogProbs, rows: Sequence[Row], parts: Parts, *, batch: int, seed: int):
        self.logprobs, self.rows, self.parts = logprobs, rows, parts
        self.order = Order(len(rows), batch, seed)
        self.adapters_below = len(logprobs.lm.adapters)  # the one to be trained is not on yet

    def batch_at(self, place: int) -> AnchorBatch | None:
        """The part of a batch at that place, None where it is empty; epochs go round for ever."""
        index = self.parts.at(self.order, place)
        if not len(index):
            return None
        batch = self.logprobs.collate([self.rows[i] for i in index])
        with lora.without_adapter(self.logprobs.lm, keep=self.adapters_below):
            base = self.logprobs.hidden(batch).astype(mx.float32)
            mx.eval(base)
        return AnchorBatch(batch, base)

    def loss(self, batch: AnchorBatch) -> tuple[mx.array, dict[str, mx.array]]:
        """How far the states have moved: mean of |h - h_base|^2 over mean of |h_base|^2."""
        moved = mx.square(self.logprobs.hidden(batch.rows).astype(mx.float32) - batch.base).mean()
        return moved / mx.square(batch.base).mean(), {}

    def size(self, batch: AnchorBatch) -> float:
        """The base's squares, which the loss is a share of."""
        return mx.square(batch.base).sum().item()
