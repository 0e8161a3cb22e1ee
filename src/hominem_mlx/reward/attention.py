"""The attention head: each output looks for its own places in a reply by a learned query, and reads them by a line.

Of an output with query `q`, weights `w` and bias `b` the tokens' standardised states `h_t` make
`sum_t a_t (w.h_t) + b` with `a = softmax(q.h_t / sqrt(D))`. Outputs share nothing, so each is learnt by itself.

Shapes: `N` rows, `B` of them in a batch, `R` tokens of a reply, `T` of the longest, `D` size of a state, `O` outputs,
`H` heads trained side by side, `F` features of the fixed poolings, `P` pairs of replies to one prompt.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from hominem_mlx.losses import bradley_terry, huber
from hominem_mlx.reward.head import bootstrap_rows, grouped_folds, label_moments, standardised

RATE, DECAY = 1e-3, 1e-2  # of AdamW
PROMPTS = 16  # a batch: with all their replies, since those are compared
EPOCHS, PATIENCE = 60, 6
MARGIN = 0.1  # least difference of labels at which one of two replies is the better
PAIRS = 0.5  # weight of pairs beside rows
READ_ROWS = 64  # a pass, where nothing is learnt


class AttentionHead(nn.Module):
    """States of a reply's tokens to outputs in the labels' unit; standardisation is done and undone in here alone.

    In two steps, since a backbone hands on one row a pair: `attend` makes `1 + E` numbers an output of the states, E
    for the bootstrap members, and the backbone puts them after its `F` features; calling the head reads those columns.
    The features themselves count for nothing in an output; their mean and scale tell what is strange.
    """

    def __init__(self, num_features: int, size: int, num_outputs: int, num_members: int, layer: int):
        super().__init__()
        self.layer = layer  # whose states are read
        self.feature_mean = mx.zeros((num_features,))
        self.feature_scale = mx.ones((num_features,))
        self.label_mean = mx.zeros((num_outputs,))
        self.label_scale = mx.ones((num_outputs,))
        self.state_mean = mx.zeros((size,))
        self.state_scale = mx.ones((size,))
        self.query = mx.zeros((1 + num_members, num_outputs, size))
        self.weight = mx.zeros((1 + num_members, num_outputs, size))
        self.bias = mx.zeros((1 + num_members, num_outputs))
        self.freeze()

    @property
    def num_columns(self) -> int:
        """How many columns it reads: features, then what `attend` makes."""
        return len(self.feature_mean) + self.bias.size

    def attend(self, states: mx.array, said: mx.array) -> mx.array:
        """Of states `[B, T, D]`, at places `said` `[B, 2]` (first, past the last): `[B, (1 + E) * O]`, standardised."""
        return look(self._standardised(states), said, self.query, self.weight, self.bias).reshape(len(states), -1)

    def attend_all(self, states: Sequence[np.ndarray]) -> np.ndarray:
        """`attend` of states `[R, D]` of each reply by itself: `[N, (1 + E) * O]` float32."""
        blocks = [states[first : first + READ_ROWS] for first in range(0, len(states), READ_ROWS)]
        return np.concatenate([np.array(self.attend(*padded(block))) for block in blocks])

    def shares(self, states: mx.array, said: mx.array) -> mx.array:
        """How much each output looks at each place, `[B, T, O]`: 0 outside of `said`, 1 in all."""
        return shares(self._standardised(states), said, self.query[0])

    def parts(self, states: mx.array, said: mx.array) -> mx.array:
        """What each place adds to each output, `[B, T, O]` in the labels' unit; the rest of it is its `start`."""
        z = self._standardised(states)
        return shares(z, said, self.query[0]) * (z @ self.weight[0].T) * self.label_scale

    @property
    def start(self) -> mx.array:
        """What an output is where no place adds anything, `[O]`."""
        return self.bias[0] * self.label_scale + self.label_mean

    def __call__(self, columns: mx.array) -> tuple[mx.array, mx.array]:
        """`[B, O]` values, unclipped, and `[E, B, O]` what each bootstrap member says."""
        found = columns[:, len(self.feature_mean) :].reshape(len(columns), *self.bias.shape).swapaxes(0, 1)
        values = found * self.label_scale + self.label_mean
        return values[0], values[1:]

    def _standardised(self, states: mx.array) -> mx.array:
        return (states - self.state_mean) / self.state_scale


def shares(z: mx.array, said: mx.array, query: mx.array) -> mx.array:
    """`softmax(q.h_t / sqrt(D))` over the places `said` `[B, 2]` (first, past the last; at least one).

    Args:
        z: states `[B, T, D]`; query: `[C, D]`.

    Returns: `[B, T, C]`. Source: `science.md` 2.1.
    """
    places = mx.arange(z.shape[1])
    inside = (places >= said[:, :1]) & (places < said[:, 1:])
    return mx.softmax(mx.where(inside[..., None], z @ query.T / z.shape[-1] ** 0.5, -mx.inf), axis=1)


