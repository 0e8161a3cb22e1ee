"""Contrast edits: a reply as it was, made worse in just one dimension, so that dimensions are told apart.

Whether an edit kept its promise shows in its rating, beside that of its original: `verifier.py` names those that did
not. Source: `science.md` 2.8.
"""

import functools
import math
from collections import Counter
from pathlib import Path

from pydantic import BaseModel

from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data import questions
from hominem_mlx.data.answers import Progress, ask
from hominem_mlx.data.questions import EDITED_WORDS, Question
from hominem_mlx.data.split import words_changed
from hominem_mlx.data.teacher import Cost, alone_with, estimate, refuse_if_dear
from hominem_mlx.errors import InputError, NoAnswer
from hominem_mlx.files import sha256_json, write_jsonl
from hominem_mlx.records import Label, Trajectory
from hominem_mlx.schema import Dimension, Manifold, Teacher

ROUNDING = 1e-9
TRIES = 2
ROOM = 0.0  # an original must be rated at least so high in what is lowered: a bad reply has nothing to lose


class Edited(BaseModel):
    """What a run of editing did: edits made, those there were, and those that failed with the reason, by id."""

    made: int = 0
    kept: int = 0
    failed: dict[str, str] = {}


def edit(home: Path, config: Config, teacher: Teacher, *, progress: Progress | None = None) -> Edited:
    """Bring the home's candidates to a share of `data.edits` contrast edits, spread evenly over the dimensions.

    Which reply is edited in which dimension hangs on `data.seed` and ids. Replies written to be bad, and those rated
    below 0 in the dimension, are not edited. What changes too much or nothing is asked for once more. Edits that
    `data verify --drop` took out count as if they were not there.

    Args:
        home: candidates are read from it, edits added to them when all are done. Answers are stored as they come.
        config: `data.edits`, `data.seed` and the cost limit.
        teacher: who edits.
        progress: called as answers come.

    Raises: InputError without candidates, TeacherError when the teacher cannot be used or would cost too much.
    """
    with alone_with(home, teacher, "editing candidates"):
        slots, old = _open_slots(home, config, teacher)
        manifold = config.manifold.in_use
        refuse_if_dear(teacher, estimate(teacher, _questions(slots, manifold)))
        done = Edited(kept=sum(row.edit_of is not None for row in old))
        new: dict[str, Trajectory] = {}
        for attempt in range(TRIES):
            left = [slot for slot in slots if slot.id not in new]
            jobs = [
                functools.partial(
                    teacher.edit, slot.prompt, slot.response, dimension=_lowered(slot, manifold), repeat=attempt
                )
                for slot in left
            ]
            for slot, text in zip(left, ask(teacher, jobs, stage="edit", progress=progress) if jobs else ()):
                reason = str(text) if isinstance(text, NoAnswer) else _fault(slot.response, text)
                if reason:
                    done.failed[slot.id] = reason
                else:
                    new[slot.id] = slot.model_copy(update={"response": text})
                    done.failed.pop(slot.id, None)
        done.made = len(new)
        rows, _ = homes.merge(old, [new[slot.id] for slot in slots if slot.id in new], wins=homes.older_wins)
        homes.write(home, Trajectory, rows)
        failed = [{"id": name, "teacher": teacher.name, "reason": reason} for name, reason in done.failed.items()]
        write_jsonl(Path(home) / homes.UNSAMPLED, failed)
        return done


def cost(home: Path, config: Config, teacher: Teacher) -> Cost:
    """What `edit` would ask of the teacher, before anything is sent."""
    return estimate(teacher, _questions(_open_slots(home, config, teacher)[0], config.manifold.in_use))


def _open_slots(home: Path, config: Config, teacher: Teacher) -> tuple[list[Trajectory], list[Trajectory]]:
    """Edits still to be made, as copies of their originals, and the candidates there are."""
    rows = homes.read(home, Trajectory)
    originals = [row for row in rows if row.edit_of is None]
    if not originals:
        raise InputError("the home has no candidate replies to edit: run `hominem data sample` first")
    edited = [row for row in rows if row.edit_of is not None]
    dropped = {row.id for row in homes.read_aside(home, homes.DROPPED)}
    standing = [row for row in edited if row.id not in dropped]
    labels = {row.id: row for row in homes.read(home, Label)}
    share = config.data.edits
    wanted = math.ceil(share / (1 - share) * len(originals) - ROUNDING) - len(standing)
    names = config.manifold.in_use.names
    counts = dict.fromkeys(names, 0) | Counter(row.lowered for row in standing if row.lowered)
    taken = {row.edit_of for row in edited}
    waiting = {
        name: sorted(
            (row for row in originals if _has_room(row, labels.get(row.id), name)),
            key=lambda row: sha256_json([config.data.seed, "edit", name, row.id]),
        )
        for name in names
    }
    slots: list[Trajectory] = []
    while len(slots) < wanted and any(waiting.values()):
        name = min((name for name in names if waiting[name]), key=lambda name: counts[name])
        row = waiting[name].pop()
        if row.id in taken:
            continue
        taken.add(row.id)
        counts[name] += 1
        update = {"id": f"{row.id}-less-{name}", "labeller": teacher.name, "edit_of": row.id, "lowered": name}
        slots.append(row.model_copy(update={**update, "persona": "", "instruction": ""}))
    return slots, rows


def _has_room(row: Trajectory, label: Label | None, name: str) -> bool:
    value = label.reward.number(name) if label else None
    return value >= ROOM if value is not None else row.metadata.get("kind") != "bad"


def _lowered(slot: Trajectory, manifold: Manifold) -> Dimension:
    return next(dimension for dimension in manifold.dimensions if dimension.name == slot.lowered)


def _questions(slots: list[Trajectory], manifold: Manifold) -> list[Question]:
    return [questions.editing_question(slot.prompt, slot.response, _lowered(slot, manifold)) for slot in slots]


def _fault(before: str, after: str) -> str:
    """Why a text is no edit of another; empty when it is one."""
    share = words_changed(before, after)
    low, high = EDITED_WORDS
    return "" if low <= share <= high else f"{share:.0%} of the words differ, not {low:.0%} to {high:.0%}: no edit"
