"""Where a batch is cut into blocks, and which lane computes which: worked out from lengths alone.

A block pads its rows to the longest, so more blocks mean less padding; and each block is a pass through the model,
which costs something beside its tokens. What counts in the end is how much the fullest lane has to do.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` (not included) of a batch, in its order, and the lane that computes them.

    spread: their one prompt is read in all lanes at once, for this part and others of the same prompt.
    """

    start: int
    stop: int
    lane: int
    spread: bool = False


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row of a batch, in its order, `[n]`: read of the prompt before the row, and of the row itself.

    opens: bool `[n]`, whether a row's prompt is another than that of the row before.
    """

    prompts: np.ndarray
    replies: np.ndarray
    opens: np.ndarray


def cut(
    lengths: Lengths, *, lanes: int, share: bool = False, spread: bool = False, a_pass: float = 1.0, pad_to: int = 1
) -> list[Part]:
    """Cut a batch into parts so that the fullest lane has as little as can be.

    Args:
        lanes: how many blocks can be computed at the same time.
        share: rows of one prompt in one block read it once.
        spread: prompts may be read in all lanes at once.
        a_pass: what a pass costs beside its tokens, in tokens.
        pad_to: lengths become multiples of this.
    """
    parts, fullest = _in_one_lane_each(lengths, lanes, share, a_pass, pad_to)
    if share and spread and lanes > 1:
        spread_out, fullest_then = _in_all_lanes(lengths, lanes, a_pass, pad_to)
        if fullest_then < fullest:
            return spread_out
    return parts


def padded(length, pad_to: int):
    """The next multiple, at least one: of a number or an array."""
    return np.maximum(1, -(-length // pad_to)) * pad_to


def _in_one_lane_each(
    lengths: Lengths, lanes: int, share: bool, a_pass: float, pad_to: int
) -> tuple[list[Part], float]:
    """Every part with its prompts in one lane; and what the fullest lane has to do."""
    n = len(lengths.replies)
    cost = np.full((n + 1, n + 1), np.inf)  # of rows start to stop as one block
    for start in range(n):
        count = np.arange(1, n - start + 1)
        reply, prompt, text = (
            padded(np.maximum.accumulate(tokens[start:]), pad_to)
            for tokens in (lengths.replies, lengths.prompts, lengths.prompts + lengths.replies)
        )
        tokens = count * text
        if share:
            prompts = 1 + np.cumsum(lengths.opens[start:]) - lengths.opens[start]
            tokens = np.minimum(tokens, prompts * prompt + count * reply)
        cost[start, start + 1 :] = a_pass + tokens
    found = []
    for power in (1, 2):  # least work in all; or blocks of like size, which share out evenly
        for edges in _partitions(cost**power, most=min(n, 8 * lanes)):
            lane_of, fullest = _shared_out([cost[edge] for edge in edges], lanes)
            found.append((fullest, [Part(*edge, lane) for edge, lane in zip(edges, lane_of, strict=True)]))
    fullest, parts = min(found, key=lambda one: one[0])
    return parts, fullest


def _in_all_lanes(lengths: Lengths, lanes: int, a_pass: float, pad_to: int) -> tuple[list[Part], float]:
    """Every prompt in pieces in all lanes, replies shared out; and what the fullest lane has to do."""
    edges = np.append(np.flatnonzero(lengths.opens), len(lengths.replies)).tolist()
    ways = []  # of each prompt, the ways to cut its replies: into one part, into two, and so on
    for start, stop in itertools.pairwise(edges):
        n = stop - start
        cost = np.full((n + 1, n + 1), np.inf)
        for first in range(n):
            longest = padded(np.maximum.accumulate(lengths.replies[start + first : stop]), pad_to)
            cost[first, first + 1 :] = a_pass + np.arange(1, n - first + 1) * longest
        cuts = _partitions(cost**2, most=min(n, 4 * lanes))
        ways.append([[(start + first, start + last, cost[first, last]) for first, last in cut] for cut in cuts])
    found = []
    for number in range(max(map(len, ways))):
        chosen = [part for cuts in ways for part in cuts[min(number, len(cuts) - 1)]]
        lane_of, fullest = _shared_out([cost for *_, cost in chosen], lanes)
        parts = [Part(start, stop, lane, spread=True) for (start, stop, _), lane in zip(chosen, lane_of)]
        found.append((fullest, parts))
    fullest, parts = min(found, key=lambda one: one[0])
    prompts = sum(padded(lengths.prompts[start], pad_to) / lanes + a_pass for start in edges[:-1])
    return parts, fullest + float(prompts)


def _partitions(cost: np.ndarray, most: int) -> Iterator[list[tuple[int, int]]]:
    """The cheapest way to cut rows into one block, into two, and so on up to `most`, as `(start, stop)` of each.

    Args:
        cost: `[n + 1, n + 1]`, of rows start to stop as one block; infinite where there are none.
    """
    came_from: list[np.ndarray] = []
    reach = cost[0]
    for _ in range(most):
        edges, stop = [], len(cost) - 1
        for before in reversed(came_from):
            edges.append((int(before[stop]), stop))
            stop = int(before[stop])
        yield [(0, stop), *reversed(edges)]
        through = reach[:, None] + cost
        came_from.append(through.argmin(0))
        reach = through.min(0)


def _shared_out(costs: Sequence[float], lanes: int) -> tuple[list[int], float]:
    """The lane of each block, the largest first to whoever has least so far; and the fullest lane's sum."""
    load, lane_of = np.zeros(lanes), [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        lane_of[place] = int(load.argmin())
        load[lane_of[place]] += costs[place]
    return lane_of, float(load.max())
