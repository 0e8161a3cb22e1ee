"""Ridge regressions inside folds inside folds: what is chosen, and what is stacked, never saw the fold it is judged on.

With fold `k` held out, every other fold `j` is predicted by a regression on the rest without `j`; a configuration is
chosen, and the weights of a stack are fitted, on those predictions. Fold `k` is predicted by a regression on all but
it. The regression is the product's (`reward.ridge.Ridge`; a test holds them equal): what is written here only makes
hundreds of them cheap. numpy on all cores, float32 products, float64 solutions.

Shapes: `n` rows, `F` features, `L` labels, `P` penalties, `C` columns solved at once.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

FOLDS = 5
DUAL_ROWS = 1000  # up to here equations are solved in [n, n], above by conjugate gradients
MAX_STEPS, TOLERANCE = 60, 1e-2  # an order of predictions changes no more
PRIOR_ROWS = 20


class Rows(Protocol):
    """Features `[n, F]`, ready to be fitted on: standardised on the rows outside the held-out fold."""

    count: int
    width: int

    def gram(self) -> np.ndarray:
        """Products of all rows with all, `[n, n]` float32."""
        ...

    def times(self, weight: np.ndarray) -> np.ndarray:
        """`[F, C]` to `[n, C]`."""
        ...

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """`[n, C]` to `[F, C]`."""
        ...


class Dense:
    """Features as one array, standardised: mean 0 and mean squared length 1 on the rows of `inside`.

    Args:
        values: `[n, F]`.
        inside: bool `[n]`, the rows that may be learnt from.
        centre: False for differences of two replies, whose sign must turn when the replies change places.
    """

    def __init__(self, values: np.ndarray, inside: np.ndarray, *, centre: bool = True):
        learnt = values[inside].astype(np.float32)
        mean = learnt.mean(axis=0, dtype=np.float64) * centre
        spread = np.sqrt(np.mean(np.square(learnt - mean.astype(np.float32)), axis=0, dtype=np.float64))
        spread[spread < 1e-6] = 1.0
        scale = spread * np.sqrt(values.shape[1])
        self.z = ((values - mean) / scale).astype(np.float32)
        self.count, self.width = self.z.shape

    def gram(self) -> np.ndarray:
        """Products of all rows with all, `[n, n]` float32."""
        return self.z @ self.z.T

    def times(self, weight: np.ndarray) -> np.ndarray:
        """`[F, C]` to `[n, C]`."""
        return self.z @ weight

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """`[n, C]` to `[F, C]`."""
        return self.z.T @ values


def left_out(
    rows: Rows,
    targets: np.ndarray,
    fold: np.ndarray,
    held_out: int,
    penalties: Sequence[float],
    *,
    intercept: bool = True,
) -> np.ndarray:
    """What regressions say of rows they were not fitted on, `[P, n, L]`, above the mean of the labels learnt from.

    That mean is left out: it is low where the rows left out have high labels, so over folds it would sort backwards.

    Args:
        rows: features; `rows` and penalties as in `reward.head.fit`.
        targets: `[n, L]`, NaN where there is no label.
        fold: int `[n]`.
        held_out: rows of this fold are never learnt from; those of another fold `j` are predicted without `j`.
        penalties: ridge penalties.
        intercept: whether the mean of the targets is free; not so for differences of two replies.
    """
    found = np.zeros((len(penalties), *targets.shape))
    gram = rows.gram() + np.float32(intercept) if rows.count <= DUAL_ROWS else None
    for labels, there in _by_mask(targets):
        known = np.isin(np.arange(len(fold)), there)
        numbers = np.unique(fold)
        parts = [known & (fold != held_out) & (fold != number) for number in numbers]
        solve = _conjugate_gradients if gram is None else _normal_equations
        answers = solve(rows, gram, targets[:, labels], parts, penalties, intercept)
        for number, predicted in zip(numbers, answers, strict=True):
            asked = np.flatnonzero(fold == number)
            found[np.ix_(range(len(penalties)), asked, labels)] = predicted[:, asked]
    return found


def _normal_equations(rows, gram, targets, parts, penalties, intercept):
    """Predictions `[P, n, L]` of the regressions on each of `parts`, in the dual form."""
    for learnt in parts:
        y = targets[learnt] - (targets[learnt].mean(axis=0) if intercept else 0.0)
        inside = gram[np.ix_(learnt, learnt)].astype(np.float64)
        answer = []
        for penalty in penalties:
            coefficients = np.linalg.solve(inside + penalty * np.eye(len(inside)), y)
            answer.append(gram[:, learnt] @ coefficients)
        yield np.stack(answer)


def _conjugate_gradients(rows, _, targets, parts, penalties, intercept):
    """The same in the primal form: (Z'MZ + l I) w = Z'My for all parts and penalties at once.

    Source: Hestenes and Stiefel 1952.
    """
    wanted = [(learnt, penalty) for learnt in parts for penalty in penalties]
    labels = targets.shape[1]
    mask = np.repeat(np.stack([learnt for learnt, _ in wanted], axis=1), labels, axis=1).astype(np.float32)
    price = np.repeat(np.array([penalty for _, penalty in wanted]), labels).astype(np.float32)
    y = np.concatenate(
        [
            np.where(learnt[:, None], targets - (targets[learnt].mean(axis=0) if intercept else 0.0), 0.0)
            for learnt, _ in wanted
        ],
        axis=1,
    ).astype(np.float32)

    def apply(weight: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        said = mask * (rows.times(weight) + free * intercept)
        return rows.transposed_times(said) + price * weight, (said.sum(axis=0) + price * free) * intercept

    weight, free = np.zeros((rows.width, y.shape[1]), np.float32), np.zeros(y.shape[1], np.float32)
    left, left_free = rows.transposed_times(y), y.sum(axis=0) * intercept
    way, way_free = left, left_free
    size = first = np.square(left).sum(axis=0) + np.square(left_free)
    for _ in range(MAX_STEPS):
        if (size <= TOLERANCE**2 * first).all():
            break
        turned, turned_free = apply(way, way_free)
        step = size / np.maximum((way * turned).sum(axis=0) + way_free * turned_free, 1e-30)
        weight, free = weight + step * way, free + step * way_free
        left, left_free = left - step * turned, left_free - step * turned_free
        before, size = size, np.square(left).sum(axis=0) + np.square(left_free)
        share = size / np.maximum(before, 1e-30)
        way, way_free = left + share * way, left_free + share * way_free
    said = rows.times(weight) + free * intercept
    for number in range(len(parts)):
        inside = said[:, number * len(penalties) * labels : (number + 1) * len(penalties) * labels]
        yield inside.reshape(len(said), len(penalties), labels).transpose(1, 0, 2)


def _by_mask(targets: np.ndarray):
    """Labels that are there on the same rows, together: `(labels, rows)`."""
    there = ~np.isnan(targets)
    patterns, owner = np.unique(there, axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        if patterns[:, index].any():
            yield np.flatnonzero(owner == index), np.flatnonzero(patterns[:, index])


def stack(
    predicted: np.ndarray, targets: np.ndarray, inside: np.ndarray, *, intercept: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """One prediction of several, weights fitted by least squares on `inside` alone and never below 0.

    Weights are drawn towards equal ones, as strongly as `PRIOR_ROWS` rows would: few rows cannot tell who is better.

    Args:
        predicted: `[S, n]`, each row predicted by a regression that was not fitted on it.
        targets: `[n]`.
        inside: bool `[n]`, rows with a label outside the held-out fold.
        intercept: as in `left_out`.

    Returns: `[n]`, and the weights `[S]`.
    """
    said, y = predicted[:, inside].T, targets[inside]
    if intercept:
        said, y = said - said.mean(axis=0), y - y.mean()
    spread = np.maximum(np.sqrt(np.square(said).mean(axis=0)), 1e-12)
    said = said / spread
    total = said.sum(axis=1)
    equal = max(0.0, float(total @ y / max(total @ total, 1e-12)))
    active, weight = np.ones(len(predicted), bool), np.zeros(len(predicted))
    while active.any():  # drops what would count against the others; at most S rounds
        inner = said[:, active]
        matrix = inner.T @ inner + PRIOR_ROWS * np.eye(inner.shape[1])
        weight[:] = 0.0
        weight[active] = np.linalg.solve(matrix, inner.T @ y + PRIOR_ROWS * equal)
        if (weight >= 0).all():
            break
        active &= weight > 0
    return predicted.T @ (weight / spread), weight / spread