def look(z: mx.array, said: mx.array, query: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """`sum_t a_t (w.h_t) + b`, `[B, H, O]`.

    Args:
        z, said: as in `shares`.
        query, weight: `[H, O, D]`; bias: `[H, O]`.
    """
    size = z.shape[-1]
    found = (shares(z, said, query.reshape(-1, size)) * (z @ weight.reshape(-1, size).T)).sum(axis=1)
    return found.reshape(len(z), *bias.shape) + bias


@dataclass(frozen=True)
class Pairs:
    """Replies to one prompt, two and two: places `first` and `second` `[P]`, and `order` `[P, O]`.

    `order` is 1 where the first is the better by its label, -1 where the second is, 0 where they are too near or one
    has no label.
    """

    first: np.ndarray
    second: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, groups: np.ndarray) -> "Pairs":
        """All pairs within prompts, of labels `[N, O]` in their own unit, NaN where there is none."""
        found = [
            pair
            for group in np.unique(groups)
            for pair in itertools.combinations(np.flatnonzero(groups == group).tolist(), 2)
        ]
        first, second = np.array(found, int).reshape(-1, 2).T
        gap = np.nan_to_num(labels[first] - labels[second])
        clear = np.abs(gap) >= MARGIN - 1e-9  # .3 - .2 is a little less than .1
        return cls(first, second, np.where(clear, np.sign(gap), 0.0).astype(np.float32))


def loss(said: mx.array, targets: mx.array, counts: mx.array, pairs: Pairs) -> mx.array:
    """Huber of each label and half of Bradley-Terry of each pair, as means, `[H, O]`: each head's loss of each output.

    Args:
        said: `[B, H, O]`, standardised as the labels are; so the temperature of pairs is one standard deviation.
        targets: `[B, O]`, NaN where there is none: such a label moves nothing.
        counts: `[H, B]`, how often a row counts for a head; alike for all rows of a prompt.
        pairs: of the batch.

    Source: `science.md` 2.2.
    """
    there = ~mx.isnan(targets)
    error = mx.where(there[:, None], said - mx.where(there, targets, 0.0)[:, None], 0.0)
    total = _mean(huber(error), counts.T[:, :, None] * there[:, None])
    if len(pairs.first):
        first, second, order = mx.array(pairs.first), mx.array(pairs.second), mx.array(pairs.order)[:, None]
        lost = bradley_terry(order * (said[first] - said[second]))
        total = total + PAIRS * _mean(lost, counts.T[first][:, :, None] * mx.abs(order))
    return total


def _mean(values: mx.array, weight: mx.array) -> mx.array:
    """Over the first axis; 0 where nothing counts."""
    return (values * weight).sum(axis=0) / mx.maximum(weight.sum(axis=0), 1.0)


@dataclass(frozen=True)
class Fitted:
    """A head, for how many epochs each output learnt, and how far off it is on rows whose fold was left out.

    `left_out` is label minus prediction `[N, O]`, in the labels' unit, NaN where there is no label.
    """

    head: AttentionHead
    epochs: list[int]
    left_out: np.ndarray


