"""`hominem demo`: the whole line on the starter corpus and the bundled student, from prompts to a better adapter.

It is also the place to read how the rooms are put together: every step is the real one, called as any program would.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hominem_mlx.cli.session import Session, shares

if TYPE_CHECKING:
    from hominem_mlx.config import Config
    from hominem_mlx.storage.registry import Artifact, Registry

SETTINGS = Path(__file__).parents[1] / "starter" / "demo.toml"
FOLDER = "demo"  # a home inside the home: trying the demo must not mix the starter corpus into a person's own data


@click.command()
@shares()
def demo(session: Session) -> None:
    """The whole line, from prompts to a better adapter, in minutes, offline.

    Labels, reward model, preference pairs, adapter, report: on the starter corpus and the bundled tiny student, in a
    home of its own (the folder `demo` inside your home, or the one given with --home). Exit code 1 when it is refused.
    """
    from hominem_mlx.config import load_config, read_toml
    from hominem_mlx.storage.registry import Registry

    began = time.perf_counter()
    home = session.home if session.home_was_given else session.home / FOLDER
    file = Path(session.config_file) if session.config_file else None
    config = load_config(None, file, session.overrides, defaults=read_toml(SETTINGS))
    console = session.console
    warn_about_blas(console.note)
    with console.progress() as progress:
        found = run(Registry(home), config, progress=progress, note=console.note, began=began)
    console.table(
        ["", "what", "measured", "goal", ""], [_line(name, entry) for name, entry in found["figures"].items()]
    )
    verdict = found["verdict"]
    console.say("")
    console.say(f"Report: {found['report']}")
    if verdict["accepted"]:
        console.say(f"Accepted and in use. Talk with it: bin/hominem chat --home {home}")
    else:
        console.say("Not accepted:\n" + "\n".join(f"  {reason}" for reason in verdict["reasons"]))
    console.result(found)
    if not verdict["accepted"]:
        sys.exit(1)


def run(registry: "Registry", config: "Config", *, progress, note, began: float) -> dict[str, Any]:
    """Every step in order; returns what `--json` writes. Running it again gives the same artifacts back."""
    from hominem_mlx.data import dataset, preferences
    from hominem_mlx.errors import NotGoodEnough
    from hominem_mlx.evaluation import report, suite
    from hominem_mlx.evaluation.goals import figure
    from hominem_mlx.files import lock, read_jsonl
    from hominem_mlx.models import backbone
    from hominem_mlx.policy import dual
    from hominem_mlx.records import Label
    from hominem_mlx.reward import train as reward
    from hominem_mlx.reward.acceptance import checks, refusals
    from hominem_mlx.reward.model import RewardModel

    home = registry.home
    with lock(home / "locks" / "demo.lock", "running the demo", wait=False):
        dataset.import_starter(home)
        parts = dataset.split(registry, home, config)
        held_out = read_jsonl(parts["suite"].file("labels.jsonl"), Label)
        lm = backbone.load(config.student.base, revision=config.student.revision, home=home)

        model = reward.train(registry, parts["labels"], config, lm=lm, progress=progress)
        reasons = refusals(checks(model.metadata["metrics"]))
        registry.examined(model, reasons, by="demo")
        if reasons:
            raise NotGoodEnough("\n".join([f"{model.ref} is kept but not used:", *reasons]))
        registry.use(model)
        judge = RewardModel.load(model.folder, lm=lm, manifold=config.manifold.in_use)
        note(f"The reward model reads with: {judge.card.backbone}. {model.metadata['notes']['why'].capitalize()}.")
        audit = reward.fit_audit(held_out, config, judge=judge, home=home, lm=lm)
        baseline = reward.fit_baseline(dataset.read_labels(parts["labels"], "train"), config)

        pairs = preferences.pair(
            registry, parts["labels"], config, scorer=judge, generator=lm, reward_model=model, progress=progress
        )
        judged_before = _fingerprint(judge, held_out, model)
        adapter = dual.train(registry, pairs, config, lm=lm, progress=progress)
        found = suite.evaluate(
            lm,
            parts["suite"],
            adapter=adapter,
            scorer=judge,
            audit_scorer=audit,
            ngram=baseline,
            config=config,
            progress=progress,
        )
        found["base_unchanged"] = found["base_unchanged"] and judged_before == _fingerprint(judge, held_out, model)
        found["figures"] = {**suite.figures(found), **reward_figures(model)}
        if found["verdict"]["accepted"]:
            registry.use(adapter, pointer=lm.pointer, note="demo")
        seconds = time.perf_counter() - began
        clock = "A1" if fast_blas() else "A1_slow"
        found["figures"][clock] = figure(clock, round(seconds, 1), n=1, how="this run, from the command to its report")
        published = report.publish(registry, found, parents=[adapter, model, parts["suite"]])
    artifacts = {**parts, "pairs": pairs, "reward_model": model, "lora": adapter, "report": published}
    return _summary(found, model, artifacts, seconds)


def reward_figures(model: "Artifact") -> dict[str, dict[str, Any]]:
    """A5 and A9, asked of a reward model with the encoder, from the out-of-fold account in METADATA."""
    from hominem_mlx.evaluation.goals import figure

    account = model.metadata["metrics"]
    if account["backbone"] != "encoder":
        return {}
    gain, residual = account["pair_accuracy_difference"], account["residual"]
    how = "encoder against ngram, out of fold, same folds grouped by prompt, all learnable rows"
    above = residual["mean"] - residual["baseline_mean"]
    return {
        "A5": figure("A5", gain["low"], n=account["pairs"], spread=(gain["low"], gain["high"]), how=how),
        "A9": figure(
            "A9", above, n=account["rows"], how=f"{how}: {residual['mean']:.3f} - {residual['baseline_mean']:.3f}"
        ),
        "A9_p": figure("A9_p", residual["p"], n=account["rows"], how="labels permuted within prompts"),
    }


def fast_blas() -> bool:
    """Whether matrices are multiplied at a proper speed here."""
    import hominem_mlx

    return sys.platform != "linux" or hominem_mlx.openblas is not None


def warn_about_blas(note) -> None:
    """The first line of the demo, where it will be slow."""
    if not fast_blas():
        note("OpenBLAS is missing, so this will take several times as long: apt-get install libopenblas0")


def _fingerprint(judge, rows, model: "Artifact") -> tuple:
    """The reward model's files and some of its scores: what policy training must not change."""
    from hominem_mlx.files import sha256_folder

    return sha256_folder(model.folder), judge.score_many([(row.prompt, row.response) for row in rows[:16]])


