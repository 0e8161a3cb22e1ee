"""The reward model: a frozen backbone, a head, and the one place where they become a judgement."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from pydantic import BaseModel, ConfigDict, ValidationError

from hominem_mlx.abuse import is_adversarial
from hominem_mlx.config import Config, home_folder, load_config
from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.files import explain, read_json, sha256_bytes, sha256_json, write_json
from hominem_mlx.models import backbone as backbones
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.encoder import NAME, find_encoder, load_encoder
from hominem_mlx.reward.attention import AttentionHead
from hominem_mlx.reward.distribution import Distribution
from hominem_mlx.reward.features import JUDGE, Backbone, EncoderReader, FeatureSpec, LmReader, Pair, Progress, Reader
from hominem_mlx.reward.head import EXTRA, RidgeHead
from hominem_mlx.reward.ngram import NgramFeatures
from hominem_mlx.reward.quantiles import QuantileHead, spread
from hominem_mlx.reward.scalar import Gate, ScalarCard, log_length
from hominem_mlx.reward.tuning import Tuning
from hominem_mlx.reward.words import WordCounts
from hominem_mlx.schema import ADVERSARIAL, EMPTY, MANIFOLD, STRANGE, Dimension, Manifold, RewardOutput
from hominem_mlx.storage.registry import Registry

WIDTH = 0.9  # how often the label lies within `RewardOutput.width` of the prediction
CARD, HEAD, VOCABULARY = "reward_model.json", "head.safetensors", "vocabulary.json"
GATE, QUANTILES = "gate.safetensors", "quantiles.safetensors"
DISTRIBUTION = "distribution.safetensors"  # not there in models of few rows, of n-grams, and older ones
TUNING = "lora.safetensors"  # low-rank parts beside the backbone's layers, of models that were trained with them
GET_ENCODER = "`hominem doctor --get-encoder` fetches it"


class Card(BaseModel):
    """What a reward model is, beside its arrays."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    manifold: Manifold
    outputs: tuple[str, ...]
    backbone: Literal["encoder", "lm", "ngram"]
    backbone_name: str
    backbone_hash: str = ""
    layers: tuple[int, ...] = ()
    poolings: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    words: int = 0
    """How many of the features, the last ones, are counts of words beside a backbone's states."""
    penalties: dict[str, float] = {}
    width: dict[str, float] = {}
    scalar: ScalarCard = ScalarCard()
    attention_layer: int | None = None
    """The block whose states an attention head reads; None with a ridge head."""
    epochs: dict[str, int] = {}
    """For how many each output of an attention head learnt; 0: nothing could be, and the mean is said."""
    lora_rank: int = 0
    """Of the low-rank parts beside the backbone's layers; 0 without any."""

    def as_json(self) -> dict:
        """What is written and hashed: of a card without words or attention, what it was before there were any."""
        unused = set() if self.words else {"words"}
        unused |= {"attention_layer", "epochs", "lora_rank"} if self.attention_layer is None else set()
        return self.model_dump(mode="json", exclude=unused)

    @functools.cached_property
    def judged(self) -> Manifold:
        """The manifold without the person's own dimensions that are no outputs: they had too few labels."""
        return self.manifold.without([own.name for own in self.manifold.own if own.name not in self.outputs])

    @property
    def emotions(self) -> tuple[Dimension, ...]:
        """The axes of emotion among the outputs."""
        return tuple(axis for axis in self.manifold.emotions if axis.name in self.outputs)


