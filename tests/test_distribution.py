"""The out-of-distribution flag: the distance by hand and by a whole covariance, the limit on rows left out, on disk."""

import numpy as np
import pytest

from hominem_mlx.errors import InputError
from hominem_mlx.reward import distribution as places
from hominem_mlx.reward.distribution import Distribution, fit


def rows(count: int, width: int = 40, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Four rows a prompt, most of their variance in three directions."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(width) < 3, 5.0, 0.5)
    prompts = rng.normal(size=(count // 4, width)).repeat(4, axis=0)
    return (prompts + rng.normal(size=(count, width))) * scale + 7, [f"p{n // 4}" for n in range(count)]


def test_the_distance_by_hand():
    # Off the mean (1, 1, 1) by (2, 0, 3): 2^2 / 4 along the first axis, 3^2 / 0.5 beside it.
    space = Distribution(np.ones(3), np.array([[1.0], [0.0], [0.0]]), np.array([4.0]), 0.5, limit=18.9)
    z = np.array([[3.0, 1.0, 4.0], [1.0, 1.0, 1.0]])
    assert space.squared_distance(z) == pytest.approx([19.0, 0.0])
    assert space.is_strange(z).tolist() == [True, False]


def test_it_is_the_distance_by_the_covariance_that_it_stands_for():
    z, groups = rows(120)
    space = fit(z, groups, folds=5, seed=0)
    assert space is not None and space.directions.shape == (40, 15)
    assert space.directions.T @ space.directions == pytest.approx(np.eye(15), abs=1e-9)
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    values, vectors = values[::-1].copy(), vectors[:, ::-1]
    values[15:] = values[15:].mean()
    inverse = vectors @ np.diag(1 / values) @ vectors.T
    other = rows(20, seed=1)[0]
    off = other - z.mean(axis=0)
    assert space.squared_distance(other) == pytest.approx(np.einsum("nf,fg,ng->n", off, inverse, off), rel=1e-8)


def test_the_limit_is_the_conformal_quantile_of_rows_whose_fold_was_left_out():
    z, groups = rows(200)
    space = fit(z, groups, folds=4, seed=3)
    fold = places.grouped_folds(groups, 4, seed=3)
    distances = []
    for number in range(4):
        inside = z[fold != number]
        values, vectors = np.linalg.eigh(np.cov(inside.T, bias=True))
        kept = len(inside) // 8
        values[:-kept] = values[:-kept].mean()
        off = z[fold == number] - inside.mean(axis=0)
        distances += (np.square(off @ vectors) / values).sum(axis=1).tolist()
    assert space.limit == pytest.approx(sorted(distances)[198])  # ceil(201 * 0.99) = 199


def test_about_one_of_a_hundred_unseen_rows_is_strange_and_far_ones_are():
    z, groups = rows(800)
    space = fit(z, groups, folds=5, seed=0)
    unseen = rows(4000, seed=9)[0]
    assert 0.002 < space.is_strange(unseen).mean() < 0.02
    assert space.is_strange(unseen + 3 * np.eye(40)[20] * 5).all()  # where rows hardly move
    assert space.is_strange(-unseen).all()


def test_few_rows_or_one_prompt_promise_nothing_and_many_are_drawn_from(monkeypatch):
    z, groups = rows(100)
    assert fit(z[:96], groups[:96], folds=5, seed=0) is None
    assert fit(z, ["p"] * 100, folds=5, seed=0) is None
    monkeypatch.setattr(places, "MOST_ROWS", 100)
    many, names = rows(300)
    drawn = fit(many, names, folds=5, seed=0)
    assert drawn.directions.shape == (40, 12)
    assert drawn.digest == fit(many, names, folds=5, seed=0).digest != fit(many, names, folds=5, seed=1).digest


def test_features_that_never_move_give_finite_distances():
    z, groups = rows(120)
    z[:, 10:] = 2.0
    space = fit(z, groups, folds=5, seed=0)
    assert np.isfinite(space.squared_distance(z)).all() and not space.is_strange(z).any()
    moved = z[:1].copy()
    moved[0, 20] += 1
    assert space.is_strange(moved).all()


def test_it_comes_back_from_disk_and_refuses_what_does_not_fit(tmp_path):
    z, groups = rows(200)
    space = fit(z, groups, folds=5, seed=0)
    path = tmp_path / "space.safetensors"
    space.save(path)
    back = Distribution.load(path, 40)
    assert back.squared_distance(z) == pytest.approx(space.squared_distance(z), rel=1e-4)
    assert back.limit == space.limit and back.digest == space.digest
    with pytest.raises(InputError, match="the head has 41 features"):
        Distribution.load(path, 41)
    Distribution(space.mean, space.directions, space.variance, 0.0, 1.0).save(path)
    with pytest.raises(InputError, match="not finite or not above 0"):
        Distribution.load(path, 40)
    path.write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        Distribution.load(path, 40)
