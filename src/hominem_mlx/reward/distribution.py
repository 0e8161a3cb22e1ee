"""Where the training rows lie in feature space, and how far from them a row lies: the out-of-distribution flag.

Shapes: `N` rows, `F` features, `D` directions. Features are standardised as the head does it. Everything is float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hominem_mlx.errors import InputError
from hominem_mlx.files import sha256_bytes, write_atomic
from hominem_mlx.reward.head import grouped_folds

DIRECTIONS = 64
QUANTILE = 0.99  # `science.md` 2.3: beyond it a row counts as strange
MOST_ROWS = 1000  # enough for 64 variances and the quantile; the eigenvalues of many more would take long
FLAT = 1e-6  # least variance, as a share of the mean one: where rows never move, rounding must not divide


@dataclass(frozen=True)
class Distribution:
    """A Gaussian whose variance is that of the rows in `D` directions and one value in all others.

    Attributes:
        mean: `[F]`.
        directions: `[F, D]`, orthonormal.
        variance: `[D]`, along them.
        rest: the variance along each of the other directions.
        limit: the squared distance within which 99 of 100 rows of unseen prompts lie.
    """

    mean: np.ndarray
    directions: np.ndarray
    variance: np.ndarray
    rest: float
    limit: float

    def squared_distance(self, z: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance of rows `[N, F]` from the mean, `[N]`.

        `sum_i (z v_i)^2 / variance_i + |z - sum_i (z v_i) v_i|^2 / rest`, z less the mean: the distance by the
        covariance of probabilistic PCA (Tipping and Bishop 1999).
        """
        off = np.asarray(z, np.float64) - self.mean
        along = np.square(off @ self.directions)
        return _distance(along, np.square(off).sum(axis=1), self.variance, self.rest)

    def is_strange(self, z: np.ndarray) -> np.ndarray:
        """Whether rows `[N, F]` lie beyond the limit, bool `[N]`."""
        return self.squared_distance(z) > self.limit

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write it; directions, which are most of it, in float32."""
        write_atomic(path, save(self._arrays()))

    @property
    def digest(self) -> str:
        """Hash of what `save` writes."""
        return sha256_bytes(save(self._arrays()))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "mean": self.mean,
            "directions": np.ascontiguousarray(self.directions, np.float32),
            "variance": self.variance,
            "rest_and_limit": np.array([self.rest, self.limit]),
        }

    @classmethod
    def load(cls, path: Path, num_features: int) -> "Distribution":
        """What `save` wrote. Raises: InputError when it does not belong to a head of that many features."""
        try:
            arrays = {name: np.asarray(value, np.float64) for name, value in load_file(path).items()}
            mean, directions, variance = (arrays[name] for name in ("mean", "directions", "variance"))
            rest, limit = arrays["rest_and_limit"].tolist()
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); run `hominem artifacts verify`") from None
        if mean.shape != (num_features,) or directions.shape != (num_features, len(variance)):
            raise InputError(
                f"{path}: has shapes {mean.shape}, {directions.shape}; the head has {num_features} features"
            )
        if not all(np.isfinite(value).all() for value in arrays.values()) or min(rest, *variance, limit) <= 0:
            raise InputError(f"{path}: holds a value that is not finite or not above 0; run `hominem artifacts verify`")
        return cls(mean, directions, variance, rest, limit)


def fit(z: np.ndarray, groups: Sequence[str] | np.ndarray, *, folds: int, seed: int) -> Distribution | None:
    """Fit it on training rows `[N, F]`.

    The limit is that of split conformal prediction on the distances of rows whose fold was left out: a row that was
    fitted lies too near. They are measured from four fifths of the rows, so the flag errs on the side of silence.

    Args:
        groups: the prompt of each row; folds keep its rows together.

    Returns: None of so few rows (fewer than 99, or one prompt) that 99 of 100 cannot be told.
    """
    if len(z) > MOST_ROWS:
        some = np.sort(np.random.default_rng([seed, 3]).permutation(len(z))[:MOST_ROWS])
        z, groups = z[some], np.asarray(groups)[some]
    rank = math.ceil((len(z) + 1) * QUANTILE)
    fold = grouped_folds(groups, folds, seed=seed)
    if rank > len(z) or len(set(fold.tolist())) < 2:
        return None
    z = np.asarray(z, np.float64)
    gram, width = z @ z.T, z.shape[1]
    distances = np.empty(len(z))
    for number in set(fold.tolist()):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        factor, variance, rest = _principal(gram[np.ix_(inside, inside)], width)
        across, own = gram[np.ix_(outside, inside)], gram[np.ix_(inside, inside)]
        off = across - own.mean(axis=0) - across.mean(axis=1, keepdims=True) + own.mean()
        length = np.diag(gram)[outside] - 2 * across.mean(axis=1) + own.mean()
        distances[outside] = _distance(np.square(off @ factor), length, variance, rest)
    factor, variance, rest = _principal(gram, width)
    mean = z.mean(axis=0)
    return Distribution(mean, (z - mean).T @ factor, variance, rest, float(np.sort(distances)[rank - 1]))


def _principal(gram: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, float]:
    """From the products of rows `[N, N]`: the factor `[N, D]` that makes directions of centred rows, the variances
    `[D]` along them, and that of each other direction of `width` in all.
    """
    count = len(gram)
    side = gram.mean(axis=0)
    values, vectors = np.linalg.eigh(gram - side - side[:, None] + side.mean())
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    least = FLAT * max(values.sum() / count / width, np.finfo(float).tiny)
    kept = min(DIRECTIONS, count // 8, width - 1, int((values / count > least).sum()))
    variance = values / count
    rest = max(variance[kept:].sum() / (width - kept), least)
    return vectors[:, :kept] / np.sqrt(values[:kept]), variance[:kept], float(rest)


def _distance(along: np.ndarray, length: np.ndarray, variance: np.ndarray, rest: float) -> np.ndarray:
    """From squared lengths `[N, D]` along directions and `[N]` in all."""
    return (along / variance).sum(axis=1) + np.maximum(length - along.sum(axis=1), 0.0) / rest
