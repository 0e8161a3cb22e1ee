"""How far a teacher agrees with itself, and what several teachers say together.

A rating is taken as what the reply deserves plus an error that the next asking does not repeat (classical test
theory: Lord and Novick 1968). Then the correlation of test and retest is the reliability r, the share of the variance
that is no error; nothing can predict the ratings better than sqrt(r) (`science.md` 2.7); and the precision of a rating,
in units of what replies differ by, is r / (1 - r).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel

from hominem_mlx.data.meanings import teller
from hominem_mlx.data.split import split_of
from hominem_mlx.metrics import pearson
from hominem_mlx.records import Label, Reward
from hominem_mlx.schema import MANIFOLD

NUMBERS = (*MANIFOLD.names, "scalar", "reward_intensity", "safety_score")
MIN_ROWS = 10  # fewer pairs of ratings say nothing of a correlation
STEEPEST = 3.0  # by which equating may widen or narrow a scale: more is no scale but a constant
MOST_RELIABLE = 0.95  # few retests can show a correlation of 1; no teacher is to count for everything


class Reliability(BaseModel):
    """One teacher's reliability in one number; None where there are too few retests, or they do not differ."""

    labeller: str
    number: str
    n: int
    reliability: float | None = None
    ceiling: float | None = None
    """The highest correlation with this teacher's ratings that anything can reach: sqrt of the reliability."""


def reliabilities(first: Sequence[Label], again: Sequence[Label]) -> list[Reliability]:
    """Test against retest, by teacher and number.

    Args:
        first: ratings.
        again: ratings of the same replies by the same teachers, asked anew; others are left out.
    """
    known = {(label.labeller, label.prompt, label.response): label for label in first}
    pairs: dict[str, list[tuple[Label, Label]]] = {}
    for label in again:
        if (before := known.get((label.labeller, label.prompt, label.response))) is not None:
            pairs.setdefault(label.labeller, []).append((before, label))
    found = []
    for labeller, rows in sorted(pairs.items()):
        for name in _numbers(first):
            both = [(x, y) for x, y in ((_number(a, name), _number(b, name)) for a, b in rows) if None not in (x, y)]
            item = Reliability(labeller=labeller, number=name, n=len(both))
            if len(both) >= MIN_ROWS:
                value = pearson(*np.array(both, float).T)
                if not math.isnan(value):
                    item = item.model_copy(update={"reliability": value, "ceiling": math.sqrt(max(0.0, value))})
            found.append(item)
    return found


def not_held_out(rows: Sequence[Label]) -> list[Label]:
    """The rows of which learning may know: those of prompts in no test split."""
    return [row for row in rows if split_of(row.prompt_id) != "test"]


def precision(reliability: float) -> float:
    """Weight of a rating beside others, `r / (1 - r)`: 0 for r <= 0, 1 for r = 0.5, 19 at most."""
    share = min(max(reliability, 0.0), MOST_RELIABLE)
    return share / (1 - share)


def precisions(found: Sequence[Reliability]) -> dict[tuple[str, str], float]:
    """Weights by `(labeller, number)`, where a reliability is known."""
    return {(i.labeller, i.number): precision(i.reliability) for i in found if i.reliability is not None}


def on_one_scale(opinions: Sequence[Label]) -> list[Label]:
    """The same opinions with every teacher's numbers brought to the scale of the one that has rated most replies.

    A strict teacher and a mild one differ by more than noise; mixed as they are, whether a reply had a second opinion
    would show in its label. Over the replies both have rated a number gets the reference's mean and spread (linear
    equating: Kolen and Brennan 2014, ch. 2); where these are fewer than `MIN_ROWS` it stays what it is. Replies of held
    out prompts are moved as the others are, but not looked at: what they say must not reach what is learnt from.
    """
    by_teacher: dict[str, dict[tuple[str, str], Label]] = {}
    for row in not_held_out(opinions):
        by_teacher.setdefault(row.labeller, {})[row.prompt, row.response] = row
    reference = min(by_teacher, key=lambda name: (-len(by_teacher[name]), name), default="")
    moves = {
        (teacher, name): _move([_pair(row, by_teacher[reference].get(place), name) for place, row in rows.items()])
        for teacher, rows in by_teacher.items()
        for name in _numbers(opinions)
        if teacher != reference
    }
    ends = _ends(opinions)
    found = []
    for row in opinions:
        numbers = row.reward.model_dump(exclude_none=True)
        for name, value in numbers.items():
            slope, shift = moves.get((row.labeller, name), (1.0, 0.0))
            low, high = ends.get(name, (0.0 if name == "reward_intensity" else -1.0, 1.0))
            numbers[name] = min(high, max(low, slope * value + shift))
        found.append(row.model_copy(update={"reward": Reward(**numbers)}))
    return found


def _pair(row: Label, other: Label | None, name: str) -> tuple[float, float] | None:
    one, two = _number(row, name), _number(other, name) if other else None
    return None if one is None or two is None else (one, two)


def _move(pairs: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """Slope and shift that give the first numbers the mean and spread of the second."""
    both = np.array([pair for pair in pairs if pair is not None], float).reshape(-1, 2)
    if len(both) < MIN_ROWS:
        return 1.0, 0.0
    (mean, target), (spread, wanted) = both.mean(axis=0), both.std(axis=0)
    slope = float(np.clip(wanted / spread, 1 / STEEPEST, STEEPEST)) if min(spread, wanted) > 1e-6 else 1.0
    return slope, float(target - slope * mean)


def mix(opinions: Sequence[Label], weights: Mapping[tuple[str, str], float]) -> Reward:
    """One reward of several teachers' ratings of one reply: of each number the mean, weighed by precision.

    This is the mean of least variance when the teachers' errors have nothing to do with one another. For a number in
    which some of them has no known reliability, or all weights are 0, all count alike. A number that nobody gave stays
    missing.
    """
    mixed: dict[str, float] = {}
    for name in _numbers(opinions):
        said = [(row.labeller, value) for row in opinions if (value := row.reward.number(name)) is not None]
        known = [weights.get((labeller, name)) for labeller, _ in said]
        shares = [1.0 if weight is None else weight for weight in known]
        if None in known or not sum(shares):
            shares = [1.0] * len(said)
        if said:
            mean = sum(share * value for share, (_, value) in zip(shares, said)) / sum(shares)
            mixed[name] = min(1.0, max(-1.0, round(mean, 6)))
    return Reward.model_validate(mixed)


def _number(label: Label, name: str) -> float | None:
    """A number by the label's own rater: one that somebody else has added to the label says nothing of that rater."""
    return label.reward.number(name) if teller(label, name) == label.labeller else None


def _numbers(rows: Sequence[Label]) -> tuple[str, ...]:
    """The names of all numbers there may be, with those of the dimensions that the person added."""
    return (*NUMBERS, *sorted({name for row in rows for name in row.reward.own}))


def _ends(rows: Sequence[Label]) -> dict[str, tuple[float, float]]:
    """The least and the most that anyone has said in each of the person's dimensions: its range or less."""
    said: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.reward.own.items():
            said.setdefault(name, []).append(value)
    return {name: (min(values), max(values)) for name, values in said.items()}
