"""The ridge head: one linear map from features to the nine numbers, its uncertainty, and how both are fitted.

Shapes: `N` rows, `F` features, `O` outputs, `E` bootstrap members, `P` penalties. Fitting runs in float64; what is
stored and scored with is float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from hominem_mlx.reward.contrast import Contrasts
from hominem_mlx.reward.ridge import Ridge, by_mask

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

    @property
    def num_columns(self) -> int:
        """How many features it reads."""
        return self.weight.shape[0]

    def __call__(self, features: mx.array) -> tuple[mx.array, mx.array]:
        """`[B, O]` values, unclipped, and `[E, B, O]` what each bootstrap member says."""
        z = (features - self.feature_mean) / self.feature_scale
        members = z @ self.member_weight + self.member_bias[:, None]
        return self._in_unit(z @ self.weight + self.bias), self._in_unit(members)

    def _in_unit(self, standardised: mx.array) -> mx.array:
        return standardised * self.label_scale + self.label_mean


@dataclass(frozen=True)
class Fitted:
    """A head, the penalty of each output, and how far off it is on rows whose fold was left out.

    `left_out` is label minus prediction `[N, O]`, in the labels' unit, NaN where there is no label, or only one fold.
    """

    head: RidgeHead
    penalties: list[float]
    left_out: np.ndarray


def grouped_folds(groups: Sequence[str] | np.ndarray, folds: int, *, seed: int) -> np.ndarray:
    """The fold of each row, `[N]` in 0..folds-1: all rows of a group together, as many groups in each as can be."""
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    place = np.empty(len(names), int)
    place[np.random.default_rng([seed, 1]).permutation(len(names))] = np.arange(len(names)) % min(folds, len(names))
    return place[owner]


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    penalties: Sequence[float],
    folds: int,
    members: int,
    seed: int,
    standardise: bool = True,
    edits: Sequence[tuple[int, int]] = (),
    edit_weight: float = 0.0,
    shares: Sequence[float] | None = None,
    owner: np.ndarray | None = None,
    counts: int = 0,
) -> Fitted:
    """Fit the head on training rows.

    With edits each dimension is fitted twice: plainly, and with the edits' differences weighed (`contrast.py`). How
    dimensions differ is taken from the second, their weighted sum from the first: the overall judgement stays what it
    was.

    Args:
        features: `[N, F]`.
        labels: `[N, O]` in their own unit, NaN where there is none: masked, output by output.
        groups: the prompt of each row: folds and bootstrap keep its rows together.
        penalties: to choose from, per output, by mean squared error over the folds. After standardisation a row has
            mean squared length 1, so a penalty means the same for any number of features.
        folds: inner folds.
        members: bootstrap heads, each on prompts drawn with replacement, at the penalties chosen for all.
        seed: of folds and bootstrap.
        standardise: whether features get mean 0 and equal variance; n-gram rows have their length already.
        edits: contrast edits among the rows, each with the row of its original.
        edit_weight: of such a difference in how dimensions differ; a row by itself weighs 1.
        shares: weights of the common dimensions, which are the first outputs, in the overall judgement; by default all
            outputs are dimensions and weigh the same.
        owner: `[F]`, the output that alone reads a feature, -1 where all do; by default all read all. With edits the
            others get their share of it in the mean.
        counts: how many of the last features are never standardised: a word found in two replies is no two-hundredth
            of one found in all, and what they weigh beside the others is in them already.
    """
    z, mean, scale = features, np.zeros(features.shape[1]), np.ones(features.shape[1])
    if standardise:
        size = features.shape[1] - counts
        z, mean[:size], scale[:size] = standardised(features[:, :size])
        z = np.concatenate([z, features[:, size:]], axis=1) if counts else z
    label_mean, label_scale = label_moments(labels)
    targets = (labels - label_mean) / label_scale
    fold = grouped_folds(groups, folds, seed=seed)
    drawn = bootstrap_rows(groups, members, seed=seed)
    views = _views(owner, labels.shape[1])
    found = _regress(z, targets, fold, penalties, drawn, views)
    share = np.ones(labels.shape[1]) if shares is None else np.asarray(shares, float)
    size = len(share)
    contrasts = Contrasts(edits if edit_weight else (), groups, labels[:, :size], edit_weight)
    if contrasts:
        views = _views(owner, size)
        weighed = _regress(contrasts.apply(z), contrasts.apply(targets[:, :size]), fold, penalties, drawn, views)
        weighed.errors = contrasts.undo(weighed.errors)
        found = _with_sum_of(found, weighed, share * label_scale[:size])

    head = RidgeHead(features.shape[1], labels.shape[1], members)
    arrays = {"feature_mean": mean, "feature_scale": scale, "label_mean": label_mean, "label_scale": label_scale}
    arrays |= {"weight": found.weight, "bias": found.bias}
    if members:
        arrays |= {"member_weight": found.member_weight, "member_bias": found.member_bias}
    head.update({name: mx.array(np.asarray(value, np.float32)) for name, value in arrays.items()})
    return Fitted(head, found.penalties.tolist(), found.errors * label_scale)


@dataclass
class _Regressions:
    """Of standardised labels; `errors` `[N, O]` are of rows whose fold was left out."""

    weight: np.ndarray  # [F, O]
    bias: np.ndarray  # [O]
    member_weight: np.ndarray  # [E, F, O]
    member_bias: np.ndarray  # [E, O]
    errors: np.ndarray
    penalties: np.ndarray  # [O]


View = tuple[np.ndarray, np.ndarray | None]  # outputs, and the features that they read; None are all


def _views(owner: np.ndarray | None, num_outputs: int) -> list[View]:
    if owner is None:
        return [(np.arange(num_outputs), None)]
    owns = np.isin(np.arange(num_outputs), owner)
    alone = [(np.array([output]), (owner < 0) | (owner == output)) for output in np.flatnonzero(owns)]
    common = owner < 0 if (owner < 0).any() else None  # where every feature has an owner, the others read them all
    return alone if owns.all() else [*alone, (np.flatnonzero(~owns), common)]


def _regress(
    z: np.ndarray,
    targets: np.ndarray,
    fold: np.ndarray,
    penalties: Sequence[float],
    drawn: Sequence[np.ndarray],
    views: Sequence[View],
) -> _Regressions:
    size, outputs = z.shape[1], targets.shape[1]
    made = _Regressions(
        np.zeros((size, outputs)),
        np.zeros(outputs),
        np.zeros((len(drawn), size, outputs)),
        np.zeros((len(drawn), outputs)),
        np.full(targets.shape, np.nan),
        np.zeros(outputs),
    )
    common = np.logical_and.reduce([reads for _, reads in views if reads is not None] or [np.zeros(size, bool)])
    shared = z[:, common] if len(z) < size else z[:, :0]
    shared_gram = shared @ shared.T  # most of every view's, which costs most
    for own, reads in views:
        columns = np.arange(size) if reads is None else np.flatnonzero(reads)
        stretch = np.sqrt(size / len(columns))  # of a standardised row: to mean squared length 1 again
        gram = None
        if reads is not None and len(z) < len(columns):
            alone = z[:, reads & ~common]
            gram = (shared_gram + alone @ alone.T) * stretch**2
        ridge = Ridge(z if reads is None else z[:, columns] * z.dtype.type(stretch), gram)
        y = targets[:, own]
        errors = _fold_errors(ridge, y, fold, penalties)
        unknown = np.isnan(errors).all(axis=(0, 1))
        # where nothing could be left out, the strongest penalty: nothing speaks for less
        best = np.where(unknown, -np.array(penalties)[:, None], np.nansum(errors**2, axis=1)).argmin(axis=0)
        chosen = np.array(penalties)[best]
        weight, made.bias[own] = ridge.solve(np.arange(len(y)), y, chosen)
        members, made.member_bias[:, own] = ridge.draws(drawn, y, chosen)
        made.weight[np.ix_(columns, own)] = weight * stretch
        made.member_weight[np.ix_(np.arange(len(drawn)), columns, own)] = members * stretch
        made.errors[:, own] = np.take_along_axis(errors, best[None, None], axis=0)[0]
        made.penalties[own] = chosen
    return made


def _with_sum_of(plain: _Regressions, weighed: _Regressions, share: np.ndarray) -> _Regressions:
    """Dimensions as `weighed` has them, moved alike until their sum by `share` is that of `plain`; other outputs plain.

    Errors of a row labelled in part are moved by what is labelled.
    """
    size = len(share)

    def moved(name: str) -> np.ndarray:
        made, other = getattr(plain, name).copy(), getattr(weighed, name)
        off = made[..., :size] - other
        counts = np.where(np.isnan(off), 0.0, share)
        total = counts.sum(-1, keepdims=True)
        mean = (counts * np.nan_to_num(off)).sum(-1, keepdims=True) / np.where(total > 0, total, 1.0)
        made[..., :size] = other + mean
        return made

    penalties = np.concatenate([weighed.penalties, plain.penalties[size:]])
    names = ("weight", "bias", "member_weight", "member_bias", "errors")
    return _Regressions(**{name: moved(name) for name in names}, penalties=penalties)


def _fold_errors(ridge: Ridge, targets: np.ndarray, fold: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Target minus prediction of each row when its fold is left out, `[P, N, O]`; NaN where a label is missing."""
    errors = np.full((len(penalties), *targets.shape), np.nan)
    for outputs, there in by_mask(targets):
        errors[np.ix_(np.arange(len(penalties)), there, outputs)] = ridge.left_out_errors(
            there, targets[:, outputs], fold, penalties
        )
    return errors


