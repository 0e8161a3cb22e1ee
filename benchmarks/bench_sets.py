"""Reading people's judgements: every JSONL file below a folder is a set, its shape is told by its fields.

| shape | fields of a row | what is measured |
|---|---|---|
| pair | prompt, chosen, rejected | pair accuracy; of two equal texts half is right |
| graded | prompt, response, labels {name: number, true, false, word, or null for none} | each label, see `Label` |
| text | text, labels | the same; rows are grouped by `person` where there is one, else by the text |
| choice | prompt, choices, answer, or `x_choices`, `x_answer` for further questions | accuracy |

Where a row has `knowledge` (what the reply should stay with) or `subject` (whom a question is about), the prompt goes
on with it. Rows of replies without any judgement (for supervised learning) are passed over.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hominem_mlx.errors import InputError
from hominem_mlx.files import read_json, read_objects, shown

Pair = tuple[str, str]
MIN_ROWS = 10  # of either class: an area over fewer says nothing
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Label:
    """One thing that people judged.

    `metric` is `pair accuracy`, `AUROC` (values 0 and 1), `Spearman` (more than two numbers) or `accuracy` (choices).
    Words become an AUROC each, that word against the others; of two words one.
    """

    name: str
    metric: str
    values: np.ndarray  # [N], NaN where there is none


@dataclass(frozen=True)
class JudgedSet:
    """One set: what is read, and how people judged it.

    Shapes: `N` items. `texts` is `[N]` pairs of prompt and reply; for the shape `pair` `[2 N]`, first all chosen
    replies and then all rejected; for `choice` an item is one choice, and `questions` says which belong together.
    """

    name: str
    shape: str
    texts: list[Pair]
    groups: np.ndarray  # [N] what folds and draws keep together
    labels: list[Label]
    questions: np.ndarray | None = None
    left_out: tuple[str, ...] = ()  # labels of which one class has too few rows
    wants_f1: bool = False  # its README names F1


def read_sets(folder: Path, only: Sequence[str] = ()) -> list[JudgedSet]:
    """Every judged set below `folder`, in alphabetical order.

    Args:
        folder: with `manifest.json` (a list of `{"set", "file", ...}`) or without.
        only: names of sets; all by default.

    Raises: InputError naming every bad row of every file by file and line, and every set that is not there.
    """
    problems: list[str] = []
    found = []
    files = _files(Path(folder), problems)
    for name in sorted(set(only) - set(files)):
        problems.append(f"--only {name}: {folder} has no such set; it has {', '.join(files) or 'none'}")
    for name, path in files.items():
        if only and name not in only:
            continue
        rows, wrong = read_objects(path)
        judged, more = _read(name, path, rows)
        problems += wrong + more
        if judged is not None:
            found.append(judged)
    if not problems and not found:
        problems.append(f"{folder}: no judged set is in it: rows with chosen and rejected, or with response and labels")
    if problems:
        raise InputError(problems)
    return found


def _files(folder: Path, problems: list[str]) -> dict[str, Path]:
    """Set names and their files: those of the manifest, and every other JSONL file by its own name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    listed: dict[str, Path] = {}
    if (folder / MANIFEST).exists():
        entries = read_json(folder / MANIFEST)
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("set", "file")):
                problems.append(f"{folder / MANIFEST}: entry {number}: needs `set` and `file`")
            elif not (folder / entry["file"]).is_file():
                problems.append(f"{folder / MANIFEST}: {entry['set']}: {entry['file']} is not there")
            else:
                listed[entry["set"]] = folder / entry["file"]
    known = {path.resolve() for path in listed.values()}
    for path in sorted(folder.rglob("*.jsonl*")):
        if path.suffix in (".jsonl", ".gz") and path.resolve() not in known:
            name = path.name.removesuffix(".gz").removesuffix(".jsonl")
            if name in listed:
                problems.append(f"{path}: a set {name} is there already: {listed[name]}; give it another name")
            else:
                listed[name] = path
    return dict(sorted(listed.items()))


