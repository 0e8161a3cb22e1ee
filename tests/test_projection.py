"""Principal directions against numbers worked by hand and a second way to compute them."""

import sys

import numpy as np
import pytest

from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.evaluation import projection


def test_two_columns_that_correlate_by_six_tenths():
    """Standardised columns of correlation r have variance 1 + r along (1, 1) / sqrt 2 and 1 - r across it.

    x = (1, 1, -1, -1) and z = (1, -1, 1, -1) are uncorrelated, so y = .6 x + .8 z has r = .6: shares 1.6 / 2 and
    .4 / 2, loadings sqrt(1.6) / sqrt 2 and sqrt(.4) / sqrt 2.
    """
    x, z = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    values = np.stack([5 + 3 * x, -1 + 0.1 * (0.6 * x + 0.8 * z)], axis=1)
    found = projection.pca(values)
    assert found.shares == pytest.approx([0.8, 0.2])
    assert np.abs(found.axes) == pytest.approx(np.full((2, 2), 0.5**0.5))
    assert found.loadings[0] == pytest.approx([0.8**0.5, 0.8**0.5])
    assert np.abs(found.loadings[1]) == pytest.approx([0.2**0.5, 0.2**0.5])
    # the first row: x stands 1 above its mean, y .6 + .8 = 1.4 standard deviations: (1 + 1.4) / sqrt 2 along the first
    assert found.places(values)[0, 0] == pytest.approx(2.4 / 2**0.5)


def test_the_same_as_eigenvalues_of_the_correlation_matrix():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7)) + 3
    found = projection.pca(values)
    expected = np.linalg.eigvalsh(np.corrcoef(values, rowvar=False))[::-1]
    assert found.shares == pytest.approx(expected / 7)
    places = found.places(values)
    assert np.cov(places, rowvar=False, ddof=0) == pytest.approx(np.diag(expected), abs=1e-12)
    by_hand = [[np.corrcoef(column, place)[0, 1] for column in values.T] for place in places.T]
    assert found.loadings == pytest.approx(np.array(by_hand))
    assert (found.loadings**2).sum(axis=0) == pytest.approx(np.ones(7)), "all directions together are the whole column"
    assert all(row[np.abs(row).argmax()] > 0 for row in found.axes)


def test_more_columns_than_rows_and_a_column_that_never_moves():
    values = np.random.default_rng(1).normal(size=(5, 40))
    values[:, 3] = 0.7
    found = projection.pca(values)
    assert found.axes.shape == (4, 40) and found.shares.sum() == pytest.approx(1)
    assert found.axes[:, 3] == pytest.approx(0) and found.loadings[:, 3] == pytest.approx(0)


def test_beside_a_single_direction_stands_a_column_of_zeros():
    halo = np.repeat(np.arange(6.0)[:, None], 3, axis=1)
    found = projection.pca(halo)
    places = found.places(halo)
    assert len(found.shares) == 1 and places.shape == (6, 2) and not places[:, 1].any() and places[:, 0].any()


@pytest.mark.parametrize("rows", [np.zeros((0, 3)), np.ones((9, 3)), np.eye(3)[:2]])
def test_rows_without_a_direction_are_refused(rows):
    with pytest.raises(InputError, match=r"fewer than three of them different"):
        projection.pca(rows)


def test_agreement_tells_a_direction_that_is_seen_from_one_that_is_guessed():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 400))
    labels = np.stack([x + 0.2 * y, x - 0.2 * y], axis=1)  # first direction x, second y
    noise = rng.normal(size=400)
    predicted = np.stack([x + noise, x - noise], axis=1)  # sees x exactly, and puts noise in the place of y
    first, second = projection.agreement(
        projection.pca(labels), labels, predicted, [str(row // 4) for row in range(400)]
    )
    assert first.mean > 0.99 and first.low > 0.98
    assert second.low < 0 < second.high


def test_a_direction_is_known_no_better_than_two_ratings_of_it_agree():
    """Along the first direction the ratings agree entirely, along the second by .25, of which the root is .5."""
    x, z, e = np.array([[1.0, 1, 1, 1, -1, -1, -1, -1], [1, 1, -1, -1] * 2, [1, -1] * 4])
    second = 0.25 * z + (1 - 0.25**2) ** 0.5 * e
    rows = [np.stack([2 * x + side, 2 * x - side], axis=1) for side in (z, second)]
    assert projection.ceilings(projection.pca(rows[0]), *rows) == pytest.approx([1.0, 0.5])
    rows[1][:, :] = rows[0][:, ::-1]  # the second turned round: they contradict each other
    assert projection.ceilings(projection.pca(rows[0]), *rows) == pytest.approx([1.0, 0.0])


def test_umap_is_asked_for_by_name_when_it_is_not_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ModelError, match=r"umap-learn.*requirements-umap\.lock"):
        projection.umap(np.eye(4))
