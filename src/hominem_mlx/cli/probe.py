"""`hominem evaluate probe` and `evaluate map`: the reward model's view of a few replies, and of all of them."""

from pathlib import Path

import click

from hominem_mlx.cli.session import Session, Words, shares


@click.command()
@click.option("-p", "--prompt", type=Words(), help="What was said.")
@click.option("-r", "--response", "replies", type=Words(), multiple=True, help="A reply; may be given several times.")
@click.option(
    "--file", metavar="FILE", type=click.Path(dir_okay=False), help="JSONL rows with prompt and response instead."
)
@click.option(
    "--swap", "swaps", type=Words(), metavar="'OLD=>NEW'", multiple=True, help="If these words were others? Repeatable."
)
@click.option(
    "--prompt-instead", "instead", type=Words(), metavar="TEXT", multiple=True, help="If the prompt were another?"
)
@click.option("--plot", metavar="PATH", type=click.Path(dir_okay=False), help="Draw it: a .png or .svg file.")
@shares()
def probe(
    session: Session,
    replies: tuple[str, ...],
    prompt: str | None,
    file: str | None,
    swaps: tuple[str, ...],
    instead: tuple[str, ...],
    plot: str | None,
) -> None:
    """Judge several replies to one prompt and mark the dimensions on which they really differ.

    With --file the replies of many prompts: how often each dimension changes between two replies to a prompt, and how
    that goes with their intensity and safety. With --swap or --prompt-instead one reply is judged again in other words:
    how far each number would shift, and whether that is more than the judge's own doubt.
    """
    asked = bool(swaps or instead)
    if (file is None) == (prompt is None and not replies) or (file is None and not (prompt and replies)):
        raise click.UsageError("give --prompt and --response, or --file")
    if asked and (file is not None or len(replies) != 1):
        raise click.UsageError("--swap and --prompt-instead ask about one reply: give one --prompt and one --response")
    from hominem_mlx.evaluation import pictures

    path = None if plot is None else pictures.check(Path(plot))
    if file is not None:
        figure = _many(session, Path(file), path is not None)
    elif asked:
        from hominem_mlx.evaluation import counterfactuals

        found = counterfactuals.counterfactuals(session.reward_model(), str(prompt), replies[0], swaps, instead)
        session.console.result(found)
        session.console.say(counterfactuals.as_text(found))
        figure = pictures.shifts(found) if path else None
    else:
        from hominem_mlx.evaluation import probes

        found = probes.probe(session.reward_model(), str(prompt), replies)
        session.console.result(found)
        session.console.say(probes.as_text(found))
        figure = pictures.candidates(found) if path else None
    if path is not None and figure is not None:
        pictures.save(figure, path)
        session.console.note(f"Picture: {path}")


def _many(session: Session, file: Path, is_drawn: bool):
    """Probes of every prompt of a file, and what goes with their changes; the figure, if it is wanted."""
    from hominem_mlx.errors import InputError
    from hominem_mlx.evaluation import pictures, probes
    from hominem_mlx.files import read_jsonl
    from hominem_mlx.records import Reply

    by_prompt: dict[str, list[str]] = {}
    for row in read_jsonl(file, Reply, unique=None):
        by_prompt.setdefault(row.prompt, []).append(row.response)
    several = {prompt: replies for prompt, replies in by_prompt.items() if len(replies) > 1}
    if not several:
        raise InputError(f"{file}: no prompt has two replies; give each reply a row of its own with the same prompt")
    if alone := len(by_prompt) - len(several):
        session.console.note(f"{alone} prompts with one reply are left out: there is nothing to compare them with.")
    model = session.reward_model()
    outputs = iter(model.score_many([(prompt, reply) for prompt, replies in several.items() for reply in replies]))
    judged = [[next(outputs) for _ in replies] for replies in several.values()]
    related = probes.relations(judged)
    probed = [probes.told(*item, said) for item, said in zip(several.items(), judged, strict=True)]
    session.console.result({"relations": related, "probes": probed})
    pairs, prompts = related["pairs"], related["prompts"]
    session.console.say(
        f"{pairs} pairs of replies to {prompts} prompts; how their differences go with other numbers:\n"
    )
    keys = ("intensity", "safety", "intensity_change", "safety_change")
    session.console.table(
        ["", "changed", "mean |change|", "|change|: intensity", "safety", "change: intensity", "safety"],
        [
            [name, f"{row['changed']:.0%}", row["size"], *(_correlation(row[key]) for key in keys)]
            for name, row in related["dimensions"].items()
        ],
    )
    session.console.say(
        "\nchanged: differ by more than 0.1 and two standard deviations; correlations with 95 % intervals by prompt:\n"
        "of |change| with the mean of both replies, then of the change with theirs"
    )
    return pictures.relations(related) if is_drawn else None


