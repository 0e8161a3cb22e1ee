"""Ridge regressions of several outputs on one feature matrix: fitted, left out by folds, and drawn by bootstrap.

Shapes: `N` rows, `F` features, `O` outputs, `P` penalties, `E` draws. Everything is float64 in numpy.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

CLOSE_ENOUGH, MOST_ROUNDS = 1e-7, 100  # of conjugate gradients: relative residual


class Ridge:
    """Ridge regressions with a free intercept on rows of one feature matrix `[N, F]`.

    With fewer rows than features the dual form is solved, in `[N, N]`; otherwise the primal one, in `[F, F]`:
    `W = Z'(ZZ' + l I)^-1 Y = (Z'Z + l I)^-1 Z'Y` with Z and Y centred (Saunders, Gammerman and Vovk 1998).
    """

    def __init__(self, z: np.ndarray):
        self.is_dual = z.shape[0] < z.shape[1]
        self.z = z if self.is_dual else np.asarray(z, np.float64)
        self.gram = np.asarray(z @ z.T if self.is_dual else (), np.float64)

    def solve(self, rows: np.ndarray, targets: np.ndarray, penalties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[F, O]` and intercepts `[O]` from `rows` (repeats allowed).

        Each output has its own penalty and its own missing rows.
        """
        weight, bias = np.zeros((self.z.shape[1], targets.shape[1])), np.zeros(targets.shape[1])
        for outputs, there in by_mask(targets[rows]):
            kept = rows[there]
            mean, matrix, right = self._equations(kept, targets[np.ix_(kept, outputs)])
            coefficients = np.zeros(right.shape)
            for penalty in np.unique(penalties[outputs]):
                own = penalties[outputs] == penalty
                coefficients[:, own] = np.linalg.solve(matrix + penalty * np.eye(len(matrix)), right[:, own])
            if self.is_dual:
                weight[:, outputs] = self.z[kept].T @ coefficients.astype(self.z.dtype)
            else:
                weight[:, outputs] = coefficients
            bias[outputs] = targets[np.ix_(kept, outputs)].mean(axis=0) - mean @ coefficients
        return weight, bias

    def draws(
        self, drawn: Sequence[np.ndarray], targets: np.ndarray, penalties: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`solve` for several draws of rows: weights `[E, F, O]` and intercepts `[E, O]`.

        In the primal form a draw is all rows with weights. Its equations are much like those of all rows, whose
        inverse makes conjugate gradients short (Hestenes and Stiefel 1952).
        """
        weight = np.zeros((len(drawn), self.z.shape[1], targets.shape[1]))
        bias = np.zeros((len(drawn), targets.shape[1]))
        if self.is_dual:
            for place, rows in enumerate(drawn):
                weight[place], bias[place] = self.solve(rows, targets, penalties)
            return weight, bias
        for outputs, kept in by_mask(targets):
            times = np.stack([np.bincount(rows, minlength=len(self.z))[kept] for rows in drawn], axis=1)
            found = self._weighted(kept, targets[np.ix_(kept, outputs)], times, penalties[outputs])
            weight[:, :, outputs], bias[:, outputs] = found
        return weight, bias

    def _weighted(self, rows, y, times, penalties) -> tuple[np.ndarray, np.ndarray]:
        """Regressions in which each row counts `times` `[rows, E]`: weights `[E, F, O]`, intercepts `[E, O]`."""
        z, size, draws = self.z[rows], self.z.shape[1], times.shape[1]
        total = np.maximum(times.sum(axis=0), 1)[:, None]
        z_mean, y_mean = times.T @ z / total, times.T @ y / total
        _, matrix, _ = self._equations(rows, y)
        inverse = {penalty: np.linalg.inv(matrix + penalty * np.eye(size)) for penalty in np.unique(penalties)}

        def apply(w: np.ndarray) -> np.ndarray:  # [F, E, O]
            said = (z @ w.reshape(size, -1)).reshape(len(z), *w.shape[1:])
            back = (z.T @ (times[:, :, None] * said).reshape(len(z), -1)).reshape(w.shape)
            centre = np.einsum("ef,feo->eo", z_mean, w)
            return back - z_mean.T[:, :, None] * (total * centre) + penalties * w

        def nearly_solve(right: np.ndarray) -> np.ndarray:
            made = np.empty_like(right)
            for penalty, matrix in inverse.items():
                own = penalties == penalty
                made[:, :, own] = (matrix @ right[:, :, own].reshape(size, -1)).reshape(size, draws, -1)
            return made

        off = times[:, :, None] * (y[:, None] - y_mean)  # sums to 0 in every draw, so z need not be centred
        right = (z.T @ off.reshape(len(z), -1)).reshape(size, *off.shape[1:])
        weight = np.moveaxis(conjugate_gradients(apply, nearly_solve, right), 0, 1)
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
        centred = self._centred_gram(rows)
        values, vectors = np.linalg.eigh(centred)
        values = np.maximum(values, 0.0)
        factor, off = vectors * np.sqrt(values), y - y.mean(axis=0)
        turned = factor.T @ off
        for number, penalty in enumerate(penalties):
            shrunk = factor / (values + penalty)
            left = off - shrunk @ turned
            for block in blocks:
                smoother = shrunk[block] @ factor[block].T + 1 / len(rows)
                errors[number, block] = np.linalg.solve(np.eye(len(block)) - smoother, left[block])

    def _left_out_primal(self, rows, y, blocks, penalties, errors) -> None:
        """The normal equations of the other folds are those of all rows less the fold's own."""
        z = self.z[rows]
        parts = [(z[block].T @ z[block], z[block].T @ y[block], z[block].sum(0), y[block].sum(0)) for block in blocks]
        whole = [sum(pieces) for pieces in zip(*parts, strict=True)]
        for block, part in zip(blocks, parts, strict=True):
            products, right, z_sum, y_sum = (all_ - own for all_, own in zip(whole, part, strict=True))
            count = len(rows) - len(block)
            matrix = products - np.outer(z_sum, z_sum) / count
            right = right - np.outer(z_sum, y_sum) / count
            for number, penalty in enumerate(penalties):
                weight = np.linalg.solve(matrix + penalty * np.eye(len(matrix)), right)
                errors[number, block] = y[block] - y_sum / count - (z[block] - z_sum / count) @ weight

    def _equations(self, rows: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean of what coefficients multiply, matrix of the normal equations, and their right side."""
        off = y - y.mean(axis=0)
        if self.is_dual:
            return self.gram[np.ix_(rows, rows)].mean(axis=0), self._centred_gram(rows), off
        z = self.z[rows]
        mean = z.mean(axis=0)
        return mean, z.T @ z - len(z) * np.outer(mean, mean), z.T @ off

    def _centred_gram(self, rows: np.ndarray) -> np.ndarray:
        inside = self.gram[np.ix_(rows, rows)]
        side = inside.mean(axis=0)
        return inside - side - side[:, None] + side.mean()


def conjugate_gradients(
    apply: Callable[[np.ndarray], np.ndarray], nearly_solve: Callable[[np.ndarray], np.ndarray], right: np.ndarray
) -> np.ndarray:
    """Solves `apply(w) = right` for positive definite systems, one along the first axis for each place of the others.

    Args:
        apply: `[F, ...]` to `[F, ...]`.
        nearly_solve: about its inverse, positive definite too.
        right: `[F, ...]`.

    Source: Hestenes and Stiefel 1952, preconditioned; ends where every residual is below 1e-7 of its right side.
    """
    found, left = np.zeros_like(right), right.copy()
    enough = CLOSE_ENOUGH * np.linalg.norm(right, axis=0)
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
