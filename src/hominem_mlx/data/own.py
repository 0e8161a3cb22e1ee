"""Asking a teacher for the dimensions that a person added, of replies that were labelled before there were these."""

from pathlib import Path

from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data.again import Again, as_candidate
from hominem_mlx.data.answers import Progress
from hominem_mlx.data.meanings import hold_to_meanings, with_numbers
from hominem_mlx.data.rater import Asking
from hominem_mlx.data.teacher import Cost, alone_with, estimate, refuse_if_dear
from hominem_mlx.errors import InputError
from hominem_mlx.records import Label, Trajectory
from hominem_mlx.schema import Teacher


def fill(home: Path, config: Config, teacher: Teacher, *, progress: Progress | None = None) -> Again:
    """Add the teacher's numbers in the person's own dimensions to labels that lack them.

    Nothing else of a label is asked for anew, and a person's labels are left alone: theirs come by `data import`.
    """
    manifold = config.manifold.in_use
    with alone_with(home, teacher, "rating in dimensions of your own"):
        labels = homes.read(home, Label, manifold)
        todo, wanted, done = _lacking(labels, config)
        asking = Asking(home, config, teacher, labels, wanted=wanted)
        refuse_if_dear(teacher, estimate(teacher, asking.questions(todo)))
        answers = dict(zip([row.id for row in todo], asking.ask(todo, progress=progress), strict=True))
        done.unanswered = {name: label for name, label in answers.items() if isinstance(label, str)}
        came = {name: label for name, label in answers.items() if isinstance(label, Label)}
        done.rated = len(came)
        # Whether the other numbers came of an answer that speaks to its judge is not for this rating to say.
        rows = [
            with_numbers(row, came[row.id].reward.own, teacher.name, manifold) if row.id in came else row
            for row in labels
        ]
        if came:
            hold_to_meanings(home, rows, manifold)
            homes.write(home, Label, rows)
        return done


def cost(home: Path, config: Config, teacher: Teacher) -> Cost:
    """What `fill` would ask of the teacher."""
    labels = homes.read(home, Label, config.manifold.in_use)
    todo, wanted, _ = _lacking(labels, config)
    return estimate(teacher, Asking(home, config, teacher, labels, wanted=wanted).questions(todo))


def _lacking(labels: list[Label], config: Config) -> tuple[list[Trajectory], dict[str, set[str]], Again]:
    """Labelled replies with holes in the person's dimensions, the names of these by id, and how many have none."""
    own = {dimension.name for dimension in config.manifold.in_use.own}
    if not own:
        raise InputError(
            "there is no dimension of your own; add a block [[manifold.dimension]] to hominem.toml "
            "(docs/REWARD_MANIFOLD.md)"
        )
    wanted = {row.id: own - row.reward.own.keys() for row in labels if row.labeller != homes.HUMAN}
    todo = [as_candidate(row) for row in labels if wanted.get(row.id)]
    return todo, wanted, Again(kept=len(labels) - len(todo))
