"""`hominem train`: a reward model, then an adapter, or a whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hominem_mlx.cli.session import InOrder, Session, shares

if TYPE_CHECKING:
    from hominem_mlx.models.backbone import LanguageModel
    from hominem_mlx.schema import Scorer
    from hominem_mlx.storage.registry import Artifact

LOOKS = {
    "step": "after step",
    "valid_accuracy": "validation pairs in order",
    "valid_displacement": "nats a token the chosen replies gained",
    "recall": "facts recalled",
    "reward": "reward",
    "audit": "audit",
}


@click.group(cls=InOrder)
def train() -> None:
    """Train a reward model, an adapter, or a whole model.

    A stopped run goes on where it was when the same command is given again.
    """


@train.command()
@shares()
def reward(session: Session) -> None:
    """Train the reward model on the labels dataset; it becomes current unless a check refuses it.

    Prints what it is worth out of fold beside n-grams on the same folds, and every check beside its goal. Where a
    reward model is in use already, the new one must not be clearly worse on the held-out labels. Exit code 1 when it is
    refused: it is kept, but not in use.
    """
    from hominem_mlx.cli.evaluate import show_account, show_checks
    from hominem_mlx.errors import NotGoodEnough
    from hominem_mlx.reward import acceptance
    from hominem_mlx.reward import train as recipe

    labels = session.current("dataset", "hominem data split", pointer="labels")
    with session.console.progress() as report:
        made = recipe.train(session.registry, labels, session.config, progress=report)
    account, notes = {**made.metadata["metrics"], "against": _against(session, made)}, made.metadata["notes"]
    found = acceptance.checks(account)
    reasons = acceptance.refusals(found)
    session.registry.examined(made, reasons, by="train reward")
    if not reasons:
        session.registry.use(made)
    checked = {"acceptance": acceptance.as_rows(found), "reasons": reasons}
    session.console.result({"artifact": made.ref, "in_use": not reasons, **checked, **account})
    show_account(session.console, account)
    show_checks(session.console, found)
    session.console.say(f"Reads {notes['backbone']['name']}: {notes['why']}.")
    if account.get("layers"):
        chosen = notes["backbone"]
        layers, poolings = ", ".join(map(str, chosen["layers"])), ", ".join(chosen["poolings"])
        session.console.say(f"Chosen to be read: layers {layers}; {poolings}.")
    for name, count in notes.get("not_learnt_yet", {}).items():
        session.console.say(
            f"Not learnt yet: {name}. It needs labels on {count} more training prompts (`hominem data import`, or for "
            "a dimension of your own `hominem data rate --own`); the others are learnt without it."
        )
    if reasons:
        raise NotGoodEnough("\n".join([f"{made.ref} is kept but not used:", *reasons]))
    session.console.say(f"{made.ref} is in use. Next: hominem data pair")


def _against(session: Session, made: "Artifact") -> dict[str, Any] | None:
    """What a fresh reward model has gained over the one in use, on held-out labels; None where there is neither."""
    from hominem_mlx.errors import HominemError
    from hominem_mlx.evaluation.suite import Suite
    from hominem_mlx.reward import successor
    from hominem_mlx.reward.model import RewardModel

    before, suite = session.registry.current("reward_model"), session.registry.current("suite")
    if before is None or before.ref == made.ref or suite is None:
        return None
    try:
        model = RewardModel.load(made.folder, manifold=session.config.manifold.in_use)
        return successor.against(model, before, Suite.read(suite.folder).labels)
    except HominemError as error:  # another manifold, a backbone that is gone, too few held-out labels
        session.console.note(f"It cannot be compared with {before.ref}, which is in use: {error}")
        return None


@train.command()
@click.option(
    "--on-top-of",
    metavar="ADAPTER",
    help="Leave that adapter as it is and train one over it: current, a version or a tag.",
)
@click.option(
    "--memory-gb",
    metavar="GB",
    type=click.FloatRange(min=0),
    help="Compute so that it takes no more memory; 0: than this machine has. The same as dual.memory_gb.",
)
@click.option(
    "--hosts",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Share the work with other Macs: a hostfile of mlx.launch, with the one that keeps the result first.",
)
@shares()
def dual(session: Session, on_top_of: str | None, memory_gb: float | None, hosts: str | None) -> None:
    """Train an adapter: memories by SFT, preferences by soft DPO (or another dual.loss), single thumbs by KTO, in one.

    Looks on the way are kept in its metrics.jsonl: validation pairs and, on dual.probes prompts, recall and how the
    reward model and an audit judge see its answers. dual.keep = best publishes the best of them, dual.patience ends a
    run that gets no better.

    The result is not used until it was judged: hominem evaluate policy, then hominem artifacts use. One that was
    trained on top of another speaks together with it; hominem artifacts merge makes one of both.

    With --memory-gb it is worked out beforehand what a step takes. Where that is more, the cheapest way is taken that
    fits: smaller chunks of logits, some blocks computed twice, batches in several parts. It takes longer and gives the
    same adapter up to rounding. A run that was stopped goes on with another --memory-gb too.

    With --hosts every machine of the list computes its part of each batch, and the adapter is the one that a single
    machine would make, up to rounding. All need the same home. When one of them fails, all stop.
    """
    if memory_gb is not None:
        session.override(f"dual.memory_gb={memory_gb}")
    if hosts:
        from hominem_mlx.cli.together import launch

        own = ["--on-top-of", on_top_of] if on_top_of else []
        return launch(Path(hosts), ["train", "dual", *own, *session.words])

    from hominem_mlx.errors import RegistryError
    from hominem_mlx.policy import dual as recipe
    from hominem_mlx.training import costs, parallel
    from hominem_mlx.training.footprint import GB

    ranks = parallel.join()
    pairs = session.current("dataset", "hominem data pair", pointer="pairs")
    under = session.adapter(on_top_of) if on_top_of else None
    if on_top_of and under is None:
        raise RegistryError(f"--on-top-of {on_top_of}: there is no such adapter to go on top of; leave the option out")
    task: dict[str, Any] = {"lm": session.base, "on_top_of": under, "ranks": ranks}
    if not ranks.is_first:
        return recipe.assist(session.registry, pairs, session.config, **task)
    look = _look(session, pairs) if session.config.dual.probes else None
    with session.console.progress() as report:
        made = recipe.train(session.registry, pairs, session.config, **task, look=look, progress=report)
    metrics = made.metadata["metrics"]
    session.console.result({"artifact": made.ref, "base": session.base.name, **metrics})
    summary = metrics["training"]
    session.console.table(
        ["channel", "steps", "mean loss", "share of the update"],
        [[name, c["steps"], c["mean_loss"], c["share_of_update"]] for name, c in summary["channels"].items()],
    )
    looks = [{"step": 0, **metrics["before"]}] * bool(metrics["before"]) + summary["evaluations"]
    if looks:
        shown = [name for name in LOOKS if any(name in row for row in looks)]
        session.console.table([LOOKS[name] for name in shown], [[row.get(name) for name in shown] for row in looks])
    if summary["stopped"]:
        session.console.say(f"Stopped early: {summary['stopped']}")
    if metrics["kept_step"] != summary["steps"]:
        session.console.say(f"Kept: the adapter after step {metrics['kept_step']}, the best of these looks.")
    estimated, took = metrics["memory"]["estimate_gb"]["total"] * GB, costs.took()
    session.console.say(f"Estimated {costs.shown(estimated)} of memory, took {costs.shown(took)}.")
    session.console.say(f"{made.ref} is trained, not in use yet. Judge it: hominem evaluate policy")
    session.console.say(f"Use it: hominem artifacts use {made.ref}")
    if under is not None:
        session.console.say(
            f"It speaks together with {under.ref}. One of both: hominem artifacts merge {under.ref} {made.ref}"
        )


def _look(session: Session, pairs: "Artifact") -> "Callable[[LanguageModel], dict[str, float]]":
    """What `dual.probes` asks for: recall, and the verdicts of those judges that there are."""
    from hominem_mlx.data import dataset
    from hominem_mlx.errors import HominemError
    from hominem_mlx.evaluation.looks import looker
    from hominem_mlx.files import read_jsonl
    from hominem_mlx.policy.memories import learnable
    from hominem_mlx.records import Preference, SftPair
    from hominem_mlx.reward.train import fit_audit

    config, base = session.config, session.base  # before the reward model, which may read with it
    valid = read_jsonl(pairs.file("preferences.valid.jsonl"), Preference, unique=None, may_be_empty=True)
    memories = read_jsonl(pairs.file("memory.jsonl"), SftPair, unique=None, may_be_empty=True)
    taught, _ = learnable(memories, safety_low=config.dual.safety_low, safety_high=config.dual.safety_high)
    judges: dict[str, Scorer] = {}
    judge = None
    if valid and session.reward_artifact() is not None:
        try:
            scorer = session.reward_model()
            scorer.score_many([(valid[0].prompt, valid[0].chosen)])  # it opens what it reads with when it first reads
            judges["reward"] = judge = scorer
        except HominemError as error:
            session.console.note(f"The reward model does not watch: {error}")
    labels = session.registry.current("dataset", pointer="labels")
    if valid and labels is not None:
        try:
            rows = dataset.read_labels(labels, "valid")
            judges["audit"] = fit_audit(rows, config, judge=judge, home=session.home, lm=base)
        except HominemError as error:
            session.console.note(f"No audit judge watches: {error}")
    return looker([pair.prompt for pair in valid], taught, judges, config)


@train.command()
@shares()
def full(session: Session) -> None:
    """Train every weight on the memories by SFT: a model of its own, which can be the base.

    For small models and much to remember; else train an adapter. The base must not be quantised and stays as it is.

    Memory: 20 bytes a weight (float32 weights, gradients and AdamW moments, whatever the base is kept in) and the
    activations of one batch: 13 GB for 0.6 billion weights, 36 GB for 1.7. It is worked out beforehand, and what does
    not fit is refused. Disk: up to 28 bytes a weight.

    Time: 6 operations a weight and token. 0.6 billion weights, 1000 memories of 100 tokens and 3 epochs make 1e15: some
    ten minutes at 2 TFLOP/s, a good laptop's GPU; three hours at 0.1 TFLOP/s, a CPU.
    """
    from hominem_mlx.policy import full as recipe

    pairs = session.current("dataset", "hominem data pair", pointer="pairs")
    with session.console.progress() as report:
        made = recipe.train(session.registry, pairs, session.config, lm=session.base, progress=report)
    metrics = made.metadata["metrics"]
    session.console.result({"artifact": made.ref, "base": session.base.name, **metrics})
    session.console.table(
        ["after step", "loss of the step", "peak memory, GB"],
        [[entry["step"], entry.get("memory"), entry["peak_gb"]] for entry in metrics["training"]["evaluations"]],
    )
    session.console.say(f"Estimated {metrics['needed_gb']:.1f} GB of memory, took {metrics['peak_gb']:.1f}.")
    if metrics["cut_responses"]:
        session.console.say(f"{metrics['cut_responses']} replies were longer than full.max_tokens and lost their end.")
    session.console.say(f"{made.ref} is trained, not in use yet. Talk with it: hominem chat student.base={made.ref}")
    session.console.say(f"Make it the base: hominem artifacts use {made.ref}")


@train.command()
@shares()
def rl(session: Session) -> None:
    """Train an adapter by reinforcement: it answers training prompts, the reward model judges.

    It learns from all answers (RLOO) or, with rl.method=dpo, from the best and the worst to each prompt; with rl.turns
    above 1 from whole conversations. rl.conflicts settles what dimensions count that pull against each other.

    Guards stop a run that learns to please its judge alone, and keep the last good state; an audit judge fitted on
    validation labels watches. Not used until it was judged: hominem evaluate policy, then hominem artifacts use.
    """
    from hominem_mlx.data import dataset
    from hominem_mlx.policy import rl as recipe
    from hominem_mlx.reward.train import fit_audit

    labels = session.current("dataset", "hominem data split", pointer="labels")
    base = session.base  # before the reward model, which may read with it
    scorer, judged_by = session.reward_model(), session.reward_artifact()
    assert judged_by is not None  # or there would be no scorer
    rows = dataset.read_labels(labels, "valid")
    audit = fit_audit(rows, session.config, judge=scorer, home=session.home, lm=base)
    with session.console.progress() as report:
        made = recipe.train(
            session.registry, labels, judged_by, session.config, lm=base, scorer=scorer, audit=audit, progress=report
        )
    metrics = made.metadata["metrics"]
    summary = metrics["training"]
    session.console.result({"artifact": made.ref, "base": base.name, **metrics})
    names = ("step", "reward", "audit", "kl", "tokens", "distinct2", "strange", "unfinished")
    session.console.table(
        ["after step", "reward", "audit", "nats from the base", "tokens", "distinct pairs", "strange", "unfinished"],
        [[look[name] for name in names] for look in (metrics["before"], *summary["evaluations"])],
    )
    if summary["stopped"]:
        session.console.say(f"A guard stopped it: {summary['stopped']}. Kept: step {metrics['kept_step']}.")
    session.console.say(f"{made.ref} is trained, not in use yet. Judge it: hominem evaluate policy")
    session.console.say(f"Use it: hominem artifacts use {made.ref}")
