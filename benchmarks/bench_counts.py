"""The baselines: counts of words and letters, made as good as we can, and the length of the reply alone.

Pieces are those of the product's `reward.ngram`; beside the reply's its prompt is counted, and a few numbers say how
much of the reply stands in the prompt and how long both are. No language model is in any of it.
"""

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from bench_folds import Dense, Rows
from bench_sets import JudgedSet, Pair

from hominem_mlx.reward.ngram import pieces

MIN_TEXTS, MANY_TEXTS, MANY_MIN_TEXTS = 2, 2000, 4  # with many texts what is rare costs much and says little
NUMBERS_WEIGHT = 0.3  # length of the row of plain numbers beside a text's row of length 1
BLOCK = 1 << 24  # numbers of a block of columns while products of rows are taken
CACHED = 1 << 12  # entries of a sparse matrix that are multiplied at once: with 15 columns they stay in the cache


class Counted:
    """Counts of one set, made once; `rows` weighs them anew for each fold, so that nothing held out is counted.

    Prompts are counted where they may say something: they cancel in pairs and in choices.
    """

    def __init__(self, judged: JudgedSet):
        items = len(judged.groups)
        least = MANY_MIN_TEXTS if items > MANY_TEXTS else MIN_TEXTS
        sign = np.where(np.arange(len(judged.texts)) < items, 1.0, -1.0).astype(np.float32)
        prompts, responses = zip(*judged.texts, strict=True)
        both = (responses, prompts) if judged.shape == "graded" else (responses,)
        self.sides = [[Side(texts, of, items, sign, least) for texts in both] for of in (pieces, words)]
        self.numbers = _signed(np.array([plain_numbers(pair) for pair in judged.texts]), judged)
        self.is_difference = judged.shape == "pair"

    def rows(self, inside: np.ndarray) -> list["Together"]:
        """What a baseline may choose from: replies alone and, where there are prompts, replies and prompts; each with
        words and letters, and with words alone, which does better where there are few rows.

        Args:
            inside: bool `[n]`, the items that may be learnt from.
        """
        numbers = Dense(self.numbers, inside, centre=not self.is_difference)
        numbers.z *= np.float32(NUMBERS_WEIGHT)
        found = []
        for sides in self.sides:
            parts = [numbers, *(Weighed(side, inside) for side in sides)]
            found += [Together(parts[: count + 1]) for count in range(1, len(parts))]
        return found


class Side:
    """Counts of pieces in the replies, or in the prompts, of one set.

    Args:
        texts: `[T]`; text `t` belongs to item `t % items` and counts with `sign[t]`.
        of: the pieces of a text.
        least: pieces in fewer texts are left out.
    """

    def __init__(
        self, texts: Sequence[str], of: Callable[[str], Iterable[str]], items: int, sign: np.ndarray, least: int
    ):
        place: dict[str, int] = {}
        columns, counts, sizes = array("i"), array("i"), []
        for text in texts:
            counter = Counter(of(text))
            columns.extend(place.setdefault(piece, len(place)) for piece in counter)
            counts.extend(counter.values())
            sizes.append(len(counter))
        column, count = np.array(columns, np.int64), np.array(counts, np.float32)
        known = np.bincount(column, minlength=len(place)) >= least
        kept = known[column]
        column = (np.cumsum(known) - 1)[column[kept]]
        order = np.argsort(column, kind="stable")
        self.items, self.least, self.sign, self.width = items, least, sign, int(known.sum())
        self.column, self.text = column[order], np.repeat(np.arange(len(sizes)), sizes)[kept][order]
        self.weight = (1 + np.log(count[kept]))[order]
        self.by_item, self.by_column = Layout(self.text % items, items), Layout(self.column, self.width)


