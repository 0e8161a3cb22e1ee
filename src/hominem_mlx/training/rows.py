"""Texts as rows of tokens: a prompt, a reply, and which positions predict the reply."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

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
class Rows:
    """A padded batch of `B` rows.

    tokens: int32 `[B, T]`. where: int32 `[N]`, index into the flattened `[B*T]` of each position that predicts a
    response token; targets: int32 `[N]`, that token; owner: int32 `[N]`, its row; lengths: float32 `[B]`, response
    tokens a row.
    """

    tokens: mx.array
    where: mx.array
    targets: mx.array
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
    """Pad rows on the right and note where their replies are."""
    width = -(-max(row.num_tokens for row in rows) // PAD_TO) * PAD_TO
    tokens = np.zeros((len(rows), width), np.int32)
    where, targets, owner = [], [], []
    for index, row in enumerate(rows):
        tokens[index, : row.num_tokens] = row.prompt + row.response
        first = index * width + len(row.prompt) - 1  # the last prompt token predicts the first reply token
        where.append(np.arange(first, first + len(row.response)))
        targets.append(row.response)
        owner.append(np.full(len(row.response), index))
    return Rows(
        mx.array(tokens),
        mx.array(np.concatenate(where).astype(np.int32)),
        mx.array(np.concatenate(targets).astype(np.int32)),
        mx.array(np.concatenate(owner).astype(np.int32)),
        mx.array([float(len(row.response)) for row in rows]),
    )
