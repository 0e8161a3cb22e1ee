"""Contrast edits in the head: the matrix by hand, the regression against rows of differences, folds, masks, members."""

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx.reward.contrast import Contrasts
from hominem_mlx.reward.head import fit, grouped_folds
from hominem_mlx.reward.ridge import Ridge

NAN = float("nan")
EDITS = [(1, 0), (2, 0), (4, 3), (7, 6), (8, 7), (11, 9)]  # row 8 is an edit of an edit


def problem(rows: int = 24, features: int = 6, outputs: int = 3, *, seed: int = 0):
    """Three rows a prompt."""
    rng = np.random.default_rng(seed)
    x = rng.normal(1.0, 2.0, (rows, features))
    y = x @ rng.normal(size=(features, outputs)) * 0.2 + 0.3 + 0.5 * rng.normal(size=(rows, outputs))
    return x, y, np.array([f"p{index // 3}" for index in range(rows)])


def with_differences(x, y, edits, weight, penalty):
    """A second implementation: a row for each difference, without intercept; normal equations."""
    root = np.sqrt(weight)
    wide = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    more = [root * np.append(x[a] - x[b], 0.0) for a, b in edits]
    right = np.concatenate([y, [root * (y[a] - y[b]) for a, b in edits]])
    wide = np.concatenate([wide, more])
    price = np.diag([penalty] * x.shape[1] + [0.0])
    solution = np.linalg.solve(wide.T @ wide + price, wide.T @ right)
    return solution[:-1], solution[-1]


def test_the_matrix_by_hand():
    made = Contrasts([(1, 0)], ["p", "p", "p"], np.zeros((3, 1)), 4.0)
    # the mean of the two stays, their difference counts sqrt(1 + 2 * 4) = 3 times
    np.testing.assert_allclose(made.apply(np.array([[1.0], [3.0], [7.0]])), [[-1.0], [5.0], [7.0]])
    np.testing.assert_allclose(made.undo(np.array([[-1.0], [5.0], [7.0]])), [[1.0], [3.0], [7.0]])


def test_squares_are_those_of_rows_and_weighed_differences():
    _, y, groups = problem()
    made = Contrasts(EDITS, groups, y, 2.5)
    expected = (y**2).sum() + 2.5 * sum(((y[a] - y[b]) ** 2).sum() for a, b in EDITS)
    assert (made.apply(y) ** 2).sum() == pytest.approx(expected)
    np.testing.assert_allclose(made.apply(np.ones((24, 2))), 1.0)
    np.testing.assert_allclose(made.undo(made.apply(y)), y)


@pytest.mark.parametrize("features", [5, 60])
def test_it_is_the_regression_with_a_row_for_each_difference(features):
    x, y, groups = problem(features=features)
    made = Contrasts(EDITS, groups, y, 3.0)
    weight, bias = Ridge(made.apply(x)).solve(np.arange(24), made.apply(y), np.full(3, 0.7))
    expected, intercept = with_differences(x, y, EDITS, 3.0, 0.7)
    np.testing.assert_allclose(weight, expected, atol=1e-9)
    np.testing.assert_allclose(bias, intercept, atol=1e-9)


def test_other_prompts_and_other_labels_are_not_joined():
    _, y, groups = problem()
    assert not Contrasts([(3, 0)], groups, y, 3.0)  # another prompt
    y[0, 1] = NAN
    assert not Contrasts([(1, 0)], groups, y, 3.0)  # the original lacks a label
    y[1, 1] = NAN
    made = Contrasts([(1, 0)], groups, y, 3.0)
    after = made.apply(y)
    np.testing.assert_array_equal(np.isnan(after), np.isnan(y))
    assert not np.array_equal(after[:2, 0], y[:2, 0])


def test_an_edit_whose_original_lacks_a_label_leaves_the_others_joined():
    _, y, groups = problem()
    y[6, 1] = NAN
    made, alone = Contrasts([(7, 6), (8, 7)], groups, y, 3.0), Contrasts([(8, 7)], groups, y, 3.0)
    np.testing.assert_array_equal(made.apply(y), alone.apply(y))


OPTIONS = {"penalties": (1.0,), "folds": 4, "seed": 0, "standardise": False}


def test_how_dimensions_differ_is_from_the_weighed_fit_and_their_sum_from_the_plain_one():
    x, y, groups = problem()
    y = (y - y.mean(0)) / y.std(0)
    head = fit(x, y, groups, members=2, edits=EDITS, edit_weight=3.0, shares=(1.0, 1.0), **OPTIONS).head
    plain = fit(x, y, groups, members=2, **OPTIONS).head
    weighed, _ = with_differences(x, y, EDITS, 3.0, 1.0)
    for name in ("weight", "bias", "member_weight", "member_bias"):
        ours, theirs = np.array(head[name]), np.array(plain[name])
        np.testing.assert_allclose(ours[..., :2].mean(-1), theirs[..., :2].mean(-1), atol=1e-6)
        np.testing.assert_array_equal(ours[..., 2], theirs[..., 2])  # no dimension of the manifold
        assert np.abs(ours[..., 0] - theirs[..., 0]).max() > 1e-3
    ours = np.array(head.weight)
    np.testing.assert_allclose(ours[:, 0] - ours[:, 1], weighed[:, 0] - weighed[:, 1], atol=1e-6)


