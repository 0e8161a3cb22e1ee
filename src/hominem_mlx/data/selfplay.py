"""Self-play: the student answers prompts, and the answers on which two judges disagree become candidates to label.

What both judges see alike teaches the reward model little; where they part, one of them is wrong.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data import sampler, selection
from hominem_mlx.data.answers import AnswerStore, Progress
from hominem_mlx.files import sha256_bytes
from hominem_mlx.records import Prompt, Trajectory
from hominem_mlx.schema import Generator, Scorer

FIRST_INDEX = 10_000  # above any number of candidates that `data sample` makes


class Played(BaseModel):
    """What a run of self-play did: answers given, answers kept, and by how much the judges differ on them."""

    answers: int = 0
    added: int = 0
    mean_disagreement: float | None = None
    least_kept: float | None = None


def play(
    home: Path,
    config: Config,
    student: Generator,
    judges: Sequence[Scorer],
    count: int,
    *,
    starter: bool = False,
    progress: Progress | None = None,
) -> Played:
    """Add the `count` answers of the student on which the two judges differ most to the home's candidates.

    Each of the person's own prompts is answered `data.candidates` times. Answers are stored as they come, so that a
    killed run goes on; equal runs give equal answers, and what is a candidate already is not added again.

    Args:
        home: prompts are read from it, candidates added to it.
        config: `data.candidates`, `data.seed`, `teacher.max_tokens`, `student.system`.
        student: who answers.
        judges: two of them; the less they share the better.
        count: how many answers become candidates, at most.
        starter: whether the prompts of the starter corpus are answered too.
        progress: called as answers come.
    """
    one, other = judges
    with homes.holding(home, "self-play"):
        prompts = sampler.own_prompts(home, starter=starter)
        store = AnswerStore(Path(home) / homes.ANSWERS)
        slots = [_slot(prompt, number) for prompt in prompts for number in range(config.data.candidates)]
        texts = sampler.student_texts(student, slots, config, store, progress)
        old = homes.read(home, Trajectory)
        there = {(row.prompt, row.response) for row in old}
        rows: dict[tuple[str, str], Trajectory] = {}
        for slot in slots:
            text = texts[slot.id]
            if isinstance(text, str) and (slot.prompt, text) not in there:
                rows.setdefault((slot.prompt, text), _answered(slot, text))
        pairs = list(rows)
        apart = selection.disagreements(one.score_many(pairs), other.score_many(pairs))
        ranked = sorted(zip(apart, rows.values(), strict=True), key=lambda item: (-item[0], item[1].id))
        kept = [
            row.model_copy(update={"metadata": {**row.metadata, "disagreement": round(float(value), 3)}})
            for value, row in ranked[:count]
        ]
        if kept:
            merged, _ = homes.merge(old, sorted(kept, key=lambda row: row.id), wins=homes.older_wins)
            homes.write(home, Trajectory, merged)
        return Played(
            answers=len(rows),
            added=len(kept),
            mean_disagreement=float(sum(apart) / len(apart)) if len(apart) else None,
            least_kept=float(ranked[len(kept) - 1][0]) if kept else None,
        )


def _slot(prompt: Prompt, number: int) -> Trajectory:
    return Trajectory(
        id=f"{prompt.id}-p{number}",
        prompt_id=prompt.id,
        category=prompt.category,
        prompt=prompt.prompt,
        response=sampler.PENDING,
        candidate_index=FIRST_INDEX + number,
        labeller=sampler.STUDENT,
        metadata={"self_play": True},
    )


def _answered(slot: Trajectory, text: str) -> Trajectory:
    name = f"{slot.prompt_id}-p{sha256_bytes(text.encode(errors='replace'))[:8]}"
    return slot.model_copy(update={"id": name, "response": text})
