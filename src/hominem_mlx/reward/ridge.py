"""Ridge regressions of several outputs on one feature matrix: fitted, left out by folds, and drawn by bootstrap.

Shapes: `N` rows, `F` features, `O` outputs, `P` penalties, `E` draws. Everything is float64 in numpy.

In the primal form the normal equations of all rows are decomposed once. Those of all but a fold, or of a bootstrap
draw, are much like them, which makes their conjugate gradients short.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Relative residuals at which conjugate gradients end: with a fold left out, and of a bootstrap draw, which only says
# how far draws lie apart.
LEFT_OUT_CLOSE, DRAW_CLOSE, MOST_ROUNDS = 1e-5, 1e-3, 300


class Whole(NamedTuple):
    """Equations of some rows, decomposed: `Z'Z` of centred features, or `ZZ'`, is `vectors @ diag(values) @ vectors.T`.

    S is the number of features in the primal form, of rows in the dual one.
    """

    mean: np.ndarray  # [S], of features; of the products with each row
    values: np.ndarray  # [S]
    vectors: np.ndarray  # [S, S]

    def solve(self, right: np.ndarray, penalties: np.ndarray) -> np.ndarray:
        """Solutions for right sides, the last axis of both `[S, ..., C]` and `[C]` in step."""
        turned = (self.vectors.T @ right.reshape(len(right), -1)).reshape(right.shape)
        turned /= self.values.reshape(-1, *[1] * (right.ndim - 1)) + penalties
        return (self.vectors @ turned.reshape(len(right), -1)).reshape(right.shape)


class Ridge:
    """Ridge regressions with a free intercept on rows of one feature matrix `[N, F]`.

    With fewer rows than features the dual form is solved, in `[N, N]`; otherwise the primal one, in `[F, F]`:
    `W = Z'(ZZ' + l I)^-1 Y = (Z'Z + l I)^-1 Z'Y` with Z and Y centred (Saunders, Gammerman and Vovk 1998).

    Args:
        z: features.
        gram: `ZZ'` where it is known; only the dual form wants it.
    """

    def __init__(self, z: np.ndarray, gram: np.ndarray | None = None):
        self.is_dual = z.shape[0] < z.shape[1]
        self.z = z if self.is_dual else np.asarray(z, np.float64)
        self.gram = np.empty(0)
        if self.is_dual:
            self.gram = np.asarray(z @ z.T if gram is None else gram, np.float64)
        self._wholes: dict[bytes, Whole] = {}

    def solve(self, rows: np.ndarray, targets: np.ndarray, penalties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[F, O]` and intercepts `[O]` from `rows`, all different.

        Each output has its own penalty and its own missing rows.
        """
        weight, bias = np.zeros((self.z.shape[1], targets.shape[1])), np.zeros(targets.shape[1])
        for outputs, there in by_mask(targets[rows]):
            kept, price = rows[there], penalties[outputs]
            y = targets[np.ix_(kept, outputs)]
            off, whole = y - y.mean(axis=0), self._whole(kept)
            if self.is_dual:
                found = whole.solve(off, price)
                weight[:, outputs] = self._sums(kept, found)
            else:
                weight[:, outputs] = found = whole.solve(self.z[kept].T @ off, price)
            bias[outputs] = y.mean(axis=0) - whole.mean @ found
        return weight, bias

    def draws(
        self, drawn: Sequence[np.ndarray], targets: np.ndarray, penalties: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`solve` for several draws of rows: weights `[E, F, O]` and intercepts `[E, O]`.

        A draw is all rows, each as often as it was drawn.
        """
        weight = np.zeros((len(drawn), self.z.shape[1], targets.shape[1]))
        bias = np.zeros((len(drawn), targets.shape[1]))
        if not drawn:
            return weight, bias
        drawn_times = np.stack([np.bincount(rows, minlength=len(self.z)) for rows in drawn], axis=1)
        find = self._weighted_dual if self.is_dual else self._weighted
        for outputs, kept in by_mask(targets):
            found = find(kept, targets[np.ix_(kept, outputs)], drawn_times[kept], penalties[outputs])
            weight[:, :, outputs], bias[:, outputs] = found
        return weight, bias

    def _weighted_dual(self, rows, y, times, penalties) -> tuple[np.ndarray, np.ndarray]:
        """As `_weighted`. A row that counts r times stands in its equations once, with the r-th part of the penalty."""
        coefficients = np.zeros((len(rows), times.shape[1], y.shape[1]))
        bias = np.zeros((times.shape[1], y.shape[1]))
        for place, counts in enumerate(times.T):
            there = np.flatnonzero(counts)
            if not len(there):
                continue
            share = counts[there] / counts.sum()
            inside = self.gram[np.ix_(rows[there], rows[there])]
            side = share @ inside
            matrix, mean = inside - side - side[:, None] + share @ side, share @ y[there]
            for penalty in np.unique(penalties):
                own = np.flatnonzero(penalties == penalty)
                priced = matrix + np.diag(penalty / counts[there])
                found = np.linalg.solve(priced, (y[there] - mean)[:, own])
                coefficients[there[:, None], place, own] = found
            bias[place] = mean - side @ coefficients[there, place]
        weight = self._sums(rows, coefficients.reshape(len(rows), -1))
        return np.moveaxis(weight.reshape(-1, *coefficients.shape[1:]), 0, 1), bias

    def _sums(self, rows: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """`Z'` of `rows`, which are all different, times coefficients; n-gram rows are long, so none is copied."""
        everywhere = np.zeros((len(self.z), coefficients.shape[1]), self.z.dtype)
        everywhere[rows] = coefficients
        return self.z.T @ everywhere

    def _weighted(self, rows, y, times, penalties) -> tuple[np.ndarray, np.ndarray]:
        """Regressions in which each row counts `times` `[rows, E]`: weights `[E, F, O]`, intercepts `[E, O]`."""
        z, size = self.z[rows], self.z.shape[1]
        total = np.maximum(times.sum(axis=0), 1)[:, None]
        z_mean, y_mean = times.T @ z / total, times.T @ y / total
        whole = self._whole(rows)

        def apply(w: np.ndarray) -> np.ndarray:  # [F, E, O]
            said = (z @ w.reshape(size, -1)).reshape(len(z), *w.shape[1:])
            back = (z.T @ (times[:, :, None] * said).reshape(len(z), -1)).reshape(w.shape)
            centre = np.einsum("ef,feo->eo", z_mean, w)
            return back - z_mean.T[:, :, None] * (total * centre) + penalties * w

        off = times[:, :, None] * (y[:, None] - y_mean)  # sums to 0 in every draw, so z need not be centred
        right = (z.T @ off.reshape(len(z), -1)).reshape(size, *off.shape[1:])
        weight = np.moveaxis(
            conjugate_gradients(apply, lambda left: whole.solve(left, penalties), right, DRAW_CLOSE), 0, 1
        )
        return weight, y_mean - np.einsum("ef,efo->eo", z_mean, weight)

    def left_out_errors(
        self, rows: np.ndarray, targets: np.ndarray, fold: np.ndarray, penalties: Sequence[float]
    ) -> np.ndarray:
        """Target minus prediction of each of `rows` by the regression on the other folds, `[P, rows, O]`.

        Args:
            targets: float `[N, O]`, nothing missing in `rows`.
            fold: int `[N]`; where all `rows` are in one, nothing can be told and the errors are NaN.
        """
        blocks = [np.flatnonzero(fold[rows] == number) for number in np.unique(fold[rows])]
        errors = np.full((len(penalties), len(rows), targets.shape[1]), np.nan)
        if len(blocks) > 1:
            (self._left_out_dual if self.is_dual else self._left_out_primal)(
                rows, targets[rows], blocks, penalties, errors
            )
        return errors

    def _left_out_dual(self, rows, y, blocks, penalties, errors) -> None:
        """Without fitting again: with the smoother H = 11'/n + L (w + l)^-1 L', whose factor L one eigendecomposition
        gives, the errors of a left-out fold G are (I - H_GG)^-1 (y - Hy)_G, to rounding (Allen 1974, PRESS, by blocks).
        """
        _, values, vectors = self._whole(rows)
        factor, off = vectors * np.sqrt(values), y - y.mean(axis=0)
        turned = factor.T @ off
        for number, penalty in enumerate(penalties):
            shrunk = factor / (values + penalty)
            left = off - shrunk @ turned
            for block in blocks:
                smoother = shrunk[block] @ factor[block].T + 1 / len(rows)
                errors[number, block] = np.linalg.solve(np.eye(len(block)) - smoother, left[block])

    def _left_out_primal(self, rows, y, blocks, penalties, errors) -> None:
        """The normal equations of the other folds are those of all rows less the fold's own; all penalties at once."""
        parts = []
        for block in blocks:
            own = self.z[rows[block]]
            parts.append((own.T @ own, own.T @ y[block], own.sum(axis=0), y[block].sum(axis=0)))
        products, right, z_sum, y_sum = (functools.reduce(np.add, pieces) for pieces in zip(*parts, strict=True))
        whole = self._whole(rows, products)
        price = np.repeat(penalties, y.shape[1])
        for block, part in zip(blocks, parts, strict=True):
            count = len(rows) - len(block)
            matrix, wanted = products - part[0], right - part[1]
            z_mean, y_mean = (z_sum - part[2]) / count, (y_sum - part[3]) / count
            matrix -= count * np.outer(z_mean, z_mean)
            wanted = np.tile(wanted - count * np.outer(z_mean, y_mean), len(penalties))
            apply = functools.partial(_penalised, matrix, price)
            weight = conjugate_gradients(apply, lambda left: whole.solve(left, price), wanted, LEFT_OUT_CLOSE)
            said = (self.z[rows[block]] @ weight - z_mean @ weight).reshape(len(block), len(penalties), -1)
            errors[:, block] = y[block] - y_mean - said.swapaxes(0, 1)

    def _whole(self, rows: np.ndarray, products: np.ndarray | None = None) -> Whole:
        """Of `rows`, whose `Z'Z` may be known. A fit asks for the same up to three times."""
        key = rows.tobytes()
        if key not in self._wholes:
            if self.is_dual:
                inside = self.gram[np.ix_(rows, rows)]
                mean = inside.mean(axis=0)
                centred = inside - mean - mean[:, None] + mean.mean()
            else:
                z = self.z[rows]
                mean = z.mean(axis=0)
                centred = (z.T @ z if products is None else products) - len(rows) * np.outer(mean, mean)
            values, vectors = np.linalg.eigh(centred)
            self._wholes[key] = Whole(mean, np.maximum(values, 0.0), vectors)
        return self._wholes[key]


def _penalised(matrix: np.ndarray, price: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return matrix @ weight + price * weight


def conjugate_gradients(
    apply: Callable[[np.ndarray], np.ndarray],
    nearly_solve: Callable[[np.ndarray], np.ndarray],
    right: np.ndarray,
    close: float,
) -> np.ndarray:
    """Solves `apply(w) = right` for positive definite systems, one along the first axis for each place of the others.

    Args:
        apply: `[F, ...]` to `[F, ...]`.
        nearly_solve: about its inverse, positive definite too.
        right: `[F, ...]`.
        close: it ends where every residual is below this share of its right side.

    Source: Hestenes and Stiefel 1952, preconditioned.
    """
    found, left = np.zeros_like(right), right.copy()
    enough = close * np.linalg.norm(right, axis=0)
    step = nearly_solve(left)
    slope = (left * step).sum(axis=0)
    for _ in range(MOST_ROUNDS):
        if (np.linalg.norm(left, axis=0) <= enough).all():
            break
        along = apply(step)
        curvature = (step * along).sum(axis=0)
        far = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
        found += far * step
        left -= far * along
        turned = nearly_solve(left)
        before, slope = slope, (left * turned).sum(axis=0)
        step = turned + np.divide(slope, before, out=np.zeros_like(slope), where=before > 0) * step
    return found


def by_mask(targets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Outputs that are labelled on the same rows, together: `(outputs, labelled rows)`, most often one group."""
    there = ~np.isnan(targets)
    patterns, owner = np.unique(there, axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        if patterns[:, index].any():
            yield np.flatnonzero(owner == index), np.flatnonzero(patterns[:, index])
