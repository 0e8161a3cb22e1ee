"""What a training step of an adapter takes of memory, from shapes alone.

A forward pass keeps of every block what its gradient will want, so the fullest moment is at the top of the model, where
logits come beside it, or in the block that is being computed. Blocks in all lanes count together.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from hominem_mlx.models import lora
from hominem_mlx.models.platform import causal_scores, lanes
from hominem_mlx.training.footprint import FLOAT, GB
from hominem_mlx.training.logprobs import LogProbs, chunk
from hominem_mlx.training.rows import Row, Rows

# Found by measuring random models of 3 to 10 blocks, see `tests/test_budget.py`.
KEPT = 1.15  # numbers a block keeps for its gradient, as a share of those its linear layers read and make
IN_HAND = 1.75  # what is there beside that while blocks are computed, as a share of the same: MLX runs ahead
READING = 1.45  # the same without a gradient
PER_LOGIT = 4  # logits, their exponentials, and the gradients of both
# Chunks of logits wait for one another, but MLX makes room for some hundred operations before they are computed, and so
# for chunks to come: up to 8 instead of 4, measured. Given a limit it waits, but not for the last operations of a lane:
# up to 4.9.
AHEAD = 2.0
AHEAD_HELD = 1.25
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
LOOKED_AT = 4  # batches of most tokens, of most response tokens, of the longest rows: so many are cut into blocks


@dataclass(frozen=True)
class Picks:
    """How a step is computed; `micro_batches` are parts of a batch, the rest is as in `LogProbs`."""

    logits_bytes: int
    checkpoints: int
    micro_batches: int = 1


@dataclass(frozen=True)
class Estimate:
    """Bytes at the fullest moment, by what they are for; `adapter` with its gradients and moments."""

    weights: int
    adapter: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.weights + self.adapter + self.activations + self.logits

    def in_gb(self) -> dict[str, float]:
        """The parts and their total, in GB."""
        return {name: getattr(self, name) / GB for name in (*(field.name for field in fields(self)), "total")}

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {shown(getattr(self, field.name))}" for field in fields(self))
        return f"{shown(self.total)} ({parts})"


TOTAL = operator.attrgetter("total")


def shown(size: float) -> str:
    """Bytes as people read them: 12.3 GB, 1.23 GB, 123.4 MB."""
    gb = size / GB
    return f"{gb:.1f} GB" if gb >= 10 else f"{gb:.2f} GB" if gb >= 1 else f"{1000 * gb:.1f} MB"


def took() -> int:
    """The most bytes that MLX held since its peak was last reset."""
    return mx.get_peak_memory()


@dataclass(frozen=True)
class Load:
    """What a batch makes a model compute.

    tokens: positions, with those of prompts and padding. scores: of attention, a head. remembered: positions of shared
    prompts. joined: positions whose keys and values are put together from a prompt's and a row's. predicted: response
    tokens of each block.
    """

    tokens: int
    scores: int
    remembered: int
    joined: int
    predicted: tuple[int, ...]


def load(rows: Rows) -> Load:
    """What the blocks of a batch make a model compute."""
    tokens = scores = remembered = joined = 0
    read = set()
    for block in rows.blocks:
        count, length = block.tokens.shape
        tokens += count * length
        if block.prompts is None:
            scores += count * causal_scores(length)
            continue
        prompts, before = block.prompts.tokens.shape
        scores += count * length * (before + length)
        joined += count * (before + length)
        if id(block.prompts.tokens) in read:  # spread prompts are read once for several blocks
            continue
        read.add(id(block.prompts.tokens))
        tokens += prompts * before
        scores += prompts * causal_scores(before)
        remembered += prompts * before
        if block.spread:  # each piece puts the keys and values of those before it in front of its own
            joined += prompts * before * (len(lanes()) + 1) // 2
    return Load(tokens, scores, remembered, joined, tuple(block.where.size for block in rows.blocks))


def heaviest(logprobs: LogProbs, batches: Iterable[Sequence[Row]], *, spread: bool) -> list[Load]:
    """The loads of those batches that may be the largest; cutting all of them into blocks would take long.

    Args:
        spread: as in `LogProbs.collate`.
    """
    weighed = []
    prompts: dict[int, tuple[int, ...]] = {}  # of each row: rows are met often, and comparing prompts takes time
    for rows in batches:
        for row in rows:
            if id(row) not in prompts:
                prompts[id(row)] = tuple(row.prompt)
        read = sum(map(len, {prompts[id(row)] for row in rows}))
        replies = sum(len(row.response) for row in rows)
        flat = len(rows) * max(row.num_tokens for row in rows)
        weighed.append(((read + replies, replies, flat), rows))
    picked = {}
    for kind in range(3):
        for _, rows in sorted(weighed, key=lambda one: -one[0][kind])[:LOOKED_AT]:
            picked[id(rows)] = rows
    return [load(logprobs.collate(rows, spread=spread)) for rows in picked.values()]


class Costs:
    """What a model with an adapter to come takes for a load.

    Args:
        logprobs: of the model, without that adapter.
        shape, keys: of the adapter, as `lora.attach` takes them.
        gradients: copies of its gradient that are held between the terms of the loss.
        met: whether gradients of several ranks are summed up: this one's, by weight, in one piece, and the sum.
        held: whether MLX is given a limit.
    """

    def __init__(
        self,
        logprobs: LogProbs,
        shape: lora.Shape,
        keys: Sequence[str],
        *,
        gradients: int,
        met: bool = False,
        held: bool = False,
    ):
        lm, sizes = logprobs.lm, _sizes(logprobs.lm.model)
        self.logprobs, self.layers, self.gradients = logprobs, lm.num_layers, gradients
        self.ahead = AHEAD_HELD if held else AHEAD
        self.beside_gradients = max(8, 3 * gradients + 3 if met else 0)  # copies, after the gradients are made
        self.weights = sum(value.nbytes for _, value in tree_flatten(lm.model.parameters()))
        self.adapter = FLOAT * lora.size(lm, shape, keys)
        self.taught = lora.num_blocks(lm, shape)
        self.head_is_input = lora.EMBEDDING in keys  # then what teaches the output layer goes through all blocks
        with lora.without_adapter(lm):
            experts = sizes.get("num_experts_per_tok") or 1
            blocks = [list(_linear_layers(block, experts)) for block in lm.model.layers]
            vectors = [value for _, value in tree_flatten(lm.model.parameters()) if value.ndim == 1]
            words = next(layer for _, layer in lm.model.named_modules() if isinstance(layer, EMBEDDINGS))
            self.vocabulary, self.width = lora.dimensions(words)
        self.number = vectors[0].dtype.size if vectors else FLOAT  # bytes
        self.heads = sizes.get("num_attention_heads") or sizes.get("n_head", 32)
        self.head_size = sizes.get("head_dim") or self.width // self.heads
        self.kv_heads = sizes.get("num_key_value_heads") or self.heads
        read, made, matrices = (max(sum(layer[i] for layer in block) for block in blocks) for i in range(3))
        self.through = read + made
        self.of_learning = 0  # bytes a token and block that only an adapter keeps
        if self.number < FLOAT:
            self.of_learning += FLOAT * read  # it learns from what layers read, in its own float32
        if shape.dropout:
            self.of_learning += (self.number + 1) * read
        self.of_dora = 0
        if shape.kind == "dora":
            self.of_learning += self.number * made
            self.of_dora = 2 * FLOAT * matrices  # the sums whose rows it measures

    def step(
        self, load: Load, picks: Picks, *, teaches: str = "linear", words: bool = True, beside: Sequence[Load] = ()
    ) -> Estimate:
        """A gradient's fullest moment.

        Args:
            teaches: what moves: `linear` layers of the blocks, the `head` or `all`.
            words: whether log-probabilities are asked for, not hidden states alone.
            beside: what is read for the same loss without a gradient; one of these.
        """
        again, inputs = picks.checkpoints, self.number * self.width * load.tokens
        block = KEPT * self.number * self.through * load.tokens + self._attention(load) + self.of_learning * load.tokens
        through = self.layers if self.head_is_input and teaches != "linear" else self.taught * (teaches != "head")
        kept = min(self.layers - again, through)
        top = kept * block + again * inputs + 3 * FLOAT * self.width * sum(load.predicted)
        in_hand = self._in_hand(load)
        logits = self._logits(load, picks, frozen=teaches == "linear") if words else 0
        moments = [(top, logits), (top + IN_HAND * in_hand, 0)]
        for read in (self.forward(each, picks) for each in beside):
            moments.append((top + read.activations, read.logits))
        if again and through:
            moments.append((again * inputs + block + IN_HAND * in_hand, 0))
        if again and kept:  # the first block that is computed again, while the one above it is not all let go
            moments.append((again * inputs + 2 * block + in_hand, 0))
        activations, logits = map(int, max(moments, key=sum))
        after = (self.gradients + self.beside_gradients) * self.adapter - activations - logits
        copies = max((self.gradients + 5) * self.adapter, after)
        return Estimate(self.weights, copies, activations, logits)

    def forward(self, load: Load, picks: Picks) -> Estimate:
        """The fullest moment of a pass without a gradient."""
        shared = self.number * 2 * self.head_size * self.kv_heads * self.layers * load.remembered
        logits = self._logits(load, picks, frozen=True)
        hidden, in_hand = 3 * FLOAT * self.width * sum(load.predicted), self._in_hand(load)
        moments = [(hidden + max(READING * in_hand, shared + in_hand), 0), (hidden + shared, logits)]
        activations, logits = map(int, max(moments, key=sum))
        return Estimate(self.weights, 3 * self.adapter, activations, logits)  # its gradient is not there

    def _attention(self, load: Load) -> float:
        return self.number * (self.heads * load.scores + 2 * self.head_size * self.kv_heads * load.joined)

    def _in_hand(self, load: Load) -> float:
        return self.number * self.through * load.tokens + self._attention(load) + self.of_dora

    def _logits(self, load: Load, picks: Picks, *, frozen: bool) -> float:
        """Bytes; `frozen` says whether the output layer is."""
        a_token = self.vocabulary * (PER_LOGIT * FLOAT + 2 * self.number * (self.number < FLOAT))
        if not self.logprobs.comes_apart:
            return a_token * load.tokens
        if not frozen:
            return a_token * sum(load.predicted)
        at_once = chunk(picks.logits_bytes, self.vocabulary)
        ahead = self.ahead if any(tokens > at_once for tokens in load.predicted) else 1.0
        return ahead * a_token * sum(min(tokens, at_once) for tokens in load.predicted)


def _sizes(model: nn.Module) -> dict[str, Any]:
    """What the model was built from; of a model with eyes its part for text."""
    sizes = dict(vars(model.args)) if "args" in vars(model) else {}
    text = sizes.get("text_config") or {}
    return sizes | (dict(text) if isinstance(text, dict) else vars(text))  # mlx-lm has both


def _linear_layers(block: nn.Module, experts: int) -> Iterator[tuple[int, int, int]]:
    """Numbers a token that each linear layer of a block reads and makes, and its weights."""
    for _, layer in block.named_modules():
        if "weight" in layer and layer.weight.ndim >= 2:
            made, read = lora.dimensions(layer)
            times = experts if layer.weight.ndim > 2 else 1
            yield times * read, times * made, read * made
