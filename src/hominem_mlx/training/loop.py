"""The one training loop: steps, schedule, clipping, measurements, checkpoints that resume to the bit."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from hominem_mlx.errors import TrainingError
from hominem_mlx.files import append_jsonl
from hominem_mlx.models.platform import compiles
from hominem_mlx.models.seeding import seeded
from hominem_mlx.training import blend, kept
from hominem_mlx.training.compiled import compiled
from hominem_mlx.training.parallel import ALONE, Ranks

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
Progress = Callable[[dict[str, Any]], None]
Look = dict[str, Any]  # what was measured after one step, by name


@dataclass(frozen=True)
class Plan:
    """How to train, whatever is trained."""

    steps: int
    learning_rate: float
    warmup_steps: int = 10
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    eval_every: int = 50
    save_every: int = 50
    blend: Literal["sum", "normalised", "alternate"] = "sum"
    seed: int = 0  # of the draw between alternating channels
    accumulate: int = 1
    """Micro-batches a step, for batches that do not fit at once: step s takes `batch_at` of s * accumulate and on."""
    compile: bool = False
    """Compile gradients where that may pay (`platform.compiles`)."""

    def schedule(self) -> Callable[[mx.array], mx.array]:
        """Linear warm-up, then cosine down to a tenth of the peak."""
        warmup = min(self.warmup_steps, max(1, self.steps // 5))
        rise = optim.linear_schedule(self.learning_rate / 100, self.learning_rate, warmup)
        fall = optim.cosine_decay(self.learning_rate, max(1, self.steps - warmup), self.learning_rate / 10)
        return optim.join_schedules([rise, fall], [warmup])


@dataclass(frozen=True)
class Channel:
    """One term of the loss: `weight * loss(model, batch_at(step))`.

    `loss` returns a scalar and a dict of measurements; `batch_at` is a pure function of the step (so the data position
    is the step) and returns None when nothing in that batch may be learnt. `teaches` says which parameters, by name,
    this term may move; the others do not even get a gradient. A term that `follows` a channel is part of it where
    channels are blended: it keeps its proportion to it and has its turn with it. `size` is what a batch's loss is a
    mean over, response tokens for instance: accumulated micro-batches count by it, and so are one big batch together;
    so do the shares of several ranks. `tokens` are those of a batch's rows, prompts included and padding not, for the
    speed that progress tells. `measures` names the measurements, for a rank that has none to show.
    """

    name: str
    weight: float
    batch_at: Callable[[int], Any]
    loss: Callable[[Any], tuple[mx.array, dict[str, mx.array]]]
    teaches: Callable[[str], bool] = lambda name: True
    follows: str = ""
    size: Callable[[Any], float] = lambda batch: 1.0
    tokens: Callable[[Any], int] = lambda batch: 0
    measures: tuple[str, ...] = ()

    @property
    def leader(self) -> str:
        """The channel that this term is part of."""
        return self.follows or self.name


def train(
    model: nn.Module,
    channels: list[Channel],
    plan: Plan,
    folder: Path,
    *,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    should_stop: Callable[[list[Look]], str | None] | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run `plan` over `channels`, or go on where a killed run stopped.

    Args:
        model: trainable parameters unfrozen, the rest frozen.
        channels: terms of the loss; each has its own backward pass, so that shares and conflicts can be measured.
        plan: steps, learning rate and so on.
        folder: where checkpoint and metrics lie; belongs to this run alone.
        evaluate: measured every `eval_every` steps and at the end.
        should_stop: gets all those measurements so far, the newest last, and gives a reason to end early, or None;
            rank 0 asks it, for all.
        progress: called every step with `step`, `steps`, `seconds_left`, `peak_gb` (the most memory MLX held since its
            peak was last reset), `tokens_per_second` where channels count tokens (of this process), and what the step
            measured.
        ranks: who trains along; all call this with the same channels but for their own shares of the batches. Rank 0
            alone writes to the folder, and reads there where to begin.

    Returns: what happened: steps, skipped steps, share of the update and mean loss by channel, evaluations,
    and how the two channels' gradients agree: mean cosine, and as a running mean `interference` (of its end).
    Raises: TrainingError on a loss that is not finite, or when another rank is gone; the last checkpoint stays good.
    """
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    optimizer = optim.AdamW(plan.schedule(), weight_decay=plan.weight_decay, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    story = (_resume(model, optimizer, folder) if ranks.is_first else None) or _new_story(channels)
    if ranks.size > 1:
        _take(model, optimizer, ranks.copied(_state(model, optimizer)))
        story = ranks.told(story)
    clock = _Clock(plan.steps, story["step"])
    lessons = _Lessons(model, [clock.counted(channel) for channel in channels], plan, ranks)

    while story["step"] < plan.steps and not story["stopped"]:
        turn = lessons.turn(story["step"])
        terms = lessons.terms(turn, story)
        _check_finite(terms, story, folder)
        report = {name: value for term in terms for name, value in term.report().items()}
        leaders = [term for term in terms if not term.channel.follows]
        if plan.blend == "normalised":
            terms = _normalised(terms, leaders, story, report)
        total = _total(terms, story)
        if turn:
            story["turns"][turn] = story["turns"].get(turn, 0) + 1
        if total:
            _compare(leaders, story, report)
            _update(model, optimizer, plan.clip_norm, total, [*terms, *leaders])
        else:
            story["skipped"] += 1  # an optimiser step without a lesson would still move weights by momentum
        story["step"] += 1
        ended = story["step"] == plan.steps
        if evaluate and (story["step"] % plan.eval_every == 0 or ended):
            measured = {"step": story["step"], **evaluate(story["step"])}
            story["evaluations"].append({**measured, **report})
            if ranks.is_first:
                append_jsonl(folder / METRICS, [{**measured, **report}])
            reason = should_stop(story["evaluations"]) if should_stop and ranks.is_first else None
            story["stopped"] = ranks.told(reason or "")
            report |= measured
        if ranks.is_first and (story["step"] % plan.save_every == 0 or ended or story["stopped"]):
            _save(model, optimizer, story, folder)
        if progress:
            progress({"step": story["step"], "steps": plan.steps, **clock.read(story["step"]), **report})
    return _summary(story)


def as_stage(progress: Progress | None) -> Progress | None:
    """The loop's events as those of a stage named `training`, for whoever shows several stages."""
    if progress is None:
        return None
    return lambda event: progress({"stage": "training", "done": event["step"], "total": event["steps"]} | event)


class _Clock:
    """How fast a run goes, on average since this process took it up; looks and checkpoints count."""

    def __init__(self, steps: int, first_step: int):
        self.steps, self.first_step = steps, first_step
        self.began, self.tokens = time.perf_counter(), 0

    def counted(self, channel: Channel) -> Channel:
        """The channel, and the tokens of its batches are counted as they are asked for."""

        def batch_at(place: int) -> Any:
            batch = channel.batch_at(place)
            if batch is not None:
                self.tokens += channel.tokens(batch)
            return batch

        return replace(channel, batch_at=batch_at)

    def read(self, step: int) -> dict[str, float]:
        """What progress tells of it after `step`."""
        spent = time.perf_counter() - self.began
        left = spent / (step - self.first_step) * (self.steps - step)
        speed = {"tokens_per_second": self.tokens / spent} if self.tokens else {}
        return {"seconds_left": left, **speed, "peak_gb": mx.get_peak_memory() / 1e9}


class _Lessons:
    """What the channels have to say in a step, as gradients."""

    def __init__(self, model: nn.Module, channels: list[Channel], plan: Plan, ranks: Ranks):
        self.model, self.channels, self.plan, self.ranks = model, channels, plan, ranks
        self.parameters = [name for name, _ in tree_flatten(model.trainable_parameters())]
        self.passes = {}
        for channel in channels:
            value_and_grad = nn.value_and_grad(model, channel.loss)
            if plan.compile and compiles():
                value_and_grad = compiled(model, value_and_grad)
            self.passes[channel.name] = _in_training(model, value_and_grad)
        self.weights = {channel.name: channel.weight for channel in channels if not channel.follows}

    def turn(self, step: int) -> str:
        """The channel whose step this is where they alternate, else none."""
        return blend.turn(self.weights, self.plan.seed, step) if self.plan.blend == "alternate" else ""

    def terms(self, turn: str, story: dict) -> list["_Term"]:
        """The term of every channel that has weight, its turn, and something to learn."""
        step, lessons = story["step"], []
        place = story["turns"].get(turn, 0) if turn else step
        for channel in self.channels:
            if not channel.weight or turn not in ("", channel.leader):
                continue
            # a weight is a share of the turns or a factor, never both
            weight = channel.weight / self.weights[turn] if turn else channel.weight
            # seeded: dropout draws the same when resumed here, and not the same on every rank
            draw = step * self.ranks.size + self.ranks.rank
            with _only(self.model, self.parameters, channel.teaches), seeded(draw):
                lesson, size = _lesson(channel, self.passes[channel.name], place, weight, self.plan.accumulate)
                if lesson is None and self.ranks.size > 1:  # without a row of a short batch it adds zeros
                    trainable = tree_flatten(self.model.trainable_parameters())
                    zeros = dict.fromkeys(channel.measures, mx.zeros(()))
                    lesson = mx.zeros(()), zeros, {name: mx.zeros_like(value) for name, value in trainable}
            lessons.append((channel, lesson, size))
        if self.ranks.size > 1:
            lessons = self._of_all_ranks(lessons)
        return [_Term.of(channel, *lesson) for channel, lesson, _ in lessons if lesson is not None]

    def _of_all_ranks(self, lessons: list[tuple]) -> list[tuple]:
        """The means by size of what all ranks found, in one sum; None where no rank found anything."""
        own = [{"loss": loss, **measured, **gradient} for _, (loss, measured, gradient), _ in lessons]
        together = []
        for (channel, _, size), means in zip(lessons, self.ranks.means(own, [size for *_, size in lessons])):
            lesson = None
            if means is not None:
                loss, measured = means.pop("loss"), {name: means.pop(name) for name in channel.measures}
                lesson = loss, measured, means
            together.append((channel, lesson, size))
        return together


def _lesson(channel: Channel, value_and_grad: Callable, step: int, weight: float, micro_batches: int) -> tuple:
    """What one step of a channel teaches, or None when nothing may be learnt, and the size of what it is a mean over.

    It is loss, measurements and weighted gradient.

    Over micro-batches the mean by size, kept as it grows: two copies of the gradient, whatever their number, and the
    very bits of a single one.
    """
    mean, seen = None, 0.0
    for place in range(step * micro_batches, (step + 1) * micro_batches):
        batch = channel.batch_at(place)
        if batch is None:
            continue
        (loss, measured), tree = value_and_grad(batch)
        new = (loss, measured, {name: weight * value for name, value in tree_flatten(tree)})
        size = channel.size(batch)
        seen += size
        if mean is not None:
            new = tree_map(lambda old, value, share=size / seen: old + share * (value - old), mean, new)
        mean = new
        del tree, new  # what nothing else holds is overwritten in place
        mx.eval(mean)
    return mean, seen


def _in_training(model: nn.Module, value_and_grad: Callable) -> Callable:
    """The same with dropout at work, which is at rest everywhere else."""

    def taught(batch):
        model.train()
        try:
            return value_and_grad(batch)
        finally:
            model.eval()

    return taught


@dataclass(frozen=True)
class _Term:
    """What one channel says in one step; norm and gradient are weighted."""

    channel: Channel
    loss: float
    measured: dict[str, float]
    norm: float
    gradient: dict[str, mx.array]

    @classmethod
    def of(
        cls, channel: Channel, loss: mx.array, measured: dict[str, mx.array], gradient: dict[str, mx.array]
    ) -> "_Term":
        """From a lesson, computed now."""
        norm = mx.sqrt(sum(mx.square(value.astype(mx.float32)).sum() for value in gradient.values()))
        mx.eval(loss, measured, gradient, norm)
        numbers = {name: value.item() for name, value in measured.items()}
        return cls(channel, loss.item(), numbers, norm.item(), gradient)

    def times(self, factor: float) -> "_Term":
        gradient = {name: factor * value for name, value in self.gradient.items()}
        return replace(self, norm=factor * self.norm, gradient=gradient)

    def report(self) -> dict[str, float]:
        """Loss and measurements by name."""
        name = self.channel.name
        return {name: self.loss, **{f"{name}_{key}": value for key, value in self.measured.items()}}


def _check_finite(terms: list[_Term], story: dict, folder: Path) -> None:
    for term in terms:
        if not (math.isfinite(term.loss) and math.isfinite(term.norm)):
            raise TrainingError(
                f"the loss of the {term.channel.name} channel is {term.loss} at step {story['step']}: stopped. The "
                f"checkpoint of step {story['saved_step']} is kept in {folder}; lower the learning rate, look at that "
                "batch"
            )


def _normalised(terms: list[_Term], leaders: list[_Term], story: dict, report: dict) -> list[_Term]:
    """The terms by factors that give every leader the same gradient norm, as running means have it."""
    for term in leaders:
        name, norm = term.channel.name, term.norm / term.channel.weight
        story["norms"][name] = blend.smoothed(story["norms"].get(name), norm)
    factors = blend.factors(story["norms"])
    report |= {f"{name}_factor": factor for name, factor in factors.items()}
    return [term.times(factors.get(term.channel.leader, 1.0)) for term in terms]


def _total(terms: list[_Term], story: dict) -> dict[str, mx.array]:
    """The sum of the gradients; each term's share in it is counted."""
    total: dict[str, mx.array] = {}
    for term in terms:
        _count(story, term.channel.name, term.loss, term.norm)
        total |= {name: total[name] + value if name in total else value for name, value in term.gradient.items()}
    return total


def _compare(leaders: list[_Term], story: dict, report: dict) -> None:
    """How far two channels agree in this step, and as a running mean."""
    if len(leaders) != 2 or min(term.norm for term in leaders) <= 0:
        return
    one, other = leaders
    cosine = _inner(one.gradient, other.gradient) / (one.norm * other.norm)
    story["cosines"] += cosine
    story["cosine_count"] += 1
    story["interference"] = blend.smoothed(story["interference"], cosine)
    report["interference"] = story["interference"]


def _update(
    model: nn.Module, optimizer: optim.Optimizer, clip_norm: float, total: dict[str, mx.array], terms: list[_Term]
) -> None:
    """The optimiser's step; empties the gradients it is given, so that it and the next step may take their memory."""
    optimizer.update(model, optim.clip_grad_norm(tree_unflatten(list(total.items())), clip_norm)[0])
    for held in (total, *(term.gradient for term in terms)):
        held.clear()
    mx.eval(model.trainable_parameters(), optimizer.state)


@contextlib.contextmanager
def _only(model: nn.Module, parameters: list[str], teaches: Callable[[str], bool]) -> Iterator[None]:
    """Inside the block only the parameters that are taught are trainable; afterwards all of `parameters` are again."""
    layers = dict(model.named_modules())
    silent = [name.rpartition(".") for name in parameters if not teaches(name)]
    for layer, _, leaf in silent:
        layers[layer].freeze(recurse=False, keys=leaf)
    try:
        yield
    finally:
        for layer, _, leaf in silent:
            layers[layer].unfreeze(recurse=False, keys=leaf)


def _inner(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    # in the order of the names, never of a set: its order, and so the sum's last bits, is another in each process
    both = [mx.inner(one[name].reshape(-1), other[name].reshape(-1)) for name in one if name in other]
    return sum(both).item() if both else 0.0


def _new_story(channels: list[Channel]) -> dict[str, Any]:
    zeros = {channel.name: {"steps": 0, "loss": 0.0, "norm": 0.0} for channel in channels}
    story = {"step": 0, "skipped": 0, "saved_step": 0, "cosines": 0.0, "cosine_count": 0, "stopped": ""}
    blending: dict[str, Any] = {"turns": {}, "norms": {}, "interference": None}
    return {**story, **blending, "channels": zeros, "evaluations": []}


def _count(story: dict, name: str, loss: float, norm: float) -> None:
    sums = story["channels"][name]
    sums["steps"] += 1
    sums["loss"] += loss
    sums["norm"] += norm


def _summary(story: dict) -> dict[str, Any]:
    total = sum(sums["norm"] for sums in story["channels"].values()) or 1.0
    channels = {
        name: {
            "steps": sums["steps"],
            "mean_loss": sums["loss"] / max(1, sums["steps"]),
            "share_of_update": sums["norm"] / total,
        }
        for name, sums in story["channels"].items()
    }
    cosine = story["cosines"] / story["cosine_count"] if story["cosine_count"] else None
    return {
        "steps": story["step"],
        "skipped_steps": story["skipped"],
        "stopped": story["stopped"] or None,
        "channels": channels,
        "mean_gradient_cosine": cosine,
        "interference": story["interference"],
        "evaluations": story["evaluations"],
    }


def _save(model: nn.Module, optimizer: optim.Optimizer, story: dict, folder: Path) -> None:
    """One file, one rename: weights, optimiser and position cannot disagree."""
    told = json.dumps({**story, "saved_step": story["step"]})
    try:
        kept.save(folder / CHECKPOINT, _state(model, optimizer), {"story": told})
    except OSError as error:
        raise TrainingError(
            f"{folder}: the checkpoint of step {story['step']} could not be written ({error}): stopped. That of step "
            f"{story['saved_step']} is kept; make room on the disk and give the same command again"
        ) from error
    story["saved_step"] = story["step"]


def _resume(model: nn.Module, optimizer: optim.Optimizer, folder: Path) -> dict[str, Any] | None:
    if not (folder / CHECKPOINT).exists():
        return None
    arrays, metadata = mx.load(str(folder / CHECKPOINT), return_metadata=True)
    _take(model, optimizer, arrays)
    return json.loads(metadata["story"])


def _state(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    arrays = {f"model.{name}": value for name, value in tree_flatten(model.trainable_parameters())}
    return arrays | {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}


def _take(model: nn.Module, optimizer: optim.Optimizer, arrays: dict[str, mx.array]) -> None:
    parts: dict[str, list] = {"model": [], "optimizer": []}
    for name, value in arrays.items():
        part, _, rest = name.partition(".")
        parts[part].append((rest, value))
    model.update(tree_unflatten(parts["model"]))
    optimizer.state = tree_unflatten(parts["optimizer"])
    mx.eval(model.trainable_parameters(), optimizer.state)
