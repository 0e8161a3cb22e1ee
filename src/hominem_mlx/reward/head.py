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
    `W = Z'(ZZ' + l I)^-1 Y = (Z'Z + l I)^-1 Z'Y` with Z and Y centred (Saunders, Gammerman and Vovk 1998). One
    eigendecomposition serves all penalties.
    """

    def __init__(self, z: mx.array | np.ndarray):
        self.z = z
        self.is_dual = z.shape[0] < z.shape[1]
        self.gram = _double(z @ z.T) if self.is_dual else None

    def path(
        self, rows: np.ndarray, targets: np.ndarray, penalties: Sequence[float]
    ) -> list[tuple[mx.array, mx.array]]:
        """Coefficients and intercepts `[O]` for each penalty, from rows (repeats allowed) without missing targets.

        Coefficients are dual `[n, O]`, one a row, or primal `[F, O]`. Dual ones sum to 0, so that centring the features
        changes nothing but the intercept.
        """
        at = mx.array(rows)
        y = _double(targets[rows])
        y_mean = y.mean(axis=0)
        if self.gram is not None:
            inside = self.gram[at][:, at]
            side = inside.mean(axis=0)
            matrix, right = inside - side - side[:, None] + side.mean(), y - y_mean
        else:
            inside = _double(self.z[at])
            centred = inside - inside.mean(axis=0)
            matrix, right = centred.T @ centred, centred.T @ (y - y_mean)
        values, vectors = mx.linalg.eigh(matrix)
        turned = vectors.T @ right
        solutions = []
        for penalty in penalties:
            coefficients = vectors @ (turned / (mx.maximum(values, 0.0) + penalty)[:, None])
            solutions.append((coefficients, y_mean - inside.mean(axis=0) @ coefficients))
        return solutions

    def predict(self, coefficients: mx.array, bias: mx.array, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Predictions `[n, O]` for `others`, from a solution of `path(rows, ...)`."""
        if self.gram is not None:
            return np.array(self.gram[mx.array(others)][:, mx.array(rows)] @ coefficients + bias)
        return np.array(_double(self.z[mx.array(others)]) @ coefficients + bias)

    def solve(self, rows: np.ndarray, targets: np.ndarray, penalties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[F, O]` and intercepts `[O]`, each output with its own penalty and its own missing rows."""
        weight = np.zeros((self.z.shape[1], targets.shape[1]))
        bias = np.zeros(targets.shape[1])
        for outputs, there in _by_mask(targets[rows]):
            kept = rows[there]
            different = sorted({float(value) for value in penalties[outputs]})
            solutions = self.path(kept, targets[:, outputs], different)
            for penalty, (coefficients, intercept) in zip(different, solutions, strict=True):
                mine = penalties[outputs] == penalty
                full = self._in_features(kept, coefficients) if self.is_dual else np.array(coefficients)
                weight[:, outputs[mine]], bias[outputs[mine]] = full[:, mine], np.array(intercept)[mine]
        return weight, bias

    def _in_features(self, rows: np.ndarray, dual: mx.array) -> np.ndarray:
        if isinstance(self.z, np.ndarray):
            return self.z[rows].T @ np.array(dual).astype(self.z.dtype)
        return np.array(self.z[mx.array(rows)].T @ dual)


def _fold_errors(ridge: Ridge, targets: np.ndarray, fold: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Mean squared error of each penalty and output over rows left out in turn, `[P, O]`."""
    squares = np.zeros((len(penalties), targets.shape[1]))
    for left_out in np.unique(fold):
        inside, outside = np.flatnonzero(fold != left_out), np.flatnonzero(fold == left_out)
        for outputs, there in _by_mask(targets[inside]):
            rows = inside[there]
            for number, (coefficients, bias) in enumerate(ridge.path(rows, targets[:, outputs], penalties)):
                error = ridge.predict(coefficients, bias, rows, outside) - targets[np.ix_(outside, outputs)]
                squares[number, outputs] += np.nansum(error**2, axis=0)
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