class Weighed:
    """`Rows` of term weights `(1 + log count) * idf`, each text of length 1, idf from the items `inside` alone."""

    def __init__(self, side: Side, inside: np.ndarray):
        self.count, self.width = side.items, side.width
        self.column, self.item = side.column, side.text % side.items
        seen = np.bincount(self.column[inside[self.item]], minlength=side.width)
        texts = inside.sum() * len(side.sign) / side.items
        idf = np.where(seen >= side.least, np.log((1 + texts) / (1 + seen)) + 1, 0.0).astype(np.float32)
        data = side.weight * idf[self.column]
        length = np.sqrt(np.bincount(side.text, np.square(data), minlength=len(side.sign)))
        self.data = data * (side.sign / np.maximum(length, 1e-12)).astype(np.float32)[side.text]
        self.by_item = side.by_item.fill(self.data, self.column)
        self.by_column = side.by_column.fill(self.data, self.item)
        self._gram: np.ndarray | None = None

    def gram(self) -> np.ndarray:
        """Products of all rows with all, `[n, n]` float32, a block of columns at a time; kept."""
        if self._gram is None:
            self._gram = np.zeros((self.count, self.count), np.float32)
            size = max(1, BLOCK // self.count)
            for first in range(0, self.width, size):
                low, high = np.searchsorted(self.column, [first, first + size])
                width = min(size, self.width - first)
                place = self.item[low:high] * width + self.column[low:high] - first
                block = np.bincount(place, self.data[low:high], minlength=self.count * width)
                block = block.reshape(self.count, width).astype(np.float32)
                self._gram += block @ block.T
        return self._gram

    def times(self, weight: np.ndarray) -> np.ndarray:
        """`[F, C]` to `[n, C]`."""
        return self.by_item.times(weight)

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """`[n, C]` to `[F, C]`."""
        return self.by_column.times(values)


class Layout:
    """Where a sparse matrix's entries go, row by row, in blocks of rows that are about as long.

    Args:
        row: `[E]`, the row of each entry.
        size: rows.
    """

    def __init__(self, row: np.ndarray, size: int):
        self.size, self.blocks = size, []
        order = np.r_[np.argsort(row, kind="stable"), len(row)]  # the last one stands for nothing
        count = np.bincount(row, minlength=size)
        start = np.cumsum(count) - count
        rows = np.argsort(count, kind="stable")
        rows = rows[count[rows] > 0]
        while len(rows):
            most = min(len(rows), max(1, CACHED // count[rows[0]]))
            most = max(1, CACHED // count[rows[most - 1]])
            block, rows = rows[:most], rows[most:]
            step = np.arange(count[block[-1]])
            places = np.where(step < count[block, None], start[block, None] + step, len(row))
            self.blocks.append((block, order[places].astype(np.int32)))

    def fill(self, data: np.ndarray, column: np.ndarray) -> "Sparse":
        """The matrix that has `data` `[E]` in `column` `[E]`."""
        data, column = np.append(data, np.float32(0)), np.append(column, 0).astype(np.int32)
        return Sparse(self.size, [(rows, data[places][:, None], column[places]) for rows, places in self.blocks])


class Sparse(NamedTuple):
    """A sparse matrix in padded blocks: numpy multiplies these about as fast as a library for sparse matrices does."""

    size: int
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # rows [b], data [b, 1, l], columns [b, l]

    def times(self, weight: np.ndarray) -> np.ndarray:
        """`[columns, C]` to `[rows, C]`."""
        found = np.zeros((self.size, weight.shape[1]), np.float32)
        for rows, data, column in self.blocks:
            found[rows] = (data @ weight.take(column, axis=0))[:, 0]
        return found


class Together:
    """`Rows` of several kinds of features side by side."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts, self.count, self.width = parts, parts[0].count, sum(part.width for part in parts)

    def gram(self) -> np.ndarray:
        """Products of all rows with all, `[n, n]` float32."""
        return np.sum([part.gram() for part in self.parts], axis=0)

    def times(self, weight: np.ndarray) -> np.ndarray:
        """`[F, C]` to `[n, C]`."""
        cuts = np.cumsum([part.width for part in self.parts])[:-1]
        return np.sum([part.times(own) for part, own in zip(self.parts, np.split(weight, cuts))], axis=0)

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """`[n, C]` to `[F, C]`."""
        return np.concatenate([part.transposed_times(values) for part in self.parts])


def words(text: str) -> Iterator[str]:
    """The pieces that are words, or two in a row."""
    return (piece for piece in pieces(text) if piece.startswith("w:"))


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
