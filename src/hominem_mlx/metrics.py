"""Measures as pure functions of numpy arrays: errors, correlations, pair accuracy, and how sure they are.

Shapes: `N` rows, `K` reward dimensions, `M` pairs. A value that cannot be computed (nothing to compare, no spread) is
NaN, never 0. Rows where either side is NaN (a missing label) are left out of two-sided measures.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

TIE = 1e-9  # label margins are sums of decimals: 0.3 must count as 0.3


class Interval(NamedTuple):
    """A mean and its percentile bootstrap interval."""

    mean: float
    low: float
    high: float


def rmse(predicted: np.ndarray, label: np.ndarray) -> float:
    """Root mean squared error of `[N]` predictions, >= 0, in the labels' unit."""
    predicted, label = _both(predicted, label)
    return float(np.sqrt(np.mean((predicted - label) ** 2))) if len(label) else float("nan")


def mae(predicted: np.ndarray, label: np.ndarray) -> float:
    """Mean absolute error of `[N]` predictions, >= 0, in the labels' unit."""
    predicted, label = _both(predicted, label)
    return float(np.mean(np.abs(predicted - label))) if len(label) else float("nan")


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation of `[N]` values, in [-1, 1]; NaN with fewer than 3 rows or a constant side."""
    a, b = _both(a, b)
    if len(a) < 3 or np.ptp(a) <= 1e-12 or np.ptp(b) <= 1e-12:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of `[N]` values (ties share their mean rank), in [-1, 1]."""
    a, b = _both(a, b)
    return pearson(ranks(a), ranks(b))


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive row of `[N]` scores above a negative one, ties counted half, in [0, 1]; chance is 0.5.

    NaN where either kind is missing. Source: Hanley and McNeil 1982 (the area under the ROC curve is Mann-Whitney's U).
    """
    score, positive = _both(score, positive)
    yes = positive > 0
    count = int(yes.sum())
    if count in (0, len(yes)):
        return float("nan")
    return float((ranks(score)[yes].sum() - count * (count + 1) / 2) / (count * (len(yes) - count)))


def f1(said: np.ndarray, positive: np.ndarray) -> float:
    """Harmonic mean of precision and recall of `[N]` yes-or-no answers, in [0, 1]; NaN where nothing is positive."""
    said, positive = np.asarray(said, bool), np.asarray(positive, bool)
    if not positive.any():
        return float("nan")
    return float(2 * (said & positive).sum() / (said.sum() + positive.sum()))


def residuals(values: np.ndarray) -> np.ndarray:
    """What is left of each dimension when the row's mean over dimensions is taken away, `[N, K]`.

    Source: `science.md` 0, "Label halo": raw correlations per dimension prove nothing when one axis rules all labels.
    """
    values = np.asarray(values, float)
    return values - values.mean(axis=1, keepdims=True)


def residual_correlations(predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Correlation per dimension of `[N, K]` predictions and labels after `residuals` on both, `[K]`.

    Rows that lack a dimension are left out, since their mean would be another quantity.
    """
    whole = ~np.isnan(np.asarray(label, float)).any(axis=1)
    a, b = residuals(np.asarray(predicted)[whole]), residuals(np.asarray(label)[whole])
    return np.array([pearson(a[:, k], b[:, k]) for k in range(a.shape[1])])


def correlation_matrix(values: np.ndarray) -> np.ndarray:
    """Correlations between the columns of `[N, K]`, `[K, K]`; rows with NaN are left out."""
    values = np.asarray(values, float)
    return np.atleast_2d(np.corrcoef(values[~np.isnan(values).any(axis=1)], rowvar=False))


def participation_ratio(matrix: np.ndarray) -> float:
    """How many dimensions a `[K, K]` correlation or covariance matrix really has: `(sum l)^2 / sum l^2` of its
    eigenvalues, from 1 (one axis in disguise) to K (all independent).

    The two sums are the trace and the sum of squared entries, so no eigenvalue is computed.
    """
    matrix = np.asarray(matrix, float)
    return float(np.trace(matrix) ** 2 / np.sum(matrix**2))


def pair_margins(
    predicted: np.ndarray, label: np.ndarray, groups: np.ndarray, *, low: float, high: float = float("inf")
) -> tuple[np.ndarray, np.ndarray]:
    """By how much the reply with the better label is predicted better, for all pairs within a group.

    Args:
        predicted, label: scalar per row, `[N]`; rows without a label are left out.
        groups: the prompt of each row, `[N]`.
        low, high: label margins that count, `low <= margin < high`, low > 0.

    Returns: `[M]` predicted margins, better minus worse, and the group of each pair `[M]`.
    """
    if not low > 0:
        raise ValueError("a pair needs a label margin: low must be above 0")
    predicted, label, groups = np.asarray(predicted, float), np.asarray(label, float), np.asarray(groups)
    margins, owners = [], []
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & ~np.isnan(label))
        first, second = np.triu_indices(len(rows), 1)
        margin = label[rows[first]] - label[rows[second]]
        said = predicted[rows[first]] - predicted[rows[second]]
        counts = (np.abs(margin) >= low - TIE) & (np.abs(margin) < high - TIE)
        margins.append((said * np.sign(margin))[counts])
        owners += [group] * int(counts.sum())
    return np.concatenate(margins) if margins else np.zeros(0), np.array(owners)


