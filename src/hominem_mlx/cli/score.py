"""`hominem score`: the reward model's judgement of replies."""

from pathlib import Path
from typing import Any

import click

from hominem_mlx.cli.session import Session, shares


@click.command()
@click.option("-p", "--prompt", help="What was said.")
@click.option("-r", "--response", help="The reply to judge.")
@click.option("--file", metavar="FILE", type=click.Path(dir_okay=False), help="JSONL rows with prompt and response.")
@shares()
def score(session: Session, prompt: str | None, response: str | None, file: str | None) -> None:
    """Let the reward model judge replies.

    One reply with --prompt and --response, or a file of rows that hold `prompt` and `response`.
    """
    if (file is None) == (prompt is None and response is None) or (file is None and not (prompt and response)):
        raise click.UsageError("give --prompt and --response, or --file")
    pairs = [(str(prompt), str(response))] if file is None else _read(Path(file))
    artifact = session.reward_artifact()
    outputs = session.reward_model().score_many(pairs)
    rows: list[dict[str, Any]] = [
        {"prompt": asked, "response": said, **output.model_dump()}
        for (asked, said), output in zip(pairs, outputs, strict=True)
    ]
    session.console.result({"reward_model": artifact and artifact.ref, "scores": rows})
    if file is None:
        output = outputs[0]
        values = [[name, value, output.uncertainty.get(name)] for name, value in output.reward_vector.items()]
        values += [["scalar", output.scalar, None], ["reward_intensity", output.reward_intensity, None]]
        session.console.table(["", "value", "+-"], [*values, ["safety_score", output.safety_score, None]])
        return
    session.console.table(
        ["row", "scalar", "intensity", "safety", *outputs[0].reward_vector],
        [
            [number, output.scalar, output.reward_intensity, output.safety_score, *output.vector]
            for number, output in enumerate(outputs, 1)
        ],
    )


def _read(path: Path) -> list[tuple[str, str]]:
    from hominem_mlx.files import read_jsonl
    from hominem_mlx.records import Reply

    return [(row.prompt, row.response) for row in read_jsonl(path, Reply, unique=None)]
