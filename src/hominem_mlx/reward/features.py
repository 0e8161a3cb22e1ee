"""What a frozen backbone makes of a prompt and a reply read together: a vector per pair, computed once and kept.

Shapes: `N` pairs, `T` tokens, `D` hidden size, `F` features = layers x poolings x D (`judge` counts once a question).
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hominem_mlx.errors import ModelError
from hominem_mlx.files import sha256_json, write_atomic
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.encoder import Encoder, Passage
from hominem_mlx.models.platform import lanes
from hominem_mlx.models.prefix import can_share
from hominem_mlx.reward.attention import AttentionHead
from hominem_mlx.reward.tuning import Tuning
from hominem_mlx.schema import TRUNCATED
from hominem_mlx.training.rows import Row, fit

Pair = tuple[str, str]
Progress = Callable[[dict], None]
SHARD = 64  # rows a cache file: what a kill may cost
SCORE_BATCH = 16
JUDGE = "judge"
LM_TOKENS = 4096  # longest pair a language model reads


@dataclass(frozen=True)
class FeatureSpec:
    """Everything features depend on besides the text.

    `layers` are block numbers, 0 the embeddings; `questions` those of `judge`, () without it.
    """

    backbone: str
    model: str
    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    questions: tuple[str, ...] = ()
    format: int = 1

    @property
    def hash(self) -> str:
        """Name of the cache folder."""
        without_questions = {name: value for name, value in asdict(self).items() if name != "questions"}
        return sha256_json(asdict(self) if self.questions else without_questions)[:16]


class Reader(Protocol):
    """A frozen model that reads pairs."""

    kind: str
    name: str
    hash: str
    num_layers: int
    tuning: Tuning | None

    def tuned(self, tuning: Tuning) -> Self:
        """The same model read with low-rank parts of a reward model's own beside its layers."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model's blocks, in order."""
        ...

    def passage(self, prompt: str, response: str) -> Passage:
        """The pair in tokens."""
        ...

    def hidden_states(
        self, passages: Sequence[Passage], layers: Sequence[int], embedded: mx.array | None = None
    ) -> list[mx.array]:
        """`[N, T, D]` float32 a layer; with `embedded` `[N, T, D]` that is read in place of the tokens' own vectors."""
        ...

    def embed(self, tokens: mx.array) -> mx.array:
        """Tokens `[...]` to their own vectors `[..., D]`, float32: what `embedded` stands for."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        ...

    def pieces(self, response: str, passage: Passage) -> list[str]:
        """The reply at each token of `said`, in order; joined they are the reply as it was read."""
        ...


class _Tunable:
    """What readers have in common: low-rank parts of a reward model's own beside their layers, or none."""

    tuning: Tuning | None = None

    def tuned(self, tuning: Tuning) -> Self:
        """The same model read with these parts; the model itself is shared and stays as it is."""
        made = copy.copy(self)
        made.tuning = tuning
        return made

    def _beside(self, blocks: Sequence[nn.Module]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.tuning is None else self.tuning.beside(blocks)


class EncoderReader(_Tunable):
    """Reads `[CLS] prompt [SEP] response [SEP]`, both directions at once."""

    kind = "encoder"

    def __init__(self, encoder: Encoder, name: str):
        self.encoder, self.name = encoder, name
        self.hash, self.num_layers = encoder.hash, encoder.num_layers

    def passage(self, prompt: str, response: str) -> Passage:
        """The pair in tokens."""
        return self.encoder.pair(prompt, response)

    def hidden_states(
        self, passages: Sequence[Passage], layers: Sequence[int], embedded: mx.array | None = None
    ) -> list[mx.array]:
        """`[N, T, D]` float32 a layer."""
        with self._beside(self.blocks):
            return self.encoder.hidden_states(passages, layers, embedded)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The encoder's blocks."""
        return self.encoder.model.layers

    def embed(self, tokens: mx.array) -> mx.array:
        """Tokens to their own vectors."""
        return self.encoder.model.word(tokens)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.encoder.shape.vocab_size

    def pieces(self, response: str, passage: Passage) -> list[str]:
        """The reply at each of its tokens."""
        return self.encoder.pieces(response, passage)


class LmReader(_Tunable):
    """Reads the pair through the chat template, as the model would have answered it; never through an adapter.

    With questions, each is also asked after the reply, as the person's next turn.
    """

    kind = "lm"

    def __init__(self, lm: LanguageModel, questions: Sequence[str] = ()):
        self.lm, self.name = lm, lm.name
        self.hash, self.num_layers = lm.hash, lm.num_layers
        self.suffixes = [lm.question_tokens(question) for question in questions]
        limit = getattr(lm.model.args, "max_position_embeddings", None) or LM_TOKENS
        self.max_tokens = min(limit, LM_TOKENS) - max(map(len, self.suffixes), default=0)

    def passage(self, prompt: str, response: str) -> Passage:
        """The pair in tokens; the token that ends the reply counts as part of it, since it has seen all of it."""
        whole = Row(self.lm.prompt_tokens(prompt), self.lm.response_tokens(response))
        row, _ = fit(whole, self.max_tokens)
        tokens = row.prompt + row.response
        flags = (TRUNCATED,) * (row.num_tokens < whole.num_tokens)
        asked = len(row.prompt)
        return Passage(tokens, [0] * len(tokens), (0, asked), (asked, len(tokens)), flags)

    def hidden_states(
        self, passages: Sequence[Passage], layers: Sequence[int], embedded: mx.array | None = None
    ) -> list[mx.array]:
        """`[N, T, D]` float32 a layer."""
        with lora.without_adapter(self.lm), self._beside(self.blocks):
            return self.lm.hidden_states(_padded([passage.tokens for passage in passages]), layers, embedded)

    def ask(
        self, passages: Sequence[Passage], layers: Sequence[int], embedded: mx.array | None = None
    ) -> tuple[list[mx.array], list[mx.array]]:
        """`hidden_states`, and `[N, K, D]` float32 a layer: where the answer to each question would begin.

        A passage is read once where the model can go on from what it kept, and never with `embedded`.
        """
        ends = mx.array([len(suffix) - 1 for suffix in self.suffixes])
        suffixes = _padded(self.suffixes)
        with lora.without_adapter(self.lm), self._beside(self.blocks):
            if embedded is None and self._can_go_on:
                tokens = _padded([passage.tokens for passage in passages])
                lengths = mx.array([len(passage.tokens) for passage in passages])
                states, after = self.lm.hidden_states_after(tokens, lengths, suffixes, layers)
                return states, [mx.take_along_axis(h, ends[None, :, None, None], axis=2)[:, :, 0] for h in after]
            whole = [passage.tokens + suffix for passage in passages for suffix in self.suffixes]
            tokens = _padded(whole)
            if embedded is not None:
                given = mx.repeat(embedded, len(self.suffixes), axis=0)
                given = mx.pad(given, [(0, 0), (0, tokens.shape[1] - given.shape[1]), (0, 0)])
                lengths = mx.repeat(mx.array([len(passage.tokens) for passage in passages]), len(self.suffixes))
                is_given = (mx.arange(tokens.shape[1]) < lengths[:, None])[..., None]
                embedded = mx.where(is_given, given, self.lm.table(tokens).astype(mx.float32))
            last = mx.array([len(row) - 1 for row in whole])[:, None, None]
            states = self.lm.hidden_states(tokens, layers, embedded)
            answers = [
                mx.take_along_axis(h, last, axis=1).reshape(len(passages), len(self.suffixes), -1) for h in states
            ]
            return [h[:: len(self.suffixes)] for h in states], answers

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The model's blocks."""
        return self.lm.model.layers

    @functools.cached_property
    def _can_go_on(self) -> bool:
        return can_share(self.lm.model)

    def embed(self, tokens: mx.array) -> mx.array:
        """Tokens to their own vectors."""
        with lora.without_adapter(self.lm):
            return self.lm.table(tokens).astype(mx.float32)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.lm.table.weight)

    def pieces(self, response: str, passage: Passage) -> list[str]:
        """The reply at each of its tokens; the one that ends it has no text."""
        tokens = passage.tokens[passage.said[0] : passage.said[1]]
        ended = tokens[-1] == self.lm.end_of_turn
        texts = [self.lm.tokenizer.decode(tokens[:count]) for count in range(len(tokens) - ended + 1)]
        texts[:-1] = [text.rstrip("\ufffd") for text in texts[:-1]]  # a sign of several tokens comes with its last one
        return [now[len(before) :] for before, now in itertools.pairwise(texts)] + [""] * ended


