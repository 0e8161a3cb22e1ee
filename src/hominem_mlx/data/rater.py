"""Numbers for candidate replies, asked of a teacher so that one impression does not colour all of them.

Either all dimensions in one call, in an order drawn from a few shuffles, or one dimension a call. Also pairs, asked in
both orders, because judges favour a place.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data import questions
from hominem_mlx.data.answers import Progress, ask
from hominem_mlx.data.questions import Question
from hominem_mlx.data.teacher import Cost, estimate, refuse_if_dear
from hominem_mlx.errors import InputError, NoAnswer
from hominem_mlx.files import write_jsonl
from hominem_mlx.records import Label, Reward, Trajectory
from hominem_mlx.schema import Dimension, Rating, Teacher


class Rated(BaseModel):
    """What a run of rating did: labels written, trajectories that had one, and those that stay unlabelled."""

    rated: int = 0
    kept: int = 0
    unlabelled: dict[str, str] = {}
    """Why there is no label, by trajectory id."""


def rate(home: Path, config: Config, teacher: Teacher, *, progress: Progress | None = None) -> Rated:
    """Label every trajectory of the home that has no label yet.

    A label is whole or not there: where one number of a reply cannot be had, the reply goes to `unlabelled.jsonl` with
    the reason, and the next run asks for what is missing.

    Args:
        home: trajectories are read from it, labels added to it when all are done. Answers are stored as they come.
        config: `teacher.rate_mode`, `data.seed` and the cost limit.
        teacher: who is asked.
        progress: called as answers come.

    Raises: TeacherError when the teacher cannot be used, or would cost more than allowed.
    """
    with homes.holding(home, "rating candidates"):
        todo, labels, kept = _unrated(home)
        refuse_if_dear(teacher, estimate(teacher, _questions(todo, config)))
        calls = [_calls(row, config) for row in todo]
        jobs = [
            functools.partial(teacher.rate, row.prompt, row.response, dimensions=dimensions, overall=overall)
            for row, parts in zip(todo, calls)
            for dimensions, overall in parts
        ]
        answers = iter(ask(teacher, jobs, stage="rate", progress=progress))
        done = Rated(kept=kept)
        new, open_items = [], []
        for row, parts in zip(todo, calls):
            label = _label(row, [(part, next(answers)) for part in parts], teacher.name)
            if isinstance(label, Label):
                new.append(label)
                continue
            done.unlabelled[row.id] = label
            open_items.append({"id": row.id, "prompt_id": row.prompt_id, "teacher": teacher.name, "reason": label})
        done.rated = len(new)
        rows, _ = homes.merge(labels, new, wins=homes.older_wins)
        homes.write(home, Label, rows)
        write_jsonl(Path(home) / homes.UNLABELLED, open_items)
        return done


def cost(home: Path, config: Config, teacher: Teacher) -> Cost:
    """What `rate` would ask of the teacher, before anything is sent."""
    return estimate(teacher, _questions(_unrated(home)[0], config))


def _unrated(home: Path) -> tuple[list[Trajectory], list[Label], int]:
    """Trajectories without a label, the labels there are, and how many trajectories need none."""
    trajectories = homes.read(home, Trajectory)
    if not trajectories:
        raise InputError("the home has no candidate replies: run `hominem data sample` first")
    labels = homes.read(home, Label)
    ids, rated = {row.id for row in labels}, {homes.place(row) for row in labels}
    todo = {(row.prompt, row.response): row for row in reversed(trajectories)}  # equal replies are rated once
    todo = {place: row for place, row in todo.items() if row.id not in ids and place not in rated}
    open_rows = [row for row in trajectories if todo.get((row.prompt, row.response)) is row]
    return open_rows, labels, len(trajectories) - len(open_rows)


Call = tuple[Sequence[Dimension], bool]


def _calls(row: Trajectory, config: Config) -> list[Call]:
    """The calls that make up one rating: which dimensions, in which order, and whether with the other numbers."""
    order = questions.order_of(row.id, config.data.seed)
    if config.teacher.rate_mode == "shuffled":
        return [(order, True)]
    return [*(([dimension], False) for dimension in order), ([], True)]


def _questions(rows: Sequence[Trajectory], config: Config) -> list[Question]:
    return [
        questions.rating_question(row.prompt, row.response, dimensions, overall=overall)
        for row in rows
        for dimensions, overall in _calls(row, config)
    ]


def _label(row: Trajectory, parts: Sequence[tuple[Call, Rating | NoAnswer]], teacher: str) -> Label | str:
    """One label from the answers to all its calls, or why there is none."""
    numbers: dict[str, float | None] = {}
    rationales, reasons = [], []
    for (dimensions, overall), answer in parts:
        if isinstance(answer, NoAnswer):
            named = f"{dimensions[0].name}: " if len(dimensions) == 1 else "overall: " if not dimensions else ""
            reasons.append(f"{named}{answer}")
            continue
        numbers |= answer.reward
        rationales.append(answer.rationale)
        if overall:
            numbers |= {name: getattr(answer, name) for name in questions.OVERALL}
    if reasons:
        return "; ".join(reasons)
    return Label(
        id=row.id,
        prompt_id=row.prompt_id,
        category=row.category,
        prompt=row.prompt,
        response=row.response,
        reward=Reward(**numbers),
        rationale=" ".join(text.strip() for text in rationales if text.strip()),
        labeller=teacher,
        edit_of=row.edit_of,
        lowered=row.lowered,
        metadata={**row.metadata, "written_by": row.labeller},
    )


# --- pairs in both orders -------------------------------------------------------------------------------------------


class Comparison(BaseModel):
    """What a teacher says of pairs when it sees each in both orders.

    `probabilities` are those that the first reply of each pair is better, None where there was no answer.
    `position_bias` is by how much the reply shown first is favoured, in [-0.5, 0.5]; `consistent` the share of pairs in
    which both orders name the same winner.
    """

    probabilities: list[float | None]
    position_bias: float | None
    consistent: float | None
    unanswered: dict[int, str] = {}


def compare_pairs(
    teacher: Teacher, pairs: Sequence[tuple[str, str, str]], *, progress: Progress | None = None
) -> Comparison:
    """Ask which reply of each `(prompt, first, second)` is better, in both orders."""
    jobs: list[Callable[[], float]] = []
    for prompt, first, second in pairs:
        jobs += [
            functools.partial(teacher.prefers, prompt, first, second),
            functools.partial(teacher.prefers, prompt, second, first),
        ]
    answers = ask(teacher, jobs, stage="compare", progress=progress)
    result = Comparison(probabilities=[], position_bias=None, consistent=None)
    shown_first, agree = [], []
    for index in range(len(pairs)):
        there, back = answers[2 * index], answers[2 * index + 1]
        if isinstance(there, NoAnswer) or isinstance(back, NoAnswer):
            result.probabilities.append(None)
            result.unanswered[index] = "; ".join(str(a) for a in (there, back) if isinstance(a, NoAnswer))
            continue
        result.probabilities.append((there + 1 - back) / 2)
        shown_first.append((there + back) / 2)
        agree.append((there - 0.5) * (0.5 - back) > 0 or there == back == 0.5)
    if agree:
        result.position_bias = float(np.mean(shown_first) - 0.5)
        result.consistent = float(np.mean(agree))
    return result
