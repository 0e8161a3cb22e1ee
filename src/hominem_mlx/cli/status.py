"""`hominem status`: what is in use, where it comes from, how much there is, and what to do next."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hominem_mlx.cli.session import Session, shares

if TYPE_CHECKING:
    from hominem_mlx.storage.registry import Artifact


@click.command()
@shares()
def status(session: Session) -> None:
    """What is in use, how much there is of everything, what to do next.

    Loads no model and sends nothing.
    """
    config = session.config
    adapters = _adapters(session)
    rewards = session.reward_artifact()
    used: list[tuple[str, str, str]] = [
        ("home", str(session.home), _source_of_config(session)),
        ("base", config.student.base, "answers come from [inference]" if config.inference.endpoint else ""),
        ("adapter", ", ".join(adapters) or "none", _origin(session, adapters)),
        ("reward model", rewards.ref if rewards else "none", _parents(rewards)),
        ("teacher", _teacher(session), "texts leave this machine" if _is_remote(session) else "stays here"),
    ]
    if config.inference.endpoint:
        used.insert(2, ("inference", f"{config.inference.model} at {config.inference.endpoint}", "no learning there"))
    rows = _count_rows(session.home)
    made = _count_artifacts(session)
    todo = _next(session, rows, adapters, rewards is not None)
    session.console.result(
        {
            "home": str(session.home),
            "base": config.student.base,
            "adapters": adapters,
            "reward_model": rewards and rewards.ref,
            "teacher": config.teacher.model_dump(mode="json", include={"kind", "model", "base_url"}),
            "inference": config.inference.endpoint,
            "rows": rows,
            "artifacts": made,
            "next": todo,
        }
    )
    session.console.table(["", "in use", ""], used)
    session.console.say()
    session.console.table(["rows", "in the home"], [[name, count] for name, count in rows.items()])
    session.console.say()
    if made:
        session.console.table(["artifacts", "made"], [[name, count] for name, count in made.items()])
        session.console.say()
    session.console.say(f"Next: {todo}")


def _adapters(session: Session) -> list[str]:
    """What answers beside the base, told from names alone: the model itself is not loaded for this."""
    student = session.config.student
    if student.adapter == "none":
        return []
    if student.adapter != "current":
        return [session.registry.get("lora", student.adapter.removeprefix("lora/")).ref]
    base = Path(student.base).name
    pointers = session.registry.pointers("lora").items()
    return [f"lora/{version}" for pointer, version in sorted(pointers) if pointer.rpartition("@")[0] == base]


def _origin(session: Session, adapters: list[str]) -> str:
    return _parents(session.registry.find(adapters[0])) if len(adapters) == 1 else ""


def _parents(artifact: "Artifact | None") -> str:
    return f"from {', '.join(artifact.metadata['parents'])}" if artifact and artifact.metadata["parents"] else ""


def _source_of_config(session: Session) -> str:
    file = session.home / "hominem.toml"
    parts = [session.config_file or "", "hominem.toml" if file.exists() else "defaults (no hominem.toml yet)"]
    return f"settings: {', '.join(part for part in parts if part)}"


def _is_remote(session: Session) -> bool:
    from urllib.parse import urlsplit

    teacher = session.config.teacher
    host = urlsplit(teacher.base_url or "").hostname
    return teacher.kind == "anthropic" and host not in ("localhost", "127.0.0.1", "::1")


def _teacher(session: Session) -> str:
    teacher = session.config.teacher
    return " ".join(part for part in (teacher.kind, teacher.model or "", teacher.base_url or "") if part)


def _count_rows(home: Path) -> dict[str, int]:
    from hominem_mlx.data.home import FILES

    own = ("preferences of your own", "thumbs of your own")
    names = ("prompts", "replies", "labels", *own, "memories", "recall questions", "fixtures")
    return {name: _lines(home / file) for name, file in zip(names, FILES.values(), strict=True)}


def _lines(path: Path) -> int:
    """Rows of a file, counted without reading them as rows: status must work when one of them is broken."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _count_artifacts(session: Session) -> dict[str, int]:
    found: dict[str, int] = {}
    for artifact in session.registry.artifacts():
        found[artifact.kind] = found.get(artifact.kind, 0) + 1
    return found


def _next(session: Session, rows: dict[str, int], adapters: list[str], has_reward_model: bool) -> str:
    """The next step on the line from prompts to an adapter."""
    pointers = session.registry.pointers("dataset")
    trained = session.registry.artifacts("lora")
    steps: list[tuple[Any, str]] = [
        (rows["prompts"] or rows["labels"], "hominem init --starter brings sample data; hominem demo shows it all"),
        (rows["replies"] or rows["labels"], "hominem data sample asks for replies to the prompts"),
        (rows["labels"], "hominem data rate labels the replies"),
        (pointers.get("labels"), "hominem data split sets held-out rows aside"),
        (has_reward_model, "hominem train reward"),
        (pointers.get("pairs"), "hominem data pair makes preferences from the labels"),
        (trained, "hominem train dual"),
        (adapters, f"hominem evaluate policy, then hominem artifacts use {trained[-1].ref if trained else ''}".strip()),
    ]
    return next((advice for is_done, advice in steps if not is_done), "hominem chat")