def bootstrap_rows(groups: Sequence[str] | np.ndarray, members: int, *, seed: int) -> list[np.ndarray]:
    """Rows of as many groups as there are, drawn with replacement, for each member."""
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    rows_of = [np.flatnonzero(owner == index) for index in range(len(names))]
    rng = np.random.default_rng([seed, 2])
    return [
        np.concatenate([rows_of[index] for index in rng.integers(0, len(names), len(names))]) for _ in range(members)
    ]


def standardised(features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features `[N, F]` in float64 with mean 0 and equal variance, and what was taken out: mean and scale `[F]`.

    The scale holds sqrt(F), so that a row has mean squared length 1.
    """
    z = np.array(features, np.float64)
    mean = z.mean(axis=0)
    z -= mean
    spread = np.sqrt(np.einsum("nf,nf->f", z, z) / len(z))
    spread[spread < 1e-6] = 1.0  # a feature that never moves says nothing and must not divide by nothing
    scale = spread * np.sqrt(z.shape[1])
    z /= scale
    return z, mean, scale


def label_moments(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `[O]` of the labels there are; a constant output keeps the scale 1."""
    there = ~np.isnan(labels)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, labels, 0.0).sum(axis=0) / count
    spread = np.sqrt((np.where(there, labels - mean, 0.0) ** 2).sum(axis=0) / count)
    return mean, np.where(spread < 1e-9, 1.0, spread)
