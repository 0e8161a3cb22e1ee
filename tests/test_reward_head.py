"""The ridge head: both forms, masks, penalties, bootstrap, and standardisation that happens once."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx.reward import ridge as ridges
from hominem_mlx.reward.head import RidgeHead, fit, grouped_folds
from hominem_mlx.reward.ridge import Ridge, conjugate_gradients

NAN = float("nan")


def problem(rows: int, features: int, outputs: int = 2, *, seed: int = 0, noise: float = 0.1):
    """Features, labels that are linear in them, and three rows a prompt."""
    rng = np.random.default_rng(seed)
    x = rng.normal(2.0, 3.0, (rows, features)).astype(np.float32)
    y = x @ rng.normal(size=(features, outputs)) * 0.05 + 0.3 + noise * rng.normal(size=(rows, outputs))
    return x, y, [f"p{index // 3}" for index in range(rows)]


def ridge_by_hand(x, y, penalty):
    """A second implementation: the intercept as a column of ones that pays no penalty, normal equations."""
    wide = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
    price = np.diag([penalty] * x.shape[1] + [0.0])
    solution = np.linalg.solve(wide.T @ wide + price, wide.T @ y)
    return solution[:-1], solution[-1]


def solve(x, y, penalties):
    return Ridge(x.astype(float)).solve(np.arange(len(x)), y, np.array(penalties))


@pytest.mark.parametrize(("rows", "features"), [(12, 30), (30, 12), (12, 12)])
def test_dual_and_primal_form_are_the_same_regression(rows, features):
    x, y, _ = problem(rows, features)
    assert Ridge(x).is_dual == (rows < features)
    weight, bias = solve(x, y, [0.5, 20.0])
    for output, penalty in enumerate([0.5, 20.0]):
        expected, intercept = ridge_by_hand(x, y[:, output], penalty)
        assert weight[:, output] == pytest.approx(expected, abs=1e-9)
        assert bias[output] == pytest.approx(intercept, abs=1e-9)


@pytest.mark.parametrize("features", [2, 5, 60])  # a fold has 4 or 5 rows
def test_left_out_errors_are_those_of_regressions_fitted_without_the_fold(features):
    x, y, groups = problem(24, features)
    fold = grouped_folds(groups, 4, seed=0)
    rows = np.flatnonzero(np.arange(24) % 5 > 0)  # as when some labels are missing
    found = Ridge(x.astype(float)).left_out_errors(rows, y, fold, [0.5, 20.0])
    for number, penalty in enumerate([0.5, 20.0]):
        expected = np.zeros((len(rows), 2))
        for out in range(4):
            inside, outside = rows[fold[rows] != out], rows[fold[rows] == out]
            weight, bias = ridge_by_hand(x[inside], y[inside], penalty)
            expected[fold[rows] == out] = y[outside] - x[outside] @ weight - bias
        np.testing.assert_allclose(found[number], expected, rtol=1e-8, atol=1e-10)


@pytest.fixture
def patient(monkeypatch):
    """Conjugate gradients that go on until nothing is left, so that formulas can be compared to rounding."""
    monkeypatch.setattr(ridges, "LEFT_OUT_CLOSE", 1e-12)
    monkeypatch.setattr(ridges, "DRAW_CLOSE", 1e-12)


def test_ending_early_costs_next_to_nothing(monkeypatch):
    x, y, groups = problem(200, 20)
    options = {"penalties": (0.01, 1.0), "folds": 4, "members": 4, "seed": 0}
    early = fit(x, y, groups, **options)
    monkeypatch.setattr(ridges, "LEFT_OUT_CLOSE", 1e-12)
    monkeypatch.setattr(ridges, "DRAW_CLOSE", 1e-12)
    late = fit(x, y, groups, **options)
    assert early.penalties == late.penalties
    np.testing.assert_allclose(early.left_out, late.left_out, atol=1e-4 * np.nanstd(y))
    spread, other = (np.array(found.head.member_weight).std(axis=0) for found in (early, late))
    np.testing.assert_allclose(spread, other, atol=0.01 * other.max())


@pytest.mark.usefixtures("patient")
def test_errors_of_rows_left_out_are_kept_in_the_labels_unit():
    x, y, groups = problem(60, 8)
    y[3, 1] = np.nan
    fitted = fit(x, y, groups, penalties=(1.0,), folds=4, members=2, seed=0, standardise=False)
    fold = grouped_folds(groups, 4, seed=0)
    for output in range(2):
        there = np.flatnonzero(~np.isnan(y[:, output]))
        mean, scale = y[there, output].mean(), y[there, output].std()
        z = (y[:, output] - mean) / scale
        left_out = np.full(60, np.nan)
        for out in range(4):
            inside = there[fold[there] != out]
            weight, bias = ridge_by_hand(x[inside], z[inside, None], 1.0)
            outside = there[fold[there] == out]
            left_out[outside] = (x[outside] @ weight + bias)[:, 0]
        np.testing.assert_allclose(fitted.left_out[:, output], (z - left_out) * scale, atol=1e-8)


def test_one_prompt_alone_leaves_nothing_out_and_gets_the_strongest_penalty():
    x, y, _ = problem(12, 4)
    options = {"folds": 4, "members": 0, "seed": 0, "standardise": False}
    fitted = fit(x, y, ["same"] * 12, penalties=(1.0,), **options)
    assert fit(x, y, ["same"] * 12, penalties=(0.1, 10.0, 1.0), **options).penalties == [10.0, 10.0]
    assert np.isnan(fitted.left_out).all()
    weight, _ = ridge_by_hand(x, (y - y.mean(0)) / y.std(0), 1.0)
    np.testing.assert_allclose(fitted.head.weight, weight, atol=1e-5)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("rows", [24, 90])  # dual, primal
@pytest.mark.parametrize("owner", [[-1] * 36 + [0] * 12 + [1] * 12, [0] * 30 + [1] * 30, [-1] * 40 + [1] * 20])
def test_a_feature_with_an_owner_is_read_for_it_alone_and_rows_keep_their_length(rows, owner):
    x, y, groups = problem(rows, 60)
    options = {"penalties": (5.0,), "folds": 4, "members": 2, "seed": 0, "standardise": False}
    head = fit(x, y, groups, owner=np.array(owner), **options).head
    for output in range(2):
        others = [other for other in set(owner) if other not in (-1, output)]
        columns = np.flatnonzero(~np.isin(owner, others))
        stretch = np.sqrt(60 / len(columns))
        weight, _ = ridge_by_hand(
            x[:, columns] * stretch, (y[:, output] - y[:, output].mean()) / y[:, output].std(), 5.0
        )
        found = np.array(head.weight)[:, output]
        np.testing.assert_allclose(found[columns], weight * stretch, rtol=1e-4, atol=1e-7)
        assert not np.delete(found, columns).any()
    assert np.array(head.member_weight).std(axis=0).max() > 0


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("features", [6, 60])
def test_a_draw_without_a_labelled_row_says_nothing(features):
    x, y, _ = problem(12, features)
    y[4:, 1] = np.nan
    weights, biases = Ridge(x.astype(float)).draws([np.arange(4, 12)], y, np.array([0.5, 0.5]))
    assert weights[0, :, 0].any() and not weights[0, :, 1].any() and biases[0, 1] == 0


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("features", [6, 60])
def test_draws_are_regressions_on_the_rows_that_were_drawn(features):
    x, y, _ = problem(40, features)
    y[:5, 1] = np.nan
    ridge, rng = Ridge(x.astype(float)), np.random.default_rng(0)
    drawn = [rng.integers(0, 40, 37) for _ in range(3)]
    weights, biases = ridge.draws(drawn, y, np.array([0.5, 20.0]))
    for rows, weight, bias in zip(drawn, weights, biases, strict=True):
        for output, penalty in enumerate([0.5, 20.0]):
            there = rows[~np.isnan(y[rows, output])]
            expected, intercept = ridge_by_hand(x[there], y[there, output], penalty)
            np.testing.assert_allclose(weight[:, output], expected, atol=1e-6)
            assert bias[output] == pytest.approx(intercept, abs=1e-6)


def test_conjugate_gradients_solve_each_system_by_itself():
    rng = np.random.default_rng(0)
    made = rng.normal(size=(3, 8, 8))
    systems = made @ made.transpose(0, 2, 1) + np.eye(8)
    right = rng.normal(size=(8, 3))
    right[:, 2] = 0.0
    found = conjugate_gradients(lambda w: np.einsum("kfg,gk->fk", systems, w), lambda r: r / 3, right, 1e-7)
    expected = np.stack([np.linalg.solve(systems[k], right[:, k]) for k in range(3)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("features", [5, 50])
def test_missing_labels_are_masked_dimension_by_dimension(features):
    x, y, _ = problem(24, features)
    holes = y.copy()
    holes[::4, 0] = NAN
    weight, bias = solve(x, holes, [1.0, 1.0])
    kept = ~np.isnan(holes[:, 0])
    expected, intercept = ridge_by_hand(x[kept], y[kept, 0], 1.0)
    assert weight[:, 0] == pytest.approx(expected, abs=1e-9)
    assert bias[0] == pytest.approx(intercept, abs=1e-9)
    assert weight[:, 1] == pytest.approx(ridge_by_hand(x, y[:, 1], 1.0)[0], abs=1e-9)


def test_what_stands_in_a_masked_row_of_another_dimension_does_not_matter():
    x, y, groups = problem(24, 40)
    y[3:6, 0] = NAN
    other = y.copy()
    other[3:6, 1] += 5.0
    options = {"penalties": (1.0,), "folds": 3, "members": 0, "seed": 0}
    first, second = fit(x, y, groups, **options), fit(x, other, groups, **options)
    assert mx.array_equal(first.head.weight[:, 0], second.head.weight[:, 0]).item()
    assert not mx.array_equal(first.head.weight[:, 1], second.head.weight[:, 1]).item()


def test_standardisation_is_undone_exactly_once():
    x, y, groups = problem(60, 4, noise=0.0)
    y = y * 7.0 + 3.0  # far from mean 0 and variance 1
    head = fit(x, y, groups, penalties=(1e-9,), folds=3, members=3, seed=0).head
    values, members = head(mx.array(x))
    np.testing.assert_allclose(values, y, atol=1e-3)
    np.testing.assert_allclose(members, np.broadcast_to(y, (3, *y.shape)), atol=1e-3)


def test_standardised_rows_have_mean_squared_length_one():
    x, y, groups = problem(40, 25)
    head = fit(x, y, groups, penalties=(1.0,), folds=3, members=0, seed=0).head
    z = (x - np.array(head.feature_mean)) / np.array(head.feature_scale)
    assert np.square(z).sum(axis=1).mean() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("rows", [30, 90])
def test_counts_stay_as_they_are_beside_standardised_features(rows):
    x, y, groups = problem(rows, 60)
    counts = (np.random.default_rng(1).random((rows, 7)) < 0.2) * 0.5
    both = np.concatenate([x, counts], axis=1).astype(np.float32)
    head = fit(both, y, groups, penalties=(0.7,), folds=3, members=0, seed=0, counts=7).head
    z = (x - x.mean(0)) / (x.std(0) * np.sqrt(60))
    expected, intercept = ridge_by_hand(np.concatenate([z, counts], axis=1), (y - y.mean(0)) / y.std(0), 0.7)
    np.testing.assert_allclose(head.weight, expected, atol=1e-4)
    np.testing.assert_allclose(head.bias, intercept, atol=1e-4)
    said, _ = head(mx.array(both))
    by_hand = (np.concatenate([z, counts], axis=1) @ expected + intercept) * y.std(0) + y.mean(0)
    np.testing.assert_allclose(said, by_hand, atol=1e-4)


def test_features_and_labels_that_never_move_do_no_harm():
    x, y, groups = problem(21, 6)
    x[:, 2] = 4.0
    y[:, 1] = -0.25
    head = fit(x, y, groups, penalties=(0.1, 1.0), folds=3, members=2, seed=0).head
    values, members = head(mx.array(x + 1.0))
    assert np.isfinite(np.array(values)).all() and np.isfinite(np.array(members)).all()
    np.testing.assert_allclose(np.array(values)[:, 1], -0.25, atol=1e-6)


def test_penalty_follows_the_evidence_output_by_output():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(90, 20)).astype(np.float32)
    y = np.stack([x @ rng.normal(size=20), rng.normal(size=90)], axis=1)  # the second is noise
    fitted = fit(x, y, [f"p{i // 3}" for i in range(90)], penalties=(1e-3, 1e3), folds=5, members=0, seed=0)
    assert fitted.penalties == [1e-3, 1e3]


def test_members_agree_where_there_is_much_to_learn_from_and_less_elsewhere():
    x, y, groups = problem(120, 6, noise=0.3)
    head = fit(x, y, groups, penalties=(0.01,), folds=3, members=16, seed=0).head
    near = np.array(head(mx.array(x.mean(axis=0, keepdims=True)))[1]).std(axis=0)
    far = np.array(head(mx.array(x.mean(axis=0, keepdims=True) + 30.0))[1]).std(axis=0)
    assert (near > 0).all() and (far > 3 * near).all()


def test_a_bootstrap_member_is_a_fit_on_prompts_drawn_with_replacement():
    x, y, groups = problem(9, 4)  # three prompts: a member sees at most three different ones
    head = fit(x, y, groups, penalties=(0.5,), folds=3, members=12, seed=0).head
    z = (x - np.array(head.feature_mean)) / np.array(head.feature_scale)
    t = (y - np.array(head.label_mean)) / np.array(head.label_scale)
    possible = []
    for a in range(3):
        for b in range(a, 3):
            for c in range(b, 3):
                rows = np.concatenate([np.arange(3 * p, 3 * p + 3) for p in (a, b, c)])
                possible.append(ridge_by_hand(z[rows], t[rows], 0.5)[0])
    for weight in np.array(head.member_weight):
        assert min(np.abs(weight - candidate).max() for candidate in possible) < 1e-5


def test_same_seed_same_bits():
    x, y, groups = problem(30, 50)
    options = {"penalties": (0.1, 1.0), "folds": 3, "members": 4}
    first = fit(x, y, groups, seed=1, **options).head.parameters()
    again = fit(x, y, groups, seed=1, **options).head.parameters()
    other = fit(x, y, groups, seed=2, **options).head.parameters()
    assert all(mx.array_equal(first[name], again[name]).item() for name in first)
    assert not mx.array_equal(first["member_weight"], other["member_weight"]).item()


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(2, 6), st.integers(0, 5))
def test_folds_never_cut_a_prompt_and_share_prompts_evenly(prompts, folds, seed):
    fold = grouped_folds(prompts, folds, seed=seed)
    owners = {prompt: {int(f) for p, f in zip(prompts, fold, strict=True) if p == prompt} for prompt in prompts}
    assert all(len(where) == 1 for where in owners.values())
    sizes = [sum(where == {number} for where in owners.values()) for number in range(min(folds, len(owners)))]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_folds_hang_on_prompts_not_on_the_order_of_rows():
    fold = dict(zip("abcdef", grouped_folds(list("abcdef"), 3, seed=0).tolist(), strict=True))
    assert dict(zip("fedcba", grouped_folds(list("fedcba"), 3, seed=0).tolist(), strict=True)) == fold


def test_head_by_hand():
    head = RidgeHead(2, 1, 1)
    head.update(
        {
            "feature_mean": mx.array([1.0, 2.0]),
            "feature_scale": mx.array([2.0, 4.0]),
            "label_mean": mx.array([0.5]),
            "label_scale": mx.array([0.1]),
            "weight": mx.array([[1.0], [-1.0]]),
            "bias": mx.array([2.0]),
            "member_weight": mx.array([[[0.0], [1.0]]]),
            "member_bias": mx.array([[0.0]]),
        }
    )
    values, members = head(mx.array([[5.0, 6.0]]))  # z = (2, 1): (2 - 1 + 2) * .1 + .5; member 1 * .1 + .5
    assert values.item() == pytest.approx(0.8)
    assert members.item() == pytest.approx(0.6)
    assert not head.trainable_parameters()
