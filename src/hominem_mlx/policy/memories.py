"""The memory channel: replies that should come, learnt by SFT. The adapter's recipe and the full one share it."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hominem_mlx import losses
from hominem_mlx.records import SftPair
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Order, Parts, Row, Rows


@dataclass(frozen=True)
class MemoryBatch:
    """`n` memories and their weights, float32 `[n]`."""

    rows: Rows
    weight: mx.array


class Memories:
    """Memories, ready to be cut into batches.

    Args:
        rows: one a memory.
        weight: float32, one a memory.
        parts: what `batch_at` counts.
        batch: memories a batch.
        seed: of their order.
    """

    measures: tuple[str, ...] = ()  # what `loss` tells beside the loss, by name

    def __init__(
        self, logprobs: LogProbs, rows: Sequence[Row], weight: np.ndarray, parts: Parts, *, batch: int, seed: int
    ):
        self.logprobs, self.rows, self.weight, self.parts = logprobs, rows, weight, parts
        self.order = Order(len(rows), batch, seed)

    def batch_at(self, place: int) -> MemoryBatch | None:
        """The part of a batch at that place, None where it is empty; epochs go round for ever."""
        index = self.parts.at(self.order, place)
        if not len(index):
            return None
        return MemoryBatch(self.logprobs.collate([self.rows[i] for i in index]), mx.array(self.weight[index]))

    def loss(self, batch: MemoryBatch) -> tuple[mx.array, dict[str, mx.array]]:
        """Token-mean cross-entropy; an example's weight counts inside the sum."""
        per_reply = -self.logprobs(batch.rows) * batch.weight
        return per_reply.sum() / batch.rows.lengths.sum(), {}

    def size(self, batch: MemoryBatch) -> float:
        """Response tokens, which the loss is a mean over."""
        return batch.rows.lengths.sum().item()


def gate(safety: float, *, low: float, high: float) -> float:
    """How far a text of this safety may be learnt, in [0, 1]; see `losses.safety_gate`."""
    return losses.safety_gate(mx.array([safety]), low=low, high=high).item()


def learnable(
    memories: Sequence[SftPair], *, safety_low: float, safety_high: float
) -> tuple[list[SftPair], np.ndarray]:
    """Memories that may be learnt and their weights, float32 `[n]` in (0, 1]: confidence times gate."""
    weights = [memory.confidence * gate(memory.safety_score, low=safety_low, high=safety_high) for memory in memories]
    kept = [memory for memory, weight in zip(memories, weights, strict=True) if weight > 0]
    return kept, np.array([weight for weight in weights if weight > 0], np.float32)
