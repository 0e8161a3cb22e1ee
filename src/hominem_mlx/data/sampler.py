"""Candidate replies to prompts: good, mixed and poor ones asked of a teacher by name, and some by the student itself.

A teacher behind an API has no temperature, so the difference between candidates comes from who is asked to answer and
how. The student's own replies matter most for what it learns: they are the ones it would have given.
"""

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel

from hominem_mlx.config import Config
from hominem_mlx.data import home as homes
from hominem_mlx.data import questions
from hominem_mlx.data.answers import AnswerStore, Progress, ask
from hominem_mlx.data.prompts import STARTER_SOURCE, Material, Persona
from hominem_mlx.data.questions import Question
from hominem_mlx.data.teacher import Cost, alone_with, estimate, refuse_if_dear
from hominem_mlx.errors import InputError, NoAnswer
from hominem_mlx.files import sha256_json, write_jsonl
from hominem_mlx.records import Prompt, Trajectory
from hominem_mlx.schema import Generator, Teacher

ORDER = ("good", "bad", "ambiguous", "good")  # of the kinds asked for, repeated
CHUNK = 16  # prompts the student answers together and that are stored together
STUDENT = "student"
PENDING = "?"  # stands for the reply while a candidate is only planned


class Sampled(BaseModel):
    """What a run of sampling did: candidates by the teacher and by the student, those there were, those that failed."""

    teacher: int = 0
    student: int = 0
    kept: int = 0
    failed: dict[str, str] = {}
    """Why there is no candidate, by id."""


def sample(
    home: Path,
    config: Config,
    teacher: Teacher,
    *,
    student: Generator | None = None,
    starter: bool = False,
    progress: Progress | None = None,
) -> Sampled:
    """Bring the person's own prompts to `data.candidates` candidates; those that are there stay.

    Args:
        home: prompts are read from it, trajectories added to it when all are done. Answers are stored as they come, so
            that a killed run goes on.
        config: `data` and `teacher` tables; `student.system` goes before the student's own replies.
        teacher: asked for all candidates but the student's.
        student: answers `data.student_candidates` of them; None leaves all to the teacher.
        starter: whether the prompts of the starter corpus get candidates too.
        progress: called as answers come.

    Raises: TeacherError when the teacher cannot be used, or would cost more than allowed.
    """
    with alone_with(home, teacher, "sampling candidates"):
        slots, old = _open_slots(home, config, teacher, student, starter)
        asked = [slot for slot in slots if slot.labeller != STUDENT]
        refuse_if_dear(teacher, estimate(teacher, map(_question, asked)))
        jobs = [functools.partial(_ask, teacher, slot) for slot in asked]
        texts: dict[str, str | NoAnswer] = dict(
            zip(
                [slot.id for slot in asked],
                ask(teacher, jobs, stage="sample", progress=progress),
            )
        )
        own = [slot for slot in slots if slot.labeller == STUDENT]
        if student is not None and own:
            texts |= student_texts(student, own, config, AnswerStore(Path(home) / homes.ANSWERS), progress)
        done = Sampled(kept=len(old))
        new = []
        for slot in slots:
            text = texts[slot.id]
            if isinstance(text, NoAnswer):
                done.failed[slot.id] = str(text)
                continue
            new.append(slot.model_copy(update={"response": text}))
            done.student += slot.labeller == STUDENT
            done.teacher += slot.labeller != STUDENT
        rows, _ = homes.merge(old, new, wins=homes.older_wins)
        homes.write(home, Trajectory, rows)
        failed = [{"id": name, "teacher": teacher.name, "reason": reason} for name, reason in done.failed.items()]
        write_jsonl(Path(home) / homes.UNSAMPLED, failed)
        return done


def cost(
    home: Path, config: Config, teacher: Teacher, *, student: Generator | None = None, starter: bool = False
) -> Cost:
    """What `sample` would ask of the teacher, before anything is sent."""
    slots, _ = _open_slots(home, config, teacher, student, starter)
    return estimate(teacher, [_question(slot) for slot in slots if slot.labeller != STUDENT])


