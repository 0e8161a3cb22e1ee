"""The dual-channel recipe: memories by SFT, values by soft DPO or a loss of its family, one adapter.

    L = w_s * CE(memories) + w_p * mean over pairs of  gate * intensity * [soft DPO + alpha * NLL(chosen) / tokens]

plus, where there are single thumbs, their KTO loss as a part of the preference channel; and, where asked for, an
anchor: w_a * |h - h_base|^2 / |h_base|^2 on replies that are no memories, which keeps memories from changing everything
else. Each term has its file: `memories.py`, `pairs.py`, `thumbs.py`, `anchor.py`; `material.py` puts them together.

With `preference_weight = 0` it is plain SFT, with `memory_weight = 0` plain DPO. The base is frozen and is the
reference: its log-probabilities are computed once, before the adapter is attached.

Several processes can share the work. Each cuts its part out of the same batches, and every term is a mean over
something that can be counted (pairs, thumbs, response tokens, the base's squared states), by which the parts count.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from hominem_mlx.config import Config
from hominem_mlx.files import lock, read_jsonl, sha256_json, write_jsonl
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.policy.held_back import sketches, validation, watch
from hominem_mlx.policy.material import Material
from hominem_mlx.records import Preference, SftPair, Thumb
from hominem_mlx.storage.registry import Artifact, Registry
from hominem_mlx.training.budget import memory_limit
from hominem_mlx.training.kept import take_back
from hominem_mlx.training.loop import METRICS, as_stage
from hominem_mlx.training.loop import train as run_loop
from hominem_mlx.training.parallel import ALONE, Ranks, program
from hominem_mlx.training.rows import Said
from hominem_mlx.training.sketch import write_sketches

Progress = Callable[[dict[str, Any]], None]
Look = Callable[[LanguageModel], dict[str, float]]
RECIPE = 2  # goes up when the same settings make another adapter, so that no run goes on by another recipe


def train(
    registry: Registry,
    pairs: Artifact,
    config: Config,
    *,
    lm: LanguageModel,
    on_top_of: Artifact | None = None,
    ranks: Ranks = ALONE,
    look: Look | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Train an adapter on a pairs dataset and publish it; a killed run goes on from its last checkpoint.

    Args:
        pairs: a `dataset` with preferences.train.jsonl, preferences.valid.jsonl and memory.jsonl.
        config: `config.dual` and `config.student.system` shape the adapter and are part of its identity; all but
            `dual.memory_gb`, which changes the rounding alone: a run that was killed can go on with less memory.
        lm: the base, without an adapter; it is handed back without one.
        on_top_of: an adapter that stays as it is under the new one. The two together are what speaks, and the base with
            this one is the reference.
        ranks: who shares the work; this is rank 0 of them, and the others call `assist`.
        look: what else to measure every `dual.eval_every` steps and before the first, by name; the model comes with the
            adapter on and must be left as it is. It is only noted: what is kept, and when to stop, hang on held-out
            pairs alone.

    Returns: the `lora` artifact, with all looks in its metrics.jsonl. Not yet `current`: that is for whoever judged it.
    Raises: TrainingError when there is nothing to learn from, when `dual.memory_gb` is not enough in any way, when
        another rank is gone, or when the loss stops being finite.
    """
    task = _Task(registry, pairs, config, lm, on_top_of)
    name, settings = task.run.name, config.dual
    with (
        lock(registry.home / "locks" / f"{name}.lock", f"training {name}", wait=False),
        _learnt(task, ranks, look, progress) as (material, before, summary),
    ):
        kept_step = (take_back(lm.model, task.run) if settings.keep == "best" else None) or summary["steps"]
        with registry.draft(
            "lora", parents=task.parents, config=task.resolved, seed=settings.seed, inputs={"base": lm.hash}
        ) as draft:
            lora.save_adapter(lm, draft.folder, material.shape)
            if sketched := sketches(material, task.held_back):
                write_sketches(sketched, draft.folder)
            if looks := [{"step": 0, **before}] * bool(before) + summary["evaluations"]:
                write_jsonl(draft.folder / METRICS, looks)
            draft.metrics = {"training": summary, "before": before, "kept_step": kept_step, **material.counts}
            draft.notes = {"base": lm.name, "pointer": lm.pointer}
    registry.audit("train", draft.published.ref, base=lm.name)
    shutil.rmtree(task.run, ignore_errors=True)
    return draft.published


