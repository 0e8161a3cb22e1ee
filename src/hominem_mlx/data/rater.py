"""Numbers for candidate replies, asked of a teacher so that one impression does not colour all of them.

Either all dimensions in one call, in an order drawn from a few shuffles, or one dimension a call.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from hominem_mlx.abuse import is_adversarial
from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data import questions
from hominem_mlx.data.answers import Progress, ask
from hominem_mlx.data.meanings import hold_to_meanings, refuse_other_meanings
from hominem_mlx.data.questions import Question
from hominem_mlx.data.recorded import RecordedTeacher
from hominem_mlx.data.teacher import Cost, alone_with, estimate, refuse_if_dear
from hominem_mlx.errors import InputError, NoAnswer
from hominem_mlx.files import write_jsonl
from hominem_mlx.records import Label, Reward, Trajectory
from hominem_mlx.schema import Dimension, Rating, Teacher

Call = tuple[Sequence[Dimension], bool]


class Rated(BaseModel):
    """What a run of rating did: labels written, replies that had one, and those that stay unlabelled."""

    rated: int = 0
    kept: int = 0
    unlabelled: dict[str, str] = {}
    """Why there is no label, by trajectory id."""
    injected: dict[str, list[str]] = {}
    """What was left out of replies that speak to their judge, before they were judged, by trajectory id."""


def rate(
    home: Path,
    config: Config,
    teacher: Teacher,
    *,
    only: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Rated:
    """Label every trajectory of the home that has no label yet.

    A label is whole or not there: where one number of a reply cannot be had, the reply goes to `unlabelled.jsonl` with
    the reason, and the next run asks for what is missing. Contrast edits come last and are judged beside the reply that
    they are a changed copy of, when this teacher has rated that.

    Args:
        home: trajectories are read from it, labels added to it when all are done. Answers are stored as they come.
        config: `teacher.rate_mode`, `data.seed` and the cost limit.
        teacher: who is asked.
        only: ids of the candidates that are asked about; None is all.
        progress: called as answers come.

    Raises: TeacherError when the teacher cannot be used, or would cost more than allowed.
    """
    with alone_with(home, teacher, "rating candidates"):
        todo, labels, kept = unrated(home, only)
        asking = Asking(home, config, teacher, [*labels, *homes.read_aside(home, homes.OPINIONS)])
        refuse_if_dear(teacher, estimate(teacher, asking.questions(todo)))
        done = Rated(kept=kept)
        new, open_items = [], []
        for row, label in zip(todo, asking.ask(todo, progress=progress)):
            if isinstance(label, Label):
                new.append(label)
                if injected := label.metadata.get(homes.INJECTED):
                    done.injected[row.id] = injected
                continue
            done.unlabelled[row.id] = label
            open_items.append({"id": row.id, "prompt_id": row.prompt_id, "teacher": teacher.name, "reason": label})
        done.rated = len(new)
        rows, _ = homes.merge(labels, new, wins=homes.older_wins)
        hold_to_meanings(home, rows, config.manifold.in_use)
        homes.write(home, Label, rows)
        write_jsonl(Path(home) / homes.UNLABELLED, open_items)
        return done


def cost(home: Path, config: Config, teacher: Teacher, *, only: Collection[str] | None = None) -> Cost:
    """What `rate` would ask of the teacher, before anything is sent."""
    todo, labels, _ = unrated(home, only)
    asking = Asking(home, config, teacher, [*labels, *homes.read_aside(home, homes.OPINIONS)])
    return estimate(teacher, asking.questions(todo))


def unrated(home: Path, only: Collection[str] | None = None) -> tuple[list[Trajectory], list[Label], int]:
    """Trajectories without a label, the labels there are, and how many trajectories need none.

    A reply whose label was dropped (`data verify --drop`) needs none.
    With `only` the first are those with these ids, and the replies of which one of them is an edit.
    """
    trajectories = candidates(home)
    labels = homes.read(home, Label)
    done = [*labels, *homes.read_aside(home, homes.DROPPED)]
    ids, rated = {row.id for row in done}, {homes.place(row) for row in done}
    todo = {(row.prompt, row.response): row for row in reversed(trajectories)}  # equal replies are rated once
    todo = {place: row for place, row in todo.items() if row.id not in ids and place not in rated}
    open_rows = [row for row in trajectories if todo.get((row.prompt, row.response)) is row]
    kept = len(trajectories) - len(open_rows)
    if only is not None:
        wanted = {*only, *(row.edit_of for row in open_rows if row.id in only and row.edit_of)}
        open_rows = [row for row in open_rows if row.id in wanted]
    return open_rows, labels, kept


def candidates(home: Path) -> list[Trajectory]:
    """The candidate replies of a home; InputError when there are none."""
    trajectories = homes.read(home, Trajectory)
    if not trajectories:
        raise InputError("the home has no candidate replies: run `hominem data sample` first")
    return trajectories


class Asking:
    """One teacher, asked for ratings as the settings say.

    Args:
        home: whose labels the ratings join.
        config: `teacher.rate_mode`, `data.seed` and the manifold.
        teacher: who is asked.
        labels: ratings there are, beside which edits are judged.
        repeat: above 0 asks anew, in another order of the dimensions.
        wanted: by id of a reply the dimensions that are asked for, and no other number; None is a whole rating.

    Raises: InputError where a dimension meant something else in the home's labels: before anything is paid for.
    """

    def __init__(
        self,
        home: Path,
        config: Config,
        teacher: Teacher,
        labels: Sequence[Label],
        *,
        repeat: int = 0,
        wanted: Mapping[str, Collection[str]] | None = None,
    ):
        refuse_other_meanings(home, config.manifold.in_use)
        self.config, self.teacher, self.repeat, self.wanted = config, teacher, repeat, wanted
        self._originals = {row.id: row for row in labels if row.labeller == teacher.name}

    def questions(self, rows: Sequence[Trajectory]) -> list[Question]:
        """All that `ask` would ask. The rating of an original that is not there yet is taken as zeros."""
        coming = {row.id: row.response for row in rows}
        asked = []
        for row in rows:
            beside = self._beside(row)
            if beside is None and row.edit_of in coming:
                names = self.config.manifold.in_use.names
                zeros = Rating(reward=dict.fromkeys(names, 0.0), scalar=0, reward_intensity=0, safety_score=0)
                beside = (coming[row.edit_of], zeros)
            asked += [
                questions.rating_question(
                    row.prompt, row.response, dimensions, overall=overall, repeat=self.repeat, beside=beside
                )
                for dimensions, overall in self._calls(row)
            ]
        return asked

    def ask(self, rows: Sequence[Trajectory], *, progress: Progress | None) -> list[Label | str]:
        """A label for each row, or why there is none. Edits come last, beside what their originals were given."""
        labels: dict[str, Label | str] = {}
        for stage in ([row for row in rows if not row.edit_of], [row for row in rows if row.edit_of]):
            labels |= zip([row.id for row in stage], self._ask(stage, progress))
            self._originals |= {name: label for name, label in labels.items() if isinstance(label, Label)}
        return [labels[row.id] for row in rows]

    def _ask(self, rows: Sequence[Trajectory], progress: Progress | None) -> list[Label | str]:
        calls = [self._calls(row) for row in rows]
        jobs = [
            functools.partial(
                self.teacher.rate,
                row.prompt,
                row.response,
                dimensions=dimensions,
                overall=overall,
                repeat=self.repeat,
                beside=self._beside(row),
            )
            for row, parts in zip(rows, calls)
            for dimensions, overall in parts
        ]
        answers = iter(ask(self.teacher, jobs, stage="rate", progress=progress) if jobs else ())
        return [_label(row, [(part, next(answers)) for part in parts], self.teacher) for row, parts in zip(rows, calls)]

    def _calls(self, row: Trajectory) -> list[Call]:
        """The calls that make up one rating: which dimensions, in which order, and whether with the other numbers."""
        drawn_by = f"{row.id} again {self.repeat}" if self.repeat else row.id
        order = questions.order_of(drawn_by, self.config.data.seed, self.config.manifold.in_use)
        whole = self.wanted is None
        if self.wanted is not None:
            order = [dimension for dimension in order if dimension.name in self.wanted[row.id]]
        if self.config.teacher.rate_mode == "shuffled":
            return [(order, whole)]
        return [*(([dimension], False) for dimension in order), *([([], True)] if whole else [])]

    def _beside(self, row: Trajectory) -> tuple[str, Rating] | None:
        """The reply that this one is a changed copy of, and what this teacher gave it."""
        original = self._originals.get(row.edit_of or "")
        if original is None:
            return None
        numbers = original.reward.model_dump(exclude_none=True)
        others = {name: numbers.pop(name) for name in questions.OVERALL if name in numbers}
        return original.response, Rating(reward=numbers, **others)


def _label(row: Trajectory, parts: Sequence[tuple[Call, Rating | NoAnswer]], teacher: Teacher) -> Label | str:
    """One label from the answers to all its calls, or why there is none.

    Where the reply speaks to its judge the label says so. A recorded label does not: what its judge saw is not known.
    """
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
    if not reasons and all(number is None for number in numbers.values()):
        reasons = ["the teacher has no number for it"]
    if reasons:
        return "; ".join(reasons)
    metadata = {**row.metadata, "written_by": row.labeller}
    injected = is_adversarial(row.response)
    if injected and not isinstance(teacher, RecordedTeacher):
        metadata[homes.INJECTED] = list(injected)
    return Label(
        id=row.id,
        prompt_id=row.prompt_id,
        category=row.category,
        prompt=row.prompt,
        response=row.response,
        reward=Reward.model_validate(numbers),
        rationale=" ".join(text.strip() for text in rationales if text.strip()),
        labeller=teacher.name,
        edit_of=row.edit_of,
        lowered=row.lowered,
        metadata=metadata,
    )
