"""Texts as rows of tokens: a prompt, a reply, and which positions predict the reply."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx
import numpy as np

from hominem_mlx.errors import TrainingError
from hominem_mlx.models.backbone import LanguageModel, conversation
from hominem_mlx.models.platform import lanes, pad_to
from hominem_mlx.models.prefix import Prompts
from hominem_mlx.records import Record, Turn
from hominem_mlx.training.cutting import Lengths, Part, cut, padded
from hominem_mlx.training.parallel import ALONE, Ranks

Said = TypeVar("Said", bound=Record)


@dataclass(frozen=True)
class Row:
    """One prompt and one reply, in tokens; the reply, end-of-turn token included, is learnt, the prompt only read."""

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
    that predicts a response token; targets: int32 `[N]`, that token. lane: number of the lane that computes it. spread:
    whether the prompts are read in all lanes at once, for this block and others with the same `prompts.tokens`.
    """

    tokens: mx.array
    where: mx.array
    targets: mx.array
    lane: int = 0
    prompts: Prompts | None = None
    spread: bool = False


@dataclass(frozen=True)
class Rows:
    """A batch: blocks for the lanes of the machine.

    owner: int32 `[N]`, the row (as given to `collate`) of each response token, block after block; lengths: float32
    `[rows]`, response tokens a row. num_tokens: of all rows, each with its prompt, without padding.
    """

    blocks: tuple[Block, ...]
    owner: mx.array
    lengths: mx.array
    num_tokens: int = field(compare=False)  # nothing that is computed hangs on it


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
    lm: LanguageModel,
    prompt: str,
    response: str,
    *,
    history: Sequence[Turn] = (),
    system: str | None = None,
    max_tokens: int,
    name: str = "a row",
) -> tuple[Row, int]:
    """Texts as a row no longer than `max_tokens`, and how many reply tokens had to go.

    Args:
        name: what the row is called in an error.

    Raises: TrainingError where the chat template writes the answered prompt otherwise than the prompt alone.
    """
    before = [turn.model_dump() for turn in history]
    if not lm.is_reply_after_prompt(conversation(prompt, system=system, history=before), response):
        raise TrainingError(
            f"{name}: the chat template of {lm.name} writes an answered conversation otherwise than the prompt to be "
            "answered and then the reply, so it would be learnt where the model never speaks. If it is so with every "
            "row, the template opens a thought or channel of its own: take an instruct model that answers at once; "
            "else leave out the row, its texts hold something that the template changes"
        )
    return fit(Row(lm.prompt_tokens(prompt, system=system, history=before), lm.response_tokens(response)), max_tokens)


def spoken(lm: LanguageModel, records: Sequence[Said]) -> list[Said]:
    """The records in whose every reply something is said; of a reply that is all thoughts nothing could be learnt."""
    replies = ("response", "chosen", "rejected")
    return [row for row in records if all(lm.spoken(getattr(row, name, ".")) for name in replies)]