def _open_slots(
    home: Path, config: Config, teacher: Teacher, student: Generator | None, starter: bool
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Candidates still to be had, as trajectories without a reply of their own, and those there are."""
    prompts = own_prompts(home, starter=starter)
    old = homes.read(home, Trajectory)
    have = {(row.prompt_id, row.candidate_index) for row in old}
    personas = Material().personas
    slots = [
        slot
        for prompt in prompts
        for slot in plan(prompt, config, teacher, personas, student=student is not None)
        if (slot.prompt_id, slot.candidate_index) not in have
    ]
    return slots, old


def own_prompts(home: Path, *, starter: bool) -> list[Prompt]:
    """The prompts of a home that are not the starter corpus's, or with `starter` all; InputError when there is none."""
    known = homes.read(home, Prompt)
    prompts = [prompt for prompt in known if starter or prompt.source != STARTER_SOURCE]
    if not prompts:
        more = f", or add --starter for the {len(known)} bundled ones" if known else ""
        raise InputError(
            f"{Path(home) / homes.FILES[Prompt]}: there is no prompt of your own; `hominem data generate` makes some, "
            f"`hominem data import FILE` brings yours{more}"
        )
    return prompts


def plan(
    prompt: Prompt, config: Config, teacher: Teacher, personas: Sequence[Persona], *, student: bool
) -> list[Trajectory]:
    """Who is asked for which candidate to one prompt. Hangs on `data.seed` and the prompt's id alone."""
    rng = random.Random(f"candidates {config.data.seed} {prompt.id}")
    total = config.data.candidates
    by_teacher = total - (min(config.data.student_candidates, total) if student else 0)
    speakers = rng.sample(list(personas), min(by_teacher, len(personas)))
    slots = []
    for index in range(total):
        kind = ORDER[index % len(ORDER)]
        mine = index >= by_teacher
        slots.append(
            Trajectory(
                id=f"{prompt.id}-{'s' if mine else 'c'}{index}",
                prompt_id=prompt.id,
                category=prompt.category,
                prompt=prompt.prompt,
                response=PENDING,
                persona="" if mine else speakers[index % len(speakers)].who,
                instruction="" if mine else questions.KINDS[kind],
                candidate_index=index,
                labeller=STUDENT if mine else teacher.name,
                metadata={"seed": config.data.seed} | ({} if mine else {"kind": kind}),
            )
        )
    return slots


def _question(slot: Trajectory) -> Question:
    return questions.sampling_question(
        slot.prompt, persona=slot.persona, instruction=slot.instruction, index=slot.candidate_index
    )


def _ask(teacher: Teacher, slot: Trajectory) -> str:
    return teacher.sample(slot.prompt, persona=slot.persona, instruction=slot.instruction, index=slot.candidate_index)


def student_texts(
    student: Generator, slots: Sequence[Trajectory], config: Config, store: AnswerStore, progress: Progress | None
) -> dict[str, str | NoAnswer]:
    """The student's replies in fixed chunks, each stored whole: what a reply is depends on its company in the batch."""
    texts: dict[str, str | NoAnswer] = {}
    identity = getattr(student, "hash", None) or getattr(student, "name", type(student).__name__)
    for start in range(0, len(slots), CHUNK):
        chunk = slots[start : start + CHUNK]
        prompts = [slot.prompt for slot in chunk]
        seed = int(sha256_json([config.data.seed, [slot.id for slot in chunk]])[:8], 16)
        settings = {
            "max_tokens": config.teacher.max_tokens,
            "temperature": 1.0,
            "seed": seed,
            "system": config.student.system,
        }
        request = {
            "student": identity,
            "adapter": str(getattr(student, "adapter", None)),
            "prompts": prompts,
            **settings,
        }
        ask: Callable[[], dict] = functools.partial(_complete, student, prompts, settings)
        replies = store.remember(request, ask, teacher=STUDENT)["texts"]
        for slot, reply in zip(chunk, replies):
            texts[slot.id] = reply if reply.strip() else NoAnswer("the student answered with nothing")
        if progress:
            progress({"stage": "sample the student", "done": start + len(chunk), "total": len(slots)})
    return texts


def _complete(student: Generator, prompts: Sequence[str], settings: dict) -> dict:
    return {"texts": student.complete(prompts, **settings)}