class RewardModel:
    """Judges replies; speaks the `Scorer` protocol. Nothing in it ever changes."""

    def __init__(
        self,
        card: Card,
        head: RidgeHead | AttentionHead,
        features: Backbone | NgramFeatures | None = None,
        *,
        gate: Gate | None = None,
        lm: LanguageModel | None = None,
        home: Path | None = None,
        distribution: Distribution | None = None,
        quantiles: QuantileHead | None = None,
        tuning: Tuning | None = None,
        words: WordCounts | None = None,
    ):
        self.card, self.head, self.gate, self.distribution = card, head, gate, distribution
        self.quantiles, self.tuning, self.words = quantiles, tuning, words
        self._features, self._lm, self._home = features, lm, home

    # --- judging ---------------------------------------------------------------------------------------------------

    def score(self, prompt: str, response: str) -> RewardOutput:
        """Judge one reply."""
        return self.score_many([(prompt, response)])[0]

    def score_many(self, pairs: Sequence[Pair]) -> list[RewardOutput]:
        """Judge `(prompt, response)` pairs, in order.

        A reply that says nothing, or nothing that the backbone can read, gets one standard deviation below the mean of
        the labels, with that deviation as its uncertainty and the flag `empty_response`, so that silence never pays.
        """
        said = [index for index, (_, response) in enumerate(pairs) if response.strip()]
        outputs = [self._empty] * len(pairs)
        if said:
            heard = [pairs[index] for index in said]
            features, flags = self.features.read(heard)
            values, members = self.predict(self.beside(features, heard))
            features = features[:, : len(self._moments[0])]
            weights, strange, scatter = self.weights(features), self.is_strange(features), self._scatter(values)
            for place, index in enumerate(said):
                if EMPTY not in flags[place]:
                    said_by = self._named(members[:, place], weights[place])
                    named = flags[place] + (STRANGE,) * bool(strange[place])
                    named += (ADVERSARIAL,) * any(map(is_adversarial, pairs[index]))
                    longer = log_length(pairs[index][1]) - self.card.scalar.log_length
                    outputs[index] = self._output(
                        values[place], _spread(said_by), named, said_by, weights[place], longer, scatter[place]
                    )
        return outputs

    def beside(self, features: np.ndarray, pairs: Sequence[Pair]) -> np.ndarray:
        """What the head reads of pairs: the features of the backbone `[N, F]`, and counts of words after them."""
        return beside(features, self.words, pairs)

    def judge_of(self, pair: Pair) -> Callable[[mx.array], mx.array]:
        """From features `[M, F]` in place of the pair's own to outputs `[M, O]`, as a graph; its words are held."""
        if self.words is None:
            return lambda features: self.head(features)[0]
        counts = mx.array(self.words.read([pair]))

        def judge(features: mx.array) -> mx.array:
            held = mx.broadcast_to(counts, (len(features), counts.shape[1]))
            return self.head(mx.concatenate([features, held], axis=1))[0]

        return judge

    def weights(self, features: np.ndarray) -> np.ndarray:
        """What each dimension counts in the scalar, `[N, K]` with sum 1, from features of the backbone `[N, F]`."""
        if self.gate is not None:
            asked = prompt_columns(self.card, features.shape[1])
            return np.array(self.gate(mx.array(features[:, asked])))
        return np.tile(self._fixed, (len(features), 1))

    def _scatter(self, values: np.ndarray) -> list[dict[str, float]]:
        """How far labels scatter about outputs `[N, O]`, by dimension and scalar; nothing where it cannot tell."""
        if self.quantiles is None:
            return [{}] * len(values)
        names = (*self.manifold.names, "scalar")
        found = spread(np.array(self.quantiles(mx.array(values)))).tolist()
        return [dict(zip(names, row, strict=True)) for row in found]

    @functools.cached_property
    def _fixed(self) -> np.ndarray:
        weights = np.array([dimension.weight for dimension in self.manifold.dimensions])
        return weights / weights.sum()

    def preference(self, one: RewardOutput, other: RewardOutput) -> float | None:
        """Probability that `one` is the better of two replies to one prompt; None where labels were too few to tell."""
        if self.card.scalar.temperature is None:
            return None
        return float(1 / (1 + np.exp(np.clip((other.scalar - one.scalar) / self.card.scalar.temperature, -50, 50))))

    def is_strange(self, features: np.ndarray) -> np.ndarray:
        """Which rows of features of the backbone `[N, F]` are out of distribution, bool `[N]`.

        None is where the model cannot tell.
        """
        if self.distribution is None:
            return np.zeros(len(features), bool)
        return self.distribution.is_strange((features - self._moments[0]) / self._moments[1])

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the backbone's features."""
        size = len(self.head.feature_mean) - self.card.words
        return np.array(self.head.feature_mean[:size]), np.array(self.head.feature_scale[:size])

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unclipped outputs `[N, O]` and those of the bootstrap members `[E, N, O]` from what `beside` makes.

        An attention head's columns come after the features, as its backbone gives them.
        """
        width = self.head.num_columns
        if features.shape[1] != width:
            raise ModelError(
                f"{self.card.backbone_name} gives {features.shape[1]} features, the reward model knows {width}; "
                "train it again: `hominem train reward`"
            )
        values, members = self.head(mx.array(features))
        return np.array(values), np.array(members)

    def read(self, pairs: Sequence[Pair], home: Path, progress: Progress | None = None) -> np.ndarray:
        """Features `[N, F]` of pairs without counts beside them, kept in the home where they cost something."""
        if isinstance(self.features, NgramFeatures):
            return self.features.read(pairs)[0]
        return self.features.read_cached(pairs, home, progress)

    def settings(self, config: Config) -> Config:
        """A configuration that trains the same kind of head, whichever the given one asks for."""
        head = "ridge" if self.card.attention_layer is None else "attention"
        own: dict = {"head": head, "lora_rank": self.card.lora_rank}
        if self.card.attention_layer is not None and isinstance(self.features, Backbone):
            own |= {
                "choose_layers": False,
                "attention_layer": self.card.attention_layer / self.features.reader.num_layers,
            }
        strength = self.words.usual**2 if self.words is not None else 0.0
        if self.backbone != "ngram" and abs((config.reward.reading(self.backbone).words or 0.0) - strength) > 1e-6:
            own["words"] = strength
        return config.model_copy(update={"reward": config.reward.model_copy(update=own)})

    @property
    def backbone(self) -> str:
        """What it reads with: `encoder`, `lm` or `ngram`."""
        return self.card.backbone

    @property
    def features(self) -> Backbone | NgramFeatures:
        """The frozen backbone itself, loaded when it is first needed."""
        if self._features is None:
            self._features = self._open()
        return self._features

    @property
    def manifold(self) -> Manifold:
        """The dimensions it judges on: those of its card, without any that had too few labels to be learnt."""
        return self.card.judged

    def fingerprint(self) -> str:
        """Digest of everything a score hangs on: equal fingerprints, equal scores on one machine."""
        arrays = tree_flatten(self.head.parameters()) + (tree_flatten(self.gate.parameters()) if self.gate else [])
        arrays += tree_flatten(self.quantiles.parameters(), ".quantiles") if self.quantiles else []
        digests = {name: sha256_bytes(memoryview(value).tobytes()) for name, value in arrays}
        digests |= {"distribution": self.distribution.digest} if self.distribution is not None else {}
        digests |= {"tuning": self.tuning.digest} if self.tuning is not None else {}
        digests |= {"words": sha256_json(self.words.as_json())} if self.words is not None else {}
        return sha256_json({"card": self.card.as_json(), "arrays": digests})

    def _open(self) -> Backbone:
        card = self.card
        if card.backbone == "encoder":
            model = None if card.backbone_name == NAME else card.backbone_name
            reader = open_reader("encoder", model, home=self._home or home_folder())
        elif self._lm is not None and self._lm.hash == card.backbone_hash:
            reader = LmReader(self._lm)
        else:
            reader = open_reader("lm", card.backbone_name, home=self._home or home_folder())
        if reader.hash != card.backbone_hash:
            raise ModelError(
                f"the reward model was trained on {card.backbone_name} {card.backbone_hash[:12]}, here it is "
                f"{reader.hash[:12]}: bring that version back, or train again with `hominem train reward`"
            )
        attention = self.head if isinstance(self.head, AttentionHead) else None
        return Backbone(reader, card.layers, card.poolings, card.questions, attention, self.tuning)

    def _named(self, members: np.ndarray, weights: np.ndarray) -> dict[str, tuple[float, ...]]:
        """What members `[E, O]` say of each output and the scalar; nothing without members."""
        if not len(members):
            return {}
        scalar = members[:, : len(weights)] @ weights
        named = dict(zip(self.card.outputs, members.T, strict=True)) | {"scalar": scalar}
        return {name: tuple(values.tolist()) for name, values in named.items()}

    def _output(
        self,
        values: np.ndarray,
        uncertainty: dict[str, float],
        flags: tuple[str, ...],
        members: dict[str, tuple[float, ...]],
        weights: np.ndarray,
        longer: float = 0.0,
        scatter: dict[str, float] | None = None,
    ) -> RewardOutput:
        """`weights` `[K]` of the scalar; `longer` than usual is the reply, in logarithms."""
        if not np.isfinite(values).all():
            raise ModelError("the reward model gave a value that is not finite; run `hominem artifacts verify`")
        unclipped = dict(zip(self.card.outputs, map(float, values), strict=True))
        vector, emotion = (
            {axis.name: min(axis.range[1], max(axis.range[0], unclipped[axis.name])) for axis in axes}
            for axes in (self.manifold.dimensions, self.card.emotions)
        )
        owed = [longer * self.card.scalar.slopes.get(name, 0.0) for name in vector]
        scalar = float(np.clip(np.array([*vector.values()]) - owed, -1.0, 1.0) @ weights)
        return RewardOutput(
            reward_vector=vector,
            reward_intensity=min(1.0, max(0.0, unclipped["reward_intensity"])),
            safety_score=min(1.0, max(-1.0, unclipped["safety_score"])),
            scalar=min(1.0, max(-1.0, scalar)),
            uncertainty=uncertainty,
            width=self.card.width,
            unclipped=unclipped,
            scatter=scatter or {},
            emotion=emotion,
            flags=flags,
            members=members,
        )

    @functools.cached_property
    def _empty(self) -> RewardOutput:
        mean, scale = np.array(self.head.label_mean), np.array(self.head.label_scale)
        spread = dict(zip(self.card.outputs, map(float, scale), strict=True))
        spread["scalar"] = float(scale[: len(self.manifold.names)].mean())
        return self._output(mean - scale, spread, (EMPTY,), {}, self._fixed)

    # --- on disk ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the model into `folder`, which should be a draft."""
        write_json(folder / CARD, self.card.as_json())
        mx.save_safetensors(str(folder / HEAD), dict(tree_flatten(self.head.parameters())))
        if self.gate is not None:
            mx.save_safetensors(str(folder / GATE), dict(tree_flatten(self.gate.parameters())))
        if self.quantiles is not None:
            mx.save_safetensors(str(folder / QUANTILES), dict(tree_flatten(self.quantiles.parameters())))
        if self.distribution is not None:
            self.distribution.save(folder / DISTRIBUTION)
        if self.tuning is not None:
            mx.save_safetensors(str(folder / TUNING), self.tuning.values)
        if isinstance(self._features, NgramFeatures):
            pieces = {"pieces": self._features.vocabulary, "idf": self._features.idf.tolist()}
            write_json(folder / VOCABULARY, pieces)
        if self.words is not None:
            write_json(folder / VOCABULARY, self.words.as_json())

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        lm: LanguageModel | None = None,
        home: Path | None = None,
        manifold: Manifold = MANIFOLD,
    ) -> "RewardModel":
        """A saved reward model; its backbone is loaded when it first scores.

        Args:
            folder: an artifact's folder, or a copy of one.
            lm: a loaded model; used as the backbone when it is the one the reward model was trained on.
            home: where the encoder is looked for; else the home the artifact lies in, else the default one.
            manifold: the dimensions in use; another version is refused.

        Raises: InputError naming everything that is wrong with the files.
        """
        folder = Path(folder)
        try:
            card = Card.model_validate(read_json(folder / CARD))
        except ValidationError as error:
            raise InputError([f"{folder / CARD}: {reason}" for reason in explain(error)]) from None
        if card.manifold.hash != manifold.hash:
            raise InputError(
                f"{folder / CARD}: was trained for manifold version {card.manifold.version} "
                f"({', '.join(card.manifold.names)}; {card.manifold.hash}), in use is version {manifold.version} "
                f"({manifold.hash}), where {', '.join(card.manifold.differences(manifold)) or 'the order is another'}; "
                "versions never mix: train again with `hominem train reward`, or put hominem.toml back"
            )
        ngram = _read_vocabulary(folder / VOCABULARY) if card.backbone == "ngram" else None
        words = _read_words(folder / VOCABULARY, card) if card.words else None
        head = _read_head(folder / HEAD, card, ngram)
        size = len(head.feature_mean) - card.words
        gate = _read_gate(folder / GATE, card, size) if (folder / GATE).exists() else None
        quantiles = _read_quantiles(folder / QUANTILES, card) if (folder / QUANTILES).exists() else None
        there = (folder / DISTRIBUTION).exists()
        distribution = Distribution.load(folder / DISTRIBUTION, size) if there else None
        tuning = _read_tuning(folder / TUNING) if card.lora_rank else None
        made = cls(card, head, ngram, gate=gate, lm=lm, home=home or _home_of(folder), distribution=distribution)
        made.quantiles, made.tuning, made.words = quantiles, tuning, words
        return made


