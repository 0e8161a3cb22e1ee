"""`hominem score`: the reward model's judgement of replies."""

from pathlib import Path
from typing import Any

import click

from hominem_mlx.cli.session import Session, Words, shares


@click.command()
@click.option("-p", "--prompt", type=Words(), help="What was said.")
@click.option("-r", "--response", type=Words(), help="The reply to judge.")
@click.option("--file", metavar="FILE", type=click.Path(dir_okay=False), help="JSONL rows with prompt and response.")
@click.option("--why", metavar="NAME", multiple=True, help="Show which words moved an output (or scalar); repeatable.")
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False), help="Write the reasons as a page too.")
@shares()
def score(
    session: Session,
    prompt: str | None,
    response: str | None,
    file: str | None,
    why: tuple[str, ...],
    html: str | None,
) -> None:
    """Let the reward model judge replies.

    One reply with --prompt and --response, or a file of rows that hold `prompt` and `response`. With --why the words
    of one reply are told apart: which of them raised an output, which lowered it. A reward model with an attention head
    (reward.head) also shows where it looked, which is no cause.
    """
    if (why or html) and (file is not None or not why):
        raise click.UsageError("--why is for one reply (--prompt, --response), and --html shows what --why finds")
    if (file is None) == (prompt is None and response is None) or (file is None and (not prompt or response is None)):
        raise click.UsageError("give --prompt and --response, or --file")
    pairs = [(str(prompt), str(response))] if file is None else _read(Path(file))
    artifact = session.reward_artifact()
    model = session.reward_model()
    outputs = model.score_many(pairs)
    rows: list[dict[str, Any]] = [
        {"prompt": asked, "response": said, **output.model_dump()}
        for (asked, said), output in zip(pairs, outputs, strict=True)
    ]
    reasons = {}
    if why:
        from hominem_mlx.reward import attribution

        with session.console.progress() as progress:
            reasons["why"] = attribution.report(model, *pairs[0], why, progress=progress)
    session.console.result({"reward_model": artifact and artifact.ref, "scores": rows, **reasons})
    if file is None:
        output = outputs[0]
        values = output.reward_vector | {"scalar": output.scalar}
        values |= {"reward_intensity": output.reward_intensity, "safety_score": output.safety_score} | output.emotion
        told = {"doubt": output.uncertainty, "scatter": output.scatter, "9 of 10 within": output.width}
        told = {title: numbers for title, numbers in told.items() if numbers or title != "scatter"}
        shown = [[name, value, *(numbers.get(name) for numbers in told.values())] for name, value in values.items()]
        session.console.table(["", "value", *told], shown)
        if output.flags:
            session.console.say(f"Flags: {', '.join(output.flags)}")
        if why:
            from hominem_mlx.cli import highlight
            from hominem_mlx.files import write_atomic

            highlight.show(session.console, reasons["why"])
            if html is not None:
                write_atomic(Path(html), highlight.page(reasons["why"]))
        return
    session.console.table(
        ["row", "scalar", "intensity", "safety", *outputs[0].reward_vector, *outputs[0].emotion, "flags"],
        [
            [
                number,
                output.scalar,
                output.reward_intensity,
                output.safety_score,
                *output.vector,
                *output.emotion.values(),
                ", ".join(output.flags),
            ]
            for number, output in enumerate(outputs, 1)
        ],
    )


def _read(path: Path) -> list[tuple[str, str]]:
    from hominem_mlx.files import read_jsonl
    from hominem_mlx.records import Reply

    return [(row.prompt, row.response) for row in read_jsonl(path, Reply, unique=None)]
