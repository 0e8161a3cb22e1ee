"""`hominem train`: a reward model, then an adapter, or a whole model."""

from pathlib import Path
from typing import Any

import click

from hominem_mlx.cli.session import InOrder, Session, shares


@click.group(cls=InOrder)
def train() -> None:
    """Train a reward model, an adapter, or a whole model.

    A stopped run goes on where it was when the same command is given again.
    """


@train.command()
@shares()
def reward(session: Session) -> None:
    """Train the reward model on the labels dataset; it becomes current when its gates pass.

    Prints what it is worth out of fold beside n-grams on the same folds. Exit code 1 when it is not good enough: it is
    kept, but not in use.
    """
    from hominem_mlx.cli.evaluate import show_account
    from hominem_mlx.errors import NotGoodEnough
    from hominem_mlx.reward import train as recipe
    from hominem_mlx.reward.acceptance import refusals

    labels = session.current("dataset", "hominem data split", pointer="labels")
    with session.console.progress() as report:
        made = recipe.train(session.registry, labels, session.config, progress=report)
    account, notes = made.metadata["metrics"], made.metadata["notes"]
    reasons = refusals(account)
    if not reasons:
        session.registry.use(made)
    session.console.result({"artifact": made.ref, "in_use": not reasons, "reasons": reasons, **account})
    show_account(session.console, account)
    session.console.say(f"Reads {notes['backbone']['name']}: {notes['why']}.")
    if reasons:
        raise NotGoodEnough("\n".join([f"{made.ref} is kept but not used:", *reasons]))
    session.console.say(f"{made.ref} is in use. Next: hominem data pair")


@train.command()
@click.option(
    "--on-top-of",
    metavar="ADAPTER",
    help="Leave that adapter as it is and train one over it: current, a version or a tag.",
)
@click.option(
    "--hosts",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Share the work with other Macs: a hostfile of mlx.launch, with the one that keeps the result first.",
)
@shares()
def dual(session: Session, on_top_of: str | None, hosts: str | None) -> None:
    """Train an adapter: memories by SFT and preferences by soft DPO (or another dual.loss), in one.

    The result is not used until it was judged: hominem evaluate policy, then hominem artifacts use. One that was
    trained on top of another speaks together with it; hominem artifacts merge makes one of both.

    With --hosts every machine of the list computes its part of each batch, and the adapter is the one that a single
    machine would make, up to rounding. All need the same home. When one of them fails, all stop.
    """
    if hosts:
        from hominem_mlx.cli.together import launch

        own = ["--on-top-of", on_top_of] if on_top_of else []
        return launch(Path(hosts), ["train", "dual", *own, *session.words])

    from hominem_mlx.errors import RegistryError
    from hominem_mlx.policy import dual as recipe
    from hominem_mlx.training import parallel

    ranks = parallel.join()
    pairs = session.current("dataset", "hominem data pair", pointer="pairs")
    under = session.adapter(on_top_of) if on_top_of else None
    if on_top_of and under is None:
        raise RegistryError(f"--on-top-of {on_top_of}: there is no such adapter to go on top of; leave the option out")
    task: dict[str, Any] = {"lm": session.base, "on_top_of": under, "ranks": ranks}
    if not ranks.is_first:
        return recipe.assist(session.registry, pairs, session.config, **task)
    with session.console.progress() as report:
        made = recipe.train(session.registry, pairs, session.config, **task, progress=report)
    metrics = made.metadata["metrics"]
    session.console.result({"artifact": made.ref, "base": session.base.name, **metrics})
    summary = metrics["training"]
    session.console.table(
        ["channel", "steps", "mean loss", "share of the update"],
        [[name, c["steps"], c["mean_loss"], c["share_of_update"]] for name, c in summary["channels"].items()],
    )
    if summary["evaluations"]:
        last = summary["evaluations"][-1]
        session.console.table(
            ["after step", "validation pairs in order", "nats a token the chosen replies moved"],
            [[last["step"], last.get("valid_accuracy"), last.get("valid_displacement")]],
        )
    if summary["stopped"]:
        session.console.say(f"Stopped early: {summary['stopped']}")
    session.console.say(f"{made.ref} is trained, not in use yet. Judge it: hominem evaluate policy")
    session.console.say(f"Use it: hominem artifacts use {made.ref}")
    if under is not None:
        session.console.say(
            f"It speaks together with {under.ref}. One of both: hominem artifacts merge {under.ref} {made.ref}"
        )


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
    """Train an adapter by reinforcement: it answers training prompts, the reward model judges (RLOO).

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
    audit = fit_audit(dataset.read_labels(labels, "valid"), session.config, home=session.home, lm=base)
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