def _line(name: str, entry: dict[str, Any]) -> list[Any]:
    from hominem_mlx.evaluation.goals import goals, say, say_goal

    mark = "yes" if entry["holds"] else "NO"
    return [name, goals()[name]["what"], say(entry["value"]), say_goal(entry["goal"]), mark]


def _summary(found: dict, model: "Artifact", artifacts: dict[str, "Artifact"], seconds: float) -> dict[str, Any]:
    account, free = model.metadata["metrics"], found["generation"]["judges"]
    return {
        "seconds": round(seconds, 1),
        "reward_model": {
            "backbone": account["backbone"],
            "pair_accuracy": account["pair_accuracy"],
            "baseline_pair_accuracy": account["baseline_pair_accuracy"],
            "pearson_mean": account["pearson_mean"],
            "residual_pearson_mean": account["residual"]["mean"],
            "baseline_residual_pearson_mean": account["residual"]["baseline_mean"],
        },
        "preference": {key: found["preference"][key] for key in ("accuracy_before", "accuracy_after", "n")},
        "memory": {key: found["memory"][key] for key in ("recalled_before", "recalled_after", "total")},
        "generation": {
            "reward_before": free["training"]["before"],
            "reward_after": free["training"]["after"],
            "reward_sd": free["training"]["sd"],
            "audit_before": free["audit"]["before"],
            "audit_after": free["audit"]["after"],
        },
        "base_unchanged": found["base_unchanged"],
        "artifacts": {name: artifact.ref for name, artifact in artifacts.items()},
        "report": str(artifacts["report"].file("report.html")),
        "figures": found["figures"],
        "verdict": found["verdict"],
    }
