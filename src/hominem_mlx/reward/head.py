"""The ridge head: one linear map from features to the nine numbers, its uncertainty, and how both are fitted.

Shapes: `N` rows, `F` features, `O` outputs, `E` bootstrap members, `P` penalties. Fitting runs in float64 on the CPU,
where MLX has it; what is stored and scored with is float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

EXTRA = ("reward_intensity", "safety_score")  # the outputs beside the dimensions of the manifold, in this order


class RidgeHead(nn.Module):
    """Features `[B, F]` to outputs in the labels' unit; standardisation is done and undone in here and nowhere else."""

    def __init__(self, num_features: int, num_outputs: int, num_members: int):
        super().__init__()
        self.feature_mean = mx.zeros((num_features,))
        self.feature_scale = mx.ones((num_features,))
        self.label_mean = mx.zeros((num_outputs,))
        self.label_scale = mx.ones((num_outputs,))
        self.weight = mx.zeros((num_features, num_outputs))
        self.bias = mx.zeros((num_outputs,))
        self.member_weight = mx.zeros((num_members, num_features, num_outputs))
        self.member_bias = mx.zeros((num_members, num_outputs))
        self.freeze()

    def __call__(self, features: mx.array) -> tuple[mx.array, mx.array]:
        """`[B, O]` values, unclipped, and `[E, B, O]` what each bootstrap member says."""
        z = (features - self.feature_mean) / self.feature_scale
        members = z @ self.member_weight + self.member_bias[:, None]
        return self._in_unit(z @ self.weight + self.bias), self._in_unit(members)

    def _in_unit(self, standardised: mx.array) -> mx.array:
        return standardised * self.label_scale + self.label_mean


@dataclass(frozen=True)
class Fitted:
    """A head and the penalty each output got."""

    head: RidgeHead
    penalties: list[float]


def grouped_folds(groups: Sequence[str] | np.ndarray, folds: int, *, seed: int) -> np.ndarray:
    """The fold of each row, `[N]` in 0..folds-1: all rows of a group together, as many groups in each as can be."""
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    place = np.empty(len(names), int)
    place[np.random.default_rng([seed, 1]).permutation(len(names))] = np.arange(len(names)) % min(folds, len(names))
    return place[owner]


def fit(
    features: mx.array | np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    penalties: Sequence[float],
    folds: int,
    members: int,
    seed: int,
    standardise: bool = True,
) -> Fitted:
    """Fit the head on training rows.

    Args:
        features: `[N, F]`; numpy rows (the n-gram baseline) are multiplied by numpy.
        labels: `[N, O]` in their own unit, NaN where there is none: masked, output by output.
        groups: the prompt of each row: folds and bootstrap keep its rows together.
        penalties: to choose from, per output, by mean squared error over the folds. After standardisation a row has
            mean squared length 1, so a penalty means the same for any number of features.
        folds: inner folds.
        members: bootstrap heads, each on prompts drawn with replacement, at the penalties chosen for all.
        seed: of folds and bootstrap.
        standardise: whether features get mean 0 and equal variance; n-gram rows have their length already.
    """
    with mx.stream(mx.cpu):
        mean, scale = _moments(features) if standardise else (np.zeros(features.shape[1]), np.ones(features.shape[1]))
        label_mean, label_scale = _label_moments(labels)
        targets = (labels - label_mean) / label_scale
        z = (_double(features) - _double(mean)) / _double(scale) if standardise else features
        ridge = Ridge(z)

        fold = grouped_folds(groups, folds, seed=seed)
        errors = _fold_errors(ridge, targets, fold, penalties)
        chosen = np.array(penalties)[errors.argmin(axis=0)]
        weight, bias = ridge.solve(np.arange(len(targets)), targets, chosen)
        drawn = [ridge.solve(rows, targets, chosen) for rows in _bootstrap_rows(groups, members, seed=seed)]

    head = RidgeHead(features.shape[1], labels.shape[1], members)
    arrays = {"feature_mean": mean, "feature_scale": scale, "label_mean": label_mean, "label_scale": label_scale}
    arrays |= {"weight": weight, "bias": bias}
    if members:
        arrays |= {"member_weight": np.stack([w for w, _ in drawn]), "member_bias": np.stack([b for _, b in drawn])}
    head.update({name: mx.array(np.asarray(value, np.float32)) for name, value in arrays.items()})
    return Fitted(head, chosen.tolist())


