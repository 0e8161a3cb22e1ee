"""Is there something that raters keep speaking of, and no dimension names? Looked for in what rationales say.

Words of a rationale come from what was talked about, from what the numbers say, and from what is in no number. The
first goes when the mean of each prompt is taken away, the second by regression on all labels. What is left always has a
strongest axis. Raters see something that has no name yet when that axis is the same in both halves of the prompts, and
holds more than when every word is dealt out anew among the replies to its prompt (parallel analysis: Horn 1965).
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from hominem_mlx.data.split import words
from hominem_mlx.metrics import pearson
from hominem_mlx.records import Label
from hominem_mlx.schema import MANIFOLD, Manifold

LEAST_ROWS, MOST_ROWS = 60, 1500  # with a rationale; more are drawn from by prompt, for time
LEAST_SEEN, MOST_SEEN = 5, 0.4  # a word counts that is in so many rationales at least, and in that share at most
MOST_WORDS = 200
HALVINGS, AGREE = 5, 0.5  # the starter corpus reaches 0.3 to 0.4 by its turns of phrase, 0.8 with one planted in 30 %
SHUFFLES, CERTAIN = 120, 0.01
TIMES = 1.2  # its part of what is left, in parts that the strongest axis has by chance
BROAD = 0.1  # of the rows must lie on it: what a few rationales share is a phrase, no axis
SHOWN, SHOWN_WORDS = 3, 6


class Example(BaseModel):
    """A reply at one end, and the reason it was given."""

    id: str
    prompt: str
    response: str
    rationale: str


class Axis(BaseModel):
    """The strongest axis of the rationales that no label explains; `note` says why nothing was looked for.

    `agreement` is the mean |cosine| of the axes of two halves of the prompts, `share` the part of what is left that
    lies on it, `breadth` the share of rows that it rests on. Where the halves agree, `by_chance` is the mean share when
    words are dealt out anew and `p` the chance of as much. `pull` correlates it with what the dimensions leave of the
    scalar.
    """

    rows: int = 0
    share: float | None = None
    agreement: float | None = None
    breadth: float | None = None
    by_chance: float | None = None
    p: float | None = None
    words: list[list[str]] = []
    ends: list[list[Example]] = []
    pull: float | None = None
    note: str = ""

    @property
    def is_strong(self) -> bool:
        """Whether a dimension should be made of it."""
        if self.p is None or self.by_chance is None or self.share is None or self.breadth is None:
            return False
        return self.p < CERTAIN and self.share >= TIMES * self.by_chance and self.breadth >= BROAD


def unnamed_axis(labels: Sequence[Label], manifold: Manifold = MANIFOLD, *, seed: int = 0) -> Axis:
    """Look for it.

    Args:
        labels: rated replies; those with a rationale count, of prompts with two of them or more.
        manifold: the dimensions that there are.
        seed: of the shuffles, and of the draw where there are too many rows.
    """
    rows = _usable(labels, seed)
    if len(rows) < LEAST_ROWS:
        return Axis(
            rows=len(rows),
            note=f"{len(rows)} rationales beside another one of their prompt are too few to look for something that no "
            f"dimension names: {LEAST_ROWS} are needed",
        )
    counts, vocabulary = _counted([row.rationale for row in rows])
    owner = np.unique([row.prompt_id for row in rows], return_inverse=True)[1]
    if len(vocabulary) > 1:
        left = _without(_centred(counts, owner), _centred(_explained(rows, manifold), owner))
    if len(vocabulary) < 2 or not (left**2).sum() > 1e-9:
        return Axis(rows=len(rows), note="the rationales hold no word that the labels do not explain")
    rng = np.random.default_rng(seed)
    share, direction = _strongest(left)
    agreement = _agreement(left, owner, rng)
    place = left @ direction
    order, heavy = np.argsort(place, kind="stable"), np.argsort(direction, kind="stable")
    found = Axis(
        rows=len(rows),
        share=share,
        agreement=agreement,
        breadth=float((place**2).sum() ** 2 / (place**4).sum() / len(rows)),
        words=[[vocabulary[at] for at in end] for end in (heavy[:SHOWN_WORDS], heavy[::-1][:SHOWN_WORDS])],
        ends=[[_example(rows[at]) for at in end] for end in (order[:SHOWN], order[::-1][:SHOWN])],
        pull=_pull(place, rows, manifold, owner),
    )
    if agreement < AGREE:
        return found
    chance = np.array([_strongest(_dealt_anew(left, owner, rng))[0] for _ in range(SHUFFLES)])
    p = float((1 + (chance >= share).sum()) / (1 + SHUFFLES))
    return found.model_copy(update={"by_chance": float(chance.mean()), "p": p})


def _usable(labels: Sequence[Label], seed: int) -> list[Label]:
    by_prompt: dict[str, list[Label]] = {}
    for row in labels:
        if words(row.rationale):
            by_prompt.setdefault(row.prompt_id, []).append(row)
    groups = [group for _, group in sorted(by_prompt.items()) if len(group) > 1]
    random.Random(seed).shuffle(groups)
    rows: list[Label] = []
    for group in groups:
        if len(rows) < MOST_ROWS:
            rows += group
    return rows


def _counted(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Which words each text has, weighed by rarity, rows of length 1 `[N, V]`; and the words."""
    said = [set(words(text)) for text in texts]
    seen = Counter(word for text in said for word in text if len(word) > 2)
    usable = [word for word, count in seen.items() if LEAST_SEEN <= count <= MOST_SEEN * len(texts)]
    vocabulary = sorted(sorted(usable, key=lambda word: (-seen[word], word))[:MOST_WORDS])
    counts = np.array([[word in text for word in vocabulary] for text in said], float)
    counts *= np.log(len(texts) / np.array([seen[word] for word in vocabulary], float))
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12), vocabulary


