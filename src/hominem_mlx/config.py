"""Every setting there is: one pydantic model per job, one TOML table each.

Order: `key=value` on the command line > `--config FILE` > `$HOMINEM_HOME/hominem.toml` > the defaults below. An unknown
key is an error that names the nearest known one. The resolved values go into every artifact's METADATA.
"""

import difflib
import functools
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hominem_mlx.errors import ConfigError, InputError
from hominem_mlx.files import explain, read_text, shown
from hominem_mlx.schema import COMMON, FULL, SEVEN, Dimension, Manifold, Signed

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Version = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]  # 3 is one too
Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=3, max_length=500)]

TAKEN = {  # names of other numbers: in labels, in answers of raters, in looks on the way of a training
    *("scalar", "reward_intensity", "intensity", "safety_score", "safety", "rationale", "first_is_better"),
    *("step", "row", "reward", "audit", "recall", "kl", "tokens", "distinct2", "strange", "unfinished"),
}


class Section(BaseModel):
    """One TOML table: no unknown keys, no surprises in types."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class Student(Section):
    """The model that learns."""

    base: str = "starter"
    """`starter` (the bundled tiny student), a folder, a Hugging Face repository (mlx-community/Qwen3-1.7B-4bit), or a
    model that `hominem train full` made (full/0001-3fa2c1d0)."""
    revision: str | None = None
    """Commit of the repository, so that the base cannot change under an adapter."""
    adapter: Version = "current"
    """Adapter to answer with: `current`, a version, or `none`."""
    reward_model: Version = "current"
    """Reward model to judge with: `current` or a version."""
    system: str | None = None
    """System prompt put before every conversation, in training and in chat alike."""


class OwnDimension(Section):
    """A dimension of a person's own; `docs/REWARD_MANIFOLD.md` shows one from the block to the reward model."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{1,39}$")]
    """Key of its numbers in label files: small letters, digits and _."""
    rubric: Phrase
    """What a rater asks of the reply, as one question."""
    bad: Phrase
    """What earns the lowest number."""
    good: Phrase
    """What earns the highest number."""
    range: tuple[Signed, Signed] = FULL
    """Lowest and highest number, within [-1, 1]: (stars - 3) / 2 makes that of one to five stars."""
    weight: NonNegative = 1.0
    """Its part of the overall preference; each of the seven has 1."""

    @model_validator(mode="after")
    def _can_stand_beside_the_seven(self):
        if self.name in COMMON or self.name in TAKEN:
            raise ValueError(f"{self.name} means something here already; choose another name")
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range = {list(self.range)}: the first number must be below the second")
        return self


class ManifoldConfig(Section):
    """What replies are judged on: seven dimensions, and those you add, each in a block [[manifold.dimension]]."""

    dimension: tuple[OwnDimension, ...] = ()
    """Name, rubric, bad, good, and if you like range and weight of each: docs/REWARD_MANIFOLD.md, "A dimension of your
    own"."""

    @model_validator(mode="after")
    def _each_name_once(self):
        names = [own.name for own in self.dimension]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the dimension {', '.join(twice)} is there twice; keep one block of it")
        return self

    @functools.cached_property
    def in_use(self) -> Manifold:
        """The seven dimensions and the person's own after them."""
        own = [
            Dimension(
                name=own.name, question=own.rubric, low=own.bad, high=own.good, weight=own.weight, range=own.range
            )
            for own in self.dimension
        ]
        return Manifold(dimensions=(*SEVEN, *own))


class Inference(Section):
    """Where answers come from when the student runs elsewhere (LM Studio, Ollama). Learning needs it right here."""

    endpoint: str | None = None
    """Base address of an Anthropic-compatible server; empty: the student runs here."""
    model: str | None = None
    """The model's name on that server."""
    api_key_env: str = "HOMINEM_INFERENCE_KEY"
    """Environment variable that holds the key; the key itself is never in a file."""