class Order:
    """Epochs without replacement: which rows are in the batch of a step, from the seed and the step alone.

    With `groups`, one a row, rows of a group stand together and groups are shuffled.
    """

    def __init__(self, size: int, batch: int, seed: int, *, groups: Sequence[str] | None = None):
        self.size_of_batch, self.seed = batch, seed
        self.batches_an_epoch = -(-size // batch)
        names = {name: number for number, name in enumerate(dict.fromkeys(groups or []))}
        self.group = np.array([names[name] for name in groups]) if groups else np.arange(size)
        self._epoch = functools.lru_cache(maxsize=1)(self._shuffled)  # asked for once a batch

    def batch(self, step: int) -> np.ndarray:
        """Row numbers `[<= batch]`; the last batch of an epoch may be short."""
        epoch, place = divmod(step, self.batches_an_epoch)
        return self._epoch(epoch)[place * self.size_of_batch : (place + 1) * self.size_of_batch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All row numbers in the order of an epoch."""
        turn = np.random.default_rng([self.seed, epoch]).permutation(self.group.max(initial=-1) + 1)
        return np.argsort(np.argsort(turn)[self.group], kind="stable")


@dataclass
class Parts:
    """How batches are cut where they are computed: by rank, then into micro-batches, which are counted through.

    All channels of a run hold the same; `micro_batches` is settled before the first batch, by each rank for itself.
    """

    micro_batches: int = 1
    ranks: Ranks = ALONE

    def step(self, place: int) -> int:
        """The step of the micro-batch at `place`."""
        return place // self.micro_batches

    def at(self, order: Order, place: int) -> np.ndarray:
        """Row numbers of this rank's micro-batch at `place`; none where a batch has fewer rows than parts."""
        own = self.ranks.share(order.batch(self.step(place)))
        return np.array_split(own, self.micro_batches)[place % self.micro_batches]


def by_prompt(rows: Sequence[Row]) -> list[int]:
    """Places of the rows in an order in which rows of one prompt are neighbours, and so are rows of like length."""
    longest: dict[tuple[int, ...], int] = {}
    for row in rows:
        prompt = tuple(row.prompt)
        longest[prompt] = max(longest.get(prompt, 0), row.num_tokens)
    keys = [(longest[tuple(row.prompt)], row.prompt, len(row.response)) for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def collate(rows: Sequence[Row], *, share: bool = False, spread: bool = False, a_pass: float = 1.0) -> Rows:
    """Cut rows into blocks of like length, pad them on the right, note where their replies are.

    Args:
        share: let rows of the same prompt read it once, in blocks where that is less work.
        spread: with `share`, let long prompts be read in all lanes at once where whole prompts would leave lanes idle.
        a_pass: what a block costs beside its tokens, in tokens (`platform.a_pass`).
    """
    order = by_prompt(rows)
    ordered = [rows[i] for i in order]
    lengths = Lengths(
        np.array([len(row.prompt) - 1 for row in ordered]),
        np.array([len(row.response) for row in ordered]),
        np.array([not i or row.prompt != ordered[i - 1].prompt for i, row in enumerate(ordered)]),
    )
    parts = cut(lengths, lanes=len(lanes()), share=share, spread=spread, a_pass=a_pass, pad_to=pad_to())
    blocks: list[Block] = []
    for part in parts:
        here = ordered[part.start : part.stop]
        if not part.spread:
            blocks.append(_block(here, share, part))
            continue
        if lengths.opens[part.start]:  # parts of the same prompt have its tokens in common
            prompt_tokens = _prompt_tokens([here[0].prompt])
        blocks.append(_continued(here, prompt_tokens, part))
    owner = np.repeat(order, lengths.replies).astype(np.int32)
    replies = mx.array([float(len(row.response)) for row in rows])
    return Rows(tuple(blocks), mx.array(owner), replies, sum(row.num_tokens for row in rows))


def _block(rows: Sequence[Row], share: bool, part: Part) -> Block:
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
    whole, reply, prompt = (
        padded(max(map(length, rows)), pad_to())
        for length in (lambda row: row.num_tokens - 1, lambda row: len(row.response), lambda row: len(row.prompt) - 1)
    )
    if share and len(prompts) * prompt + len(rows) * reply < len(rows) * whole:
        return _continued(rows, _prompt_tokens(prompts), part)
    tokens = _right_padded([row.prompt + row.response[:-1] for row in rows], whole)
    # the last prompt token predicts the first reply token
    return Block(mx.array(tokens), *_targets(rows, whole, [len(row.prompt) - 1 for row in rows]), part.lane)


def _continued(rows: Sequence[Row], prompt_tokens: mx.array, part: Part) -> Block:
    """Rows that go on from their prompts, which are `prompt_tokens` in the order in which they are met."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(tuple(row.prompt) for row in rows))}
    before = Prompts(
        prompt_tokens,
        mx.array([len(prompt) - 1 for prompt in places]),
        mx.array([places[tuple(row.prompt)] for row in rows]),
    )
    width = padded(max(len(row.response) for row in rows), pad_to())
    tokens = _right_padded([row.prompt[-1:] + row.response[:-1] for row in rows], width)
    return Block(mx.array(tokens), *_targets(rows, width, [0] * len(rows)), part.lane, before, part.spread)


def _prompt_tokens(prompts: Sequence[Sequence[int]]) -> mx.array:
    """Each prompt without its last token."""
    width = padded(max(map(len, prompts)) - 1, pad_to())
    return mx.array(_right_padded([list(prompt[:-1]) for prompt in prompts], width))


def _targets(rows: Sequence[Row], width: int, starts: Sequence[int]) -> tuple[mx.array, mx.array]:
    """`where` and `targets` of rows with so many columns that predict from these on."""
    where = [np.arange(len(row.response)) + start + i * width for i, (row, start) in enumerate(zip(rows, starts))]
    targets = np.concatenate([row.response for row in rows])
    return mx.array(np.concatenate(where).astype(np.int32)), mx.array(targets.astype(np.int32))


def _right_padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens
