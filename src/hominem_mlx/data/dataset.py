"""From growing files to pinned snapshots: rows come in through one door and leave split by prompt, hashed, leak-free.

What may be learnt from (`raw`, `dataset`) and what may only be examined with (`suite`) never share an ancestor:
changing every held-out row leaves the training artifacts as they are, byte for byte. So a held-out row that repeats a
learnable text is left out of the suite, never the other way round.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from hominem_mlx.abuse import is_adversarial
from hominem_mlx.config import Config
from hominem_mlx.data import exports, formats
from hominem_mlx.data import home as homes
from hominem_mlx.data.meanings import completed, hold_to_meanings, is_own_alone
from hominem_mlx.data.split import Texts, split_of, words
from hominem_mlx.errors import InputError
from hominem_mlx.files import explain, read_jsonl, write_jsonl
from hominem_mlx.records import Fixture, Label, Preference, Prompt, RecallQuestion, Record, SftPair, Thumb
from hominem_mlx.schema import MANIFOLD, Manifold
from hominem_mlx.storage.registry import Artifact, Registry

Counts = dict[str, dict[str, int]]
Part = Literal["train", "valid"]
THUMBS = "thumbs.jsonl"
RETESTS = "relabels.jsonl"  # of the starter corpus

# --- rows come in ---------------------------------------------------------------------------------------------------


def import_starter(home: Path) -> Counts:
    """Add the starter corpus and its second ratings. Rows that are there stay as they are. Returns counts by kind."""
    with homes.holding(home, "importing the starter corpus"):
        _import_starter_retests(home)
        return {
            kind: _merge(home, model, read_jsonl(homes.STARTER / name, model), wins=homes.older_wins)
            for kind, model, name in (
                ("prompts", Prompt, "prompts.jsonl"),
                ("labels", Label, "reward_samples.jsonl"),
                ("memory", SftPair, "memory.jsonl"),
                ("recall", RecallQuestion, "recall.jsonl"),
                ("fixtures", Fixture, "fixtures.jsonl"),
            )
        }


def _import_starter_retests(home: Path) -> None:
    there = homes.read_aside(home, homes.RETESTS)
    known = {(row.labeller, row.id) for row in there}
    second = [row.model_copy(update={"labeller": "starter"}) for row in read_jsonl(homes.STARTER / RETESTS, Label)]
    new = [row for row in second if (row.labeller, row.id) not in known]
    if new:
        write_jsonl(Path(home) / homes.RETESTS, [*there, *new])


def import_file(
    home: Path,
    path: Path,
    kind: str | None = None,
    *,
    labeller: str | None = None,
    left_out: Counter[str] | None = None,
    manifold: Manifold = MANIFOLD,
) -> Counts:
    """Add a file of rows, wholly or not at all.

    Args:
        home: where they go.
        path: JSONL of rows as `formats` knows them, or another file that `exports` reads; kinds may be mixed.
        kind: what all rows must be (`formats.KINDS`); None tells by each row's keys.
        labeller: who rated the labels that do not say it; `human` wins over any teacher.
        left_out: gets how many rows were right and of no use here, by reason.
        manifold: the dimensions in use. Labels in none but the person's own among them are added to the label that
            their reply has, in the home or in the file; where it has none they are left out.

    Returns: how many rows were added, replaced and kept, by kind. Raises: InputError naming every bad row.
    """
    if kind is not None and kind not in formats.KINDS:
        raise InputError(f"there is no kind {kind!r}; kinds are {', '.join(formats.KINDS)}")
    with homes.holding(home, f"importing {Path(path).name}"):
        left_out = Counter() if left_out is None else left_out
        rows = _with_label(home, path, _read_any(Path(path), kind, labeller, left_out, manifold), left_out)
        _refuse_recall_leaks(home, path, rows)
        hold_to_meanings(home, [row for _, row in rows if isinstance(row, Label)], manifold)
        counts: Counts = {}
        for name, model in formats.KINDS.items():
            new = [row for _, row in rows if isinstance(row, model)]
            if new and model is Label:
                new = completed(new, homes.read(home, Label), manifold)  # type: ignore[assignment, arg-type]
            if new:
                counts[name] = _merge(home, model, new, wins=homes.newer_wins)
        return counts


def _with_label(
    home: Path, path: Path, rows: list[tuple[str, Record]], left_out: Counter[str]
) -> list[tuple[str, Record]]:
    """The rows without those that would add to a label that is not there: half of one would pass for a rated reply."""
    labels = [row for _, row in rows if isinstance(row, Label)]
    labelled = {homes.place(row) for row in [*homes.read(home, Label), *labels] if not is_own_alone(row)}
    kept: list[tuple[str, Record]] = []
    lost: list[tuple[str, Record]] = []
    for where, row in rows:
        alone = isinstance(row, Label) and is_own_alone(row) and homes.place(row) not in labelled
        (lost if alone else kept).append((where, row))
    if lost:
        lines = ", ".join(where.rpartition(":")[2] for where, _ in lost)
        reason = (
            f"rows with numbers in your own dimensions alone, for replies without a label that they could join (line "
            f"{lines}): label these replies first (`hominem data rate`), then import the file again"
        )
        if not kept:
            raise InputError(f"{path}: there is no row in it to take; {len(lost)} {reason}")
        left_out[reason] += len(lost)
    return kept


def _merge(home: Path, model: type[homes.Row], new: Iterable[homes.Row], *, wins) -> dict[str, int]:
    old = homes.read(home, model)
    rows, counts = homes.merge(old, new, wins=wins)
    if rows != old:
        homes.write(home, model, rows)
    return counts


def _read_any(
    path: Path, kind: str | None, labeller: str | None, left_out: Counter[str], manifold: Manifold
) -> list[tuple[str, Record]]:
    values, problems = exports.read_rows(path, left_out)
    rows: list[tuple[str, Record]] = []
    seen: dict[tuple[type, str], str] = {}
    for where, value in values:
        if not isinstance(value, dict):
            problems.append(f'{where}: a row must be an object such as {{"prompt": "..."}}')
            continue
        name = kind or formats.kind_of(value)
        if name is None:
            problems.append(
                f"{where}: cannot tell what this row is from its keys ({', '.join(map(str, value)) or 'none'}); "
                f"say which kind the file holds: {', '.join(formats.KINDS)}"
            )
            continue
        try:
            records = formats.to_records(value, name, labeller=labeller, manifold=manifold)
        except ValidationError as error:
            problems += [f"{where}: {reason}" for reason in explain(error)]
            continue
        except formats.LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        for row in records:
            key = (type(row), row.id)  # type: ignore[attr-defined]
            if key in seen and "id" in value:  # rows without an id have that of their content: equal rows count once
                problems.append(f"{where}: id = {key[1]!r} is already used in {seen[key]}; give it another")
                continue
            place = where.rpartition(":")[2]
            seen[key] = f"line {place}" if place.isdigit() else place
            rows.append((where, row))
    if problems:
        raise InputError(sorted(problems, key=_line_number))
    if not rows:
        passed = "".join(f"; {count} {reason}" for reason, count in left_out.items())
        raise InputError(f"{path}: there is no row in it" + (f" to take{passed}" if passed else ""))
    return rows


def _line_number(problem: str) -> int:
    found = re.search(r":(\d+): ", problem)
    return int(found.group(1)) if found else 0


def _refuse_recall_leaks(home: Path, path: Path, rows: Sequence[tuple[str, Record]]) -> None:
    """A question that is asked in the examination must not be taught, word for word."""
    old = [("", row) for model in (SftPair, RecallQuestion) for row in homes.read(home, model)]
    taught = {_said(row.instruction) for _, row in [*old, *rows] if isinstance(row, SftPair)}
    asked = {_said(row.question) for _, row in [*old, *rows] if isinstance(row, RecallQuestion)}
    problems = []
    for where, row in rows:
        if isinstance(row, SftPair) and _said(row.instruction) in asked:
            problems.append(f"{where}: instruction is also a held-out recall question; word one of them differently")
        if isinstance(row, RecallQuestion) and _said(row.question) in taught:
            problems.append(f"{where}: question is also the instruction of a memory pair; word it differently")
    if problems:
        raise InputError(problems)


def _said(text: str) -> str:
    return " ".join(words(text))


# --- snapshots go out -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The rows of a home, sorted by what may be done with them, and what was left out with the reason.

    `left_out` are held-out rows, `attacks` those that would be learnt from but for an attack on a model or its judge.
    """

    labels: dict[Part, list[Label]]
    preferences: dict[Part, list[Preference]]
    thumbs: list[Thumb]
    thumbs_left_out: int
    memory: list[SftPair]
    held_labels: list[Label]
    held_preferences: list[Preference]
    recall: list[RecallQuestion]
    fixtures: list[Fixture]
    left_out: list[dict[str, str]]
    attacks: list[dict[str, str]]