class TeacherConfig(Section):
    """Who writes and rates examples. The default never leaves the machine."""

    kind: Literal["recorded", "local", "anthropic"] = "recorded"
    """`recorded` (the starter corpus), `local` (an mlx-lm model, read by its
    log-probabilities), `anthropic` (a cloud or local server)."""
    model: str | None = None
    """Model id for `anthropic`, folder or repository for `local`."""
    base_url: str | None = None
    """Anthropic-compatible address, for example of LM Studio or Ollama; empty: Anthropic's own."""
    api_key_env: str = "ANTHROPIC_API_KEY"
    """Environment variable that holds the key."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests in flight at once."""
    max_tokens: Count = 1024
    """Longest answer asked for."""
    timeout_seconds: Positive = 120.0
    """Per request; the client retries a few times by itself."""
    max_retries: Annotated[int, Field(ge=0, le=10)] = 3
    """Retries of the client library on 408, 409, 429, 5xx and dropped connections."""
    rate_mode: Literal["shuffled", "single"] = "shuffled"
    """All dimensions in one call in a shuffled order, or one dimension a call (dearer, less halo)."""
    batch: bool = False
    """Ask by the Message Batches interface: half the price, an answer within 24 hours; Anthropic's own servers only."""
    batch_poll_seconds: Positive = 30.0
    """Between looks at a batch."""
    usd_per_million_input: NonNegative = 0.0
    """Price, for the estimate; prices change, so they are yours to set."""
    usd_per_million_output: NonNegative = 0.0
    """Price of answers."""
    max_cost_usd: NonNegative | None = None
    """Stop before a run whose estimate is higher."""


class DataConfig(Section):
    """Prompts, candidates and their split."""

    prompts: Count = 24
    """How many prompts `data generate` makes."""
    candidates: Annotated[int, Field(ge=2, le=32)] = 4
    """Candidate replies a prompt; good, bad and ambiguous ones are asked for by name."""
    student_candidates: Annotated[int, Field(ge=0, le=32)] = 2
    """Of these, replies by the student itself (on-policy)."""
    edits: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.3
    """Share of all candidates that `data sample --edits` makes contrast edits: copies worse in one dimension only."""
    seed: int = 0
    """Seed of every draw in `data`."""


class PairConfig(Section):
    """From labels to preference pairs."""

    min_margin: NonNegative = 0.1
    """Smallest difference of scalar labels that makes a pair."""
    temperature: Positive = 0.25
    """T in target = sigmoid(margin / sqrt(T^2 + u+^2 + u-^2))."""
    max_per_prompt: Count = 6
    """Seeded cap, so that a prompt with many candidates does not rule."""
    on_policy: Annotated[int, Field(ge=0, le=64)] = 0
    """Answers the student gives to each training prompt, scored by the reward model; best against worst is a pair."""
    on_policy_max_tokens: Count = 64
    """Longest of these answers."""
    on_policy_min_margin: NonNegative = 0.1
    """Smallest difference between the lower bound of the best and the value of the worst."""
    on_policy_strange: bool = False
    """Whether answers count that are unlike all that the reward model was trained on, so that it can only guess."""
    seed: int = 0
    """Seed of the cap and of sampling."""


READ: dict[str, dict[str, Any]] = {  # by kind of backbone; `docs/ARCHITECTURE.md` says how they were chosen
    "encoder": {
        "layers": (0.0, 0.17, 0.33, 0.5, 0.67),
        "poolings": ("mean", "std", "gap", "near"),
        "words": 0.5,
    },
    "lm": {"layers": (0.0, 0.33, 0.67), "poolings": ("mean", "max", "std", "gap"), "words": 0.0},
}


