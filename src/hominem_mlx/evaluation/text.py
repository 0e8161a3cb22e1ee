"""What can be said of answers by reading them word by word."""

import difflib
import re
from collections.abc import Iterable, Sequence

from hominem_mlx import metrics

Piece = tuple[str, str]  # ("same" | "gone" | "new", text)


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes kept."""
    return re.findall(r"[\w']+", text.casefold())


def contains(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as whole words, whatever the case: "art" is not in "start"."""
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text.casefold()) is not None


def is_recalled(answer: str, key: str, other_keys: Iterable[str]) -> bool:
    """Whether an answer names this fact's key and no other fact's (naming them all would be no memory)."""
    others = {other.casefold() for other in other_keys} - {key.casefold()}
    return contains(answer, key) and not any(contains(answer, other) for other in others)


def distinct2(texts: Sequence[str]) -> float:
    """Share of different neighbouring word pairs; see `metrics.distinct2`."""
    return metrics.distinct2([words(text) for text in texts])


def word_diff(before: str, after: str) -> list[Piece]:
    """How `before` becomes `after`, word by word; same and gone give `before`, same and new give `after`."""
    old, new = before.split(), after.split()
    pieces: list[Piece] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("same", " ".join(old[i:j])))
            continue
        if i < j:
            pieces.append(("gone", " ".join(old[i:j])))
        if k < m:
            pieces.append(("new", " ".join(new[k:m])))
    return pieces