def split(registry: Registry, home: Path, config: Config) -> dict[str, Artifact]:
    """Pin the home's rows as artifacts and make them current.

    Returns: `raw` (all learnable rows), `labels` (the dataset, pointer "labels") and `suite` (all held-out rows).
    Equal rows give equal artifacts, whatever the order of the files.
    """
    manifold = config.manifold.in_use
    hold_to_meanings(home, homes.read(home, Label, manifold), manifold)
    parts = sort_rows(home)
    learnable = [row for rows in parts.labels.values() for row in rows]
    if not parts.labels["train"]:
        raise InputError(
            "the home has no labelled reply to learn from: import the starter corpus or labels of your own, or run "
            "`hominem data rate`"
        )
    given = [row for rows in parts.preferences.values() for row in rows]
    with registry.draft("raw", manifold=manifold) as draft:
        write_jsonl(draft.folder / "labels.jsonl", _by_id(learnable))
        write_jsonl(draft.folder / "memory.jsonl", parts.memory)
        if given:
            write_jsonl(draft.folder / "preferences.jsonl", _by_id(given))
        if parts.thumbs:
            write_jsonl(draft.folder / THUMBS, parts.thumbs)
        if parts.thumbs or parts.thumbs_left_out:
            draft.metrics |= {"thumbs": len(parts.thumbs), "thumbs_left_out": parts.thumbs_left_out}
        draft.metrics |= {"labels": len(learnable), "memory": len(parts.memory), "preferences": len(given)}
        if parts.attacks:
            draft.metrics["attacks_left_out"] = len(parts.attacks)
            draft.notes["left_out"] = parts.attacks
    raw = draft.published
    with registry.draft("dataset", parents=[raw], config={"holds": "labels"}, manifold=manifold) as draft:
        for part in ("train", "valid"):
            write_jsonl(draft.folder / f"labels.{part}.jsonl", parts.labels[part])
            if given:
                write_jsonl(draft.folder / f"preferences.{part}.jsonl", parts.preferences[part])
            draft.metrics[part] = len(parts.labels[part])
        if parts.thumbs:
            write_jsonl(draft.folder / THUMBS, parts.thumbs)
        write_jsonl(draft.folder / "memory.jsonl", parts.memory)
    labels = draft.published
    with registry.draft("suite", manifold=manifold) as draft:
        write_jsonl(draft.folder / "labels.jsonl", parts.held_labels)
        write_jsonl(draft.folder / "recall.jsonl", parts.recall)
        write_jsonl(draft.folder / "fixtures.jsonl", parts.fixtures)
        if parts.held_preferences:
            write_jsonl(draft.folder / "preferences.jsonl", parts.held_preferences)
        draft.metrics |= {
            "labels": len(parts.held_labels),
            "prompts": len({row.prompt_id for row in parts.held_labels}),
            "recall": len(parts.recall),
            "fixtures": len(parts.fixtures),
        }
        draft.notes["left_out"] = parts.left_out
    suite = draft.published
    for artifact, pointer in ((raw, "default"), (labels, "labels"), (suite, "default")):
        registry.use(artifact, pointer=pointer)
    return {"raw": raw, "labels": labels, "suite": suite}