def _padded(rows: Sequence[Sequence[int]]) -> mx.array:
    """Tokens `[N, T]`, zeros on the right."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return mx.array(tokens)


def pool(
    hidden: mx.array, asked: mx.array, said: mx.array, poolings: Sequence[str], like: mx.array | None = None
) -> mx.array:
    """Response tokens to one vector.

    Args:
        hidden: `[N, T, D]`.
        asked, said: int `[N, 2]`, first and past-the-last place of prompt and reply; a reply has at least one token.
        poolings: of `mean`, `max`, `std`, `last` over the reply; `prompt`: the mean of the prompt; and two that
            tell a linear head how far the reply goes from what was said: `gap`, |mean of the reply - mean of the
            prompt|, and `near`, the mean over the reply of |token - the prompt's token of most similar direction|. A
            prompt without tokens counts as zeros.
        like: `[N, T, D]` or `[1, T, D]`, states by which `near` finds the most similar token; by default `hidden`.

    Returns: `[N, len(poolings) * D]`. Source: `science.md` 2.1; `std` and `gap` were found on the training prompts,
    `near` matches tokens as BERTScore does (Zhang et al. 2020, arXiv 1904.09675).
    """
    places = mx.arange(hidden.shape[1])

    def inside(span: mx.array) -> mx.array:
        return ((places >= span[:, :1]) & (places < span[:, 1:]))[..., None]

    reply, prompt = inside(said), inside(asked)
    mean = mx.where(reply, hidden, 0.0).sum(1) / reply.sum(1)
    asked_mean = mx.where(prompt, hidden, 0.0).sum(1) / mx.maximum(prompt.sum(1), 1)

    def near() -> mx.array:
        by = mx.stop_gradient(hidden if like is None else like)  # which token is nearest has no slope
        direction = by / mx.maximum(mx.sqrt(mx.square(by).sum(-1, keepdims=True)), 1e-12)
        alike = mx.where(prompt.swapaxes(1, 2), direction @ direction.swapaxes(1, 2), -mx.inf)
        nearest = mx.broadcast_to(mx.argmax(alike, axis=2), hidden.shape[:2])
        found = mx.take_along_axis(hidden, nearest[..., None], axis=1)
        far = mx.abs(hidden - mx.where(prompt.any(1, keepdims=True), found, 0.0))
        return mx.where(reply, far, 0.0).sum(1) / reply.sum(1)

    made = {
        "mean": lambda: mean,
        "max": lambda: mx.where(reply, hidden, -mx.inf).max(1),
        "std": lambda: _root(mx.where(reply, mx.square(hidden - mean[:, None]), 0.0).sum(1) / reply.sum(1)),
        "last": lambda: mx.take_along_axis(hidden, (said[:, 1] - 1)[:, None, None], axis=1)[:, 0],
        "prompt": lambda: asked_mean,
        "gap": lambda: mx.abs(mean - asked_mean),
        "near": near,
    }
    return mx.concatenate([made[name]() for name in poolings], axis=1)


def _root(x: mx.array) -> mx.array:
    """Square root whose slope at 0 is 0 and not infinite: a reply of one token has no spread."""
    return mx.where(x > 0, mx.sqrt(mx.where(x > 0, x, 1.0)), 0.0)


class Backbone:
    """A reader, the layers and poolings that are read, and where results are kept.

    The pooling `judge` is none: it stands for the states with which a language model would begin to answer each of
    `questions`, asked after the reply, and comes after all poolings, question by question. What an attention head makes
    of the states comes last.
    """

    def __init__(
        self,
        reader: Reader,
        layers: Sequence[int],
        poolings: Sequence[str],
        questions: Sequence[str] = (),
        attention: AttentionHead | None = None,
        tuning: Tuning | None = None,
    ):
        if JUDGE in poolings:
            if not isinstance(reader, LmReader):
                raise ModelError(
                    f"{reader.name} cannot be asked a question: take `{JUDGE}` out of reward.poolings, or set "
                    "reward.backbone=lm"
                )
            reader = LmReader(reader.lm, questions)
        self.untuned = reader
        self.reader: Reader = reader if tuning is None else reader.tuned(tuning)
        self.questions = tuple(questions) if JUDGE in poolings else ()
        self.pooled = tuple(name for name in poolings if name != JUDGE)
        self.spec = FeatureSpec(reader.kind, reader.hash, tuple(layers), tuple(poolings), self.questions)
        self.attention = attention
        self.layers = sorted({*layers, *([] if attention is None else [attention.layer])})
        self._states: dict[tuple[int, Pair], np.ndarray] = {}
        wrong = [layer for layer in self.layers if not 0 <= layer <= reader.num_layers]
        if wrong:
            raise ModelError(f"{reader.name} has {reader.num_layers} layers; {wrong} cannot be read")

    def looked_at_by(self, attention: AttentionHead | None, tuning: Tuning | None = None) -> "Backbone":
        """The same model read with this attention head and these low-rank parts, or without."""
        spec = self.spec
        made = Backbone(self.untuned, spec.layers, spec.poolings, spec.questions, attention, tuning)
        if made.reader.tuning is None and self.reader.tuning is None:
            made._states = self._states
        return made

    @functools.cached_property
    def plain(self) -> "Backbone":
        """The same without a head and as the model was published: the features alone, which hang on no label."""
        return self if self.attention is None and self.reader.tuning is None else self.looked_at_by(None)

    def owner(self, num_features: int) -> np.ndarray | None:
        """`[F]`: the number of the question whose answer a feature belongs to, -1 for poolings; None without any."""
        if not self.questions:
            return None
        size = num_features // (len(self.spec.layers) * (len(self.pooled) + len(self.questions)))
        block = size * len(self.spec.layers)
        pooled = np.full(block * len(self.pooled), -1)
        return np.concatenate([pooled, np.repeat(np.arange(len(self.questions)), block)])

    def read(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
        """Features `[N, F]` float32, then the head's columns, and the flags of each pair; nothing is kept."""
        passages = [self.reader.passage(*pair) for pair in pairs]
        order = sorted(range(len(passages)), key=lambda index: len(passages[index].tokens))
        size = SCORE_BATCH // len(lanes())
        batches = [[passages[i] for i in order[first : first + size]] for first in range(0, len(order), size)]
        made = list(self._made(batches, self.features))
        features = np.concatenate(made) if made else np.zeros((0, 0), np.float32)
        back = np.argsort(order, kind="stable")
        return features[back], [passage.flags for passage in passages]

    def read_cached(self, pairs: Sequence[Pair], home: Path, progress: Progress | None = None) -> np.ndarray:
        """Features `[N, F]` float32 of a data set, from `home/cache/features` where they are there; no head's columns.

        Each pair is computed alone: what it gets then hangs on no neighbour, so that a run after a kill, or with more
        rows, finds the same bits and arrives at the same reward model.
        """
        folder = Path(home) / "cache" / "features" / self.spec.hash
        keys = [sha256_json(list(pair)) for pair in pairs]
        known = _read_shards(folder, set(keys))
        missing = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}.items())
        for first in range(0, len(missing), SHARD):
            fresh, shard = {}, missing[first : first + SHARD]
            alone = self._made([[self.reader.passage(*pair)] for _, pair in shard], self.plain.features)
            for offset, ((key, _), row) in enumerate(zip(shard, alone, strict=True), first + 1):
                fresh[key] = row[0]
                if progress and (offset % 8 == 0 or offset == len(missing)):
                    progress({"stage": "features", "done": offset, "total": len(missing)})
            _write_shard(folder, fresh)
            known |= fresh
        return np.stack([known[key] for key in keys])

    def keep(self, pairs: Sequence[Pair], features: np.ndarray, home: Path) -> None:
        """Put features `[N, F]` that were read beside others where `read_cached` looks for them."""
        folder = Path(home) / "cache" / "features" / self.spec.hash
        rows = {sha256_json(list(pair)): row for pair, row in zip(pairs, features, strict=True)}
        known = _read_shards(folder, set(rows))
        fresh = [key for key in rows if key not in known]
        for first in range(0, len(fresh), SHARD):
            _write_shard(folder, {key: rows[key] for key in fresh[first : first + SHARD]})

    def states(self, pairs: Sequence[Pair], layer: int, progress: Progress | None = None) -> list[np.ndarray]:
        """States of each reply's tokens at one layer, `[R, D]` float32 each: what an attention head learns from.

        Each pair is computed alone, as in `read_cached`, and kept in memory only: they are several times what features
        are, and few trainings ask for them.
        """

        def said(passages: Sequence[Passage]) -> mx.array:
            first, last = passages[0].said
            return self.reader.hidden_states(passages, [layer])[0][0, first:last]

        missing = [pair for pair in dict.fromkeys(pairs) if (layer, pair) not in self._states]
        made = self._made([[self.reader.passage(*pair)] for pair in missing], said)
        for done, (pair, states) in enumerate(zip(missing, made, strict=True), 1):
            self._states[layer, pair] = states
            if progress and (done % 8 == 0 or done == len(missing)):
                progress({"stage": "token states", "done": done, "total": len(missing)})
        return [self._states[layer, pair] for pair in pairs]

    def _made(
        self, batches: Sequence[Sequence[Passage]], make: Callable[[Sequence[Passage]], mx.array]
    ) -> Iterator[np.ndarray]:
        """What is made of each batch; as many batches at once as the machine has lanes."""
        for first in range(0, len(batches), len(lanes())):
            made = []
            for lane, passages in zip(lanes(), batches[first:]):
                with mx.stream(lane):
                    made.append(make(passages))
            mx.eval(made)
            for features in map(np.array, made):
                if not np.isfinite(features).all():
                    raise ModelError(f"{self.reader.name} gives hidden states that are not finite; is it damaged?")
                yield features

    def features(
        self,
        passages: Sequence[Passage],
        embedded: mx.array | None = None,
        like: Sequence[mx.array | None] | None = None,
    ) -> mx.array:
        """Features `[N, F]` of passages, then the head's columns, as a graph.

        With `embedded` `[N, T, D]` that is read in place of their tokens' own vectors; with `like`, states `[N, T, D]`
        a layer (or `[1, T, D]` for all), those say which token `near` looks at.
        """
        asked = mx.array([passage.asked for passage in passages])
        said = mx.array([passage.said for passage in passages])
        answers: list[mx.array] = []
        if self.questions and isinstance(self.reader, LmReader):
            states, answers = self.reader.ask(passages, self.layers, embedded)
        else:
            states = self.reader.hidden_states(passages, self.layers, embedded)
        places = [self.layers.index(layer) for layer in self.spec.layers]
        held = like or [None] * len(places)
        blocks = (
            [pool(states[place], asked, said, self.pooled, by) for place, by in zip(places, held)]
            if self.pooled
            else []
        )
        if answers:
            kept = [answers[place] for place in places]
            blocks.append(mx.stack(kept, axis=2).reshape(len(passages), -1))  # [N, K, layers, D]
        if self.attention is not None:
            blocks.append(self.attention.attend(states[self.layers.index(self.attention.layer)], said))
        return mx.concatenate(blocks, axis=1)


def layer_numbers(depths: Sequence[float], num_layers: int) -> list[int]:
    """Block numbers, 0..num_layers, nearest to shares of the depth; each once, in order."""
    return sorted({round(depth * num_layers) for depth in depths})


def _write_shard(folder: Path, rows: dict[str, np.ndarray]) -> None:
    keys = list(rows)
    data = save({"features": np.stack([rows[key] for key in keys])}, metadata={"keys": " ".join(keys)})
    write_atomic(folder / f"{sha256_json(keys)[:16]}.safetensors", data)


def _read_shards(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as shard:
                keys = shard.metadata()["keys"].split()
                rows = shard.get_tensor("features") if not wanted.isdisjoint(keys) else ()
        except (SafetensorError, OSError, KeyError, TypeError):
            continue  # a damaged disk, not a kill of ours: computed again
        found |= {key: row for key, row in zip(keys, rows, strict=False) if key in wanted}
    return found
