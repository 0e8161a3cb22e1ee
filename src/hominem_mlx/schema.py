"""The reward manifold in words and numbers, and the three seams between rooms.

Seven dimensions in [-1, 1], `reward_intensity` in [0, 1] (how strongly an example should drive learning, never < 0)
and `safety_score` in [-1, 1] (whether it is safe to learn from the text at all; a gate, never part of the reward).
`docs/REWARD_MANIFOLD.md` tells the same with examples.
"""

import functools
import math
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from hominem_mlx.files import sha256_json

Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Signed = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
FULL = (-1.0, 1.0)
EMPTY, TRUNCATED = "empty_response", "truncated"  # the flags of a `RewardOutput`
STRANGE, ADVERSARIAL = "out_of_distribution", "adversarial"


class Dimension(BaseModel):
    """One axis of the manifold; `low` and `high` are what a rater reads beside the two ends of its range."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    question: str
    low: str
    high: str
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    range: tuple[Signed, Signed] = FULL

    @model_serializer(mode="wrap")
    def _as_before_ranges(self, serialise) -> dict[str, Any]:
        """Without the range that nearly all have, so that what was made before there were others keeps its hash."""
        fields = serialise(self)
        if self.range == FULL:
            fields.pop("range", None)
        return fields


SEVEN = (
    Dimension(
        name="empathy",
        question="Does the reply see what this person feels and let it count?",
        low="mocks, dismisses or ignores what the person feels",
        high="sees precisely what this person feels and lets it count",
    ),
    Dimension(
        name="social_coherence",
        question="Does the reply fit the moment, the relationship and what was just said?",
        low="wrong register, a rude turn, ignores what was said",
        high="fits the moment, the relationship and what was just said",
    ),
    Dimension(
        name="agency_support",
        question="Does the reply enlarge the person's own choice and ability?",
        low="orders, takes the decision away, belittles, fosters dependence",
        high="enlarges the person's own choice and ability; the next step is theirs",
    ),
    Dimension(
        name="epistemic_integrity",
        question="Is the reply true, calibrated, and open about what is not known?",
        low="false, invented, certain without ground, flatters against the facts",
        high="true, calibrated, says what is not known, corrects kindly",
    ),
    Dimension(
        name="harm_avoidance",
        question="Does the reply notice the risk that is really there and lower it?",
        low="pushes towards harm to the person or to others",
        high="notices the risk that is really there and lowers it",
    ),
    Dimension(
        name="narrative_alignment",
        question="Does the reply stay with the person's story, values and given ground?",
        low="breaks or ignores their story, values or the given facts",
        high="stays with their story, connects to what matters to them, moves it on",
    ),
    Dimension(
        name="curiosity",
        question="Does the reply open the subject?",
        low="closes the subject, lectures, shows no interest",
        high="opens it: a real question, a fresh angle, an invitation to look further",
    ),
)

# What the person felt on reading the reply, where labels say so. No part of the manifold: axes of weight 0 beside it.
# Source: `science.md` 6.1 (valence, arousal and dominance: Mehrabian and Russell 1974; that surprise is a fourth axis:
# Fontaine et al. 2007).
EMOTIONS = tuple(
    Dimension(name=name, question=question, low=low, high=high, weight=0.0, range=ends)
    for name, question, low, high, ends in (
        ("valence", "Did it leave the person feeling bad or good?", "bad", "good", FULL),
        ("arousal", "How stirred was the person?", "calm", "stirred up", (0.0, 1.0)),
        ("dominance", "How much in command did the person feel?", "powerless", "in command", FULL),
        (
            "predictive_discrepancy",
            "Was it worse or better than the person had expected?",
            "much worse than expected",
            "much better than expected",
            FULL,
        ),
        (
            "temporal_orientation",
            "Did it turn the person towards what is to come or towards what was?",
            "towards what is to come",
            "towards what was",
            FULL,
        ),
        (
            "social_broadcast",
            "How seen did the person feel?",
            "alone with it",
            "seen, as if others were there",
            (0.0, 1.0),
        ),
    )
)


class Manifold(BaseModel):
    """The ordered dimensions a label or a prediction has. Two manifolds mix only when their hashes agree."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = 1
    dimensions: tuple[Dimension, ...] = SEVEN

    @property
    def names(self) -> tuple[str, ...]:
        """Dimension names in order; `K` of them."""
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def own(self) -> tuple[Dimension, ...]:
        """The dimensions that the person added to the seven."""
        return tuple(dimension for dimension in self.dimensions if dimension.name not in COMMON)

    @property
    def emotions(self) -> tuple[Dimension, ...]:
        """The axes beside it; a dimension that the person described takes the place of one of the same name."""
        return tuple(axis for axis in EMOTIONS if axis.name not in self.names)

    @property
    def common(self) -> "Manifold":
        """The manifold without them."""
        return self.without([dimension.name for dimension in self.own])

    def without(self, names: Collection[str]) -> "Manifold":
        """The manifold without some dimensions; itself where it has none of them."""
        kept = tuple(dimension for dimension in self.dimensions if dimension.name not in names)
        return self if kept == self.dimensions else Manifold(version=self.version, dimensions=kept)

    @functools.cached_property
    def hash(self) -> str:
        """Content hash, stored with everything that was made for this manifold."""
        return sha256_json(self.model_dump(mode="json"))[:16]

    def scalar(self, vector: Sequence[float | None]) -> float:
        """Overall preference: the weighted mean of `[K]` dimension values, in [-1, 1]; None is left out of it."""
        there = [(d.weight, value) for d, value in zip(self.dimensions, vector, strict=True) if value is not None]
        return sum(weight * value for weight, value in there) / sum(weight for weight, _ in there)

    def differences(self, other: "Manifold") -> list[str]:
        """What differs in `other`, a few words a dimension, for an error message."""
        mine, theirs = ({d.name: d for d in manifold.dimensions} for manifold in (self, other))
        told = [f"{name} is new" for name in theirs if name not in mine]
        told += [f"{name} is gone" for name in mine if name not in theirs]
        told += [
            f"{name} has another {field}"
            for name, dimension in mine.items()
            for field in type(dimension).model_fields
            if name in theirs and getattr(dimension, field) != getattr(theirs[name], field)
        ]
        return told