def _numbers(rows: Sequence[Label], names: Sequence[str]) -> np.ndarray:
    """Labels `[N, F]`, a missing one as the mean of the others in its column."""
    values = np.array([[row.reward.number(name) for name in names] for row in rows], float)
    there = ~np.isnan(values)
    means = np.where(there, values, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return np.where(there, values, means)


def _explained(rows: Sequence[Label], manifold: Manifold) -> np.ndarray:
    """All that has a name `[N, P]`: labels, bent too, what an edit lowered, who rated, lengths of reply and reason."""
    values = _numbers(rows, (*manifold.names, "reward_intensity", "safety_score"))
    lengths = [[len(words(row.response)), len(words(row.rationale))] for row in rows]
    columns = [values, values**2, np.log1p(lengths)]
    for told in ([str(row.lowered) for row in rows], [row.labeller for row in rows]):
        columns.append(np.array([[value == each for each in sorted(set(told))] for value in told], float))
    return np.concatenate(columns, axis=1)


def _centred(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Values `[N, F]` less the mean of their group."""
    sums = np.zeros((owner.max() + 1, values.shape[1]))
    np.add.at(sums, owner, values)
    return values - (sums / np.bincount(owner)[:, None])[owner]


def _without(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What a linear regression of `[N, F]` on `[N, P]` leaves."""
    basis, scale, _ = np.linalg.svd(known, full_matrices=False)
    basis = basis[:, scale > 1e-9 * max(scale.max(), 1e-12)]
    return values - basis @ (basis.T @ values)


def _strongest(values: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of the sum of squares on the first principal axis of `[N, V]`, and that axis `[V]`."""
    squares, axes = np.linalg.eigh(values.T @ values)
    return float(squares[-1] / squares.sum()), axes[:, -1]


def _agreement(values: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> float:
    """Mean |cosine| of the strongest axes of two halves of the groups, over a few halvings."""
    cosines = []
    for _ in range(HALVINGS):
        is_first = rng.permutation(owner.max() + 1)[owner] % 2 == 0
        one, other = (_strongest(values[half])[1] for half in (is_first, ~is_first))
        cosines.append(abs(float(one @ other)))
    return float(np.mean(cosines))


def _dealt_anew(values: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each column shuffled by itself within the groups: as many words, but none goes with another."""
    order = np.argsort(owner[:, None] + rng.random(values.shape), axis=0)
    start = np.argsort(owner, kind="stable")
    found = np.empty_like(values)
    found[start] = np.take_along_axis(values, order, axis=0)
    return found


def _pull(place: np.ndarray, rows: Sequence[Label], manifold: Manifold, owner: np.ndarray) -> float | None:
    """Correlation of the axis with what the dimensions leave of the scalar; None where they leave nothing."""
    there = [number for number, row in enumerate(rows) if row.reward.scalar is not None]
    if len(there) < LEAST_ROWS:
        return None
    rated, group = [rows[at] for at in there], np.unique(owner[there], return_inverse=True)[1]
    given, named = _numbers(rated, ["scalar"]), _numbers(rated, manifold.names)
    left = _without(_centred(given, group), _centred(named, group))[:, 0]
    return pearson(place[there], left) if left.std() > 1e-3 else None  # less is rounding


def _example(row: Label) -> Example:
    return Example(id=row.id, prompt=row.prompt, response=row.response, rationale=row.rationale)
