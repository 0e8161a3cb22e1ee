"""What is picked so that training an adapter stays within so much memory.

The cheapest that fits: as configured; smaller chunks of logits; some blocks computed a second time; batches in several
parts. Each costs time, and changes of the result no more than the rounding.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import numpy as np

from hominem_mlx.training import footprint
from hominem_mlx.training.costs import TOTAL, Costs, Estimate, Load, Picks, heaviest, shown
from hominem_mlx.training.logprobs import READ_AT_ONCE
from hominem_mlx.training.parallel import ALONE, Ranks
from hominem_mlx.training.rows import Order, Parts, Row, by_prompt

NOTHING = Load(0, 0, 0, 0, ())
HALVINGS = 4  # of the chunks of logits: with fewer tokens at once, products lose their speed


@contextlib.contextmanager
def memory_limit(gb: float | None) -> Iterator[int | None]:
    """Bytes that training may take, which MLX keeps to inside the block: what it has freed goes back in time.

    Args:
        gb: as in `dual.memory_gb`; None changes nothing and gives None.
    """
    if gb is None:
        yield None
        return
    limit = int(gb * footprint.GB) or footprint.there_is()
    before = mx.set_memory_limit(limit)
    try:
        yield limit
    finally:
        mx.set_memory_limit(before)


@dataclass(frozen=True)
class Lessons:
    """All that a channel computes: `steps` batches of `order`.

    rows: what it is made of, one an item of the order; or, with sides `[k, items]`, the `k` rows of each item.
    teaches, words: as in `Costs.step`.
    beside: by item, a row that is read with every part of its batch, without a gradient.
    """

    order: Order
    rows: Sequence[Row]
    steps: int
    teaches: Literal["linear", "head", "all"]
    words: bool = True
    sides: np.ndarray | None = None
    beside: Mapping[int, Row] = field(default_factory=dict)

    def batches(self, parts: Parts) -> Iterator[list[Row]]:
        """The rows of every micro-batch, each once."""
        for place in range(self.steps * parts.micro_batches):
            items = parts.at(self.order, place)
            if len(items):
                yield [self.rows[i] for i in (items if self.sides is None else np.unique(self.sides[:, items]))]

    def batches_beside(self) -> Iterator[list[Row]]:
        """The rows that are read beside the micro-batches of each step."""
        for step in range(self.steps if self.beside else 0):
            if rows := [self.beside[i] for i in self.order.batch(step).tolist() if i in self.beside]:
                yield rows


@dataclass(frozen=True)
class Fit:
    """What was picked, what it takes, what it would take as configured where that is more, and the limit in bytes."""

    picks: Picks
    estimate: Estimate
    before: Estimate | None
    limit: int

    @property
    def fits(self) -> bool:
        """Whether it is within the limit."""
        return self.estimate.total <= self.limit

    def told(self, configured: Picks, blocks: int) -> str:
        """What it takes, what was picked and why, for people; `blocks` are those of the model."""
        text, picks, ways = f"at most {self.estimate} of {shown(self.limit)}", self.picks, []
        if self.before is None:
            return f"{text}: as configured"
        if picks.logits_bytes != configured.logits_bytes:
            ways.append(f"logits in chunks of {picks.logits_bytes / 2**20:.3g} MiB")
        if picks.checkpoints != configured.checkpoints:
            ways.append(f"{picks.checkpoints} of {blocks} blocks computed twice")
        if picks.micro_batches != configured.micro_batches:
            ways.append(f"batches in {picks.micro_batches} parts")
        return f"{text}: {', '.join(ways)}, since as configured it would be {shown(self.before.total)}"


class Budget:
    """Finds picks for what several channels compute.

    Args:
        ranks: who shares the batches; what is found is for this one.
    """

    def __init__(self, costs: Costs, lessons: Sequence[Lessons], ranks: Ranks = ALONE):
        self.costs, self.lessons, self.ranks = costs, lessons, ranks
        self._loads = functools.cache(self._loads_of)

    def estimate(self, picks: Picks) -> Estimate:
        """The fullest moment of all steps."""
        found = []
        for place, lessons in enumerate(self.lessons):
            loads, read = self._loads(place, picks.micro_batches, not picks.checkpoints)
            found += [
                self.costs.step(load, picks, teaches=lessons.teaches, words=lessons.words, beside=read)
                for load in loads or [NOTHING]  # a rank may have no row of any batch
            ]
        return max(found, key=TOTAL)

    def fit(self, configured: Picks, limit: int, *, can_checkpoint: bool) -> Fit:
        """The cheapest picks within `limit` bytes; where none is, those that take least."""
        before, least = self.estimate(configured), None
        for picks in self._ways(configured, can_checkpoint):
            fit = Fit(picks, self.estimate(picks), None if picks == configured else before, limit)
            if fit.fits:
                return fit
            if least is None or fit.estimate.total < least.estimate.total:
                least = fit
        assert least is not None  # the first way is as configured
        return least

    def _ways(self, configured: Picks, can_checkpoint: bool) -> Iterator[Picks]:
        """Cheaper ways first: as few parts as can be, then as few checkpoints, then chunks as large."""
        largest = max(lessons.order.size_of_batch for lessons in self.lessons)
        most = self.costs.layers if can_checkpoint else configured.checkpoints
        parts = 1
        while True:
            for checkpoints in range(configured.checkpoints, most + 1):
                for halvings in range(HALVINGS + 1):
                    yield Picks(configured.logits_bytes >> halvings, checkpoints, parts)
            if parts == largest:
                return
            parts = min(2 * parts, largest)

    def _loads_of(self, place: int, parts: int, spread: bool) -> tuple[list[Load], list[Load]]:
        """The heaviest that a gradient is wanted of, and that is read beside it."""
        lessons, logprobs = self.lessons[place], self.costs.logprobs
        batches = (lessons.batches(Parts(parts, self.ranks)), lessons.batches_beside())
        learnt, read = (heaviest(logprobs, each, spread=spread) for each in batches)
        return learnt, read


def reading(costs: Costs, rows: Sequence[Row], at_once: int) -> Estimate:
    """What `reference_logprobs` takes for these rows, so many at once."""
    logprobs, order = costs.logprobs, by_prompt(rows)
    batches = [[rows[i] for i in order[start : start + at_once]] for start in range(0, len(order), at_once)]
    picks = Picks(logprobs.logits_bytes, logprobs.checkpoints)
    loads = heaviest(logprobs, batches, spread=not picks.checkpoints)
    return max((costs.forward(load, picks) for load in loads), key=TOTAL)


def read_at_once(costs: Costs, rows: Sequence[Row], limit: int | None) -> int:
    """How many of these rows can be read at once within `limit` bytes, where no gradient is wanted."""
    at_once = READ_AT_ONCE
    while limit is not None and at_once > 1 and reading(costs, rows, at_once).total > limit:
        at_once //= 2
    return at_once
