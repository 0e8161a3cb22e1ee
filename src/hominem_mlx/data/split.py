"""Which rows may be learnt from. The split hangs on the prompt's id alone, so it stays as the corpus grows."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from hominem_mlx.files import sha256_bytes

Split = Literal["train", "valid", "test"]
Row = TypeVar("Row")
TRAIN, VALID = 0.60, 0.15  # the rest is test


def split_of(prompt_id: str) -> Split:
    """The split a prompt and everything said to it belong to: 60 % train, 15 % valid, 25 % test."""
    place = int(sha256_bytes(f"split:{prompt_id}".encode())[:8], 16) / 2**32
    return "train" if place < TRAIN else "valid" if place < TRAIN + VALID else "test"


def by_split(rows: Iterable[Row]) -> dict[Split, list[Row]]:
    """Rows that have a `prompt_id`, sorted into the three splits."""
    parts: dict[Split, list[Row]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        parts[split_of(row.prompt_id)].append(row)  # type: ignore[attr-defined]
    return parts


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes kept: the unit of all word-level measures here."""
    return re.findall(r"[\w']+", text.lower())


def near_duplicates(texts: Sequence[str], *, threshold: float = 0.8) -> list[tuple[int, int, float]]:
    """Pairs of texts whose word 3-grams overlap by at least `threshold` (Jaccard), as `(i, j, overlap)`, i < j."""
    grams = []
    for text in texts:
        tokens = words(text)
        grams.append({tuple(tokens[i : i + 3]) for i in range(max(1, len(tokens) - 2))})
    found = []
    for j in range(len(texts)):
        for i in range(j):
            overlap = len(grams[i] & grams[j]) / max(1, len(grams[i] | grams[j]))
            if overlap >= threshold:
                found.append((i, j, overlap))
    return found
