"""Runs paths side by side: one process each, one step each in turn, round after round."""

import json
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_models import Case

HERE = Path(__file__).parent
PATIENCE = 600  # seconds a step may take, compiling included
STEPS = {"T": 5}  # a round takes so many steps on a small shape, one on others
SLOW = (
    60  # seconds; a path whose warm-up takes longer takes part in the first round only, or a run would not end in time
)


class CannotRun(Exception):
    """Why a path gave no measurement."""


def interpreter(path: str) -> str:
    """The Python of a path: TRL may have a `.venv-bench-trl`, since mlx-tune wants another release of datasets."""
    own = HERE.parent / f".venv-bench-{path}" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


class Worker:
    """A path in its own process."""

    def __init__(self, path: str, case: Case):
        self.path = path
        command = [interpreter(path), str(HERE / "bench_worker.py"), json.dumps({"path": path, **asdict(case)})]
        source = os.pathsep.join([str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"},
        )

    def answer(self) -> dict:
        """The next line it says. Raises: CannotRun with its reason."""
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            self.stop()
            raise CannotRun(f"{self.path} said nothing for {PATIENCE} seconds")
        line = self.process.stdout.readline()
        if not line:
            raise CannotRun(f"{self.path} ended with status {self.process.wait()}; is there too little memory?")
        told = json.loads(line)
        if "error" in told:
            raise CannotRun(f"{self.path}: {told['error']}")
        return told

    def step(self, steps: int = 1) -> dict:
        """One measurement. Raises: CannotRun."""
        try:
            self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise CannotRun(f"{self.path} has ended") from None
        return self.answer()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@dataclass
class Measured:
    """What the rounds of one path gave. `given` is what its first step gave, usually the loss; memory in bytes."""

    seconds: list[float]
    cpu_seconds: list[float]
    given: object
    peak: int
    resident: int

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)


def side_by_side(paths: Sequence[str], case: Case, rounds: int) -> tuple[dict[str, Measured], dict[str, str]]:
    """A warm-up and some rounds of every path, one step each in turn; every other round goes backwards.

    A path that is `SLOW` takes part in the first round only.

    Returns: what was measured by path, and the reason of each that could not run.
    """
    measured: dict[str, Measured] = {}
    reasons: dict[str, str] = {}
    workers = {path: Worker(path, case) for path in dict.fromkeys(paths)}
    slow: set[str] = set()

    def drop(path: str, reason: CannotRun) -> None:
        reasons[path] = str(reason)
        measured.pop(path, None)
        workers.pop(path).stop()

    try:
        for path in list(workers):
            try:
                workers[path].answer()
                told = workers[path].step()
                measured[path] = Measured([], [], told["given"], 0, 0)
                if told["seconds"] > SLOW:
                    slow.add(path)
            except CannotRun as reason:
                drop(path, reason)
        for number in range(rounds):
            for path in list(workers)[:: -1 if number % 2 else 1]:
                if number and path in slow:
                    continue
                try:
                    told = workers[path].step(STEPS.get(case.shape, 1))
                except CannotRun as reason:
                    drop(path, reason)
                    continue
                found = measured[path]
                found.seconds.append(told["seconds"])
                found.cpu_seconds.append(told["cpu_seconds"])
                found.peak, found.resident = max(found.peak, told["peak"]), told["resident"]
    finally:
        for worker in workers.values():
            worker.stop()
    return measured, reasons


def once(path: str, case: Case) -> object:
    """What one step of a path gives. Raises: CannotRun."""
    worker = Worker(path, case)
    try:
        worker.answer()
        return worker.step()["given"]
    finally:
        worker.stop()