def test_the_overall_judgement_hangs_on_no_weight():
    x, y, groups = problem()
    y[:, 1] *= 4.0  # dimensions of unlike spread, and unlike importance
    shares = np.array([1.0, 0.5, 2.0])
    values = [
        np.array(
            fit(x, y, groups, members=0, edits=EDITS, edit_weight=weight, shares=shares, **OPTIONS).head(
                mx.array(x, mx.float32)
            )[0]
        )
        for weight in (0.0, 3.0)
    ]
    np.testing.assert_allclose(values[0] @ shares, values[1] @ shares, atol=1e-5)
    assert np.abs(values[0] - values[1]).max() > 1e-2


def test_without_edits_or_weight_the_head_is_the_plain_one():
    x, y, groups = problem()
    plain = fit(x, y, groups, members=2, **OPTIONS)
    for options in ({"edit_weight": 3.0}, {"edits": EDITS}, {"edits": [(3, 0)], "edit_weight": 3.0}):
        other = fit(x, y, groups, members=2, **OPTIONS, **options)
        np.testing.assert_array_equal(other.head.weight, plain.head.weight)


def test_errors_of_rows_left_out_are_those_of_heads_fitted_without_the_fold():
    x, y, groups = problem()
    y = (y - y.mean(0)) / y.std(0)
    fitted = fit(x, y, groups, members=0, edits=EDITS, edit_weight=3.0, **OPTIONS)
    fold = grouped_folds(groups, 4, seed=0)
    for out in range(4):
        rows = np.flatnonzero(fold != out)
        place = {row: index for index, row in enumerate(rows)}
        edits = [(place[a], place[b]) for a, b in EDITS if a in place]
        weight, bias = with_differences(x[rows], y[rows], edits, 3.0, 1.0)
        flat, level = with_differences(x[rows], y[rows], [(0, 0)], 0.0, 1.0)
        said, plain = x[fold == out] @ weight + bias, x[fold == out] @ flat + level
        said = said + (plain - said).mean(axis=1, keepdims=True)
        np.testing.assert_allclose(fitted.left_out[fold == out], y[fold == out] - said, atol=1e-5)


def test_a_row_labelled_in_part_gets_finite_errors():
    x, y, groups = problem()
    y[[6, 7, 8, 9], 1] = NAN
    fitted = fit(x, y, groups, members=2, edits=EDITS, edit_weight=3.0, **OPTIONS)
    np.testing.assert_array_equal(np.isnan(fitted.left_out), np.isnan(y))
    assert np.isfinite(np.array(fitted.head.member_weight)).all()


def test_what_an_edit_shares_with_its_original_disturbs_no_longer():
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(150, 3))
    x = np.repeat(originals, 2, axis=0)
    x[1::2] += rng.normal(size=(150, 3))
    true = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])
    y = x @ true + np.repeat(2.0 * rng.normal(size=(150, 2)), 2, axis=0)  # what no feature tells, of both rows
    groups = np.repeat(np.arange(150), 2)
    edits = [(2 * number + 1, 2 * number) for number in range(150)]
    far = []
    for weight in (0.0, 10.0):
        head = fit(x, y, groups, members=0, edits=edits, edit_weight=weight, **OPTIONS | {"penalties": (1e-3,)}).head
        found = np.array(head.weight * head.label_scale)
        far.append(np.abs((found[:, 0] - found[:, 1]) - (true[:, 0] - true[:, 1])).max())
    assert far[1] < 0.1 and far[1] < far[0] / 2


# --- features that one output alone reads ---------------------------------------------------------------------------


def test_a_feature_with_an_owner_is_read_by_no_other_output():
    x, y, groups = problem(features=8)
    owner = np.array([-1, -1, -1, -1, 0, 0, 1, 1])
    head = fit(x, y, groups, members=2, owner=owner, **OPTIONS).head
    weight, members = np.array(head.weight), np.array(head.member_weight)
    for output, reads in enumerate(([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7], [0, 1, 2, 3])):
        others = [column for column in range(8) if column not in reads]
        assert not weight[others, output].any() and not members[:, others, output].any()
        stretch = np.sqrt(8 / len(reads))  # a row keeps its length whatever it holds
        alone = fit(x[:, reads] * stretch, y[:, [output]], groups, members=2, **OPTIONS).head
        np.testing.assert_allclose(weight[reads, output], np.array(alone.weight)[:, 0] * stretch, atol=1e-5)
        np.testing.assert_allclose(np.array(head.bias)[output], np.array(alone.bias)[0], atol=1e-5)
        np.testing.assert_allclose(
            members[:, reads, output], np.array(alone.member_weight)[:, :, 0] * stretch, atol=2e-3
        )


def test_where_every_feature_has_an_owner_the_other_outputs_read_them_all():
    x, y, groups = problem(features=8)
    head = fit(x, y, groups, members=0, owner=np.repeat([0, 1], 4), **OPTIONS).head
    plain = fit(x, y, groups, members=0, **OPTIONS).head
    np.testing.assert_allclose(np.array(head.weight)[:, 2], np.array(plain.weight)[:, 2], atol=1e-6)
    assert not np.array(head.weight)[4:, 0].any()


def test_features_that_all_read_are_the_plain_head():
    x, y, groups = problem(features=8)
    plain = fit(x, y, groups, members=2, edits=EDITS, edit_weight=1.0, **OPTIONS)
    other = fit(x, y, groups, members=2, edits=EDITS, edit_weight=1.0, owner=np.full(8, -1), **OPTIONS)
    np.testing.assert_allclose(other.head.weight, plain.head.weight, atol=1e-6)
    np.testing.assert_allclose(other.left_out, plain.left_out, atol=1e-9)
