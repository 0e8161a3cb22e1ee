"""`hominem evaluate`: is the reward model any good, is the adapter better than its base, what do both say?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hominem_mlx.cli.probe import map_, probe
from hominem_mlx.cli.session import InOrder, Session, Words, shares

if TYPE_CHECKING:
    from hominem_mlx.cli.console import Console
    from hominem_mlx.reward.acceptance import Check
    from hominem_mlx.storage.registry import Artifact

ADAPTER = click.option("--adapter", metavar="NAME", help="A version or a tag; else the newest adapter of this base.")


@click.group(cls=InOrder)
def evaluate() -> None:
    """Judge a reward model or an adapter on held-out material."""


@evaluate.command()
@click.option(
    "--rows", type=click.IntRange(0), default=5, show_default=True, help="Rows to show, predicted beside labelled."
)
@click.option("--against", metavar="NAME", help="Another reward model to compare it with: current, a version or a tag.")
@shares()
def reward(session: Session, rows: int, against: str | None) -> None:
    """Measure the reward model on held-out labels, beside n-grams, and show some predictions to look at.

    Every check of acceptance is shown beside its goal: no dimension lost in another, none that speaks for all, little
    moved by edits that mean nothing, little lost on categories of prompts that were never seen. With --against also
    what it has gained over a predecessor, on the same rows. Exit code 1 when a check refuses it, which says more than
    that a goal was not reached. The model in use is examined, or another one with student.reward_model=VERSION.
    """
    from hominem_mlx.data import dataset
    from hominem_mlx.errors import InputError, NotGoodEnough
    from hominem_mlx.evaluation.suite import Suite
    from hominem_mlx.reward import acceptance, categories, successor
    from hominem_mlx.reward import train as recipe
    from hominem_mlx.reward.features import Backbone

    model, seed = session.reward_model(), session.config.reward.seed
    examined = session.reward_artifact()
    assert examined is not None  # or there would be no model
    suite = session.current("suite", "hominem data split")
    labels = Suite.read(suite.folder).labels
    if len({label.prompt_id for label in labels}) < 2:
        raise InputError(f"{suite.ref} holds labels of fewer than two prompts; label more prompts, then data split")
    learnt = session.current("dataset", "hominem data split", pointer="labels")
    baseline = recipe.fit_baseline(dataset.read_labels(learnt, "train"), session.config)
    before = session.registry.get("reward_model", against.removeprefix("reward_model/")) if against else None
    account = acceptance.held_out(model, baseline, labels, seed=seed)
    if before is not None:
        account["against"] = successor.against(model, before, labels, seed=seed, curvature=True)
    known = [*dataset.read_labels(learnt, "train"), *dataset.read_labels(learnt, "valid")]
    backbone = model.features if isinstance(model.features, Backbone) else None
    with session.console.progress() as report:
        pairs = [(row.prompt, row.response) for row in known]
        features = None if backbone is None else backbone.read_cached(pairs, session.home, report)
        account["categories"] = categories.carried_over(
            known, features, backbone, model.settings(session.config), report
        )
    found, shown = acceptance.checks(account), recipe.preview(model, labels, rows, seed)
    reasons = acceptance.refusals(found)
    session.registry.examined(examined, reasons, by="evaluate reward")
    session.console.result(
        {"held_out": account, "acceptance": acceptance.as_rows(found), "reasons": reasons, "preview": shown}
    )
    show_account(session.console, account)
    show_checks(session.console, found)
    if beside := account.get("against"):
        drift, growth = _shown(beside["drift"]), _shown(beside["curvature_growth"])
        session.console.say(f"Drift from {beside['name']}: {drift}; growth of the variance of its curvature: {growth}")
    for row in shown:
        session.console.say(f"\n{row['id']}  {row['prompt']}\n  {row['response']}")
        numbers = [[name, row["labelled"][name], value] for name, value in row["predicted"].items()]
        session.console.table(["", "labelled", "predicted"], numbers)
    if reasons:
        raise NotGoodEnough("\n".join([f"{examined.ref} is refused:", *reasons]))


@evaluate.command()
@ADAPTER
@click.option("--use", is_flag=True, help="Make the adapter current when it is accepted.")
@shares()
def policy(session: Session, adapter: str | None, use: bool) -> None:
    """Measure an adapter against its base on what neither has seen, and accept or refuse it.

    Judged by the reward model and by an audit judge fitted on held-out labels alone; without a reward model free
    answers are not judged. Exit code 1 when it is refused. The report is kept; nothing is put in use without --use.
    """
    from hominem_mlx.data import dataset
    from hominem_mlx.errors import NotGoodEnough
    from hominem_mlx.evaluation import report as reports
    from hominem_mlx.evaluation import suite as suites
    from hominem_mlx.reward import train as reward

    examined, suite = _examined(session, adapter), session.current("suite", "hominem data split")
    judge, labels = session.reward_artifact(), session.registry.current("dataset", pointer="labels")
    held_out = suites.Suite.read(suite.folder).labels
    scorer, audit = session.reward_model() if judge else None, None
    if scorer is not None and held_out:
        audit = reward.fit_audit(held_out, session.config, judge=scorer, home=session.home, lm=session.base)
    with session.console.progress() as progress:
        found = suites.evaluate(
            session.base,
            suite,
            adapter=examined,
            scorer=scorer,
            audit_scorer=audit,
            ngram=reward.fit_baseline(dataset.read_labels(labels, "train"), session.config) if labels else None,
            config=session.config,
            progress=progress,
        )
    made = reports.publish(session.registry, found, parents=[examined, *([judge] if judge else []), suite])
    verdict = found["verdict"]
    if use and verdict["accepted"]:
        session.registry.use(examined, pointer=session.base.pointer, note=f"accepted by {made.ref}")
    session.console.result({**reports.plain(found), "report": made.ref, "adapter": examined.ref})
    _show_figures(session.console, found["figures"])
    session.console.say(f"Report: {made.file(reports.HTML)}")
    if not verdict["accepted"]:
        raise NotGoodEnough(f"{examined.ref} is refused:\n" + "\n".join(verdict["reasons"]))
    session.console.say(f"{examined.ref} is accepted{' and in use' if use else ''}.")
    if not use:
        session.console.say(f"Use it: hominem artifacts use {examined.ref}")


@evaluate.command()
@click.option("-p", "--prompt", "prompts", type=Words(), multiple=True, help="What to ask; may be given several times.")
@ADAPTER
@click.option("--file", metavar="FILE", type=click.Path(dir_okay=False), help="JSONL prompts instead of --prompt.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, help="0, the default, compares likeliest answers."
)
@shares()
def compare(session: Session, prompts: tuple[str, ...], adapter: str | None, file: str | None, temperature: float):
    """Answer the same prompts with the base and with the adapter, side by side.

    Shows the words that changed, and how the reward model sees both answers.
    """
    from hominem_mlx.evaluation import compare as comparing

    if bool(prompts) == (file is not None):
        raise click.UsageError("give --prompt, or --file")
    asked = list(prompts) if file is None else _read_prompts(Path(file))
    scorer = session.reward_model() if session.reward_artifact() else None
    found = comparing.compare(
        session.base, _examined(session, adapter), asked, scorer=scorer, config=session.config, temperature=temperature
    )
    session.console.result(found)
    session.console.say(comparing.as_text(found))


evaluate.add_command(probe)
evaluate.add_command(map_)


def _examined(session: Session, name: str | None) -> "Artifact":
    """The adapter that was named, else the newest of the configured base."""
    from hominem_mlx.errors import RegistryError

    if name is not None:
        found = session.adapter(name)
        if found is None:
            raise RegistryError("the base cannot be compared with itself; name an adapter")
        return found
    pointer = session.base.pointer
    own = [made for made in session.registry.artifacts("lora") if made.metadata["notes"].get("pointer") == pointer]
    if not own:
        raise RegistryError(f"there is no adapter of {session.base.name} yet; `hominem train dual` makes one")
    return own[-1]


def _read_prompts(path: Path) -> list[str]:
    from hominem_mlx.files import read_jsonl
    from hominem_mlx.records import Prompt

    return [row.prompt for row in read_jsonl(path, Prompt, unique=None)]


def show_account(console: "Console", account: dict[str, Any]) -> None:
    """What a reward model is worth on rows it was not fitted on, beside n-grams on the same rows."""
    keys = ("rmse", "mae", "pearson", "residual_pearson", "pair_accuracy", "close_pair_accuracy")
    baseline = account["baseline_outputs"] | account.get("baseline_own", {})
    console.table(
        ["", "rmse", "mae", "r", "residual r", "pairs in order", "close pairs", "n-grams: r", "pairs in order"],
        [
            [name, *(measured.get(key) for key in keys), baseline[name]["pearson"], baseline[name]["pair_accuracy"]]
            for name, measured in (account["outputs"] | account.get("own", {})).items()
        ],
    )
    difference, residual = account["pair_accuracy_difference"], account["residual"]
    rows = [
        ["clear pairs in order", account["pair_accuracy"], account["baseline_pair_accuracy"], f"of {account['pairs']}"],
        ["close pairs in order", account["close_pair_accuracy"], account["baseline_close_pair_accuracy"],
         f"of {account['close_pairs']}"],
        ["difference, 95 %", difference["mean"], None, f"{_shown(difference['low'])} to {_shown(difference['high'])}"],
        ["mean correlation", account["pearson_mean"], account["baseline_pearson_mean"], ""],
        ["mean residual correlation", residual["mean"], residual["baseline_mean"], f"p = {_shown(residual['p'])}"],
    ]  # fmt: skip
    if calibrated := account.get("calibration"):
        told = ", ".join(f"{share:.0%} within {float(level):.0%}" for level, share in calibrated["coverage"].items())
        rows.append(["calibration error", calibrated["error"], None, f"worst {_shown(calibrated['worst'])}; {told}"])
    if quantiles := account.get("quantiles"):
        told = ", ".join(f"{share:.0%} within {float(level):.0%}" for level, share in quantiles["coverage"].items())
        wide, equal = quantiles["width"]["0.9"], quantiles["equal_width"]["0.9"]
        told += f"; of equal widths {_shown(equal)}"
        rows.append(["width of 9 of 10, by quantiles", wide, None, told])
    console.say()
    console.table(["overall", "model", "n-grams", ""], rows)


def show_checks(console: "Console", found: "Sequence[Check]") -> None:
    """Each check of a reward model beside its goal."""
    console.say()
    console.table(
        ["", "check", "value", "goal", "what"],
        [[check.verdict, check.check, check.value, check.shown_goal, check.what] for check in found],
    )


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _show_figures(console: "Console", figures: dict[str, dict[str, Any]]) -> None:
    from hominem_mlx.evaluation.goals import goals, say, say_goal

    rows = []
    for name, entry in figures.items():
        mark, what = "holds" if entry["holds"] else "MISSED", goals()[name]["what"]
        rows.append([mark, name, say(entry["value"]), say_goal(entry["goal"]), entry["n"], what])
    console.table(["", "figure", "value", "goal", "n", "what"], rows)
