"""The baselines: counts of words and letters, made as good as we can, and the length of the reply alone.

Pieces are those of the product's `reward.ngram`; beside the reply's its prompt is counted, and a few numbers say how
much of the reply stands in the prompt and how long both are. No language model is in any of it.
"""

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
from bench_folds import Dense
from bench_sets import JudgedSet, Pair

from hominem_mlx.reward.ngram import pieces

MIN_TEXTS, MANY_TEXTS, MANY_MIN_TEXTS = 2, 2000, 4  # with many texts what is rare costs much and says little
NUMBERS_WEIGHT = 0.3  # length of the row of plain numbers beside a text's row of length 1
BLOCK = 1 << 24  # numbers of a block of columns while products of rows are taken


class Counted:
    """Counts of one set, made once; `rows` weighs them anew for each fold, so that nothing held out is counted.

    Documents are replies, and prompts where these may say something: they cancel in pairs and in choices.
    """

    def __init__(self, judged: JudgedSet):
        items = len(judged.groups)
        self.items = items
        reads_prompt = judged.shape == "graded"
        replies = [response for _, response in judged.texts]
        prompts = [prompt for prompt, _ in judged.texts] if reads_prompt else []
        self.owner = np.concatenate([np.arange(len(replies)) % items, np.arange(len(prompts))])
        self.replies = len(replies)
        self.sign = np.ones(len(self.owner), np.float32)
        self.is_difference = judged.shape == "pair"
        if self.is_difference:
            self.sign[items : 2 * items] = -1.0
        self._index([(text, "") for text in replies] + [(text, "p") for text in prompts])
        self.numbers = _signed(np.array([plain_numbers(pair) for pair in judged.texts]), judged)

    def _index(self, documents: Sequence[tuple[str, str]]) -> None:
        """Where every count stands: sorted by document, and the order by piece."""
        place: dict[str, int] = {}
        columns, counts, sizes = array("i"), array("i"), []
        for text, side in documents:
            counter = Counter(side + piece for piece in pieces(text))
            columns.extend(place.setdefault(piece, len(place)) for piece in counter)
            counts.extend(counter.values())
            sizes.append(len(counter))
        column, count = np.array(columns), np.array(counts, np.float32)
        self.least = MANY_MIN_TEXTS if self.items > MANY_TEXTS else MIN_TEXTS
        known = np.bincount(column, minlength=len(place)) >= self.least
        kept = known[column]
        self.width = int(known.sum())
        self.document = np.repeat(np.arange(len(sizes)), sizes)[kept]
        self.column = (np.cumsum(known) - 1)[column[kept]]
        self.weight = 1 + np.log(count[kept])
        self.by_column = np.argsort(self.column, kind="stable")

    def rows(self, inside: np.ndarray) -> list["Weighed"]:
        """Term weights `(1 + log count) * idf`, each document of length 1, idf from the items `inside` alone.

        Returns: what a baseline may choose from: replies alone and, where there are prompts, replies and prompts.
        """
        alone = np.arange(len(self.owner)) < self.replies
        return [Weighed(self, inside, read) for read in ([alone] if alone.all() else [alone, np.ones_like(alone)])]


class Weighed:
    """One fold's view of `Counted`: `Rows` of counts and plain numbers together."""

    def __init__(self, counted: Counted, inside: np.ndarray, read: np.ndarray):
        self.counted = counted
        documents = inside[counted.owner] & read
        seen = np.bincount(counted.column[documents[counted.document]], minlength=counted.width)
        idf = np.where(seen >= counted.least, np.log((1 + documents.sum()) / (1 + seen)) + 1, 0.0).astype(np.float32)
        data = counted.weight * idf[counted.column]
        squares = np.bincount(counted.document, np.square(data), minlength=len(counted.owner))
        self.data = data * (counted.sign / np.sqrt(np.maximum(squares, 1e-12)))[counted.document].astype(np.float32)
        self.item = counted.owner[counted.document]
        self.numbers = Dense(counted.numbers, inside, centre=not counted.is_difference).z * np.float32(NUMBERS_WEIGHT)
        self.count, self.width = counted.items, counted.width + self.numbers.shape[1]
        self._order = counted.by_column
        self._starts = np.flatnonzero(np.r_[True, np.diff(counted.column[self._order]) > 0])
        self._present = counted.column[self._order][self._starts]

    def gram(self) -> np.ndarray:
        """Products of all rows with all, `[n, n]` float32, a block of columns at a time."""
        total = self.numbers @ self.numbers.T
        column, item, data = self.counted.column[self._order], self.item[self._order], self.data[self._order]
        size = max(1, BLOCK // self.count)
        for first in range(0, self.counted.width, size):
            low, high = np.searchsorted(column, [first, first + size])
            width = min(size, self.counted.width - first)
            block = np.bincount(
                item[low:high] * width + column[low:high] - first, data[low:high], minlength=self.count * width
            )
            block = block.reshape(self.count, width).astype(np.float32)
            total += block @ block.T
        return total

    def times(self, weight: np.ndarray) -> np.ndarray:
        """`[F, C]` to `[n, C]`."""
        words, numbers = weight[: self.counted.width], weight[self.counted.width :]
        column = self.counted.column
        said = [np.bincount(self.item, self.data * one[column], minlength=self.count) for one in words.T]
        return np.stack(said, axis=1).astype(np.float32) + self.numbers @ numbers

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """`[n, C]` to `[F, C]`."""
        out = np.zeros((self.width, values.shape[1]), np.float32)
        item, data = self.item[self._order], self.data[self._order]
        for number, one in enumerate(values.T):
            out[self._present, number] = np.add.reduceat(data * one[item], self._starts) if len(data) else 0.0
        out[self.counted.width :] = self.numbers.T @ values
        return out


def plain_numbers(pair: Pair) -> list[float]:
    """How much of a reply stands in its prompt (words, word pairs, letter triples and fives), and how long both are."""
    prompt, response = pair
    asked, said = _sets(prompt), _sets(response)
    shares = [len(ours & theirs) / max(1, len(ours)) for ours, theirs in zip(said, asked, strict=True)]
    back = [len(ours & theirs) / max(1, len(theirs)) for ours, theirs in zip(said, asked, strict=True)]
    return [
        *shares,
        back[0],
        *length(response),
        np.log1p(len(prompt)),
        _share(r"\d", response),
        _share(r"[A-Z]", response),
    ]


def length(text: str) -> list[float]:
    """What the length-only baseline knows: log and root of the number of characters."""
    return [float(np.log1p(len(text))), float(np.sqrt(len(text)))]


def length_rows(judged: JudgedSet, inside: np.ndarray) -> Dense:
    """`Rows` of the length-only baseline."""
    values = _signed(np.array([length(response) for _, response in judged.texts]), judged)
    return Dense(values, inside, centre=judged.shape != "pair")


def _signed(values: np.ndarray, judged: JudgedSet) -> np.ndarray:
    """`[texts, F]` to `[items, F]`: the difference chosen - rejected in pairs."""
    items = len(judged.groups)
    return values[:items] - values[items:] if judged.shape == "pair" else values


def _share(pattern: str, text: str) -> float:
    return len(re.findall(pattern, text)) / max(1, len(text))


def _sets(text: str) -> list[set[str]]:
    words = re.findall(r"\w+", text.lower())
    plain = " ".join(text.lower().split())
    letters = [{plain[at : at + size] for at in range(len(plain) - size + 1)} for size in (3, 5)]
    return [set(words), set(itertools.pairwise(words)), *letters]
