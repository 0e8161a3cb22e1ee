"""The baseline every quality report prints beside the model: counts of words and letters, no language model at all."""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from hominem_mlx.reward.features import Pair

WORDS, LETTERS = (1, 2), (3, 5)
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
MIN_TEXTS = 2  # a piece seen in one text teaches nothing about another


def pieces(text: str) -> Iterator[str]:
    """Word 1-2-grams (`w:`) and character 3-5-grams (`c:`) of one text, lower case, white space as one space."""
    text = " ".join(text.lower().split())
    words = WORD.findall(text)
    for size in range(WORDS[0], WORDS[1] + 1):
        yield from ("w:" + " ".join(words[at : at + size]) for at in range(len(words) - size + 1))
    padded = f" {text} "
    for size in range(LETTERS[0], LETTERS[1] + 1):
        yield from ("c:" + padded[at : at + size] for at in range(len(padded) - size + 1))


@functools.lru_cache(maxsize=4096)
def _counts(text: str) -> Counter[str]:
    return Counter(pieces(text))


class NgramFeatures:
    """Term weights `(1 + log count) * idf` of the reply, each row of length 1 (Salton and Buckley 1988).

    Vocabulary and idf come from the texts it is fitted on: training folds only.
    """

    kind = "ngram"
    name = "word 1-2-grams and character 3-5-grams"

    def __init__(self, vocabulary: Sequence[str], idf: np.ndarray):
        self.vocabulary, self.idf = list(vocabulary), np.asarray(idf, np.float32)
        self.place = {piece: index for index, piece in enumerate(self.vocabulary)}

    @classmethod
    def fit(cls, pairs: Sequence[Pair]) -> "NgramFeatures":
        """Pieces found in at least `MIN_TEXTS` of these replies, in alphabetical order."""
        counts: Counter[str] = Counter()
        for _, response in pairs:
            counts.update(_counts(response).keys())
        vocabulary = sorted(piece for piece, count in counts.items() if count >= MIN_TEXTS)
        seen = np.array([counts[piece] for piece in vocabulary], float)
        return cls(vocabulary, np.log((1 + len(pairs)) / (1 + seen)) + 1)

    def read(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
        """Features `[N, V]` float32; nothing is ever cut, so there are no flags."""
        features = np.zeros((len(pairs), len(self.vocabulary)), np.float32)
        for row, (_, response) in zip(features, pairs, strict=True):
            counts = _counts(response)
            at = np.array([self.place.get(piece, -1) for piece in counts], int)
            known = at >= 0
            at = at[known]
            weights = (1 + np.log(np.array(list(counts.values()), float)[known])) * self.idf[at]
            row[at] = weights / (np.linalg.norm(weights) or 1.0)
        return features, [()] * len(pairs)
