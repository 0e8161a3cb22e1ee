"""`hominem train`: a reward model, then an adapter."""

import click

from hominem_mlx.cli.session import InOrder, Session, shares


@click.group(cls=InOrder)
def train() -> None:
    """Train a reward model or an adapter.

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
@shares()
def dual(session: Session, on_top_of: str | None) -> None:
    """Train an adapter: memories by SFT and preferences by soft DPO (or another dual.loss), in one.

    The result is not used until it was judged: hominem evaluate policy, then hominem artifacts use. One that was
    trained on top of another speaks together with it; hominem artifacts merge makes one of both.
    """
    from hominem_mlx.errors import RegistryError
    from hominem_mlx.policy import dual as recipe

    pairs = session.current("dataset", "hominem data pair", pointer="pairs")
    under = session.adapter(on_top_of) if on_top_of else None
    if on_top_of and under is None:
        raise RegistryError(f"--on-top-of {on_top_of}: there is no such adapter to go on top of; leave the option out")
    with session.console.progress() as report:
        made = recipe.train(session.registry, pairs, session.config, lm=session.base, on_top_of=under, progress=report)
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