def pair_outcomes(
    predicted: np.ndarray, label: np.ndarray, groups: np.ndarray, *, low: float, high: float = float("inf")
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the reply with the better label is also predicted better; arguments as in `pair_margins`.

    Returns: `[M]` outcomes (1 right, 0 wrong, 0.5 where the predictions are equal) and the group of each pair `[M]`.
    """
    margins, owners = pair_margins(predicted, label, groups, low=low, high=high)
    return 0.5 + 0.5 * np.sign(margins), owners


def pair_accuracy(
    predicted: np.ndarray, label: np.ndarray, groups: np.ndarray, *, low: float, high: float = float("inf")
) -> float:
    """Mean of `pair_outcomes`, in [0, 1]; chance is 0.5."""
    outcomes, _ = pair_outcomes(predicted, label, groups, low=low, high=high)
    return float(outcomes.mean()) if len(outcomes) else float("nan")


def bootstrap(
    values: np.ndarray, groups: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of `[N]` values and its interval when whole groups (prompts) are drawn with replacement.

    Rows of one prompt are not independent; drawing prompts keeps the interval honest. Percentile method
    (Efron and Tibshirani 1993, ch. 13). For a paired comparison pass the differences.
    """
    values = np.asarray(values, float)
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    draws = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """`bootstrap` of `a - b`: how much better `a` is than `b` on the same items."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    return bootstrap(difference, groups, resamples=resamples, seed=seed, level=level)


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A statistic that is no mean (an area, a correlation) and its interval when whole groups are drawn.

    Args:
        statistic: of int row numbers `[M]`, repeats included; for a paired comparison return the difference.
        groups: the prompt of each row, `[N]`.
        resamples: draws; one in which the statistic is NaN (a class is missing) is left out.

    Returns: the statistic of all rows as `mean`, and the interval.
    """
    if not len(groups):
        return Interval(float("nan"), float("nan"), float("nan"))
    found = [statistic(rows) for rows in group_draws(groups, resamples=resamples, seed=seed)]
    return interval_of(statistic(np.arange(len(groups))), found, level=level)


def group_draws(groups: np.ndarray, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of as many groups as there are, drawn with replacement, `[M]` int, one array a draw."""
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    by_group = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner))
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = rng.integers(0, len(names), len(names))
        sizes = (ends - np.r_[0, ends[:-1]])[drawn]
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield by_group[np.repeat(ends[drawn] - sizes, sizes) + inside]


def interval_of(value: float, drawn: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """A value and the percentile interval of what bootstrap draws gave; those that are NaN are left out."""
    there = np.asarray(drawn, float)
    there = there[~np.isnan(there)]
    if not len(there):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(there, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def permutation_p(
    statistic: Callable[[np.ndarray], Any],
    rows: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Any:
    """One-sided chance, in (0, 1], of a statistic at least this large when the rows are shuffled.

    Args:
        statistic: of `[N, ...]` rows in some order, against something fixed; of an array of them each one's chance.
        rows: the rows in their own order.
        groups: shuffle only within these; rows of one prompt resemble each other, so free shuffling would flatter.
        resamples: shuffles; the smallest possible p is `1 / (resamples + 1)`.

    Source: Phipson and Smyth 2010 (the observed order counts as one of the shuffles).
    """
    rows = np.asarray(rows)
    rng = np.random.default_rng(seed)
    owner = np.zeros(len(rows), int) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    by_group = np.argsort(owner, kind="stable")
    observed = statistic(rows)
    reached = 0
    for _ in range(resamples):
        shuffled = np.lexsort((rng.random(len(rows)), owner))  # random inside each group
        order = np.empty(len(rows), int)
        order[by_group] = shuffled
        reached += statistic(rows[order]) >= observed
    return (1 + reached) / (1 + resamples)


def reliability(
    predicted: np.ndarray, label: np.ndarray, *, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean prediction, mean label and number of rows, `[bins]` each, of equally many rows sorted by prediction.

    A calibrated model has equal means in every bin: of what it calls 0.4 the labels are 0.4 on average. With fewer rows
    there are fewer bins.
    """
    predicted, label = _both(predicted, label)
    parts = np.array_split(np.argsort(predicted, kind="stable"), max(1, min(bins, len(predicted))))
    said, given = (
        np.array([values[part].mean() if len(part) else np.nan for part in parts]) for values in (predicted, label)
    )
    return said, given, np.array([len(part) for part in parts])


def calibration_error(predicted: np.ndarray, label: np.ndarray, *, bins: int = 10) -> float:
    """Expected calibration error of a regression, >= 0, in the labels' unit: `sum_b n_b / n |prediction - label|` over
    the bins of `reliability`.

    Source: `science.md` 2.4; for probabilities Naeini, Cooper and Hauskrecht 2015.
    """
    said, given, counts = reliability(predicted, label, bins=bins)
    return float(np.abs(said - given) @ counts / counts.sum()) if counts.sum() else float("nan")


def coverage(error: np.ndarray, width: np.ndarray) -> float:
    """Share of errors `[...]` no larger than the half-widths `[...]` promised for them; NaN errors are left out."""
    error, width = np.broadcast_arrays(np.asarray(error, float), np.asarray(width, float))
    there = ~np.isnan(error)
    return float((np.abs(error[there]) <= width[there]).mean()) if there.any() else float("nan")


def conformal_width(errors: np.ndarray, level: float) -> float:
    """Half-width that holds the next error with a chance of at least `level`, from `[N]` errors of rows left out.

    The `ceil((N + 1) level)`-th smallest absolute error; infinite where N is too small for the level.
    Source: split conformal prediction, Lei et al. 2018 (arXiv 1604.04173).
    """
    sizes = np.sort(np.abs(errors[~np.isnan(errors)]))
    place = math.ceil((len(sizes) + 1) * level)
    return float(sizes[place - 1]) if 0 < place <= len(sizes) else float("inf")


def rdm_drift(before: np.ndarray, now: np.ndarray) -> float:
    """How far two views of the same `[P, D]` probes differ in what they hold to be alike, in [0, 1].

    1 minus the rank correlation of both views' dissimilarities (1 - cosine of rows, centred over probes), not below 0.
    Turning or scaling a view changes nothing; the two may differ in `D`. NaN with fewer than 20 probes or without
    spread. Source: representational similarity analysis, Kriegeskorte et al. 2008; `science.md` 1.4.
    """
    if len(before) != len(now):
        raise ValueError(f"both views must be of the same probes, got {len(before)} and {len(now)}")
    if len(before) < 20:
        return float("nan")
    first, second = _dissimilarities(before), _dissimilarities(now)
    return float(np.clip(1 - spearman(first, second), 0.0, 1.0))


def _dissimilarities(values: np.ndarray) -> np.ndarray:
    rows = np.asarray(values, float) - np.mean(values, axis=0)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return 1 - (rows @ rows.T)[np.triu_indices(len(rows), 1)]


def variance_between(values: np.ndarray) -> float:
    """Variance between the rows of `[P, J]` repeated measurements, without what their own noise adds, >= 0.

    Variance of the row means minus the mean variance within rows over J (one-way analysis of variance, random rows).
    NaN with fewer than two rows or measurements.
    """
    values = np.asarray(values, float)
    if min(values.shape) < 2:
        return float("nan")
    within = values.var(axis=1, ddof=1).mean() / values.shape[1]
    return max(0.0, float(values.mean(axis=1).var(ddof=1) - within))


def curvature_growth(now: float, before: float) -> float:
    """How much more the curvature varies than it did, in [0, 1]: 0 where it does not, 1 at 16 times the variance.

    `clip01(log2((now + e) / (before + e)) / 4)` of two variances, e a hundredth of `before`; NaN where that is 0.
    Source: `science.md` 1.5.
    """
    if not before > 0 or math.isnan(now):
        return float("nan")
    slack = before / 100
    return float(np.clip(math.log2((now + slack) / (before + slack)) / 4, 0.0, 1.0))


def distinct2(texts: Sequence[Sequence[Hashable]]) -> float:
    """Different neighbouring pairs over all such pairs, in texts of words or of tokens.

    Returns: 1 where nothing repeats, near 0 where everything does; 0 without any pair.
    Source: Li et al. 2016, distinct-n (arXiv 1510.03055).
    """
    pairs = [pair for text in texts for pair in itertools.pairwise(text)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two [N] arrays of one length are needed, got {a.shape} and {b.shape}")
    there = ~(np.isnan(a) | np.isnan(b))
    return a[there], b[there]


def ranks(values: np.ndarray) -> np.ndarray:
    """Places of `[N]` values in ascending order, from 1 to N; equal values share their mean place."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]