COMMON = frozenset(dimension.name for dimension in SEVEN)
MANIFOLD = Manifold()


class RewardOutput(BaseModel):
    """What a reward model says of one reply.

    `reward_vector` holds every dimension in [-1, 1]; `uncertainty` its standard deviation over bootstrap members
    (>= 0, same unit; of scalar, intensity and safety too); `unclipped` the values before clipping; `width` half of the
    interval around each of those that holds the label in nine of ten cases; `scatter` the standard deviation (>= 0) of
    labels about dimensions and scalar of a reply like this, where the model tells it; `scalar` the weighted mean.
    `emotion` holds what the person would feel, on those axes of `EMOTIONS` that the model has learnt, and counts in no
    other number. `flags` says when a value deserves less trust: `empty_response`, `truncated`, `out_of_distribution`
    (further from the training rows than 99 of 100 like them), `adversarial` (prompt or reply attacks a model or its
    judge, see `abuse.py`). `members` is what each bootstrap member says, in the same order for every reply, so that
    differences can be taken member by member; it is not written out.
    """

    model_config = ConfigDict(frozen=True)
    reward_vector: dict[str, Signed]
    reward_intensity: Unit
    safety_score: Signed
    scalar: Signed
    uncertainty: dict[str, float] = {}
    width: dict[str, float] = {}
    unclipped: dict[str, float] = {}
    scatter: dict[str, float] = {}
    emotion: dict[str, float] = {}
    flags: tuple[str, ...] = ()
    members: dict[str, tuple[float, ...]] = Field(default={}, exclude=True, repr=False)

    @property
    def vector(self) -> tuple[float, ...]:
        """The dimension values `[K]` in manifold order."""
        return tuple(self.reward_vector.values())

    def doubt(self, name: str) -> float:
        """All that is unsure about a number, >= 0: `sqrt(uncertainty^2 + scatter^2)`. Source: `science.md` 2.3."""
        return math.hypot(self.uncertainty.get(name, 0.0), self.scatter.get(name, 0.0))


@runtime_checkable
class Scorer(Protocol):
    """Anything that judges replies: a reward model, a baseline, a test double."""

    def score_many(self, pairs: Sequence[tuple[str, str]]) -> list[RewardOutput]:
        """Judge `(prompt, response)` pairs, in order."""
        ...


@runtime_checkable
class Generator(Protocol):
    """Anything that answers: a model in this process or behind HTTP."""

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float, seed: int, system: str | None = None
    ) -> list[str]:
        """One answer a prompt, in order. `temperature` 0 is greedy; equal seeds give equal answers where it can."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Anything that can write candidate replies and rate them. See `data/teacher.py` for the four there are.

    Every method raises `NoAnswer` when there is no usable answer to this one question (the item stays open and the run
    goes on) and `TeacherError` when going on makes no sense. `concurrency` is how many threads may ask at once; 1 means
    the calling thread only.
    """

    name: str
    concurrency: int

    def sample(self, prompt: str, *, persona: str, instruction: str, index: int) -> str:
        """One candidate reply to `prompt`, written as `persona` under `instruction`; `index` counts candidates."""
        ...

    def rate(
        self,
        prompt: str,
        response: str,
        *,
        dimensions: Sequence[Dimension],
        overall: bool = True,
        repeat: int = 0,
        beside: "tuple[str, Rating] | None" = None,
    ) -> "Rating":
        """The asked dimensions of one reply, judged in the order given; with `overall` also the other numbers.

        `repeat` above 0 asks anew, whatever was answered before. `beside` is the reply that this one is a changed copy
        of, with its rating: the two are judged side by side.
        """
        ...

    def edit(self, prompt: str, response: str, *, dimension: Dimension, repeat: int = 0) -> str:
        """`response` written again so that it falls short in `dimension` and is as it was in all others."""
        ...

    def prefers(self, prompt: str, first: str, second: str) -> float:
        """Probability in [0, 1] that `first` is the better reply; callers ask in both orders."""
        ...


class Rating(BaseModel):
    """What a rater returns for one reply: dimension values by name, intensity, safety, scalar and a rationale.

    What the rater was not asked for is missing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    reward: dict[str, Signed]
    reward_intensity: Unit | None = None
    safety_score: Signed | None = None
    scalar: Signed | None = None
    rationale: str = ""
