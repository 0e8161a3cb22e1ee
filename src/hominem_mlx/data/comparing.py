"""Replies side by side: which of two is better, asked in both orders, because judges favour a place."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data import questions
from hominem_mlx.data.answers import Progress, ask
from hominem_mlx.data.questions import Question
from hominem_mlx.data.rater import candidates
from hominem_mlx.data.teacher import Cost, alone_with, estimate, refuse_if_dear
from hominem_mlx.errors import NoAnswer
from hominem_mlx.files import sha256_json
from hominem_mlx.records import Preference, Trajectory
from hominem_mlx.schema import Teacher


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


class Compared(BaseModel):
    """What a run of comparing did; `position_bias` and `consistent` as in `Comparison`."""

    pairs: int = 0
    undecided: int = 0
    unanswered: dict[str, str] = {}
    position_bias: float | None = None
    consistent: float | None = None


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


def compare(home: Path, config: Config, teacher: Teacher, *, progress: Progress | None = None) -> Compared:
    """Compare candidates to one prompt side by side, in both orders, and add what is preferred to the home's pairs.

    At most `pairs.max_per_prompt` pairs a prompt, drawn by `pairs.seed`. A pair's target is the mean of both orders;
    one on which the teacher has no leaning teaches nothing and is left out, as are pairs there are.
    """
    with alone_with(home, teacher, "comparing candidates"):
        pairs = _to_compare(home, config)
        refuse_if_dear(teacher, estimate(teacher, _comparisons(pairs)))
        said = compare_pairs(teacher, [(a.prompt, a.response, b.response) for a, b in pairs], progress=progress)
        new = [_preferred(a, b, p) for (a, b), p in zip(pairs, said.probabilities) if p is not None and p != 0.5]
        rows, _ = homes.merge(homes.read(home, Preference), new, wins=homes.older_wins)
        if new:
            homes.write(home, Preference, rows)
        undecided = sum(p == 0.5 for p in said.probabilities)
        unanswered = {f"{pairs[place][0].id}, {pairs[place][1].id}": why for place, why in said.unanswered.items()}
        return Compared(
            pairs=len(new),
            undecided=undecided,
            unanswered=unanswered,
            position_bias=said.position_bias,
            consistent=said.consistent,
        )


def cost(home: Path, config: Config, teacher: Teacher) -> Cost:
    """What `compare` would ask of the teacher."""
    return estimate(teacher, _comparisons(_to_compare(home, config)))


def _to_compare(home: Path, config: Config) -> list[tuple[Trajectory, Trajectory]]:
    known = {homes.place(row) for row in homes.read(home, Preference)}
    by_prompt: dict[str, dict[str, Trajectory]] = {}
    for row in candidates(home):
        by_prompt.setdefault(row.prompt, {}).setdefault(row.response, row)
    chosen = []
    for rows in by_prompt.values():
        drawn = sorted(
            itertools.combinations(sorted(rows.values(), key=lambda row: row.id), 2),
            key=lambda pair: sha256_json([config.pairs.seed, pair[0].id, pair[1].id]),
        )[: config.pairs.max_per_prompt]
        chosen += [(a, b) for a, b in drawn if (a.prompt, *sorted((a.response, b.response))) not in known]
    return chosen


def _comparisons(pairs: Sequence[tuple[Trajectory, Trajectory]]) -> list[Question]:
    both = [(a.prompt, *texts) for a, b in pairs for texts in ((a.response, b.response), (b.response, a.response))]
    return [questions.comparing_question(*texts) for texts in both]


def _preferred(one: Trajectory, other: Trajectory, probability: float) -> Preference:
    better, worse = (one, other) if probability > 0.5 else (other, one)
    return Preference(
        # Labels of the same two replies make a pair as well: the ids must differ.
        id=f"{homes.COMPARED}{sha256_json([better.id, worse.id])[:12]}",
        prompt=better.prompt,
        chosen=better.response,
        rejected=worse.response,
        prompt_id=better.prompt_id,
        chosen_id=better.id,
        rejected_id=worse.id,
        category=better.category,
        target=max(probability, 1 - probability),
    )
