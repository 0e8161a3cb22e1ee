"""Which rows may be learnt from. The split hangs on the prompt's id alone, so it stays as the corpus grows."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from hominem_mlx.files import sha256_bytes

Split = Literal["train", "valid", "test"]
Row = TypeVar("Row")
TRAIN, VALID = 0.60, 0.15  # the rest is test
NEAR = 0.8  # overlap from which two texts count as one


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


def words_changed(before: str, after: str) -> float:
    """Share of the longer text's words that are not in the common sequence of both, in [0, 1]."""
    one, other = words(before), words(after)
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return 1 - sum(block.size for block in matcher.get_matching_blocks()) / max(len(one), len(other), 1)


class Texts:
    """Texts seen so far, found again by the share of word 3-grams they have in common (Jaccard overlap)."""

    def __init__(self, texts: Iterable[str] = ()):
        self._grams: list[set[tuple[str, ...]]] = []
        self._holders: dict[tuple[str, ...], list[int]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """See one more text; texts are numbered from 0."""
        grams = _grams(text)
        for gram in grams:
            self._holders.setdefault(gram, []).append(len(self._grams))
        self._grams.append(grams)

    def near(self, text: str, *, threshold: float = NEAR) -> list[tuple[int, float]]:
        """Numbers of the texts that overlap with `text` by at least `threshold`, with the overlap."""
        grams = _grams(text)
        shared = Counter(number for gram in grams for number in self._holders.get(gram, ()))
        overlaps = ((n, count / len(grams | self._grams[n])) for n, count in sorted(shared.items()))
        return [(number, overlap) for number, overlap in overlaps if overlap >= threshold]


def near_duplicates(texts: Sequence[str], *, threshold: float = NEAR) -> list[tuple[int, int, float]]:
    """Pairs of texts whose word 3-grams overlap by at least `threshold` (Jaccard), as `(i, j, overlap)`, i < j."""
    found = []
    seen = Texts()
    for j, text in enumerate(texts):
        found += [(i, j, overlap) for i, overlap in seen.near(text, threshold=threshold)]
        seen.add(text)
    return found


def _grams(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i : i + 3]) for i in range(max(1, len(tokens) - 2))}
