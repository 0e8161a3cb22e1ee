"""One record per arrow of the line: prompt, trajectory, label, preference, memory pair.

Field names are those of `docs/FORMATS.md`; keys we do not know are kept out of the way (ignored), as our neighbours do,
so that files of theirs load here and ours load there. Values that cannot be right are refused with a reason.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from hominem_mlx.schema import COMMON, EMOTIONS, MANIFOLD, Manifold, Signed, Unit

Text = Annotated[str, Field(min_length=1, max_length=200_000)]
Id = Annotated[str, Field(min_length=1, max_length=200)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """Base of all rows: immutable, strict about types (a string is not a number), tolerant of extra keys."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    @model_validator(mode="after")
    def _texts_say_something(self):
        for name in ("prompt", "response", "chosen", "rejected", "instruction", "question"):
            value = getattr(self, name, None)
            if isinstance(value, str) and value.isspace():
                raise ValueError(f"{name} is only white space; write a text or delete the row")
        return self

    @model_validator(mode="after")
    def _metadata_can_be_written_again(self):
        try:
            json.dumps(getattr(self, "metadata", None), allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, TypeError):
            raise ValueError("metadata holds NaN, Infinity or half a character; write plain JSON values") from None
        return self


class Prompt(Record):
    """Something a person might say. `tags` and `difficulty` steer sampling and are reported on."""

    id: Id
    prompt: Text
    category: str = "general"
    difficulty: Literal["easy", "medium", "hard"] = "medium"
    tags: list[str] = []
    source: str = "human"
    metadata: dict[str, Any] = {}


class Trajectory(Record):
    """One candidate reply to a prompt, with who wrote it and how it was asked for."""

    id: Id
    prompt_id: Id
    category: str = "general"
    prompt: Text
    response: Text
    persona: str = ""
    instruction: str = ""
    candidate_index: Annotated[int, Field(ge=0)] = 0
    labeller: str = ""
    edit_of: str | None = None
    lowered: str | None = None
    metadata: dict[str, Any] = {}


class Reply(Record):
    """Something said and the reply to it: all that a reward model needs."""

    prompt: Text
    response: Text


class Reward(Record):
    """The labelled numbers of one reply. Missing dimensions are None: masked in training, never read as 0.

    Dimensions that a person added are further keys, and so are axes of emotion (`schema.EMOTIONS`). Validated with
    `context={"manifold": ...}` they must be dimensions of that manifold, or such axes, and lie in their range.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Signed | None]
    empathy: Signed | None = None
    social_coherence: Signed | None = None
    agency_support: Signed | None = None
    epistemic_integrity: Signed | None = None
    harm_avoidance: Signed | None = None
    narrative_alignment: Signed | None = None
    curiosity: Signed | None = None
    scalar: Signed | None = None
    reward_intensity: Unit | None = None
    safety_score: Signed | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _own_dimensions_are_known(cls, value: Any, build, info: ValidationInfo):
        manifold = (info.context or {}).get("manifold")
        if manifold is not None and isinstance(value, dict):
            given = [name for name in value if name not in cls.model_fields and value[name] is not None]
            faults = {name: fault for name in given if (fault := _fault(name, value[name], manifold))}
            if faults:
                told = [
                    InitErrorDetails(type=PydanticCustomError("dimension", fault), loc=(name,), input=value[name])
                    for name, fault in faults.items()
                ]
                raise ValidationError.from_exception_data(cls.__name__, told)
        return build(value)

    @property
    def own(self) -> dict[str, float]:
        """The numbers in dimensions that the person added, and in axes of emotion."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}

    def number(self, name: str) -> float | None:
        """One number by its name; None where there is no label."""
        return getattr(self, name) if name in type(self).model_fields else self.own.get(name)

    def vector(self, manifold: Manifold = MANIFOLD) -> list[float | None]:
        """Dimension values `[K]` in manifold order; None where there is no label."""
        return [self.number(name) for name in manifold.names]

    def overall(self, manifold: Manifold = MANIFOLD) -> float | None:
        """The rater's own scalar, else the weighted mean of the dimensions, else None.

        Dimensions that the person added are part of that mean where they have a label; the seven all must.
        """
        if self.scalar is not None:
            return self.scalar
        vector = self.vector(manifold)
        holes = [name for name, value in zip(manifold.names, vector, strict=True) if value is None]
        return None if COMMON.intersection(holes) else manifold.scalar(vector)


