"""Single thumbs: replies that a person marked good or bad, with no second one beside them, learnt by KTO.

    L = mean over thumbs of  confidence * gate * balance * KTO(log p - log p_ref against z0)

z0 is what the policy has gained on replies that were given to other prompts. `balance` lets all good and all bad thumbs
count alike, however many there are of each, with a mean of 1 (lambda of Ethayarajh et al. 2024, arXiv 2402.01306, 4.2).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hominem_mlx import losses
from hominem_mlx.policy.memories import gate
from hominem_mlx.records import Thumb
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Order, Parts, Row, Rows, fit


@dataclass(frozen=True)
class ThumbBatch:
    """`n` thumbs. Of each: reference float32, good bool, weight float32, all `[n]`.

    strange: `m` replies, each behind a prompt that it was not given to, and their reference `[m]`; None where all
    thumbs are about one prompt. A part of a batch has those of the whole one, and so the same z0.
    """

    rows: Rows
    reference: mx.array
    good: mx.array
    weight: mx.array
    strange: tuple[Rows, mx.array] | None


class Thumbs:
    """Thumbs, ready to be cut into batches once they `begin`.

    Args:
        rows: one a thumb.
        good: bool, one a thumb.
        weight: float32, one a thumb, before balance.
        parts: what `batch_at` counts.
        max_tokens: longest row.
        beta: of the loss.
        batch: thumbs a batch.
        seed: of their order.

    Attributes:
        strange: by number of a thumb, the row that z0 has of it.
    """

    measures = ("accuracy", "baseline")  # what `loss` tells beside the loss, by name

    def __init__(
        self,
        logprobs: LogProbs,
        rows: Sequence[Row],
        good: np.ndarray,
        weight: np.ndarray,
        parts: Parts,
        *,
        max_tokens: int,
        beta: float,
        batch: int,
        seed: int,
    ):
        self.logprobs, self.rows, self.good, self.parts, self.beta = logprobs, rows, good, parts, beta
        self.weight = weight * balance(good)
        self.strange = {
            place: fit(Row(rows[place].prompt, rows[other].response), max_tokens)[0]
            for place, other in enumerate(partners(rows).tolist())
            if other >= 0
        }
        self.order = Order(len(rows), batch, seed)

    def begin(self, references: Callable[[list[Row]], np.ndarray]) -> None:
        """Read all rows under the reference."""
        values = references([*self.rows, *self.strange.values()])
        self.reference = values[: len(self.rows)]
        self.strange_reference = dict(zip(self.strange, values[len(self.rows) :].tolist(), strict=True))

    def batch_at(self, place: int) -> ThumbBatch | None:
        """The part of a batch at that place, None where it is empty; epochs go round for ever."""
        index = self.parts.at(self.order, place)
        if not len(index):
            return None
        strange = [i for i in self.order.batch(self.parts.step(place)).tolist() if i in self.strange]
        return ThumbBatch(
            self.logprobs.collate([self.rows[i] for i in index]),
            mx.array(self.reference[index]),
            mx.array(self.good[index]),
            mx.array(self.weight[index]),
            (
                self.logprobs.collate([self.strange[i] for i in strange]),
                mx.array([self.strange_reference[i] for i in strange]),
            )
            if strange
            else None,
        )

    def loss(self, batch: ThumbBatch) -> tuple[mx.array, dict[str, mx.array]]:
        """Weighted mean of `losses.kto`: over n, not over the sum of weights."""
        gained = self.logprobs(batch.rows) - batch.reference
        baseline = mx.array(0.0)
        if batch.strange:
            rows, reference = batch.strange
            baseline = losses.kto_baseline(self.logprobs(rows, gradient=False) - reference)
        loss = (batch.weight * losses.kto(gained, batch.good, baseline, beta=self.beta)).mean()
        return loss, {"accuracy": ((gained > baseline) == batch.good).mean(), "baseline": baseline}

    def size(self, batch: ThumbBatch) -> float:
        """Thumbs, which the loss is a mean over."""
        return batch.good.size


def learnable_thumbs(
    thumbs: Sequence[Thumb], *, safety_low: float, safety_high: float
) -> tuple[list[Thumb], np.ndarray]:
    """Thumbs that may be learnt from and their weights, float32 `[n]` in (0, 1].

    The gate looks at replies that are to become likelier; an unsafe one may always be pushed away (`science.md` 3.4).
    """
    weights = [
        thumb.confidence * (gate(thumb.safety_score, low=safety_low, high=safety_high) if thumb.good else 1.0)
        for thumb in thumbs
    ]
    kept = [thumb for thumb, weight in zip(thumbs, weights, strict=True) if weight > 0]
    return kept, np.array([weight for weight in weights if weight > 0], np.float32)


def balance(good: np.ndarray) -> np.ndarray:
    """Factors float32 `[n]` of mean 1 that make good and bad thumbs count alike in all; 1 where there is one kind only.

    Args:
        good: bool `[n]`.
    """
    share = good.mean() if good.size else 0.0
    if share in (0.0, 1.0):
        return np.ones(good.shape, np.float32)
    return np.where(good, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)


def partners(rows: Sequence[Row]) -> np.ndarray:
    """For each row another one whose prompt differs, int `[n]`, -1 where there is none; no row serves two others."""
    prompts = [tuple(row.prompt) for row in rows]
    order = sorted(range(len(rows)), key=prompts.__getitem__)  # rows of a prompt are neighbours
    shift = max(Counter(prompts).values(), default=0)  # past the largest group of them
    found = np.full(len(rows), -1)
    for place, row in enumerate(order):
        other = order[(place + shift) % len(order)]
        if prompts[other] != prompts[row]:
            found[row] = other
    return found