def _spread(members: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """Standard deviation over members, output by output."""
    return {name: float(np.std(values)) for name, values in members.items()}


def _read_head(path: Path, card: Card, ngram: NgramFeatures | None) -> RidgeHead | AttentionHead:
    arrays = _read_arrays(path)

    def size(name: str) -> int:
        return arrays[name].shape[0] if name in arrays and arrays[name].ndim else 0

    head: RidgeHead | AttentionHead
    if card.attention_layer is None:
        width = len(ngram.vocabulary) if ngram else size("weight")
        head = RidgeHead(width, len(card.outputs), size("member_bias"))
    else:
        sizes = size("feature_mean"), size("state_mean"), len(card.outputs), max(0, size("bias") - 1)
        head = AttentionHead(*sizes, card.attention_layer)
    wrong = card.outputs != (*card.judged.names, *EXTRA, *(axis.name for axis in card.emotions))
    problems = [f"its outputs {', '.join(card.outputs)} are not those of its manifold"] if wrong else []
    _fill(head, arrays, path, problems)
    return head


def _read_gate(path: Path, card: Card, width: int) -> Gate:
    arrays = _read_arrays(path)
    asked = prompt_columns(card, width)
    gate = Gate(len(asked), [dimension.weight for dimension in card.judged.dimensions])
    _fill(gate, arrays, path, [])
    return gate


def _read_quantiles(path: Path, card: Card) -> QuantileHead:
    head = QuantileHead(len(card.outputs), len(card.judged.names))
    _fill(head, _read_arrays(path), path, [])
    return head


def _read_tuning(path: Path) -> Tuning:
    values = _read_arrays(path)
    problems = [f"{name} holds NaN or infinity" for name, v in values.items() if not mx.isfinite(v).all().item()]
    names = {name.rpartition(".")[0] for name in values}
    missing = [f"{name}.{side}" for name in sorted(names) for side in "ab" if f"{name}.{side}" not in values]
    problems += [f"{name} is missing" for name in missing]
    problems += [] if values else ["holds nothing, and the reward model was trained with low-rank parts"]
    if problems:
        raise InputError([f"{path}: {problem}" for problem in problems])
    return Tuning(values)


def _read_arrays(path: Path) -> dict[str, mx.array]:
    try:
        return dict(mx.load(str(path)))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run `hominem artifacts verify`") from None


def _fill(module: nn.Module, arrays: dict[str, mx.array], path: Path, problems: list[str]) -> None:
    """Put arrays in their places. Raises: InputError naming all that do not fit, beside other problems."""
    expected = dict(tree_flatten(module.parameters()))
    problems += [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} does not belong to a reward model" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {value.shape}, expected {expected[name].shape}"
        for name, value in arrays.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems += [f"{name} holds NaN or infinity" for name, v in arrays.items() if not mx.isfinite(v).all().item()]
    if problems:
        raise InputError([f"{path}: {problem}" for problem in problems])
    module.update(tree_unflatten(list(arrays.items())))


def _read_vocabulary(path: Path) -> NgramFeatures:
    value = read_json(path)
    try:
        pieces, idf = [str(piece) for piece in value["pieces"]], np.array(value["idf"], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: needs `pieces` and `idf` ({error})") from None
    if len(pieces) != len(idf) or not np.isfinite(idf).all():
        raise InputError(f"{path}: {len(pieces)} pieces and {len(idf)} finite weights do not match")
    return NgramFeatures(pieces, idf)


def _read_words(path: Path, card: Card) -> WordCounts:
    words = WordCounts.from_json(read_json(path), path)
    if len(words.vocabulary) != card.words:
        raise InputError(
            f"{path}: {len(words.vocabulary)} pieces, {CARD} tells of {card.words}; run `hominem artifacts verify`"
        )
    return words


def beside(features: np.ndarray, words: WordCounts | None, pairs: Sequence[Pair]) -> np.ndarray:
    """Features of a backbone `[N, F]` and, after them, what is counted in the replies, `[N, F + V]`."""
    return features if words is None else np.concatenate([features, words.read(pairs)], axis=1)


def _home_of(folder: Path) -> Path | None:
    """The home an artifact lies in (`home/artifacts/reward_model/version`), or None."""
    parents = folder.absolute().parents
    return parents[2] if len(parents) > 2 and parents[1].name == "artifacts" else None


def prompt_columns(read: Card | FeatureSpec, width: int) -> np.ndarray:
    """Which of `width` features are the prompt's own: what a gate reads."""
    pooled = [name for name in read.poolings if name != JUDGE]
    size = width // max(1, len(read.layers) * (len(pooled) + len(read.questions)))
    own = [place for place in range(len(read.layers) * len(pooled)) if pooled[place % len(pooled)] == "prompt"]
    return np.concatenate([np.arange(place * size, (place + 1) * size) for place in own] or [np.arange(0)])


def open_reader(
    kind: str, model: str | None, *, home: Path, lm: LanguageModel | None = None, base: str = "starter"
) -> Reader:
    """The frozen model behind `encoder` or `lm` features.

    Args:
        kind: `encoder` or `lm`.
        model: a folder (or, for `lm`, a repository); None is the fetched encoder, or the student's base.
        home: where the fetched encoder lies.
        lm: the student, when it is loaded already.
        base: the student's base otherwise.
    """
    if kind == "lm":
        return LmReader(lm if lm is not None and model is None else backbones.load(model or base, home=home))
    if model is not None:
        return EncoderReader(load_encoder(Path(model).expanduser()), model)
    folder = find_encoder(home)
    if folder is None:
        raise ModelError(f"the sentence encoder {NAME} is not here; {GET_ENCODER}, or set reward.backbone=lm")
    return EncoderReader(load_encoder(folder, pinned=True), NAME)


def score(prompt: str, response: str, *, home: str | Path | None = None) -> RewardOutput:
    """Judge one reply with the reward model in use.

    Args:
        prompt: what the person said.
        response: the reply.
        home: the home folder; else `$HOMINEM_HOME`, else `~/.hominem`.

    Raises: RegistryError when no reward model is in use yet.
    """
    place = home_folder(home)
    config = load_config(place)
    artifact = Registry(place).get("reward_model", config.student.reward_model)
    return _loaded(artifact.folder, config.manifold.in_use).score(prompt, response)


@functools.lru_cache(maxsize=2)
def _loaded(folder: Path, manifold: Manifold) -> RewardModel:
    return RewardModel.load(folder, manifold=manifold)  # artifacts never change, so neither does this
