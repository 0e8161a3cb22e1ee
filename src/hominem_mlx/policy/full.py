"""Full tuning: every weight learns the memories by SFT; the result is a model of its own, not an adapter.

It is trained in float32, whatever the base is kept in: in 16 bits most steps of 5e-6 change nothing. On the bundled
student in bfloat16 100 of them lowered the loss by 0.001, in float32 by 0.060. For the same reason the result comes to
the base's precision by chance, in proportion: to the nearest number two thirds of that were lost, of 24 steps 90 %.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from hominem_mlx.config import Config, FullConfig
from hominem_mlx.errors import ModelError, TrainingError
from hominem_mlx.files import lock, read_jsonl, sha256_json
from hominem_mlx.models import backbone, lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.seeding import seeded
from hominem_mlx.policy.memories import Memories, MemoryBatch, learnable
from hominem_mlx.records import SftPair
from hominem_mlx.storage.registry import Artifact, Registry
from hominem_mlx.training import footprint
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.loop import Channel, Plan, as_stage
from hominem_mlx.training.loop import train as run_loop
from hominem_mlx.training.rows import Parts, Row, spoken, to_row

Progress = Callable[[dict[str, Any]], None]
RECIPE = 2  # goes up when the same settings make another model, so that no run goes on by another recipe
DROPPED_BITS = {mx.bfloat16: 16, mx.float16: 13}  # of a float32's fraction


def train(
    registry: Registry, pairs: Artifact, config: Config, *, lm: LanguageModel, progress: Progress | None = None
) -> Artifact:
    """Train all weights on the memories of a pairs dataset and publish them; a killed run goes on where it was.

    Args:
        pairs: a `dataset` with memory.jsonl.
        config: `config.full` and `config.student.system` shape the model and are part of its identity.
        lm: the base, not quantised and without an adapter. Its weights in memory are what is trained; afterwards it has
            those of its folder again, which is only read.

    Returns: the `full` artifact, which can be a base: `student.base=full/0001-3fa2c1d0`.
    Raises: ModelError for a base that cannot be trained whole, TrainingError when there is nothing to learn from, when
        memory or disk do not suffice, and when the loss stops being finite.
    """
    settings, system = config.full, config.student.system
    _refuse_quantised(lm)
    memories = read_jsonl(pairs.file("memory.jsonl"), SftPair, unique=None, may_be_empty=True)
    said = spoken(lm, memories)
    kept, weight = learnable(said, safety_low=settings.safety_low, safety_high=settings.safety_high)
    if not kept:
        raise TrainingError(
            f"there is nothing to learn from: {pairs.ref} has {len(memories)} memories, and none may be learnt; bring "
            "some in with `hominem data import`, or train preferences: `hominem train dual`"
        )
    rows, cut = [], 0
    for lesson in kept:
        texts, history = (lesson.instruction, lesson.response), lesson.history or ()
        name, longest = f"memory {lesson.id}", settings.max_tokens
        row, lost = to_row(lm, *texts, history=history, system=system, max_tokens=longest, name=name)
        rows.append(row)
        cut += lost > 0
    identity = {"base": lm.hash, "system": system, "recipe": RECIPE}
    resolved: dict[str, Any] = {"full": settings.model_dump(mode="json"), **identity}
    run = registry.home / "runs" / f"full-{sha256_json([pairs.hash, resolved])[:16]}"
    base = registry.at(lm.folder)
    with lock(registry.home / "locks" / f"{run.name}.lock", f"training {run.name}", wait=False):
        need = _refuse_too_large(lm, rows, settings.batch, run)
        kinds = {name: value.dtype for name, value in tree_flatten(lm.model.parameters())}
        try:
            lm.model.set_dtype(mx.float32)
            lm.model.unfreeze()
            lessons = Memories(LogProbs(lm), rows, weight, Parts(), batch=settings.batch, seed=settings.seed)
            batches = settings.epochs * lessons.order.batches_an_epoch

            def batch_at(place: int) -> MemoryBatch | None:
                return lessons.batch_at(place) if place < batches else None  # the last step may have fewer

            def peak(step: int = 0) -> dict[str, float]:
                return {"peak_gb": mx.get_peak_memory() / footprint.GB}

            mx.reset_peak_memory()
            summary = run_loop(
                lm.model,
                [Channel("memory", 1.0, batch_at, lessons.loss, size=lessons.size, tokens=lambda b: b.rows.num_tokens)],
                _plan(settings, batches),
                run,
                evaluate=peak,
                progress=as_stage(progress),
            )
            _round(lm, kinds, settings.seed)
            with registry.draft(
                "full",
                parents=[pairs, *([base] if base else [])],
                config=resolved,
                seed=settings.seed,
                inputs={"base": lm.hash},
            ) as draft:
                _save(lm, draft.folder)
                draft.metrics = {
                    "training": summary,
                    "memories": {
                        "given": len(memories),
                        "all_thoughts": len(memories) - len(said),
                        "refused_by_gate": len(said) - len(kept),
                    },
                    "cut_responses": cut,
                    "weights": footprint.num_weights(lm),
                    "needed_gb": need.total / footprint.GB,
                    **peak(),
                }
                draft.notes = {"base": lm.name}
        finally:
            backbone.reload(lm)
    registry.audit("train", draft.published.ref, base=lm.name)
    shutil.rmtree(run, ignore_errors=True)
    return draft.published


def _plan(settings: FullConfig, batches: int) -> Plan:
    return Plan(
        steps=-(-batches // settings.accumulate),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        eval_every=settings.log_every,
        save_every=settings.save_every,
        accumulate=settings.accumulate,
        compile=settings.compile,
    )


def _refuse_quantised(lm: LanguageModel) -> None:
    if lora.adapter_parameters(lm.model):
        raise ModelError(f"{lm.name} has an adapter on; full tuning trains the base itself: take the adapter off first")
    weights = tree_flatten(lm.model.parameters())
    packed = [name for name, value in weights if not mx.issubdtype(value.dtype, mx.floating)]
    if packed:
        raise ModelError(
            f"{lm.name} is quantised ({packed[0]} and {len(packed) - 1} more), and quantised weights cannot be tuned: "
            "train an adapter (`hominem train dual`), or name the model this one was made from, not quantised, such as "
            "student.base=Qwen/Qwen3-0.6B"
        )


def _refuse_too_large(lm: LanguageModel, rows: list[Row], batch: int, run: Path) -> footprint.Need:
    """What training takes of memory, where the machine has that, and the disk for checkpoint and result."""
    need, there = footprint.need(lm, rows, batch=batch), footprint.there_is()
    if need.total > there:
        raise TrainingError(
            f"tuning all {footprint.num_weights(lm) / 1e6:.1f} million weights of {lm.name} needs {need} of memory, "
            f"and there is {there / footprint.GB:.1f} GB: train an adapter (`hominem train dual`), take a smaller "
            f"base, end other programs, or lower full.max_tokens (the longest row has "
            f"{max(row.num_tokens for row in rows)} tokens) or full.batch ({batch})"
        )
    disk, free = footprint.disk(lm, run), footprint.free_disk(run)
    if disk > free:
        raise TrainingError(
            f"tuning {lm.name} needs {disk / footprint.GB:.1f} GB of disk for its checkpoints and the result, and "
            f"there is {free / footprint.GB:.1f} GB at {run.parent.parent}: make room, or use a --home on another disk"
        )
    return need


def _round(lm: LanguageModel, kinds: dict[str, mx.Dtype], seed: int) -> None:
    """Bring float32 weights to the precision they had, up or down by chance so that the mean stays what it is.

    Croci et al. 2022, Stochastic rounding (doi 10.1098/rsos.211631). A value that has the precision already keeps it.
    """
    with seeded(seed):
        for name, value in tree_flatten(lm.model.parameters()):
            lm.model.update(tree_unflatten([(name, rounded(value, kinds[name]))]))
            mx.eval(lm.model.parameters())


def rounded(value: mx.array, kind: mx.Dtype) -> mx.array:
    """float32 in a shorter float type: each number becomes one of its two neighbours there, the nearer one likelier."""
    if kind not in DROPPED_BITS:
        return value.astype(kind)
    step = 1 << DROPPED_BITS[kind]
    bits = value.view(mx.uint32) + mx.random.randint(0, step, value.shape, dtype=mx.uint32)
    return (bits & mx.array(~(step - 1) & 0xFFFFFFFF, mx.uint32)).view(mx.float32).astype(kind)


def _save(lm: LanguageModel, folder: Path) -> None:
    try:
        backbone.save(lm, folder)
    except (RuntimeError, OSError) as error:
        raise TrainingError(
            f"{folder.parent}: the trained model could not be written ({error}); its last checkpoint is kept: make "
            "room on the disk and give the same command again"
        ) from error
