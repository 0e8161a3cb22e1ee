"""Count-sketches of gradients: a few thousand numbers whose inner products are those of millions, nearly.

Entry `j` of the tensor `name` is added, with a sign, to one of `k` sums; sum and sign hang on the seed, the name and
`j` alone. So sketches made in different runs, by different ranks and of adapters with other layers can be compared, and
a sum of sketches is the sketch of the sum. For vectors of length 1 the error of an inner product has mean 0 and a
standard deviation of at most sqrt(2 / k). Source: Charikar et al. 2002; Weinberger et al. 2009 (arXiv 0902.2206).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hominem_mlx.errors import InputError
from hominem_mlx.files import write_atomic

SKETCHES = "sketches.safetensors"
WIDTH, SEED = 4096, 0  # sketches of another width or seed cannot be compared with these


def sketch(vector: Mapping[str, mx.array], *, width: int = WIDTH, seed: int = SEED) -> np.ndarray:
    """The count-sketch of named arrays of any shape, read as one long vector: float32 `[width]`."""
    sums = np.zeros(width)
    for name in sorted(vector):  # sums in one order, whatever order the names come in
        values = np.array(vector[name].astype(mx.float32), np.float64).reshape(-1)
        bits = _bits(name, len(values), seed)
        signed = np.where(bits >> np.uint64(63), values, -values)
        sums += np.bincount((bits % np.uint64(width)).astype(np.int64), weights=signed, minlength=width)
    return sums.astype(np.float32)


def _bits(name: str, size: int, seed: int) -> np.ndarray:
    """64 random bits an entry, uint64 `[size]`: SplitMix64 (Steele et al. 2014) begun at a hash of seed and name."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
    x = np.uint64(start) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Sketches:
    """Sketched gradients of the margins of `n` validation pairs; the gradient object of `science.md` 1.1.

    gradients: float32 `[n, width]`: of the margin, by all arrays of the adapter, not preconditioned. margins: float32
    `[n]`, `beta * [(logp - ref)(chosen) - (logp - ref)(rejected)]`. pairs: int64 `[n]`, lines, from 0, of
    `preferences.valid.jsonl` in the adapter's parent.
    """

    gradients: np.ndarray
    margins: np.ndarray
    pairs: np.ndarray


def write_sketches(sketches: Sketches, folder: Path) -> None:
    """Write `sketches.safetensors` into `folder`, which should be a draft."""
    write_atomic(folder / SKETCHES, save(dict(vars(sketches)), metadata={"seed": str(SEED)}))


def read_sketches(folder: Path) -> Sketches:
    """What `write_sketches` wrote.

    Raises: InputError where the file is missing, damaged or of another seed or width.
    """
    path = folder / SKETCHES
    if not path.exists():
        raise InputError(f"{path}: there is no such file; adapters have it when trained with dual.sketch_pairs above 0")
    try:
        with safe_open(path, framework="numpy") as file:
            seed = int(file.metadata()["seed"])
            found = Sketches(*(file.get_tensor(field.name) for field in fields(Sketches)))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); train the adapter again") from None
    if seed != SEED or found.gradients.shape != (len(found.pairs), WIDTH) or found.margins.shape != found.pairs.shape:
        raise InputError(
            f"{path}: gradients {found.gradients.shape} of seed {seed} and margins {found.margins.shape} of "
            f"{len(found.pairs)} pairs; this version compares {WIDTH} sums of seed {SEED}: train the adapter again"
        )
    return found