def _read(name: str, path: Path, rows: list[tuple[str, object]]) -> tuple[JudgedSet | None, list[str]]:
    """One set, or what is wrong with it."""
    kept: list[tuple[str, dict]] = []
    problems = []
    for where, row in rows:
        if isinstance(row, dict):
            kept.append((where, row))
        else:
            problems.append(f"{where}: {shown(row)} is no row; write an object with prompt, chosen and rejected")
    shapes = {where: _shape(row) for where, row in kept}
    present = [shape for shape in shapes.values() if shape]
    if not present:
        problems += [] if rows else [f"{path}: there is no row in it"]
        problems += [
            f"{where}: has neither chosen and rejected, nor response and labels" for where, row in kept if not _sft(row)
        ]
        return None, problems
    shape = max(sorted(set(present)), key=present.count)
    for where, row in kept:
        if shapes[where] != shape:
            problems.append(f"{where}: is not a row of shape {shape} as most of this file ({NEEDS[shape]})")
        else:
            problems += [f"{where}: {reason}" for reason in CHECKS[shape](row)]
    good = [row for _, row in kept]
    if problems:
        return None, problems
    readme = path.parent / "README.md"
    wants_f1 = readme.is_file() and "F1" in readme.read_text(encoding="utf-8", errors="replace")
    return MAKERS[shape](name, path, good, wants_f1)


def _shape(row: dict) -> str:
    if "chosen" in row or "rejected" in row:
        return "pair"
    if "choices" in row:
        return "choice"
    if "labels" in row:
        return "text" if "text" in row and "response" not in row else "graded"
    return ""


def _sft(row: dict) -> bool:
    return "prompt" in row and "response" in row


NEEDS = {
    "pair": "prompt, chosen, rejected",
    "graded": "prompt, response, labels",
    "text": "text, labels",
    "choice": "prompt, choices, answer",
}


def _texts(row: dict, *names: str, may_be_empty: Sequence[str] = ("prompt",)) -> Iterator[str]:
    """What is wrong with these fields as texts."""
    for name in names:
        if name not in row:
            yield f"{name} is missing"
        elif not isinstance(row[name], str):
            yield f"{name} = {shown(row[name])}: must be a text"
        elif not row[name].strip() and name not in may_be_empty:
            yield f"{name} is empty"
    for name in ("knowledge", "subject"):
        if not isinstance(row.get(name, ""), str):
            yield f"{name} = {shown(row[name])}: must be a text"


def _labels(row: dict) -> Iterator[str]:
    labels = row.get("labels")
    if not isinstance(labels, dict) or not labels:
        yield f"labels = {shown(labels)}: must name at least one label and its value"
        return
    for name, value in labels.items():
        is_number = isinstance(value, int | float)
        if value is not None and not is_number and not isinstance(value, str):
            yield f"labels.{name} = {shown(value)}: must be a number, a word, true, false or null"
        elif is_number and not math.isfinite(value):
            yield f"labels.{name} = {value}: must be finite; write null where there is none"


def _check_pair(row: dict) -> Iterator[str]:
    yield from _texts(row, "prompt", "chosen", "rejected", may_be_empty=("prompt", "rejected"))


def _check_graded(row: dict) -> Iterator[str]:
    yield from _texts(row, "prompt", "response", may_be_empty=("prompt", "response"))  # people judge silence too
    yield from _labels(row)


def _check_text(row: dict) -> Iterator[str]:
    yield from _texts(row, "text")
    yield from _labels(row)


def _check_choice(row: dict) -> Iterator[str]:
    yield from _texts(row, "prompt")
    for start in _questions(row):
        choices, answer = row.get(start + "choices"), row.get(start + "answer")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            yield f"{start}choices = {shown(choices)}: must be two or more texts"
        elif len(set(choices)) < len(choices):
            yield f"{start}choices: one stands there twice"
        elif answer not in choices:
            yield f"{start}answer = {shown(answer)}: is none of its choices"


CHECKS = {"pair": _check_pair, "graded": _check_graded, "text": _check_text, "choice": _check_choice}


def _questions(row: dict) -> list[str]:
    """Beginnings of the names of all questions in a row: "" for `choices`, "x_" for `x_choices`."""
    return sorted(name.removesuffix("choices") for name in row if name == "choices" or name.endswith("_choices"))


def _prompt(row: dict) -> str:
    return "\n".join(row[name] for name in ("prompt", "knowledge", "subject") if row.get(name))


def _group(row: dict) -> str:
    return " ".join(row["prompt"].split())


