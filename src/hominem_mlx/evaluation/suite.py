"""Is the adapter better than its base? Both are asked the same held-out things in one process, on one base."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hominem_mlx.config import Config
from hominem_mlx.errors import ModelError
from hominem_mlx.evaluation import measures
from hominem_mlx.evaluation.goals import figure, verdict
from hominem_mlx.evaluation.observe import Observed, Replies, Suite, drift, observe
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.schema import RewardOutput, Scorer
from hominem_mlx.storage.registry import Artifact

Progress = Callable[[dict[str, Any]], None]
Judged = dict[str, tuple[list[RewardOutput], list[RewardOutput]]]


def evaluate(
    lm: LanguageModel,
    suite: Artifact | Path | str,
    *,
    adapter: Artifact | Path | str | None = None,
    scorer: Scorer | None = None,
    audit_scorer: Scorer | None = None,
    ngram: Scorer | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an adapter against its base on held-out material.

    Args:
        lm: the base model; it comes back as it was given, adapter or not.
        suite: a `suite` artifact, or a folder with labels.jsonl, recall.jsonl, fixtures.jsonl (any may be missing).
        adapter: a `lora` artifact or its folder; without it, the adapter the model was loaded with.
        scorer: the training judge, a reward model; without it free answers are collected but not judged.
        audit_scorer: a judge that shares neither training prompts nor features with `scorer`.
        ngram: the baseline judge, measured on the held-out pairs beside the others.
        config: `config.evaluation` and `config.student.system`.
        progress: called with `{"stage", "done", "total"}`.

    Returns: `preference`, `memory`, `generation`, `drift`, `fixtures` (each None where the suite has nothing for it),
        `base_unchanged`, `figures` by id, `verdict {accepted, reasons}`, `seconds`.
    """
    config = config or Config()
    began = time.perf_counter()
    material = Suite.read(_folder(suite))
    with attached(lm, adapter) as adapter_folder:
        replies = Replies.of(lm, material, config)
        with lora.without_adapter(lm):
            weights = lm.fingerprint()
            before = observe(lm, material, replies, config, who="base", progress=progress)
        after = observe(lm, material, replies, config, who="adapter", progress=progress)
        asked = [prompt for prompt in material.prompts.values() for _ in range(config.evaluation.samples)]
        nats, tokens = drift(lm, asked, before.samples, config, progress=progress)
        with lora.without_adapter(lm):
            unchanged = weights == lm.fingerprint()
            judges = {"training": scorer, "audit": audit_scorer, "ngram": ngram}
            on_labels, on_samples = _judge(material, asked, before, after, judges, progress)
    labels, better, worse = replies.lengths
    settings = config.evaluation
    found: dict[str, Any] = {
        "base": {"name": Path(lm.name).name, "hash": lm.hash[:12]},
        "adapter": _hash(adapter) or adapter_folder.name,
        "suite": _hash(suite) or _folder(suite).name,
        "preference": measures.preference(material, before, after, labels, on_labels, settings),
        "memory": measures.memory(material, before, after, settings),
        "generation": measures.generation(material, before, after, on_samples, settings),
        "drift": measures.drift_per_token(nats, tokens, material, settings),
        "fixtures": measures.fixtures(material, before, after, better, worse),
        "base_unchanged": unchanged,
    }
    found["figures"] = figures(found)
    found["verdict"] = verdict(found["figures"])
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def figures(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures that an evaluation measures, each beside its goal."""
    entries: dict[str, dict[str, Any]] = {}
    if pairs := found["preference"]:
        how = f"implicit reward margin > 0 on all pairs of {pairs['prompts']} held-out prompts; bootstrap by prompt"
        low, high = pairs["interval"]
        entries["A2"] = figure("A2", pairs["accuracy_after"], n=pairs["n"], spread=(low, high), how=how)
        entries["A2_low"] = figure("A2_low", low, n=pairs["n"], spread=(low, high), how=how)
    if facts := found["memory"]:
        how = f"greedy answers to questions about {facts['facts']} facts: this key as a whole word, no other fact's"
        total = facts["total"]
        entries["A3"] = figure("A3", facts["recalled_after"] / total, n=total, spread=facts["interval"], how=how)
        entries["A3_before"] = figure("A3_before", facts["recalled_before"] / total, n=total, how=how)
    if free := found["generation"]:
        how = f"{free['samples']} sampled answers to each of {free['prompts']} held-out prompts, same seeds"
        for name, judge, part in (("A4_train", "training", 0), ("A4_audit", "audit", 1)):  # the mean; its low end
            if judge in free["judges"]:
                change = free["judges"][judge]["difference_in_sd"]
                spread = None if change[1] is None else change[1:]
                entries[name] = figure(name, change[part], n=free["n"], spread=spread, how=f"{how}; {judge} judge")
        entries["A4_length"] = figure("A4_length", free["mean_words_ratio"], n=free["n"], how=f"{how}; words")
        entries["A4_distinct2"] = figure("A4_distinct2", free["distinct2_ratio"], n=free["n"], how=how)
    how = "sha256 of the base weights in memory, before and after"
    entries["A6"] = figure("A6", found["base_unchanged"], n=1, how=how)
    if kept := found["fixtures"]:
        how = "greedy answers of base and adapter; what the base fails already does not count"
        entries["fixtures"] = figure("fixtures", len(kept["words_regressed"]), n=kept["n"], how=how)
        if kept["ordered"]:
            flipped = len(kept["order_regressed"]) / kept["ordered"]
            how = "log-probability per token of both replies; what the base fails already does not count"
            entries["fixtures_order"] = figure("fixtures_order", flipped, n=kept["ordered"], how=how)
    return entries


def _judge(
    suite: Suite,
    asked: list[str],
    before: Observed,
    after: Observed,
    judges: dict[str, Scorer | None],
    progress: Progress | None,
) -> tuple[dict[str, list[RewardOutput]], Judged]:
    """Verdicts on the labelled replies and on the free answers, by judge.

    The audit judge says nothing of the labelled replies: it may well have been fitted on them.
    """
    given = [(label.prompt, label.response) for label in suite.labels]
    first = [(prompt, answer.text) for prompt, answer in zip(asked, before.samples, strict=True)]
    second = [(prompt, answer.text) for prompt, answer in zip(asked, after.samples, strict=True)]
    on_labels: dict[str, list[RewardOutput]] = {}
    on_samples: Judged = {}
    present = {name: judge for name, judge in judges.items() if judge is not None and given}
    for done, (name, judge) in enumerate(present.items(), 1):
        if name != "audit":
            on_labels[name] = judge.score_many(given)
        if name != "ngram":
            said = judge.score_many([*first, *second])
            on_samples[name] = said[: len(first)], said[len(first) :]
        if progress:
            progress({"stage": "judging", "done": done, "total": len(present)})
    return on_labels, on_samples


@contextlib.contextmanager
def attached(lm: LanguageModel, adapter: Artifact | Path | str | None) -> Iterator[Path]:
    """The model with the adapter under examination; afterwards with the adapter it came with, or with none."""
    own = lm.adapter
    if adapter is None and own is None:
        raise ModelError("nothing to examine: give an adapter, or load the model with one")
    folder = _folder(adapter) if adapter is not None else Path(own or "")
    if adapter is None:
        yield folder
        return
    if own is None and lm.adapters:
        raise ModelError(f"{lm.name} has an adapter on that was never saved, and it would be lost: save or detach it")
    if own is not None:
        lora.detach(lm)
    try:
        lora.load_adapter(lm, folder)
        yield folder
    finally:
        lora.detach(lm)
        if own is not None:
            lora.load_adapter(lm, Path(own))


def _folder(place: Artifact | Path | str) -> Path:
    return place.folder if isinstance(place, Artifact) else Path(place)


def _hash(place: Artifact | Path | str | None) -> str | None:
    """What names an artifact whatever its ordinal, so that equal evaluations make equal reports."""
    return f"{place.kind} {place.hash[:8]}" if isinstance(place, Artifact) else None