class RewardConfig(Section):
    """The reward model."""

    backbone: Literal["auto", "encoder", "lm", "ngram"] = "auto"
    """`encoder` (of sentences), `lm` (the student's states), `ngram` (baseline), `auto`: encoder when present."""
    model: str | None = None
    """Folder or repository of the backbone; empty: the fetched encoder, or the student's base."""
    layers: tuple[Share, ...] = ()
    """Depths (share of all layers, 0 the embeddings) whose hidden states are read; none: what was best of those that
    were measured, 0, 0.17, 0.33, 0.5 and 0.67 of the encoder, 0, 0.33 and 0.67 of the student."""
    choose_layers: bool = False
    """Whether layers and poolings are chosen among six sets, by folds grouped by prompt, whatever the two settings say.
    Training then fits seven heads in place of one."""
    poolings: tuple[Literal["mean", "max", "std", "last", "prompt", "gap", "near", "judge"], ...] = ()
    """How response tokens become one vector; none: `mean`, `std`, `gap` and `near` with the encoder, `mean`, `max`,
    `std` and `gap` with the student. `gap` is the distance of their mean from the prompt's, by feature, `near`
    the mean distance of each from the prompt's token most like it, `prompt` the prompt's mean. `judge` (`lm` only) asks
    the model each dimension's question after the reply and takes the state with which it would begin to answer."""
    words: NonNegative | None = None
    """What counts of words and of two in a row weigh in the ridge beside the backbone's states, which weigh 1; 0 leaves
    them out. Not set: 0.5 with the encoder, 0 with the student. `ngram` counts in any case."""
    head: Literal["ridge", "attention"] = "ridge"
    """`ridge`: a linear map of the poolings; `attention`: each output looks for its own places in a reply by a learned
    query, trained by Huber and Bradley-Terry with early stopping. Slower, and in memory it takes what all tokens do."""
    attention_layer: Share = 0.67
    """Depth (share of all layers) of the states an attention head reads."""
    lora_rank: Annotated[int, Field(ge=0, le=64)] = 0
    """Above 0: LoRA of this rank beside the backbone's layers up to there, learnt together with an attention head and
    kept with the reward model; the backbone stays as it is. Each of up to 30 rounds costs as much as reading all rows
    three times, and every fold of the account has its own."""
    penalties: tuple[Positive, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Ridge penalties to choose from, per dimension, by folds grouped by prompt; a feature row has squared length 1."""
    edit_weight: NonNegative = 3.0
    """How much the difference between a contrast edit and its original weighs, beside a reply by itself, in how the
    dimensions differ; the overall judgement hangs on no weight. 0 is a plain ridge; n-grams have none."""
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    """Folds grouped by prompt."""
    members: Annotated[int, Field(ge=1, le=64)] = 8
    """Bootstrap-by-prompt heads; their spread is the uncertainty."""
    quantiles: bool = False
    """Whether the model also tells, reply by reply, how far labels of a dimension and the scalar scatter about what it
    says. `score` shows it, and `rl.uncertainty_weight` counts it as doubt."""
    scalar: Literal["linear", "gated"] = "linear"
    """How dimensions become one number: `linear` by their weights; `gated` by weights that hang on the prompt, where
    2,000 pairs of labels say that this is better. It wants `prompt` among the poolings."""
    length: Literal["kept", "removed"] = "kept"
    """Whether the scalar keeps what each dimension owes to the length of a reply. This and `scalar` are for scores,
    pairs and comparisons; acceptance, attribution and reinforcement go by the plain weighted mean."""
    seed: int = 0
    """Seed of folds and bootstrap."""

    @model_validator(mode="after")
    def _fit_together(self):
        if self.head == "attention" and self.backbone == "ngram":
            raise ValueError("head = attention reads the states of tokens, and n-grams have none; use head = ridge")
        if self.head == "attention" and self.choose_layers:
            raise ValueError(
                "choose_layers is for head = ridge, which is fitted in seconds: set attention_layer instead"
            )
        if self.head == "attention" and self.words:
            raise ValueError("words is for head = ridge, which counts them beside what it reads: leave it out, or 0")
        if (
            self.scalar == "gated"
            and self.backbone != "ngram"
            and (self.choose_layers or "prompt" not in self.poolings)
        ):
            raise ValueError("scalar = gated reads the prompt: add prompt to poolings, with choose_layers off")
        if self.lora_rank and self.head != "attention":
            raise ValueError("lora_rank needs head = attention: a ridge is solved, and gives the backbone no gradient")
        return self

    def reading(self, kind: str) -> "RewardConfig":
        """The same with all that was left to the backbone filled in for one of this kind; n-grams have none."""
        if kind == "ngram":
            return self
        given = {name: value for name in READ[kind] if (value := getattr(self, name)) not in ((), None)}
        if self.head == "attention":
            given["words"] = 0.0
        return self.model_copy(update=READ[kind] | given)


class AdapterConfig(Section):
    """What all ways to train an adapter have in common."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the adapter."""
    scale: Positive = 2.0
    """Scale of the adapter (alpha / rank in PEFT's words)."""
    num_layers: int = -1
    """Blocks, counted from the last, that get an adapter; -1 is all."""
    head_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """How many directions of its input the output layer may read, the strongest first; 0 leaves it free. With 1 it
    weighs words, which is learnt from little, and cannot learn replies by heart."""
    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Linear warm-up; then cosine to a tenth."""
    clip_norm: Positive = 1.0
    """Gradient clipping by global norm."""
    safety_low: Signed = -0.2
    """Nothing is learnt from a text this unsafe: the gate is shut."""
    safety_high: Signed = 0.2
    """From a text this safe all is: the gate is open; between, in proportion."""
    seed: int = 0
    """Seed of initialisation, order and every draw."""


class DualConfig(AdapterConfig):
    """The adapter: memory channel (SFT) and preference channel (soft DPO + NLL) in one recipe."""

    memory_weight: Share = 0.4
    """w_s; 0 leaves the memory channel out."""
    preference_weight: Share = 0.6
    """w_p; 0 leaves the preference channel out."""
    thumb_weight: NonNegative = 1.0
    """What a single thumb (KTO) weighs against a pair, as part of their channel; all thumbs together weigh at most this
    against all pairs. 0 leaves them out."""
    anchor_weight: NonNegative = 0.0
    """How strongly memories must leave the final hidden states of other replies where they are: those of the pairs, and
    the student's own answers to their prompts (made with pairs.on_policy)."""
    ideal_memories: Annotated[int, Field(ge=0)] = 0
    """With fewer memories than this their channel weighs less, by the root of their share, a quarter at least; the
    weights then add up to 1. 0: the number does not matter."""
    ideal_pairs: Annotated[int, Field(ge=0)] = 0
    """The same for pairs."""
    blend: Literal["sum", "normalised", "alternate"] = "sum"
    """How the channels share a step: their weighted `sum`; `normalised`, where each first gets the same gradient norm;
    `alternate`, one channel a step, drawn by weight (ALRIGHT)."""
    loss: Literal["dpo", "ipo", "simpo", "dpop", "odpo", "rdpo", "wpo"] = "dpo"
    """Of pairs: `dpo` with soft targets (RPO with `nll_weight`), `ipo` (a margin, not exceeded), `simpo` (per token, no
    reference), `dpop` (chosen replies must not lose), `odpo` (more where scores differ more), `rdpo` (length explains
    a part), `wpo` (pairs count as far as the student would say them)."""
    beta: Positive = 0.1
    """Inverse temperature of the loss. simpo counts per token and wants 2 to 2.5."""
    simpo_gamma: NonNegative = 1.0
    """simpo: the margin asked for."""
    dpop_lambda: NonNegative = 50.0
    """dpop: how much what the chosen reply has lost counts against it."""
    odpo_alpha: NonNegative = 1.0
    """odpo: how much log(score margin) is asked for on top; pairs without scores are learnt as by dpo."""
    rdpo_alpha: NonNegative = 0.01
    """rdpo: the part of a preference that a token more explains."""
    nll_weight: NonNegative = 0.2
    """Weight of the length-normalised NLL of the chosen reply."""
    kind: Literal["lora", "dora"] = "lora"
    """`lora`, or `dora`, which also learns the length of every row of a matrix: slower, and no other adapter can be
    merged with it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""
    memory_targets: Literal["linear", "head", "all"] = "linear"
    """What memories may move: the linear layers of the blocks, the output layer, or all of them."""
    preference_targets: Literal["linear", "head", "all"] = "linear"
    """What preferences may move. Apart from memory's, the two channels cannot disturb each other."""
    weight_decay: NonNegative = 0.0
    """AdamW decay of the adapter."""
    epochs: Count = 2
    """Passes over each channel's rows, without replacement; the shorter channel is repeated to keep step."""
    batch_pairs: Count = 16
    """Preference pairs a step; those of a prompt come together and share replies: take a few prompts' worth."""
    batch_memories: Count = 8
    """Memory pairs a step."""
    batch_thumbs: Count = 8
    """Single thumbs a step."""
    batch_anchors: Count = 8
    """Replies a step that the anchor holds."""
    max_tokens: Count = 2048
    """Longest row; the prompt is cut from its start, a reply never without saying so."""
    checkpoint: Share = 0.0
    """Share of the blocks computed a second time for their gradient: 1 takes a quarter of the memory and half as much
    time again. Families that do not allow it train as ever; the adapter's METADATA says how many: `checkpointed`."""
    memory_gb: NonNegative | None = None
    """Most memory that training may take, in GB (1e9 bytes); 0: what this machine has. Chunks of logits, checkpoints
    and parts of batches are then picked so that it fits. No part of what the adapter is: only rounding hangs on it,
    and the draws of dropout."""
    compile: bool = False
    """Compile the gradient (`mx.compile`), anew for every set of shapes. Those of one or two rows come again, those of
    more hardly ever: worth a try on a GPU with small batches. On a Linux CPU it gains nothing and is not done."""
    eval_every: Count = 50
    """Steps between looks at the validation part."""
    probes: Annotated[int, Field(ge=0)] = 8
    """In each look of `hominem train dual`, how many validation prompts are answered for the reward model and an audit
    judge to score, and how many taught facts are asked for; 0: none."""
    keep: Literal["last", "best"] = "last"
    """Publish the adapter of the `last` step, or that of the `best` look: the most validation pairs in order and, of
    equals, the likelier chosen replies."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after this many looks without a better one; 0: never."""
    save_every: Count = 50
    """Steps between resumable checkpoints."""
    max_displacement: NonNegative = 0.5
    """Stop when the chosen replies have lost more than this many nats a token against the reference; 0: never."""
    allow_swap: bool = False
    """Turn a pair around when the chosen side is clearly unsafe and the other is safe."""
    unsafe_pairs: Literal["drop", "npo"] = "drop"
    """Pairs with both sides below `safety_low`: left out, or both sides unlearnt by a bounded loss at a tenth of the
    weight."""
    sketch_pairs: Annotated[int, Field(ge=0)] = 0
    """Validation pairs whose gradients at the end are kept, sketched, beside the adapter (`sketches.safetensors`)."""

    @model_validator(mode="after")
    def _fit_together(self):
        if self.head_rank and self.kind == "dora":
            raise ValueError("head_rank needs kind = lora: the lengths DoRA learns read every direction")
        if self.unsafe_pairs == "npo" and self.loss == "simpo":
            raise ValueError("unsafe_pairs = npo needs another loss: simpo's beta is of a token, NPO's of a reply")
        if self.checkpoint and self.dropout:
            raise ValueError("checkpoint needs dropout = 0: what is computed a second time would draw another mask")
        return self


class FullConfig(Section):
    """Full tuning: every weight learns the memories by SFT. The result is a base of its own, not an adapter."""

    learning_rate: Positive = 5e-6
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Linear warm-up, at most a fifth of all steps; then cosine to a tenth."""
    weight_decay: NonNegative = 0.01
    """AdamW decay of every weight."""
    clip_norm: Positive = 1.0
    """Gradient clipping by global norm."""
    epochs: Count = 3
    """Passes over the memories, without replacement."""
    batch: Count = 1
    """Memories computed at once; memory for activations grows with it."""
    accumulate: Count = 32
    """Batches a step: their gradient is that of one large batch, at the memory of a small one."""
    compile: bool = False
    """As `dual.compile`."""
    max_tokens: Count = 2048
    """Longest row; the prompt is cut from its start, a reply never without saying so."""
    log_every: Count = 10
    """Steps between lines of loss and peak memory in the artifact's METADATA."""
    save_every: Count = 500
    """Steps between resumable checkpoints, each 12 bytes a weight."""
    safety_low: Signed = -0.2
    """Below: the gate is shut."""
    safety_high: Signed = 0.2
    """Above: the gate is open."""
    seed: int = 0
    """Seed of order and of rounding to the base's precision."""


class RlConfig(AdapterConfig):
    """The adapter, by reinforcement: the student answers training prompts, the reward model judges."""

    method: Literal["rloo", "dpo"] = "rloo"
    """`rloo` learns from every answer, by how much better it is than its siblings; `dpo` from the best and the worst of
    them, as a pair, where the judge can tell these apart."""
    steps: Count = 100
    """Steps; each answers a batch of prompts anew."""
    batch_prompts: Count = 8
    """Prompts a step."""
    answers: Annotated[int, Field(ge=2, le=32)] = 4
    """Answers to each of them; every one is compared with the others."""
    turns: Count = 1
    """Turns of the user. Above 1 conversations among the memories are played instead of prompts: the user's turns stay,
    the assistant's are made anew, and the judge reads each conversation once, as a whole."""
    max_tokens: Count = 128
    """Longest answer; one that does not end by then counts as worse than all that do."""
    kl_weight: NonNegative = 0.05
    """What a nat of distance from the base costs with `rloo`, in standard deviations of the reward."""
    beta: Positive = 0.1
    """Strength of the pull towards the base with `dpo`."""
    conflicts: Literal["sum", "pcgrad", "cagrad", "mgda"] = "sum"
    """Dimensions that pull against each other, with `rloo`: `sum` adds them up by their weights; `pcgrad` takes out of
    each what points against another; `cagrad` helps the one that gains least, near the sum; `mgda` lets none fall. All
    but `sum` want each answer's gradient by itself too, which about doubles a step."""
    uncertainty_weight: NonNegative = 1.0
    """What a standard deviation of doubt in the reward costs; with `reward.quantiles` labels' scatter is part of it."""
    length_weight: NonNegative = 0.5
    """What an answer of twice the base's mean length costs."""
    targets: Literal["linear", "head", "all"] = "linear"
    """What may move: the linear layers of the blocks, the output layer, or all of them."""
    eval_every: Count = 10
    """Steps between looks by the guards."""
    save_every: Count = 10
    """Steps between resumable checkpoints."""
    probes: Annotated[int, Field(ge=8)] = 128
    """Answers to validation prompts in each look; the base's own answers to them set the scale of the reward."""
    max_kl: Positive = 10.0
    """Guard: nats between policy and base, a whole answer (or conversation)."""
    max_length: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.3
    """Guard: mean length against the base's."""
    min_distinct2: Share = 0.8
    """Guard: share of different neighbouring tokens against the base's."""
    max_strange: Share = 0.05
    """Guard: share of answers on which the reward model is less sure than on 99 % of the base's; it speaks when a look
    finds more, by over a standard error."""

    @model_validator(mode="after")
    def _fit_together(self):
        if self.conflicts != "sum" and self.method == "dpo":
            raise ValueError(f"conflicts = {self.conflicts} needs method = rloo: dpo learns from one order of answers")
        return self


class EvaluationConfig(Section):
    """How an adapter is judged."""

    samples: Count = 4
    """Sampled answers a held-out prompt."""
    max_tokens: Count = 64
    """Longest sampled answer."""
    recall_tokens: Count = 40
    """Longest answer to a recall question."""
    temperature: Positive = 1.0
    """Of sampling."""
    min_margin: NonNegative = 0.3
    """Held-out pairs count from this scalar label margin on."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamplings by prompt behind every interval."""
    seed: int = 0
    """Seed of sampling and bootstrap."""


class Config(Section):
    """All tables together; `Config()` is a working default that never leaves the machine."""

    student: Student = Student()
    manifold: ManifoldConfig = ManifoldConfig()
    inference: Inference = Inference()
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    pairs: PairConfig = PairConfig()
    reward: RewardConfig = RewardConfig()
    dual: DualConfig = DualConfig()
    full: FullConfig = FullConfig()
    rl: RlConfig = RlConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def home_folder(flag: str | os.PathLike | None = None) -> Path:
    """`--home`, else `$HOMINEM_HOME`, else `~/.hominem`."""
    return Path(flag or os.environ.get("HOMINEM_HOME") or "~/.hominem").expanduser().absolute()


def load_config(
    home: Path | None = None, file: Path | None = None, overrides: Sequence[str] = (), defaults: dict | None = None
) -> Config:
    """The resolved configuration.

    Args:
        home: folder whose `hominem.toml` is read when it exists.
        file: a TOML file that wins over it.
        overrides: `table.key=value` strings that win over both; values are TOML, bare words are strings.
        defaults: tables that lie below everything (a recipe's own, for instance the demo's).

    Raises: ConfigError naming every wrong key and value at once.
    """
    tables: dict[str, Any] = {}
    _merge(tables, defaults or {})
    sources = [home / "hominem.toml"] if home is not None and (home / "hominem.toml").exists() else []
    problems: list[str] = []
    clashes: dict[str, str] = {}  # where a source's settings of one table do not go together: another may mend that
    for path in [*sources, *([Path(file)] if file is not None else [])]:
        values = read_toml(path)
        found = sorted((_line_of(keys, path), reason, clash) for keys, reason, clash in _mistakes(values))
        problems += [f"{path}:{line}: {reason}" for line, reason, clash in found if not clash]
        clashes |= {clash: f"{path}:{line}: {reason}" for line, reason, clash in found if clash}
        _merge(tables, values)
    for text in overrides:
        try:
            values = _parse_override(text)
        except ConfigError as error:
            problems += error.problems
            continue
        mistakes = [(reason, clash) for _, reason, clash in _mistakes(values)]
        problems += [f"{text}: {reason}" for reason, clash in mistakes if not clash]
        clashes |= {clash: f"{text}: {reason}" for reason, clash in mistakes if clash}
        _merge(tables, values)
    merged = list(_mistakes(tables))
    problems += [clashes.get(clash, reason) for _, reason, clash in merged if clash or not problems]
    if problems:
        raise ConfigError(problems)
    return Config.model_validate(tables)


def read_toml(path: Path) -> dict:
    """The tables of a TOML file, unchecked."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except InputError as error:
        raise ConfigError(error.problems) from None


def _parse_override(text: str) -> dict:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!a}: is not UTF-8") from None
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{text!r}: write overrides as table.key=value, for example dual.rank=8")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word: teacher.kind=local
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed


def _merge(into: dict, values: dict) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


Keys = tuple[str | int, ...]  # the way to a value: ("dual", "rank")


def _mistakes(values: dict) -> Iterator[tuple[Keys, str, str]]:
    """Where each unknown key and wrong value stands, what is wrong with it, and "" or the `_clash` that it is."""
    known = [
        f"{table}.{key}"
        for table, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]
    clean: dict[str, dict] = {}
    for table, section in values.items():
        if table not in Config.model_fields:
            said = table if isinstance(section, dict) else f"{table} = {_shown(table, section)}"
            yield (table,), f"unknown table or key {said}{_nearest(table, [*Config.model_fields, *known])}", ""
        elif not isinstance(section, dict):
            yield (table,), f"{table} = {shown(section)}: it is a table; write {table}.KEY", ""
        else:
            clean[table] = {key: value for key, value in section.items() if f"{table}.{key}" in known}
            for key, value in section.items():
                name = f"{table}.{key}"
                if name not in known:
                    yield (table, key), f"unknown key {name} = {_shown(key, value)}{_nearest(name, known)}", ""
    try:
        Config.model_validate(clean)
    except ValidationError as error:
        for item, reason in zip(error.errors(), explain(error), strict=True):
            within, place = item["loc"][-1:], ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                reason = f"unknown key {place} = {_shown(str(within[0]), item['input'])}"
                reason += _nearest(str(within[0]), OwnDimension.model_fields, OwnDimension.model_fields)
            yield item["loc"][: -1 if item["type"] == "missing" else None], reason, _clash(item)


def _clash(item: Any) -> str:
    """What tells one mistake of pydantic from others when it is about several settings of a table; else ""."""
    return f"{item['loc'][0]}: {item['msg']}" if len(item["loc"]) == 1 and item["type"] == "value_error" else ""


def _shown(key: str, value: object) -> str:
    """A value of a key we do not know, unless it looks like a secret that was put into the wrong file."""
    is_secret = isinstance(value, str) and re.search("key|token|secret|password", key, re.IGNORECASE)
    return "'...'" if is_secret else shown(value)


def _line_of(keys: Keys, path: Path) -> int:
    """The line on which a value begins: the first one without which the file, cut there, would lack it."""
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    whole = 0  # lines that are TOML by themselves
    for count in range(1, len(lines) + 1):
        try:
            value: Any = tomllib.loads("\n".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue  # within a value of several lines
        for key in keys:
            if not (key in value if isinstance(value, dict) else isinstance(value, list) and key in range(len(value))):
                break
            value = value[key]
        else:
            return whole + 1
        whole = count
    return len(lines)


def _nearest(key: str, known: Iterable[str], listed: Iterable[str] = Config.model_fields) -> str:
    tails = {name.split(".")[-1]: name for name in known} | {name: name for name in known}
    close = difflib.get_close_matches(key, list(tails), n=1, cutoff=0.5) or difflib.get_close_matches(
        key.split(".")[-1], list(tails), n=1, cutoff=0.5
    )
    return f"; did you mean {tails[close[0]]}?" if close else f"; known: {', '.join(listed)}"