def fit(
    states: Sequence[np.ndarray],
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    layer: int,
    folds: int,
    members: int,
    seed: int,
    tell: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fit the head on training rows.

    One head a fold learns without it, beside the head that learns from all rows and the bootstrap members: they are
    trained side by side and share nothing but the order of the rows. What heads say of the folds left out tells each
    output for how many epochs to learn, and how far off it is then.

    Args:
        states: of each row's reply, `[R, D]` from `layer`.
        features: `[N, F]` of the fixed poolings.
        labels: `[N, O]` in their own unit, NaN where there is none: masked, output by output.
        groups: the prompt of each row: folds, batches and bootstrap keep its rows together.
        layer: the block that the states are from.
        folds: left out in turn.
        members: bootstrap heads, each on prompts drawn with replacement.
        seed: of folds, bootstrap and order.
        tell: called after each epoch with its number and how many there are at most.
    """
    groups = np.asarray(groups)
    fold = grouped_folds(groups, folds, seed=seed)
    numbers = np.unique(fold)
    drawn = [np.bincount(rows, minlength=len(groups)) for rows in bootstrap_rows(groups, members, seed=seed)]
    counts = np.stack([np.ones(len(groups)), *drawn, *(fold != number for number in numbers)]).astype(np.float32)

    _, mean, scale = standardised(features)
    label_mean, label_scale = label_moments(labels)
    state_mean, state_scale = moments(states)
    z = [((each - state_mean) / state_scale).astype(np.float32) for each in states]
    targets = ((labels - label_mean) / label_scale).astype(np.float32)
    learnt, epochs, said = _learn(z, targets, labels, groups, counts, np.searchsorted(numbers, fold), seed, tell)

    head = AttentionHead(features.shape[1], len(state_mean), labels.shape[1], members, layer)
    arrays = {"feature_mean": mean, "feature_scale": scale, "label_mean": label_mean, "label_scale": label_scale}
    arrays |= {"state_mean": state_mean, "state_scale": state_scale}
    arrays |= {name: value[: 1 + members] for name, value in learnt.items()}
    head.update({name: mx.array(np.asarray(value, np.float32)) for name, value in arrays.items()})
    return Fitted(head, epochs.tolist(), labels - (said * label_scale + label_mean))


def _learn(
    z: list[np.ndarray],
    targets: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    counts: np.ndarray,
    fold: np.ndarray,
    seed: int,
    tell: Callable[[int, int], None] | None,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Queries, weights and biases of all heads after the epochs `[O]` best for the folds left out.

    The last heads are those that a fold is left out of, in the order of `fold` `[N]`.

    Returns: the three arrays, the epochs, and what was said of each row with its fold left out, `[N, O]`.
    """
    heads, outputs, first = len(counts), targets.shape[1], len(counts) - fold.max() - 1
    shape = (heads, outputs, z[0].shape[1])
    # Each starts as the mean of its own labels, and looks at all places alike.
    values = {"query": mx.zeros(shape), "weight": mx.zeros(shape), "bias": mx.array(means(targets, counts))}
    optimizer = optim.AdamW(learning_rate=RATE, weight_decay=DECAY, bias_correction=True)
    rows_of = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    everywhere, ones = Pairs.of(labels, groups), mx.ones((1, len(groups)))
    rng = np.random.default_rng([seed, 4])

    def step(values, states, said, wanted, times, pairs):
        return loss(look(states, said, **values), wanted, times, pairs).sum()

    slope = mx.grad(step)

    def left_out() -> tuple[np.ndarray, np.ndarray]:
        said = np.zeros(targets.shape, np.float32)
        for number in range(fold.max() + 1):
            own = {name: value[first + number : first + number + 1] for name, value in values.items()}
            outside = np.flatnonzero(fold == number)
            for rows in np.split(outside, range(READ_ROWS, len(outside), READ_ROWS)):
                said[rows] = np.array(look(*padded([z[row] for row in rows]), **own))[:, 0]
        return said, np.array(loss(mx.array(said)[:, None], mx.array(targets), ones, everywhere))[0]

    kept, epochs = dict(values), np.zeros(outputs, int)
    kept_said, least = left_out()
    for epoch in range(1, EPOCHS + 1):
        order = rng.permutation(len(rows_of))
        for batch in np.split(order, range(PROMPTS, len(order), PROMPTS)):
            rows = np.concatenate([rows_of[index] for index in batch])
            wanted, times = mx.array(targets[rows]), mx.array(counts[:, rows])
            pairs = Pairs.of(labels[rows], groups[rows])
            gradients = slope(values, *padded([z[row] for row in rows]), wanted, times, pairs)
            values = optimizer.apply_gradients(gradients, values)
            mx.eval(values, optimizer.state)
        said, lost = left_out()
        better = lost < least
        least, epochs[better], kept_said[:, better] = np.where(better, lost, least), epoch, said[:, better]
        chosen = {"query": better[:, None], "weight": better[:, None], "bias": better}
        kept = {name: mx.where(mx.array(chosen[name]), values[name], kept[name]) for name in values}
        mx.eval(kept)
        if tell:
            tell(epoch, EPOCHS)
        if epoch - epochs.max() >= PATIENCE:
            break
    return {name: np.array(value) for name, value in kept.items()}, epochs, kept_said


def means(targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean `[H, O]` of the labels there are, of rows as often as they count for each head."""
    there = ~np.isnan(targets)
    return (counts @ np.where(there, targets, 0.0) / np.maximum(counts @ there, 1.0)).astype(np.float32)


def padded(rows: Sequence[np.ndarray]) -> tuple[mx.array, mx.array]:
    """States `[R, D]` of each row as one `[B, T, D]`, zeros on the right, and the real places `[B, 2]`."""
    states = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), np.float32)
    for place, row in zip(states, rows, strict=True):
        place[: len(row)] = row
    return mx.array(states), mx.array([(0, len(row)) for row in rows])


def moments(states: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `[D]` over all tokens; a feature that never moves keeps the scale 1."""
    count = sum(map(len, states))
    mean = sum(each.sum(axis=0, dtype=np.float64) for each in states) / count
    spread = np.sqrt(sum(np.square(each - mean).sum(axis=0) for each in states) / count)
    return mean, np.where(spread < 1e-6, 1.0, spread)
