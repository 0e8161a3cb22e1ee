"""Principal directions of reward vectors and features, how well each is predicted, and UMAP's flat picture of them.

Shapes: `N` rows, `F` columns (dimensions or features), `C` directions, at most `min(N - 1, F)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hominem_mlx import metrics
from hominem_mlx.errors import InputError, ModelError

NOTHING = 1e-9  # share of the variance below which a direction is rounding
COMPRESSED = 50  # directions that UMAP sees of many features
INSTALL = ".venv/bin/python -m pip install --require-hashes -r requirements-umap.lock"


@dataclass(frozen=True)
class Pca:
    """Directions of most variance of columns brought to mean 0 and variance 1.

    `mean`, `scale` `[F]` of the columns; `axes` `[C, F]` orthonormal rows, each turned so that its largest entry is
    positive; `shares` `[C]` of the whole variance, falling, sum 1; `loadings` `[C, F]`: correlation of each column
    with the rows' places along each direction.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    shares: np.ndarray
    loadings: np.ndarray

    def places(self, values: np.ndarray) -> np.ndarray:
        """Where rows `[M, F]` lie along each direction, `[M, C]`, in standard deviations of the fitted columns.

        A column of zeros stands beside a single direction: pictures have two axes.
        """
        found = (np.asarray(values, float) - self.mean) / self.scale @ self.axes.T
        return found if found.shape[1] > 1 else np.pad(found, ((0, 0), (0, 1)))


def pca(values: np.ndarray) -> Pca:
    """Principal components of the correlation matrix, by singular values (Jolliffe 2002, ch. 2 and 3).

    Args:
        values: `[N, F]`, finite. A column that never moves takes no part.

    Raises: InputError where fewer than three rows differ, so that there is no direction to speak of.
    """
    rows = np.asarray(values, float)
    if len(np.unique(rows, axis=0)) < 3:
        raise InputError(f"{len(rows)} rows, fewer than three of them different: there is no direction to find")
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(spread < NOTHING, 1.0, spread)
    standardised = np.where(spread < NOTHING, 0.0, (rows - mean) / scale)
    _, singular, axes = np.linalg.svd(standardised, full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    kept = shares > NOTHING
    singular, axes, shares = singular[kept], axes[kept], shares[kept]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    return Pca(mean, scale, axes, shares, axes * (singular / np.sqrt(len(rows)))[:, None])


def agreement(
    found: Pca, labels: np.ndarray, predicted: np.ndarray, groups: Sequence[str], *, seed: int = 0
) -> list[metrics.Interval]:
    """How well each direction of the labels is predicted: correlation of labels and predictions along it.

    A flat scree plot of predictions could be noise; this says which directions are truly seen.

    Args:
        found: directions of the labels.
        labels, predicted: `[N, F]` of rows that the model was not fitted on.
        groups: the prompt of each row, drawn whole for the 95 % interval.
    """
    ours, theirs = found.places(predicted), found.places(labels)
    owners = np.asarray(groups)

    def along(k: int) -> metrics.Interval:
        def correlation(rows: np.ndarray) -> float:
            return metrics.pearson(ours[rows, k], theirs[rows, k])

        return metrics.bootstrap_statistic(correlation, owners, resamples=500, seed=seed)

    return [along(k) for k in range(len(found.axes))]


def ceilings(found: Pca, first: np.ndarray, second: np.ndarray) -> list[float]:
    """How well each direction could be predicted at all: the root of the correlation of two ratings of the same rows.

    Args:
        found: directions of the labels.
        first, second: both ratings `[M, F]`.

    Returns: in [0, 1]; 0 where the two ratings do not agree.
    Source: Spearman 1904 (correction for attenuation): of a label with reliability r no more than sqrt(r) can be known.
    """
    ours, theirs = found.places(first), found.places(second)
    return [max(0.0, metrics.pearson(a, b)) ** 0.5 for a, b in zip(ours.T, theirs.T, strict=True)]


def need_umap() -> None:
    """Raises: ModelError with the command that installs umap-learn where it is missing."""
    try:
        import umap  # noqa: F401
    except ImportError:
        message = f"UMAP needs the package umap-learn, which is not here; in the project's folder: {INSTALL}"
        raise ModelError(message) from None


def umap(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Rows `[N, F]` laid flat `[N, 2]` so that neighbours stay neighbours. A picture: distances and sizes mean nothing.

    Columns are standardised, and where there are more than 50 directions the 50 strongest are read.
    Source: McInnes, Healy and Melville 2018 (arXiv 1802.03426), by umap-learn at its defaults.
    """
    need_umap()
    from umap import UMAP

    places = pca(values).places(values)[:, :COMPRESSED]
    neighbours = min(15, len(places) - 1)
    return np.asarray(UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(places), float)