def sort_rows(home: Path) -> Parts:
    """Every row of a home in its place.

    A prompt's id decides its split. Learnable prompts that say nearly the same under different ids go to `valid`
    together when one of them is there. Held-out rows that repeat a learnable text are left out. Thumbs are only
    learnt from: those about other prompts than training ones are left out and counted.

    This is the one door to learning, so here stands the gate against attacks (`science.md` 3.4): a row whose prompt is
    one, or that would make a reply likelier which is one, stays in the home and is named, and nothing learns from it.
    """
    labels, preferences, thumbs = homes.read(home, Label), homes.read(home, Preference), homes.read(home, Thumb)
    memory = homes.read(home, SftPair)
    attacks: list[dict[str, str]] = []
    reasons = functools.lru_cache(maxsize=None)(is_adversarial)  # a prompt has many rows

    def honest(rows: Sequence[homes.Row]) -> list[homes.Row]:
        kept = []
        for row in rows:
            held_out = isinstance(row, Label | Preference | Thumb) and split_of(row.prompt_id) == "test"
            why = () if held_out else next(filter(None, map(reasons, _learnt_texts(row))), ())
            if why:
                attacks.append({"id": row.id, "reason": f"it {' and '.join(why)}"})  # type: ignore[attr-defined]
            else:
                kept.append(row)
        return kept

    labels, preferences, thumbs, memory = honest(labels), honest(preferences), honest(thumbs), _by_id(honest(memory))
    everything: list[Label | Preference | Thumb] = [*labels, *preferences, *thumbs]
    scored = [row for row in everything if split_of(row.prompt_id) != "test"]
    valid = _valid_prompts(scored)
    learnt = Texts([*sorted({row.prompt for row in scored}), *(row.instruction for row in memory)])
    left_out: list[dict[str, str]] = []

    def held(rows: Sequence[homes.Row]) -> list[homes.Row]:
        kept = []
        for row in _by_id(rows):
            if split_of(row.prompt_id) != "test":  # type: ignore[attr-defined]
                continue
            if learnt.near(row.prompt):  # type: ignore[attr-defined]
                left_out.append({"id": row.id, "reason": "its prompt is nearly one that is learnt from"})  # type: ignore[attr-defined]
            else:
                kept.append(row)
        return kept

    def learnable(rows: Sequence[homes.Row]) -> dict[Part, list[homes.Row]]:
        mine = [row for row in _by_id(rows) if split_of(row.prompt_id) != "test"]  # type: ignore[attr-defined]
        return {
            "train": [row for row in mine if row.prompt not in valid],  # type: ignore[attr-defined]
            "valid": [row for row in mine if row.prompt in valid],  # type: ignore[attr-defined]
        }

    learnt_thumbs = learnable(thumbs)["train"]
    taught = {_said(row.instruction) for row in memory} | {_said(row.prompt) for row in learnt_thumbs}
    recall = []
    for question in _by_id(homes.read(home, RecallQuestion)):
        if _said(question.question) in taught:
            left_out.append({"id": question.id, "reason": "it is taught word for word"})
        else:
            recall.append(question)
    return Parts(
        labels=learnable(labels),
        preferences=learnable(preferences),
        thumbs=learnt_thumbs,
        thumbs_left_out=len(thumbs) - len(learnt_thumbs),
        memory=memory,
        held_labels=held(labels),
        held_preferences=held(preferences),
        recall=recall,
        fixtures=_by_id(homes.read(home, Fixture)),
        left_out=left_out,
        attacks=sorted(attacks, key=lambda row: row["id"]),
    )