def _pair_set(name: str, path: Path, rows: list[dict], wants_f1: bool) -> tuple[JudgedSet | None, list[str]]:
    texts = [(_prompt(row), row[side]) for side in ("chosen", "rejected") for row in rows]
    groups = np.array([_group(row) for row in rows])
    label = Label("chosen", "pair accuracy", np.ones(len(rows)))
    return JudgedSet(name, "pair", texts, groups, [label]), _too_few(path, groups)


def _graded_set(name: str, path: Path, rows: list[dict], wants_f1: bool) -> tuple[JudgedSet | None, list[str]]:
    texts = [(_prompt(row), row["response"]) for row in rows]
    groups = np.array([_group(row) for row in rows])
    return _judged(name, path, "graded", texts, groups, rows, wants_f1)


def _text_set(name: str, path: Path, rows: list[dict], wants_f1: bool) -> tuple[JudgedSet | None, list[str]]:
    texts = [("", row["text"]) for row in rows]
    groups = np.array([str(row.get("person") or row["text"]) for row in rows])
    return _judged(name, path, "text", texts, groups, rows, wants_f1)


def _judged(
    name: str, path: Path, shape: str, texts: list[Pair], groups: np.ndarray, rows: list[dict], wants_f1: bool
) -> tuple[JudgedSet | None, list[str]]:
    labels, left_out, problems = [], [], _too_few(path, groups)
    for key in dict.fromkeys(key for row in rows for key in row["labels"]):
        made, few, wrong = _columns(key, [row["labels"].get(key) for row in rows])
        labels += made
        left_out += few
        problems += [f"{path}: labels.{key}: {reason}" for reason in wrong]
    if not labels and not problems:
        problems.append(f"{path}: no label has {MIN_ROWS} rows of either class; nothing can be measured")
    judged = JudgedSet(name, shape, texts, groups, labels, left_out=tuple(left_out), wants_f1=wants_f1)
    return (None if problems else judged), problems


def _columns(key: str, given: list[Any]) -> tuple[list[Label], list[str], list[str]]:
    """The labels that one field of `labels` makes, those left out, and what is wrong."""
    there = [value for value in given if value is not None]
    words = {value for value in there if isinstance(value, str)}
    if words and len(words) < len(set(there)):
        return [], [], [f"is a word in some rows ({shown(min(words))}) and a number in others"]
    if words:
        kinds = sorted(words)
        columns = {f"{key}={kind}": [None if v is None else v == kind for v in given] for kind in kinds}
        if len(kinds) == 2:
            del columns[f"{key}={kinds[1]}"]
    else:
        columns = {key: given}
    made, few = [], []
    for name, column in columns.items():
        values = np.array([math.nan if value is None else float(value) for value in column])
        kinds, counts = np.unique(values[~np.isnan(values)], return_counts=True)
        if len(kinds) > 2:
            made.append(Label(name, "Spearman", values))
        elif len(kinds) == 2 and counts.min() >= MIN_ROWS:
            made.append(Label(name, "AUROC", np.where(np.isnan(values), np.nan, values == kinds[1])))
        else:
            few.append(name)
    return made, few, []


def _choice_set(name: str, path: Path, rows: list[dict], wants_f1: bool) -> tuple[JudgedSet | None, list[str]]:
    texts, groups, questions, right = [], [], [], []
    for number, row in enumerate(rows):
        for start in _questions(row):
            asked = f"{_prompt(row)}\n{start.removesuffix('_')}".strip()
            for choice in row[start + "choices"]:
                texts.append((asked, choice))
                groups.append(_group(row))
                questions.append(f"{number} {start}")
                right.append(float(choice == row[start + "answer"]))
    owners = np.unique(np.array(questions), return_inverse=True)[1]
    label = Label("answer", "accuracy", np.array(right))
    judged = JudgedSet(name, "choice", texts, np.array(groups), [label], questions=owners)
    return judged, _too_few(path, judged.groups)


def _too_few(path: Path, groups: np.ndarray) -> list[str]:
    least = 10  # with fewer prompts folds inside folds have nothing to learn from
    count = len(set(groups))
    return [f"{path}: has {count} prompts; at least {least} are needed for folds"] if count < least else []


MAKERS = {"pair": _pair_set, "graded": _graded_set, "text": _text_set, "choice": _choice_set}