def _correlation(found: dict[str, float | None]) -> str:
    if found["r"] is None:
        return "?"
    interval = "" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    return f"{found['r']:+.2f}{interval}"


@click.command(name="map")
@click.option("--folder", metavar="FOLDER", type=click.Path(file_okay=False), help="Where to; else plots in the home.")
@click.option("--umap", is_flag=True, help="Draw UMAP's pictures too (needs umap-learn).")
@shares()
def map_(session: Session, folder: str | None, umap: bool) -> None:
    """Draw the whole manifold: its directions in labels and in held-out predictions, rewards and features laid flat.

    Shows whether there really are as many directions as dimensions, and how well each is predicted.
    """
    import numpy as np

    from hominem_mlx.data import dataset
    from hominem_mlx.data import home as homes
    from hominem_mlx.evaluation import maps, projection
    from hominem_mlx.evaluation.suite import Suite
    from hominem_mlx.reward.head import EXTRA
    from hominem_mlx.reward.targets import targets

    if umap:
        projection.need_umap()
    model = session.reward_model()
    learnt = session.current("dataset", "hominem data split", pointer="labels")
    parts = [
        [row for part in ("train", "valid") for row in dataset.read_labels(learnt, part)],
        Suite.read(session.current("suite", "hominem data split").folder).labels,
    ]
    rows = [row for part in parts for row in part]
    seven = model.manifold.common  # a dimension of the person's own has labels on some rows only
    names = (*seven.names, *EXTRA)
    second = {row.id: row.reward.vector(seven) for row in homes.read_aside(session.home, homes.RETESTS)}
    unknown = [None] * len(seven.names)
    pairs = [(row.prompt, row.response) for row in rows]
    predicted = np.full((len(rows), len(names)), np.nan)
    outputs = model.score_many(pairs[len(parts[0]) :])
    for place, said in enumerate(outputs, len(parts[0])):
        predicted[place] = [said.unclipped[name] for name in names]
    with session.console.progress() as progress:
        material = maps.Material(
            names=names,
            dimensions=len(seven.names),
            categories=[row.category for row in rows],
            prompts=[row.prompt_id for row in rows],
            labels=targets(rows, seven),
            features=model.read(pairs, session.home, progress),
            held_out=np.arange(len(rows)) >= len(parts[0]),
            predicted=predicted,
            again=np.array([second.get(row.id, unknown) for row in rows], float),
        )
        drawn_in = session.home / "plots" if folder is None else Path(folder)
        found = maps.draw(material, drawn_in, umap=umap, progress=progress)
    session.console.result(found)
    told = found["directions"]
    ours, theirs = told["labels"]["shares"], told["predictions"]["shares"]
    most = told.get("ceilings") or [None] * len(ours)
    session.console.table(
        ["direction", "labels", "predictions", "seen: r", "at most", "strongest dimensions"],
        [
            [str(k + 1), f"{ours[k]:.0%}", f"{theirs[k]:.0%}" if k < len(theirs) else "",
             _correlation(told["agreement"][k]), most[k], _strongest(told["labels"]["loadings"], k)]
            for k in range(len(ours))
        ],
    )  # fmt: skip
    labels, predictions = (told[key]["participation_ratio"] for key in ("labels", "predictions"))
    session.console.say(
        f"\nparticipation ratio {labels:.2f} (labels), {predictions:.2f} (predictions) of {len(seven.names)}, "
        f"on {told['rows']} held-out replies to {told['prompts']} prompts"
    )
    session.console.say(f"{len(found['files'])} pictures in {drawn_in}")


def _strongest(loadings: dict[str, list[float]], direction: int) -> str:
    ranked = sorted(loadings.items(), key=lambda item: -abs(item[1][direction]))[:3]
    return ", ".join(f"{name} {values[direction]:+.2f}" for name, values in ranked)