class Label(Record):
    """A rated reply: the row of `reward_samples.jsonl`. `labeller = human` wins over a teacher's row of the same id."""

    id: Id
    prompt_id: Id
    category: str = "general"
    prompt: Text
    response: Text
    reward: Reward
    rationale: str = ""
    labeller: str = "teacher"
    edit_of: str | None = None
    lowered: str | None = None
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _says_something(self):
        if all(value is None for value in self.reward.model_dump().values()):
            raise ValueError("reward has no number; rate at least one dimension or delete the row")
        return self


class Preference(Record):
    """Two replies to one prompt, the first thought better.

    `target` is the probability that it really is (0.5 to 1); `reward_intensity` weighs the pair, the safety scores of
    both sides feed the gate (`science.md` 3.3, 3.4). Only prompt, chosen and rejected are needed: peers' files load.
    """

    id: Id = ""
    prompt: Text
    chosen: Text
    rejected: Text
    prompt_id: str = ""
    chosen_id: str = ""
    rejected_id: str = ""
    category: str = "general"
    chosen_score: Finite | None = None
    rejected_score: Finite | None = None
    score_margin: Finite | None = None
    target: Annotated[float, Field(ge=0.5, le=1, allow_inf_nan=False)] = 1.0
    reward_intensity: Unit = 1.0
    safety_score: Signed = 1.0
    rejected_safety_score: Signed = 1.0


class Thumb(Record):
    """One reply that a person liked or did not, with no second one beside it, and what they said why.

    `confidence` weighs it; the safety score gates a reply that is to become likelier. Only prompt, response and good
    are needed; TRL's `completion` and `label` are read as response and good.
    """

    id: Id = ""
    prompt: Text
    response: Text
    good: bool
    reason: str = ""
    prompt_id: str = ""
    category: str = "general"
    confidence: Probability = 1.0
    safety_score: Signed = 1.0


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    role: Literal["user", "assistant"]
    content: Text


class SftPair(Record):
    """Something to remember: a question or instruction and the reply that should come.

    `history` holds the turns before the instruction, where there were any: read by the model, not learnt from here.
    """

    id: Id = ""
    instruction: Text
    response: Text
    history: list[Turn] | None = None
    source: str = "human"
    conversation_id: str | None = None
    message_id: str | None = None
    confidence: Probability = 1.0
    category: str = "general"
    created_at: str | None = None
    safety_score: Signed = 1.0
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _history_leads_to_the_instruction(self):
        turns = self.history or []
        if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(
                "history must go user, assistant, user, assistant: the instruction is the user's next turn"
            )
        return self


class RecallQuestion(Record):
    """A held-out question about a taught fact; recalled when the answer holds `key` and no other fact's key."""

    id: Id
    fact_id: Id
    question: Text
    key: Text


class Fixture(Record):
    """A prompt that matters to its owner and what must not regress there (see `evaluation/suite.py`)."""

    id: Id
    prompt: Text
    must_contain: list[str] = []
    must_not_contain: list[str] = []
    better: str | None = None
    worse: str | None = None
    why: str = ""


def _fault(name: str, value: object, manifold: Manifold) -> str:
    """What is wrong with a number in a dimension that is none of the seven; empty when nothing is."""
    dimension = next((each for each in (*manifold.dimensions, *manifold.emotions) if each.name == name), None)
    if dimension is None:
        return (
            f"there is no dimension {name}; take the number out, or say in hominem.toml what it means, with a block "
            f'[[manifold.dimension]] of the lines name = "{name}", rubric = "...", bad = "...", good = "..." '
            f"(docs/REWARD_MANIFOLD.md); axes of emotion are {', '.join(axis.name for axis in EMOTIONS)}"
        )
    low, high = dimension.range
    if isinstance(value, int | float) and not isinstance(value, bool) and not low <= value <= high:
        return f"the range of {name} is {low:g} to {high:g}"
    return ""
