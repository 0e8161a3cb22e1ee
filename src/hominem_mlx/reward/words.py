"""Counts of words beside a backbone's states: which words stand there, of which means of states keep too little.

Shapes: `N` pairs, `V` pieces (a word, or two in a row), `R` tokens of a reply, `O` outputs.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from hominem_mlx.errors import InputError
from hominem_mlx.reward.features import Pair
from hominem_mlx.reward.ngram import WORD

MIN_PROMPTS = 2  # replies to one prompt share its matter: a piece seen with one prompt says nothing about another
MOST = 10_000  # pieces; the most widespread ones


def pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """Each word, and each two in a row, in lower case, with its place `start..stop` in the text."""
    words = [(match.group().lower(), *match.span()) for match in WORD.finditer(text)]
    yield from words
    for (one, start, _), (two, _, stop) in itertools.pairwise(words):
        yield f"{one} {two}", start, stop


class WordCounts:
    """`(1 + log count) * weight` of each piece of a reply, less where that makes a row longer than is usual.

    So a reply of any length can say only so much by its words, and what it says is the sum of what each of them adds.
    Vocabulary and weights come from the rows it is fitted on.
    """

    def __init__(self, vocabulary: Sequence[str], weights: np.ndarray, usual: float):
        """
        Args:
            vocabulary: `V` pieces.
            weights: `[V]`.
            usual: Euclidean length from which on rows are shortened to it.
        """
        self.vocabulary, self.weights, self.usual = list(vocabulary), np.asarray(weights, np.float32), float(usual)
        self.place = {piece: index for index, piece in enumerate(self.vocabulary)}

    @classmethod
    def fit(cls, pairs: Sequence[Pair], groups: Sequence[str] | np.ndarray, strength: float) -> "WordCounts":
        """Pieces found with at least `MIN_PROMPTS` prompts, in alphabetical order, weighed by rarity.

        Args:
            pairs: training rows.
            groups: the prompt of each.
            strength: mean squared length of a row, or a little less; standardised states of a backbone have 1.

        Source: of the weights, Salton and Buckley 1988, `log((1 + prompts) / (1 + prompts with it)) + 1`.
        """
        found = defaultdict(set)
        for (_, response), group in zip(pairs, groups, strict=True):
            for piece, _, _ in pieces(response):
                found[piece].add(group)
        spread = sorted((-len(prompts), piece) for piece, prompts in found.items() if len(prompts) >= MIN_PROMPTS)
        vocabulary = sorted(piece for _, piece in spread[:MOST])
        seen = np.array([len(found[piece]) for piece in vocabulary], float)
        weights = np.log((1 + len(set(groups))) / (1 + seen)) + 1
        lengths = np.linalg.norm(cls(vocabulary, weights, np.inf).read(pairs), axis=1)
        scale = np.sqrt(strength / (np.square(lengths).mean() or 1.0))
        return cls(vocabulary, weights * scale, np.sqrt(strength))

    def read(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Features `[N, V]` float32 of the replies."""
        features = np.zeros((len(pairs), len(self.vocabulary)), np.float32)
        for row, (_, response) in zip(features, pairs, strict=True):
            counts = Counter(piece for piece, _, _ in pieces(response) if piece in self.place)
            at = np.array([self.place[piece] for piece in counts], int)
            row[at] = (1 + np.log(np.array(list(counts.values()), float))) * self.weights[at]
            row /= max(1.0, float(np.linalg.norm(row)) / self.usual)
        return features

    def added(self, pair: Pair, tokens: Sequence[str], worth: np.ndarray) -> np.ndarray:
        """What each token of a reply adds by its words, `[R, O]`, which sums up to `read([pair]) @ worth`.

        What a piece adds is shared evenly among all the letters of the places where it stands.

        Args:
            tokens: the reply's, joined the reply itself or its beginning: what stands further back is given to the
                last.
            worth: `[V, O]`, what one unit of each feature adds.
        """
        (row,) = self.read([pair])
        letters = np.zeros((len(pair[1]), worth.shape[1]))
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for piece, start, stop in pieces(pair[1]):
            if piece in self.place:
                places[piece].append((start, stop))
        for piece, spans in places.items():
            index = self.place[piece]
            share = row[index] * worth[index] / sum(stop - start for start, stop in spans)
            for start, stop in spans:
                letters[start:stop] += share
        ends = np.minimum(np.cumsum([len(token) for token in tokens]), len(letters))
        ends[-1] = len(letters)
        sums = np.concatenate([np.zeros((1, letters.shape[1])), np.cumsum(letters, axis=0)])
        return np.diff(sums[ends], axis=0, prepend=sums[:1])

    # --- on disk ----------------------------------------------------------------------------------------------------

    def as_json(self) -> dict:
        """What `from_json` reads."""
        return {"pieces": self.vocabulary, "weights": self.weights.tolist(), "usual": self.usual}

    @classmethod
    def from_json(cls, value: dict, where: object) -> "WordCounts":
        """What `as_json` made. Raises: InputError, naming `where`, when it is something else."""
        try:
            vocabulary, weights = [str(piece) for piece in value["pieces"]], np.array(value["weights"], np.float32)
            usual = float(value["usual"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: needs `pieces`, `weights` and `usual` ({error})") from None
        if weights.shape != (len(vocabulary),) or not (np.isfinite(weights).all() and usual > 0):
            raise InputError(
                f"{where}: {len(vocabulary)} pieces and weights {weights.shape} do not match; run "
                "`hominem artifacts verify`"
            )
        return cls(vocabulary, weights, usual)