def assist(
    registry: Registry,
    pairs: Artifact,
    config: Config,
    *,
    lm: LanguageModel,
    ranks: Ranks,
    on_top_of: Artifact | None = None,
) -> None:
    """Compute this rank's share of the `train` that rank 0 runs with the same arguments; nothing is written here.

    Raises: TrainingError when they are not the same, when another rank is gone, and whenever `train` does.
    """
    with _learnt(_Task(registry, pairs, config, lm, on_top_of), ranks):
        pass


class _Task:
    """What is to be trained, and what makes it the same as, or another than, a run before or on another machine."""

    def __init__(
        self, registry: Registry, pairs: Artifact, config: Config, lm: LanguageModel, on_top_of: Artifact | None
    ):
        self.config, self.lm, self.pairs, self.on_top_of = config, lm, pairs, on_top_of
        settings = config.dual
        self.preferences = _rows(pairs, "preferences.train.jsonl", Preference)
        self.held_back = _rows(pairs, "preferences.valid.jsonl", Preference)
        self.memories = _rows(pairs, "memory.jsonl", SftPair)
        self.anchors = _rows(pairs, "anchors.jsonl", SftPair, optional=True) if settings.anchor_weight else []
        self.thumbs = _rows(pairs, "thumbs.jsonl", Thumb, optional=True) if settings.thumb_weight else []
        self.settings = {
            "dual": settings.model_dump(mode="json", exclude={"memory_gb"}),
            "system": config.student.system,
            "recipe": RECIPE,
        }
        self.resolved: dict[str, Any] = self.settings | {"base": lm.hash}
        self.parents = [pairs, *(each for each in (on_top_of, registry.at(lm.folder)) if each)]
        name = sha256_json([*(parent.hash for parent in self.parents), self.resolved])[:16]
        self.run: Path = registry.home / "runs" / f"dual-{name}"

    def facts(self) -> dict[str, Any]:
        """What all ranks must have in common, by name."""
        return {
            "base": self.lm.hash,
            "pairs dataset": self.pairs.hash,
            "adapter below": self.on_top_of.hash if self.on_top_of else None,
            "settings": self.settings,
            "program": program(),
        }


@contextlib.contextmanager
def _learnt(
    task: _Task, ranks: Ranks, look: Look | None = None, progress: Progress | None = None
) -> Iterator[tuple[Material, dict[str, float], dict[str, Any]]]:
    """The model with a trained adapter on inside the block: its material, the look before, and what happened."""
    lm, settings, under = task.lm, task.config.dual, task.on_top_of
    ranks.agree(task.facts())
    with lora.loaded(lm, under.folder if under else None), memory_limit(settings.memory_gb) as limit:
        material = Material(lm, settings, task.config.student.system, progress, limit, ranks)
        mx.reset_peak_memory()
        spoken = material.spoken
        preferences, held_back = spoken(task.preferences), spoken(task.held_back)
        memories, anchors, thumbs = spoken(task.memories), spoken(task.anchors), spoken(task.thumbs)
        channels = material.channels(preferences, memories, anchors, thumbs)
        validate = validation(material, held_back)
        directions = material.head_directions()
        lora.attach(lm, material.shape, seed=settings.seed, keys=material.keys, on_top=under is not None)
        if directions is not None:  # another machine's may have other signs
            lora.aim_head(lm, ranks.copied({"directions": directions})["directions"])
        before = look(lm) if look else {}

        def measure(step: int) -> dict[str, float]:
            return {**(validate(step) if validate else {}), **(look(lm) if look else {})}  # rank 0 looks, all wait

        summary = run_loop(
            lm.model,
            channels,
            material.plan(),
            task.run,
            evaluate=measure if validate or ranks.told(look is not None) else None,
            should_stop=watch(material, task.run),
            progress=as_stage(progress),
            ranks=ranks,
        )
        yield material, before, summary


def _rows(pairs: Artifact, name: str, kind: type[Said], *, optional: bool = False) -> list[Said]:
    """The rows of a file of the dataset; of an `optional` one that is not there none."""
    if optional and not (pairs.folder / name).exists():
        return []
    return read_jsonl(pairs.file(name), kind, unique=None, may_be_empty=True)
