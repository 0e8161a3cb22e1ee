"""Several processes that train one adapter together, each with its share of every batch.

Rank 0 keeps everything: it alone writes, prints and publishes. The others compute, and hear from it where to begin and
when to stop, so all hold the same weights at every step. They meet in MLX's ring over TCP, which `mlx.launch` sets up.
MLX fails a sum when a neighbour's connection is closed; each process then ends with a message, and its own closed
connections tell the next one. A machine that falls silent (no power, no cable) closes nothing: there a watchdog ends
the wait.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from hominem_mlx.errors import TrainingError
from hominem_mlx.files import sha256_file, sha256_json

Arrays = dict[str, mx.array]
PATIENCE_SECONDS = 600.0  # of waiting for the others, and then ten times what one's own share took
SOLO = 12.0  # times as long where rank 0 may have work that is its alone: loading, looking, judging
AGAIN = "What was saved is kept by rank 0: see what the others said, then give the same command again"


class Ranks:
    """The processes of a run, seen from one of them. Every method that names all ranks must be called by all of them.

    Args:
        group: MLX's, or None: alone, and then every method gives back at once what it was given.
        patience: seconds; see `PATIENCE_SECONDS`.
    """

    def __init__(self, group: mx.distributed.Group | None = None, *, patience: float = PATIENCE_SECONDS):
        self.group, self.patience = group, patience
        self.rank: int = group.rank() if group else 0
        self.size: int = group.size() if group else 1
        self._met = time.monotonic()

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and publishes."""
        return self.rank == 0

    def share(self, index: np.ndarray) -> np.ndarray:
        """This rank's part of the rows of a batch, int `[n]` to `[<= n / size + 1]`; it may be empty.

        Neighbours stay together: they share their prompt. A prompt at a border is computed on both sides of it.
        """
        return np.array_split(index, self.size)[self.rank]

    def means(self, values: Sequence[Arrays], weights: Sequence[float]) -> list[Arrays | None]:
        """Means over the ranks of several sets of arrays, each rank counted by its weight; one sum for all of them.

        Args:
            values: arrays by name, the same names and shapes on all ranks; summed in float32.
            weights: one a set, >= 0; what this rank's values are a mean over.

        Returns: a set for each, or None where its weight is 0 on all ranks.
        """
        flat = [
            weight * value.astype(mx.float32).reshape(-1)
            for named, weight in zip(values, weights)
            for _, value in sorted(named.items())
        ]
        sums = self._meet(mx.distributed.all_sum, mx.concatenate([mx.array(weights, mx.float32), *flat]))
        found: list[Arrays | None] = []
        start = len(weights)
        for named, total in zip(values, sums[:start].tolist()):
            means = {}
            for name, value in sorted(named.items()):
                part = sums[start : start + value.size] / (total or 1.0)
                means[name] = part.reshape(value.shape).astype(value.dtype)
                start += value.size
            found.append(means if total else None)
        return found

    def computed(self, count: int, compute: Callable[[np.ndarray], Sequence[float]]) -> np.ndarray:
        """`count` numbers, each computed by one of all ranks: float32 `[count]`.

        Args:
            compute: from places, int `[n]`, to their numbers `[n]`.
        """
        places = self.share(np.arange(count))
        numbers = np.zeros(count, np.float32)
        if len(places):
            numbers[places] = compute(places)
        if self.size == 1:
            return numbers
        return np.array(self._meet(mx.distributed.all_sum, mx.array(numbers)))

    def told(self, value: Any) -> Any:
        """A JSON value as rank 0 has it, on all ranks."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        length = int(self._meet(mx.distributed.all_sum, mx.array([len(text)]), patience=SOLO).item())
        mine = mx.array(np.frombuffer(text, np.uint8)) if self.is_first else mx.zeros(length, mx.uint8)
        return json.loads(np.array(self._of_first(mine)).tobytes())

    def copied(self, arrays: Arrays) -> Arrays:
        """Arrays as rank 0 has them, bit for bit, on all ranks; names and shapes are the same there."""
        if self.size == 1:
            return arrays
        found = {}
        for name, value in sorted(arrays.items()):  # a state that was read back has another order
            found[name] = self._of_first(value.reshape(-1).view(mx.uint8)).view(value.dtype).reshape(value.shape)
        return found

    def agree(self, facts: dict[str, Any]) -> None:
        """Make sure that all ranks are about to do the same.

        Args:
            facts: JSON values, by what they are called in the message.

        Raises: TrainingError on all ranks, naming every rank that differs from rank 0 and in what.
        """
        if self.size == 1:
            return
        own = np.frombuffer(bytes.fromhex("".join(map(sha256_json, facts.values()))), np.uint8)
        all_of_them = np.array(self._meet(mx.distributed.all_gather, mx.array(own), patience=SOLO))
        digests = all_of_them.reshape(self.size, len(facts), -1)
        differs = (digests != digests[0]).any(axis=-1)
        others = [
            f"rank {rank} has another {', another '.join(name for name, other in zip(facts, row) if other)} than rank 0"
            for rank, row in enumerate(differs)
            if row.any()
        ]
        if others:
            raise TrainingError(
                f"{'; '.join(others)}: nothing was begun. Machines that train together need the same home and "
                "settings: copy the home of rank 0 to the others (rsync -a ~/.hominem/ OTHER:.hominem/); for another "
                "base set student.revision to one commit, for another program copy this project's folder; then give "
                "the same command again"
            )

    # --- inside ----------------------------------------------------------------------------------------------------

    def _of_first(self, data: mx.array) -> mx.array:
        """Bytes as rank 0 has them: uint8 of one length on all ranks."""
        return self._meet(mx.distributed.all_sum, data if self.is_first else mx.zeros_like(data), patience=SOLO)

    def _meet(self, operation: Callable[..., mx.array], mine: mx.array, *, patience: float = 1.0) -> mx.array:
        mx.eval(mine)  # so that what goes wrong below is the meeting itself
        patience = patience * self.patience + 10 * (time.monotonic() - self._met)
        watchdog = threading.Timer(patience, self._give_up, [patience])
        watchdog.daemon = True
        watchdog.start()
        try:
            met = operation(mine, group=self.group)
            mx.eval(met)
        except RuntimeError as error:
            raise TrainingError(
                f"rank {self.rank} of {self.size}: another process of this run has ended ({error}): stopped. {AGAIN}"
            ) from error
        finally:
            watchdog.cancel()
        self._met = time.monotonic()
        return met

    def _give_up(self, patience: float) -> NoReturn:
        """End this process from beside a wait that nothing can interrupt. Nobody writes while he waits."""
        said = f"no word from another process of this run for {patience:.0f} s; is its machine asleep or cut off?"
        print(f"hominem: rank {self.rank} of {self.size}: {said} Stopped. {AGAIN}", file=sys.stderr, flush=True)
        os._exit(TrainingError.exit_code)


ALONE = Ranks()


def program() -> str:
    """Digest of what computes: the sources of this library, and the versions of those it stands on."""
    root = Path(__file__).parents[1]
    sources = {str(path.relative_to(root)): sha256_file(path) for path in sorted(root.rglob("*.py"))}
    return sha256_json([sources, {name: version(name) for name in ("mlx", "mlx-lm", "numpy", "transformers")}])


def join(*, patience: float = PATIENCE_SECONDS) -> Ranks:
    """The ring that `mlx.launch` told this process to join; waits for the others. `ALONE` where it was not launched.

    Raises: TrainingError when the others cannot be reached.
    """
    if "MLX_RANK" not in os.environ:
        return ALONE
    try:
        return Ranks(mx.distributed.init(strict=True, backend="ring"), patience=patience)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {os.environ['MLX_RANK']}: the others cannot be reached ({error}): check that every address of the "
            "hostfile is this network's, that no firewall asks to allow Python, and give the same command again"
        ) from error
