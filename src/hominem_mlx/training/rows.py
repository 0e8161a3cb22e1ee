"""Texts as rows of tokens: a prompt, a reply, and which positions predict the reply."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hominem_mlx.models.platform import lanes

PAD_TO = 16  # few distinct shapes, little padding


@dataclass(frozen=True)
class Row:
    """One prompt and one reply, in tokens; the reply ends with the end-of-turn token."""

    prompt: list[int]
    response: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Block:
    """`B` rows of like length, padded to `T`.

    tokens: int32 `[B, T]`. where: int32 `[N]`, index into the flattened `[B*T]` of each position that predicts a
    response token; targets: int32 `[N]`, that token.
    """

    tokens: mx.array
    where: mx.array
    targets: mx.array


@dataclass(frozen=True)
class Rows:
    """A batch: one block for each lane of the machine.

    owner: int32 `[N]`, the row (as given to `collate`) of each response token, block after block; lengths: float32
    `[rows]`, response tokens a row.
    """

    blocks: tuple[Block, ...]
    owner: mx.array
    lengths: mx.array


def fit(row: Row, max_tokens: int) -> tuple[Row, int]:
    """A row no longer than `max_tokens`, and how many reply tokens had to go.

    The prompt loses its beginning first, since what was said last matters most; the reply loses its end only when it
    alone is too long.
    """
    room = max_tokens - len(row.response)
    if room >= len(row.prompt):
        return row, 0
    if room >= 1:
        return Row(row.prompt[-room:], row.response), 0
    kept = row.response[: max_tokens - 1]
    return Row(row.prompt[-1:], kept), len(row.response) - len(kept)


def collate(rows: Sequence[Row]) -> Rows:
    """Cut rows into blocks of like length and equal work, pad them on the right, note where their replies are."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].num_tokens)
    work = np.cumsum([rows[index].num_tokens for index in order])
    cuts = np.searchsorted(work, work[-1] * np.arange(1, len(lanes())) / len(lanes()), side="right")
    parts = [part for part in np.split(np.array(order), cuts) if len(part)]
    owner = np.repeat(order, [len(rows[index].response) for index in order])
    return Rows(
        tuple(_block([rows[index] for index in part]) for part in parts),
        mx.array(owner.astype(np.int32)),
        mx.array([float(len(row.response)) for row in rows]),
    )


def _block(rows: Sequence[Row]) -> Block:
    width = -(-max(row.num_tokens for row in rows) // PAD_TO) * PAD_TO
    tokens = np.zeros((len(rows), width), np.int32)
    where, targets = [], []
    for index, row in enumerate(rows):
        tokens[index, : row.num_tokens] = row.prompt + row.response
        first = index * width + len(row.prompt) - 1  # the last prompt token predicts the first reply token
        where.append(np.arange(first, first + len(row.response)))
        targets.append(row.response)
    return Block(
        mx.array(tokens),
        mx.array(np.concatenate(where).astype(np.int32)),
        mx.array(np.concatenate(targets).astype(np.int32)),
    )