class Ridge:
    """Ridge regressions with a free intercept on rows of one feature matrix `[N, F]`.

    With fewer rows than features the dual form is solved, in `[N, N]`; otherwise the primal one, in `[F, F]`:
    `W = Z'(ZZ' + l I)^-1 Y = (Z'Z + l I)^-1 Z'Y` with Z and Y centred (Saunders, Gammerman and Vovk 1998).
    """

    def __init__(self, z: mx.array | np.ndarray):
        self.z = z
        self.is_dual = z.shape[0] < z.shape[1]
        self.gram = _double(z @ z.T) if self.is_dual else None

    def solve(self, rows: np.ndarray, targets: np.ndarray, penalties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[F, O]` and intercepts `[O]` from `rows` (repeats allowed).

        Each output has its own penalty and its own missing rows.
        """
        weight = np.zeros((self.z.shape[1], targets.shape[1]))
        bias = np.zeros(targets.shape[1])
        for outputs, there in _by_mask(targets[rows]):
            kept = rows[there]
            inside, matrix, _ = self._centred(kept)
            y = _double(targets[np.ix_(kept, outputs)])
            right = y - y.mean(axis=0)
            right = right if self.is_dual else (inside - inside.mean(axis=0)).T @ right
            coefficients = mx.zeros(right.shape, mx.float64)
            for penalty in np.unique(penalties[outputs]):
                own = mx.array(np.flatnonzero(penalties[outputs] == penalty))
                ridge = matrix + float(penalty) * mx.eye(len(matrix), dtype=mx.float64)
                coefficients[:, own] = mx.linalg.solve(ridge, right[:, own])
            weight[:, outputs] = self._in_features(kept, coefficients) if self.is_dual else coefficients
            bias[outputs] = y.mean(axis=0) - inside.mean(axis=0) @ coefficients
        return weight, bias

    def left_out_errors(
        self, rows: np.ndarray, targets: np.ndarray, fold: np.ndarray, penalties: Sequence[float]
    ) -> np.ndarray:
        """Squared error summed over `rows`, each predicted by the regression on the other folds, `[P, O]`.

        No regression is fitted again: with the smoother H = 11'/n + L (w + l)^-1 L', whose factor L one
        eigendecomposition gives, the errors of a left-out fold G are (I - H_GG)^-1 (y - Hy)_G, to rounding (Allen 1974,
        PRESS, by blocks).

        Args:
            targets: float `[N, O]`, nothing missing in `rows`.
            fold: int `[N]`; where all `rows` are in one, nothing can be told and the errors are 0.
        """
        blocks = [mx.array(np.flatnonzero(fold[rows] == number)) for number in np.unique(fold[rows])]
        if len(blocks) < 2:
            return np.zeros((len(penalties), targets.shape[1]))
        _, matrix, centred = self._centred(rows)
        values, vectors = mx.linalg.eigh(matrix)
        values = mx.maximum(values, 0.0)
        factor = vectors * mx.sqrt(values) if self.is_dual else centred @ vectors
        y = _double(targets[rows])
        turned = factor.T @ (y - y.mean(axis=0))
        squares = []
        for penalty in penalties:
            shrunk = factor / (values + penalty)
            left = y - y.mean(axis=0) - shrunk @ turned
            total = mx.zeros(y.shape[1], mx.float64)
            for block in blocks:
                one = mx.ones((len(block), 1), mx.float64)
                u, v = (
                    mx.concatenate([shrunk[block], one / len(rows)], axis=1),
                    mx.concatenate([factor[block], one], axis=1),
                )
                error = _solve_low_rank(u, v, left[block])
                total = total + mx.square(error).sum(axis=0)
            squares.append(np.array(total))
        return np.stack(squares)

    def _centred(self, rows: np.ndarray) -> tuple[mx.array, mx.array, mx.array | None]:
        """What is multiplied by coefficients, uncentred; the matrix of the normal equations; centred rows (primal)."""
        at = mx.array(rows)
        if self.gram is not None:
            inside = self.gram[at][:, at]
            side = inside.mean(axis=0)
            return inside, inside - side - side[:, None] + side.mean(), None
        inside = _double(self.z[at])
        centred = inside - inside.mean(axis=0)
        return inside, centred.T @ centred, centred

    def _in_features(self, rows: np.ndarray, dual: mx.array) -> np.ndarray:
        if isinstance(self.z, np.ndarray):
            return self.z[rows].T @ np.array(dual).astype(self.z.dtype)
        return np.array(self.z[mx.array(rows)].T @ dual)


def _solve_low_rank(u: mx.array, v: mx.array, right: mx.array) -> mx.array:
    """(I - u v')^-1 right for u, v `[n, r]` and right `[n, O]`; in `[r, r]` where that is smaller (Woodbury 1950)."""
    if len(u) <= u.shape[1]:
        return mx.linalg.solve(mx.eye(len(u), dtype=mx.float64) - u @ v.T, right)
    inner = mx.eye(u.shape[1], dtype=mx.float64) - v.T @ u
    return right + u @ mx.linalg.solve(inner, v.T @ right)


def _fold_errors(ridge: Ridge, targets: np.ndarray, fold: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Squared error of each penalty and output over rows left out in turn, `[P, O]`."""
    squares = np.zeros((len(penalties), targets.shape[1]))
    for outputs, there in _by_mask(targets):
        squares[:, outputs] = ridge.left_out_errors(there, targets[:, outputs], fold, penalties)
    return squares


def _by_mask(targets: np.ndarray):
    """Outputs that are labelled on the same rows, together: `(outputs, labelled rows)`, most often one group."""
    there = ~np.isnan(targets)
    patterns, owner = np.unique(there, axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        if patterns[:, index].any():
            yield np.flatnonzero(owner == index), np.flatnonzero(patterns[:, index])


def _bootstrap_rows(groups: Sequence[str] | np.ndarray, members: int, *, seed: int) -> list[np.ndarray]:
    """Rows of as many groups as there are, drawn with replacement, for each member."""
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    rows_of = [np.flatnonzero(owner == index) for index in range(len(names))]
    rng = np.random.default_rng([seed, 2])
    return [
        np.concatenate([rows_of[index] for index in rng.integers(0, len(names), len(names))]) for _ in range(members)
    ]


def _moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale `[F]`; the scale holds sqrt(F), so that a standardised row has mean squared length 1."""
    rows = np.asarray(features, np.float64)
    spread = rows.std(axis=0)
    spread[spread < 1e-6] = 1.0  # a feature that never moves says nothing and must not divide by nothing
    return rows.mean(axis=0), spread * np.sqrt(rows.shape[1])


def _label_moments(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `[O]` of the labels there are; a constant output keeps the scale 1."""
    there = ~np.isnan(labels)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, labels, 0.0).sum(axis=0) / count
    spread = np.sqrt((np.where(there, labels - mean, 0.0) ** 2).sum(axis=0) / count)
    return mean, np.where(spread < 1e-9, 1.0, spread)


def _double(values) -> mx.array:
    return values.astype(mx.float64) if isinstance(values, mx.array) else mx.array(values, dtype=mx.float64)
