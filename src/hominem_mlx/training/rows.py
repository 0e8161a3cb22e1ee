"""Texts as rows of tokens: a prompt, a reply, and which positions predict the reply."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from hominem_mlx.models.platform import lanes, pad_to
from hominem_mlx.models.prefix import Prompts
from hominem_mlx.records import Turn

if TYPE_CHECKING:
    from hominem_mlx.models.backbone import LanguageModel


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

    tokens: int32 `[B, T]`: prompt and reply; or, after `prompts`, the prompt's last token and the reply. The reply's
    own last token is predicted and never read. where: int32 `[N]`, index into the flattened `[B*T]` of each position
    that predicts a response token; targets: int32 `[N]`, that token.
    """

    tokens: mx.array
    where: mx.array
    targets: mx.array
    prompts: Prompts | None = None


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


def to_row(
    lm: "LanguageModel",
    prompt: str,
    response: str,
    *,
    history: Sequence[Turn] = (),
    system: str | None = None,
    max_tokens: int,
) -> tuple[Row, int]:
    """Texts as a row no longer than `max_tokens`, and how many reply tokens had to go."""
    before = [turn.model_dump() for turn in history]
    return fit(Row(lm.prompt_tokens(prompt, system=system, history=before), lm.response_tokens(response)), max_tokens)


class Order:
    """Epochs without replacement: which rows are in the batch of a step, from the seed and the step alone.

    With `groups`, one a row, rows of a group stand together and groups are shuffled.
    """

    def __init__(self, size: int, batch: int, seed: int, *, groups: Sequence[str] | None = None):
        self.size_of_batch, self.seed = batch, seed
        self.batches_an_epoch = -(-size // batch)
        names = {name: number for number, name in enumerate(dict.fromkeys(groups or []))}
        self.group = np.array([names[name] for name in groups]) if groups else np.arange(size)

    def batch(self, step: int) -> np.ndarray:
        """Row numbers `[<= batch]`; the last batch of an epoch may be short."""
        epoch, place = divmod(step, self.batches_an_epoch)
        turn = np.random.default_rng([self.seed, epoch]).permutation(self.group.max(initial=-1) + 1)
        order = np.argsort(np.argsort(turn)[self.group], kind="stable")
        return order[place * self.size_of_batch : (place + 1) * self.size_of_batch]


def by_prompt(rows: Sequence[Row]) -> list[int]:
    """Places of the rows in an order in which rows of one prompt are neighbours, and so are rows of like length."""
    longest: dict[tuple[int, ...], int] = {}
    for row in rows:
        prompt = tuple(row.prompt)
        longest[prompt] = max(longest.get(prompt, 0), row.num_tokens)
    keys = [(longest[tuple(row.prompt)], row.prompt, len(row.response)) for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def collate(rows: Sequence[Row], *, share: bool = False) -> Rows:
    """Cut rows into blocks of like length and equal work, pad them on the right, note where their replies are.

    Args:
        share: let rows of the same prompt read it once, in blocks where that is less work.
    """
    order = by_prompt(rows)
    opens = [
        not share or place == 0 or rows[order[place - 1]].prompt != rows[i].prompt for place, i in enumerate(order)
    ]
    work = np.cumsum([len(rows[i].prompt) * new + len(rows[i].response) for i, new in zip(order, opens)])
    cuts = np.searchsorted(work, work[-1] * np.arange(1, len(lanes())) / len(lanes()), side="right")
    starts = np.flatnonzero(opens)
    if len(starts) >= len(lanes()):  # rather uneven lanes than a prompt in two of them
        cuts = starts[np.abs(starts - cuts[:, None]).argmin(1)]
    parts = [part for part in np.split(np.array(order), cuts) if len(part)]
    owner = np.repeat(order, [len(rows[index].response) for index in order])
    return Rows(
        tuple(_block([rows[index] for index in part], share) for part in parts),
        mx.array(owner.astype(np.int32)),
        mx.array([float(len(row.response)) for row in rows]),
    )


def _block(rows: Sequence[Row], share: bool) -> Block:
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(tuple(row.prompt) for row in rows))}
    whole, reply, prompt = (
        _padded(max(map(length, rows)))
        for length in (lambda row: row.num_tokens - 1, lambda row: len(row.response), lambda row: len(row.prompt) - 1)
    )
    if share and len(prompts) * prompt + len(rows) * reply < len(rows) * whole:
        tokens = _right_padded([row.prompt[-1:] + row.response[:-1] for row in rows], reply)
        starts = [0] * len(rows)
        before = Prompts(
            mx.array(_right_padded([list(prompt[:-1]) for prompt in prompts], prompt)),
            mx.array([len(prompt) - 1 for prompt in prompts]),
            mx.array([prompts[tuple(row.prompt)] for row in rows]),
        )
    else:
        tokens = _right_padded([row.prompt + row.response[:-1] for row in rows], whole)
        starts = [len(row.prompt) - 1 for row in rows]  # the last prompt token predicts the first reply token
        before = None
    width = tokens.shape[1]
    where = [np.arange(len(row.response)) + start + i * width for i, (row, start) in enumerate(zip(rows, starts))]
    return Block(
        mx.array(tokens),
        mx.array(np.concatenate(where).astype(np.int32)),
        mx.array(np.concatenate([row.response for row in rows]).astype(np.int32)),
        before,
    )


def _padded(length: int) -> int:
    return max(1, -(-length // pad_to())) * pad_to()


def _right_padded(rows: Sequence[list[int]], width: int) -> np.ndarray:
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens
