"""Ratings of what has been rated: by the same teacher, to see how reliable it is, and by another, to mix the two."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from hominem_mlx.config import Config
from hominem_mlx.data import agreement
from hominem_mlx.data import home as homes
from hominem_mlx.data.answers import Progress
from hominem_mlx.data.meanings import MIXED, OWN, fingerprint, hold_to_meanings, teller, with_numbers_of
from hominem_mlx.data.rater import Asking
from hominem_mlx.data.teacher import Cost, alone_with, estimate, refuse_if_dear
from hominem_mlx.errors import InputError
from hominem_mlx.files import sha256_json, write_jsonl
from hominem_mlx.records import Label, Trajectory
from hominem_mlx.schema import Manifold, Teacher

RETEST_SHARE, RETEST_ROWS = 0.10, 20  # of a teacher's labels; a handful would show nothing


class Again(BaseModel):
    """What asking for ratings of labelled replies did: ratings that came, that were there, and that did not come."""

    rated: int = 0
    kept: int = 0
    unanswered: dict[str, str] = {}
    """Why there is no second rating, by label id."""
    unknown: list[str] = []
    """Teachers without known reliabilities: where one of them has spoken, all count alike."""


def retest(home: Path, config: Config, teacher: Teacher, *, progress: Progress | None = None) -> Again:
    """Ask the teacher anew about a tenth of the replies it has labelled: what its reliability is read from.

    The second ratings lie in `retests.jsonl` and are never learnt from. Which replies are drawn hangs on `data.seed`
    and their ids alone.
    """
    with alone_with(home, teacher, "rating a second time"):
        drawn, there = _retested(home, config, teacher)
        asking = Asking(home, config, teacher, (), repeat=1)
        refuse_if_dear(teacher, estimate(teacher, asking.questions(drawn)))
        done = Again(kept=len(there))
        new = _sorted_out(drawn, asking.ask(drawn, progress=progress), done)
        if new:
            write_jsonl(Path(home) / homes.RETESTS, [*homes.read_aside(home, homes.RETESTS), *new])
        return done


def retest_cost(home: Path, config: Config, teacher: Teacher) -> Cost:
    """What `retest` would ask of the teacher."""
    asking = Asking(home, config, teacher, (), repeat=1)
    return estimate(teacher, asking.questions(_retested(home, config, teacher)[0]))


def _retested(home: Path, config: Config, teacher: Teacher) -> tuple[list[Trajectory], list[Label]]:
    """Replies that a retest asks about now, and those asked about before."""
    rated = [row for row in first_ratings(home) if row.labeller == teacher.name and row.edit_of is None]
    if not rated:
        raise InputError(f"{teacher.name} has labelled nothing in this home: run `hominem data rate` with it first")
    there = [row for row in homes.read_aside(home, homes.RETESTS) if row.labeller == teacher.name]
    count = min(len(rated), max(math.ceil(RETEST_SHARE * len(rated)), RETEST_ROWS))
    drawn = sorted(rated, key=lambda row: sha256_json([config.data.seed, "retest", row.id]))[:count]
    asked = {homes.place(row) for row in there}
    return [as_candidate(row) for row in drawn if homes.place(row) not in asked], there


def first_ratings(home: Path) -> list[Label]:
    """Every rating by one teacher or person, also those that are part of a mixed label by now."""
    opinions = homes.read_aside(home, homes.OPINIONS)
    mixed = {homes.place(row) for row in opinions}
    return [*(row for row in homes.read(home, Label) if homes.place(row) not in mixed), *opinions]


def second(home: Path, config: Config, teacher: Teacher, *, progress: Progress | None = None) -> Again:
    """Ask the teacher about replies that another teacher has labelled; the label becomes what both say together.

    All are brought to the scale of the teacher that has said most, then each counts by its precision in each number
    (`agreement`); what each said stays in `opinions.jsonl`. A person's label stays what it is, and so does one that
    came in or was mended by hand since. A person's numbers in dimensions of their own stay in whatever label.
    """
    manifold = config.manifold.in_use
    with alone_with(home, teacher, "asking for a second opinion"):
        todo, kept = _others(home, teacher)
        asking = Asking(home, config, teacher, first_ratings(home))
        refuse_if_dear(teacher, estimate(teacher, asking.questions(todo)))
        done = Again(kept=kept)
        new = _sorted_out(todo, asking.ask(todo, progress=progress), done)
        labels = homes.read(home, Label)
        opinions = homes.read_aside(home, homes.OPINIONS)
        heard = {homes.place(row) for row in opinions}
        answered = {homes.place(row) for row in new}
        begun = [row for row in labels if homes.place(row) in answered - heard]
        opinions = [*opinions, *begun, *new]
        if new:
            write_jsonl(Path(home) / homes.OPINIONS, opinions)
        retests = agreement.not_held_out(homes.read_aside(home, homes.RETESTS))
        found = agreement.reliabilities([*labels, *opinions], retests)
        weights = agreement.precisions(found)
        said, on_scale = (_by_place(rows) for rows in (opinions, agreement.on_one_scale(opinions)))
        mixed = [
            _mixed(row, on_scale[place], weights, manifold) if _is_made_of(row, said.get(place, []), manifold) else row
            for row, place in ((row, homes.place(row)) for row in labels)
        ]
        if mixed != labels:
            hold_to_meanings(home, mixed, manifold)
            homes.write(home, Label, mixed)
        speakers = {row.labeller for row in opinions}
        done.unknown = sorted(speakers - {labeller for labeller, _ in weights})
        return done


def second_cost(home: Path, config: Config, teacher: Teacher) -> Cost:
    """What `second` would ask of the teacher."""
    asking = Asking(home, config, teacher, first_ratings(home))
    return estimate(teacher, asking.questions(_others(home, teacher)[0]))


def _others(home: Path, teacher: Teacher) -> tuple[list[Trajectory], int]:
    """Replies that teachers have labelled without this one, imported ones too, and how many it has an opinion on."""
    labels = homes.read(home, Label)
    if not labels:
        raise InputError("no reply has a label in this home: run `hominem data rate` with another teacher first")
    mine = {homes.place(row) for row in first_ratings(home) if row.labeller == teacher.name}
    rows = {homes.place(row): row for row in labels if row.labeller != homes.HUMAN}
    return [as_candidate(row) for place, row in rows.items() if place not in mine], len(mine)


def _by_place(rows: Sequence[Label]) -> dict[tuple[str, ...], list[Label]]:
    found: dict[tuple[str, ...], list[Label]] = {}
    for row in rows:
        found.setdefault(homes.place(row), []).append(row)
    return found


def _is_made_of(label: Label, opinions: Sequence[Label], manifold: Manifold) -> bool:
    """Whether a label says what teachers said, so that it may be mixed anew: no newer row, none mended by hand.

    What others have added since in dimensions of the person's own does not count.
    """
    added = [name for name in label.reward.own if teller(label, name) != label.labeller]
    spoken = {row.labeller: fingerprint(with_numbers_of(row, label, added, manifold).reward) for row in opinions}
    if len(opinions) < 2 or label.labeller == homes.HUMAN:
        return False
    if label.labeller in spoken:
        return spoken[label.labeller] == fingerprint(label.reward)
    as_mixed = label.metadata.get(MIXED, fingerprint(label.reward))
    return set(label.labeller.split("+")) <= spoken.keys() and as_mixed == fingerprint(label.reward)


def _mixed(
    label: Label, opinions: Sequence[Label], weights: Mapping[tuple[str, str], float], manifold: Manifold
) -> Label:
    """The label as what these opinions say together; numbers by a person stay, and those that none of them has."""
    speakers = sorted(row.labeller for row in opinions)
    rationale = " ".join(row.rationale for row in opinions if row.rationale)
    reward = agreement.mix(opinions, weights)
    metadata = {name: value for name, value in label.metadata.items() if name != OWN} | {MIXED: fingerprint(reward)}
    update = {"labeller": "+".join(speakers), "reward": reward, "rationale": rationale, "metadata": metadata}
    stay = [name for name in label.reward.own if teller(label, name) == homes.HUMAN or reward.number(name) is None]
    return with_numbers_of(label.model_copy(update=update), label, stay, manifold)


def _sorted_out(rows: Sequence[Trajectory], labels: Sequence[Label | str], done: Again) -> list[Label]:
    """The labels that came; the others are noted with their reasons."""
    done.unanswered = {row.id: label for row, label in zip(rows, labels) if isinstance(label, str)}
    new = [label for label in labels if isinstance(label, Label)]
    done.rated = len(new)
    return new


def as_candidate(row: Label) -> Trajectory:
    """A labelled reply as the candidate it was."""
    values = row.model_dump(include={"id", "prompt_id", "category", "prompt", "response", "edit_of", "lowered"})
    metadata = {name: value for name, value in row.metadata.items() if name not in (MIXED, OWN)}
    return Trajectory(**values, labeller=str(metadata.get("written_by", "")), metadata=metadata)