def _learnt_texts(row: Record) -> Iterator[str]:
    """What is said to the model in a row, and the reply that it would make likelier.

    The reply of a label makes nothing likelier by itself: pairs leave injected ones out where they would win.
    """
    if isinstance(row, SftPair):
        yield from (turn.content for turn in row.history or ())
        yield from (row.instruction, row.response)
    if isinstance(row, Label | Preference | Thumb):
        yield row.prompt
    if isinstance(row, Preference):
        yield row.chosen
    if isinstance(row, Thumb) and row.good:
        yield row.response


def _valid_prompts(rows: Sequence[Label | Preference | Thumb]) -> set[str]:
    """Prompt texts that belong to `valid`: by their id, or because they nearly repeat one that does."""
    texts = sorted({row.prompt for row in rows})
    valid = {row.prompt for row in rows if split_of(row.prompt_id) == "valid"}
    # One prompt id may have more than one text (a turn worded anew), so ids tie texts together as overlap does.
    ids: dict[str, set[str]] = {}
    for row in rows:
        ids.setdefault(row.prompt_id, set()).add(row.prompt)
    seen = Texts(texts)
    ties = {text: {texts[number] for number, _ in seen.near(text)} for text in texts}
    for group in ids.values():
        for text in group:
            ties[text] |= group
    waiting = list(valid)
    while waiting:
        new = ties[waiting.pop()] - valid
        valid |= new
        waiting += new
    return valid


def _by_id(rows: Iterable[homes.Row]) -> list[homes.Row]:
    return sorted(rows, key=lambda row: row.id)  # type: ignore[attr-defined]


# --- reading snapshots ----------------------------------------------------------------------------------------------


def read_labels(artifact: Artifact, part: Part) -> list[Label]:
    """The labels of one part of a "labels" dataset."""
    return read_jsonl(artifact.file(f"labels.{part}.jsonl"), Label, may_be_empty=True)


def read_given(artifact: Artifact, part: Part) -> list[Preference]:
    """The pairs people handed in, of one part of a "labels" dataset."""
    path = artifact.folder / f"preferences.{part}.jsonl"
    return read_jsonl(path, Preference, may_be_empty=True) if path.exists() else []


def read_thumbs(artifact: Artifact) -> list[Thumb]:
    """The single verdicts of a dataset."""
    path = artifact.folder / THUMBS
    return read_jsonl(path, Thumb) if path.exists() else []


def read_memory(artifact: Artifact) -> list[SftPair]:
    """The memory pairs of a dataset."""
    return read_jsonl(artifact.file("memory.jsonl"), SftPair, may_be_empty=True)
