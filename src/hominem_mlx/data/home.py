"""The growing files of a home: where each kind of row lies, reading them, and adding rows without losing any.

A person's rows win over a teacher's. Files are replaced whole, so a kill leaves the old file or the new one.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from hominem_mlx.errors import InputError
from hominem_mlx.files import lock, read_jsonl, sha256_bytes, sha256_json, write_jsonl
from hominem_mlx.records import (
    Fixture,
    Label,
    Preference,
    Prompt,
    RecallQuestion,
    Record,
    SftPair,
    Thumb,
    Trajectory,
)
from hominem_mlx.schema import Manifold

Row = TypeVar("Row", bound=Record)

FILES: dict[type[Record], str] = {
    Prompt: "data/raw/prompts.jsonl",
    Trajectory: "data/raw/trajectories.jsonl",
    Label: "data/labeled/reward_samples.jsonl",
    Preference: "data/preferences/preferences.jsonl",
    Thumb: "data/preferences/thumbs.jsonl",
    SftPair: "data/sft/sft_training.jsonl",
    RecallQuestion: "data/raw/recall.jsonl",
    Fixture: "data/raw/fixtures.jsonl",
}
ANSWERS = "data/raw/teacher_answers.jsonl"
BATCHES = "data/raw/teacher_batches.jsonl"
RETESTS = "data/labeled/retests.jsonl"
OPINIONS = "data/labeled/opinions.jsonl"
DROPPED = "data/labeled/dropped.jsonl"
UNLABELLED = "data/labeled/unlabelled.jsonl"
UNSAMPLED = "data/raw/unsampled.jsonl"
STARTER = Path(__file__).parents[1] / "starter"
HUMAN = "human"
INJECTED = "injected"  # key of a label's metadata: why the reply counts as an attack; it was judged without that
COMPARED = "compared-"  # how ids of pairs begin of which only a comparison of the two replies is known


def holding(home: Path, purpose: str) -> AbstractContextManager[None]:
    """Keep other writers of the home's data files out; raises BusyError naming the one that is there."""
    return lock(Path(home) / "locks" / "data.lock", purpose, wait=False)


def read(home: Path, model: type[Row], manifold: Manifold | None = None) -> list[Row]:
    """All rows of one kind, none when the file is not there yet. Rows without an id get one from their content.

    With a manifold, labels in dimensions that it does not have are refused.
    """
    path = Path(home) / FILES[model]
    if not path.exists():
        return []
    context = {"manifold": manifold} if manifold else None
    rows = [identified(row) for row in read_jsonl(path, model, unique=None, may_be_empty=True, context=context)]
    seen: set[str] = set()
    problems = []
    for row in rows:
        if row.id in seen:  # type: ignore[attr-defined]
            problems.append(f"{path}: id = {row.id!r} is used twice; give one row another")  # type: ignore[attr-defined]
        seen.add(row.id)  # type: ignore[attr-defined]
    if problems:
        raise InputError(problems)
    return rows


def read_aside(home: Path, file: str) -> list[Label]:
    """Labels of `RETESTS`, `OPINIONS` or `DROPPED`, beside those that are learnt from; none when there is no file."""
    path = Path(home) / file
    return read_jsonl(path, Label, unique=None, may_be_empty=True) if path.exists() else []


def write(home: Path, model: type[Row], rows: Iterable[Row]) -> None:
    """Replace the file of one kind."""
    write_jsonl(Path(home) / FILES[model], rows)


def identified(row: Row) -> Row:
    """The row, with ids made from its content where it has none: equal content, equal id."""
    update: dict[str, str] = {}
    if hasattr(row, "prompt_id") and not row.prompt_id:
        update["prompt_id"] = prompt_id(row.prompt)  # type: ignore[attr-defined]
    if not row.id:  # type: ignore[attr-defined]
        update["id"] = content_id(row)
    return row.model_copy(update=update) if update else row


def prompt_id(prompt: str) -> str:
    """The id of a prompt that came without one, so that the same words always fall into the same split."""
    text = " ".join(prompt.split())
    return f"p-{sha256_bytes(text.encode(errors='replace'))[:12]}"  # half characters are refused later, by field


def content_id(row: Record) -> str:
    """An id from the texts a row consists of."""
    names = ("prompt", "response", "instruction", "chosen", "rejected", "question", "fact_id")
    texts = [str(getattr(row, name)) for name in names if hasattr(row, name)] + _earlier(row)
    return f"{type(row).__name__.lower()}-{sha256_json(texts)[:12]}"


def _earlier(row: Record) -> list[str]:
    """What was said before, in order."""
    return [turn.content for turn in getattr(row, "history", None) or []]


def place(row: Record) -> tuple[str, ...]:
    """What a row is about: two rows with one place are two opinions on the same thing."""
    if isinstance(row, Label | Thumb):
        return (row.prompt, row.response)
    if isinstance(row, Preference):
        return (row.prompt, *sorted((row.chosen, row.rejected)))
    if isinstance(row, SftPair):
        return (row.instruction, row.response, *_earlier(row))
    if isinstance(row, Prompt):
        return (row.prompt,)
    return (row.id,)  # type: ignore[attr-defined]


def merge(old: Sequence[Row], new: Iterable[Row], *, wins: Callable[[Row, Row], bool]) -> tuple[list[Row], dict]:
    """Old rows with new ones added or put in their stead.

    A new row meets an old one when it has the same id or says something about the same texts. The row that stays keeps
    the old id, so that edits and pairs which name it still find it.

    Args:
        old: rows there are, ids unique.
        new: rows that come.
        wins: `(new, old)`: whether the new row takes the old one's place.

    Returns: all rows, and how many were `added`, `replaced` and `kept`.
    """
    rows = list(old)
    by_id = {row.id: index for index, row in enumerate(rows)}  # type: ignore[attr-defined]
    by_place = {place(row): index for index, row in enumerate(rows)}
    counts = {"added": 0, "replaced": 0, "kept": 0}
    for row in new:
        index = by_place.get(place(row), by_id.get(row.id))  # type: ignore[attr-defined]
        if index is None:
            by_id[row.id] = by_place[place(row)] = len(rows)  # type: ignore[attr-defined]
            rows.append(row)
            counts["added"] += 1
            continue
        standing = rows[index].model_copy(update={"id": row.id})  # type: ignore[attr-defined]
        if row == standing or not wins(row, rows[index]):
            counts["kept"] += 1
            continue
        same = place(row) == place(rows[index])
        update = {"id": rows[index].id}  # type: ignore[attr-defined]
        if same and isinstance(row, Label):  # a person's numbers for a known reply: it stays the edit it was
            update |= {name: getattr(rows[index], name) for name in ("prompt_id", "edit_of", "lowered")}
        if not same:
            del by_place[place(rows[index])]
        rows[index] = row.model_copy(update=update)
        by_place[place(row)] = index
        counts["replaced"] += 1
    return rows, counts


def newer_wins(new: Record, old: Record) -> bool:
    """A person's row beats a teacher's and its own older self; a teacher's never beats a person's."""
    if isinstance(new, Label) and isinstance(old, Label):
        return new.labeller == HUMAN or old.labeller != HUMAN
    return True


def older_wins(new: Record, old: Record) -> bool:
    """What is there stays."""
    return False
