"""What teachers answered: stored the moment it arrives, so that a killed run goes on and pays for nothing twice.

An append-only JSONL, one answer a line, keyed by the hash of the full request, the teacher's identity included. A
teacher has no temperature that would make it repeat itself: the log is what makes a run repeatable.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict

from hominem_mlx.errors import NoAnswer
from hominem_mlx.files import append_jsonl, lock, read_jsonl, sha256_json

T = TypeVar("T")
Progress = Callable[[dict], None]


class Answer(BaseModel):
    """One line of the log. `answer` is raw, as it came: parsing happens again on every read."""

    model_config = ConfigDict(extra="ignore")
    key: str
    teacher: str = ""
    answer: dict[str, Any]


class AnswerStore:
    """The log, and its content in memory.

    Args:
        path: the log; None keeps answers for this process only.
    """

    def __init__(self, path: Path | None = None):
        self.path = Path(path) if path is not None else None
        self._guard = threading.Lock()
        self._answers: dict[str, dict] = {}
        self.reread()

    def reread(self) -> None:
        """Take in what other processes have stored since."""
        if self.path is not None and self.path.exists():
            rows = read_jsonl(self.path, Answer, unique=None, may_be_empty=True, torn_tail=True)
            self._answers = {row.key: row.answer for row in rows}

    def __contains__(self, request: dict) -> bool:
        return self.holds(sha256_json(request))

    def holds(self, key: str) -> bool:
        """Whether there is an answer to the request with this hash."""
        return key in self._answers

    def put(self, answers: dict[str, dict], *, teacher: str) -> None:
        """Store answers by the hashes of their requests; those there are stay as they are.

        Args:
            answers: raw answers.
            teacher: who was asked, for people who read the log.
        """
        with self._guard:
            new = {key: answer for key, answer in answers.items() if key not in self._answers}
            if self.path is not None and new:
                rows = [Answer(key=key, teacher=teacher, answer=answer) for key, answer in new.items()]
                with lock(self.path.with_name(f".{self.path.name}.lock"), "storing a teacher's answers"):
                    append_jsonl(self.path, rows)
            self._answers |= new

    def remember(self, request: dict, ask: Callable[[], dict], *, teacher: str) -> dict:
        """The stored answer to `request`, or that of `ask()`, stored before it is used.

        Args:
            request: everything that shapes the answer, as JSON; its hash is the key.
            ask: gets the answer; what it raises is passed on and nothing is stored.
            teacher: who was asked, for people who read the log.
        """
        key = sha256_json(request)
        if key not in self._answers:
            self.put({key: ask()}, teacher=teacher)
        return self._answers[key]


class Asked(Protocol):
    """What `ask` needs of a teacher."""

    @property
    def concurrency(self) -> int:
        """How many threads may ask at once; 1 means the calling thread only."""
        ...


@runtime_checkable
class Gathering(Protocol):
    """A teacher that answers from what is stored and gathers all other requests, to send them together."""

    def settle(self, progress: Progress | None) -> bool:
        """Send what was gathered and wait for the answers; whether there was anything to send or to wait for."""
        ...


def ask(
    teacher: Asked, jobs: Sequence[Callable[[], T]], *, stage: str, progress: Progress | None = None
) -> list[T | NoAnswer]:
    """Results of `jobs`, questions to `teacher`, in their order; where a job had no answer, the reason.

    With a gathering teacher the jobs are done again until none of them has anything left to ask.
    """
    if not isinstance(teacher, Gathering):
        return ask_all(jobs, concurrency=teacher.concurrency, stage=stage, progress=progress)
    while True:
        results = ask_all(jobs, concurrency=teacher.concurrency, stage=stage)
        if not teacher.settle(progress):
            return results


def ask_all(
    jobs: Sequence[Callable[[], T]], *, concurrency: int, stage: str, progress: Progress | None = None
) -> list[T | NoAnswer]:
    """Results of `jobs` in their order; where a job had no answer, the reason.

    Args:
        jobs: questions to a teacher.
        concurrency: threads; 1 asks from the calling thread, which a model in this process needs.
        stage: name shown by `progress`.
        progress: called after each answer.

    Raises: whatever a job raises beside NoAnswer; jobs that have not begun are dropped then.
    """
    done = 0

    def answered(_: object = None) -> None:
        nonlocal done
        done += 1
        if progress:
            progress({"stage": stage, "done": done, "total": len(jobs)})

    def attempt(job: Callable[[], T]) -> T | NoAnswer:
        try:
            return job()
        except NoAnswer as reason:
            return reason

    if concurrency == 1:
        results = []
        for job in jobs:
            results.append(attempt(job))
            answered()
        return results
    with ThreadPoolExecutor(concurrency) as pool:
        futures: list[Future] = [pool.submit(attempt, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                answered()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # what is on its way has been paid for: let it be stored
            raise
        return [future.result() for future in futures]
