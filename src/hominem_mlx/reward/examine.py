"""What a reward model is worth: its predictions beside a baseline's, on rows neither was fitted on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hominem_mlx import metrics
from hominem_mlx.reward.dominance import dominance
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.schema import COMMON, MANIFOLD, Manifold, RewardOutput

CERTAIN = 0.01  # chance below which a dimension counts as found
Edit = tuple[int, int, int]  # row of a contrast edit, row of the reply it was made from, index of what it lowers
LEVELS = (0.5, 0.8, 0.9)  # of intervals that are examined
CLEAR, CLOSE = 0.3, 0.05  # label margins: from CLEAR on a pair is clear, from CLOSE up to CLEAR it is close


def compare(
    predicted: np.ndarray,
    baseline: np.ndarray,
    labels: np.ndarray,
    scalar: np.ndarray,
    groups: np.ndarray,
    *,
    edits: Sequence[Edit] = (),
    seed: int = 0,
    manifold: Manifold = MANIFOLD,
) -> dict:
    """Every measure of the model and of the baseline, and the paired difference.

    Args:
        predicted, baseline: out-of-fold predictions `[N, K + 2]` of dimensions, intensity, safety.
        labels: `[N, K + 2]`, NaN where there is none; scalar: overall label `[N]`.
        groups: the prompt of each row.
        edits: contrast edits among the rows.
        seed: of bootstrap and permutations.

    Returns: flat measures of the model and, as `baseline_...`, of the baseline (see `measure`); the paired differences
    `pair_accuracy_difference` (figure A5) and `close_pair_accuracy_difference`, each `{"mean", "low", "high"}`, 95 % by
    bootstrap over prompts; `residual` holds what figure A9 asks; `dominance` (see there) and `whole`, how many rows
    have a label in every dimension. Rounded to 6 digits; None where nothing can be said.
    """
    mine = measure(predicted, labels, scalar, groups, seed=seed, manifold=manifold)
    theirs = measure(baseline, labels, scalar, groups, seed=seed, manifold=manifold)
    account: dict = {"label_participation_ratio": _ratio(labels[:, : len(manifold.names)])}
    for key in ("pairs", "close_pairs"):
        account[key] = mine.pop(key)
        del theirs[key]
    residuals = {"": mine.pop("residual"), "baseline_": theirs.pop("residual")}
    account["residual"] = {prefix + key: value for prefix, found in residuals.items() for key, value in found.items()}
    account |= mine | {f"baseline_{key}": value for key, value in theirs.items()}
    for name, low, high in (("pair_accuracy", CLEAR, math.inf), ("close_pair_accuracy", CLOSE, CLEAR)):
        a, owners = metrics.pair_outcomes(scalars(predicted, manifold), scalar, groups, low=low, high=high)
        b, _ = metrics.pair_outcomes(scalars(baseline, manifold), scalar, groups, low=low, high=high)
        account[f"{name}_difference"] = metrics.paired_bootstrap(a, b, owners, seed=seed)._asdict()
    account["whole"] = int((~np.isnan(labels[:, : len(manifold.names)]).any(axis=1)).sum())
    weights = [dimension.weight for dimension in manifold.dimensions]
    account["dominance"] = dominance(predicted[:, : len(weights)], weights, manifold.names)
    account["contrasts"] = contrasts(predicted, edits, groups, seed=seed, manifold=manifold)
    account["baseline_contrasts"] = contrasts(baseline, edits, groups, seed=seed, manifold=manifold)
    return in_json(account)


def contrasts(
    predicted: np.ndarray,
    edits: Sequence[Edit],
    groups: np.ndarray,
    *,
    seed: int = 0,
    manifold: Manifold = MANIFOLD,
) -> dict[str, Any]:
    """How often lowering one dimension of a reply lowers that prediction, and moves no other as far.

    Predictions `[N, K + 2]` are compared in standard deviations of their dimension over all rows.

    Returns: `share` (chance: 1 / K, halved for the direction), its 95 % interval `low`, `high` by bootstrap over
        prompts, and `n`.
    """
    size = len(manifold.names)
    z = predicted[:, :size] / np.maximum(predicted[:, :size].std(axis=0), 1e-12)
    hits, owners = [], []
    for edited, origin, dimension in edits:
        fall = z[origin] - z[edited]
        hits.append(float(fall[dimension] > 0 and np.abs(fall).argmax() == dimension))
        owners.append(groups[edited])
    share = metrics.bootstrap(np.array(hits), np.array(owners), seed=seed)
    return {"share": share.mean, "low": share.low, "high": share.high, "n": len(hits)}


def measure(
    predicted: np.ndarray,
    labels: np.ndarray,
    scalar: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int = 0,
    manifold: Manifold = MANIFOLD,
) -> dict:
    """Errors, correlations and pair accuracies, for each output and overall; shapes as in `compare`.

    `residual["p"]` is the chance of so high a mean residual correlation when replies of one prompt swap their labels,
    `certain` how many dimensions have one below 0.01 by themselves; `spread` is the standard deviation of predictions
    over that of labels.
    """
    size = len(manifold.names)
    residual = metrics.residual_correlations(predicted[:, :size], labels[:, :size])
    p_values = _residual_p(predicted[:, :size], labels[:, :size], groups, seed=seed)
    outputs: dict[str, dict[str, float]] = {}
    for index, name in enumerate((*manifold.names, *EXTRA)):
        p, y = predicted[:, index], labels[:, index]
        outputs[name] = {
            "rmse": metrics.rmse(p, y),
            "mae": metrics.mae(p, y),
            "pearson": metrics.pearson(p, y),
            "pair_accuracy": metrics.pair_accuracy(p, y, groups, low=CLEAR),
            "close_pair_accuracy": metrics.pair_accuracy(p, y, groups, low=CLOSE, high=CLEAR),
        }
        if index < size:
            outputs[name]["residual_pearson"] = residual[index]
            outputs[name]["residual_p"] = p_values[index]
            outputs[name]["spread"] = float(np.nanstd(p) / np.nanstd(y)) if np.nanstd(y) > 0 else math.nan
    overall = scalars(predicted, manifold)
    clear, _ = metrics.pair_outcomes(overall, scalar, groups, low=CLEAR)
    close, _ = metrics.pair_outcomes(overall, scalar, groups, low=CLOSE, high=CLEAR)
    return {
        "pair_accuracy": float(clear.mean()) if len(clear) else math.nan,
        "pairs": len(clear),
        "close_pair_accuracy": float(close.mean()) if len(close) else math.nan,
        "close_pairs": len(close),
        "pearson_mean": float(np.mean([outputs[name]["pearson"] for name in manifold.names])),
        "pearson_scalar": metrics.pearson(overall, scalar),
        "residual": {
            "mean": float(residual.mean()),
            "p": p_values[size],
            "certain": int((p_values[:size] < CERTAIN).sum()),
        },
        "participation_ratio": _ratio(predicted[:, :size]),
        "outputs": outputs,
    }


def widths(left_out: np.ndarray, levels: Sequence[float] = LEVELS) -> np.ndarray:
    """Half-width `[levels, O]` of an interval around a prediction that holds the label so often.

    Args:
        left_out: label minus prediction `[N, O]` of rows that were not fitted on, NaN where there is no label.
        levels: chances, in (0, 1).
    """
    return np.array([[metrics.conformal_width(column, level) for column in left_out.T] for level in levels])


def calibration(
    predicted: np.ndarray, labels: np.ndarray, promised: np.ndarray, *, manifold: Manifold = MANIFOLD
) -> dict[str, Any]:
    """Do predictions mean what they say? All on rows that were not fitted on.

    Args:
        predicted, labels: `[N, K + 2]`.
        promised: half-widths `[LEVELS, N, K + 2]` of intervals, from rows of other prompts.

    Returns: `error` (mean over dimensions of the calibration error), `worst`, `outputs` (each one's) and `coverage`:
        by level the share of labels of all dimensions inside their interval.
    """
    size = len(manifold.names)
    names = (*manifold.names, *EXTRA)
    errors = {name: metrics.calibration_error(predicted[:, i], labels[:, i]) for i, name in enumerate(names)}
    own = [errors[name] for name in manifold.names]
    off = (labels - predicted)[:, :size]
    covered = {
        str(level): metrics.coverage(off, width[:, :size]) for level, width in zip(LEVELS, promised, strict=True)
    }
    return in_json({"error": float(np.mean(own)), "worst": max(own), "outputs": errors, "coverage": covered})


def hidden_norm(features: np.ndarray, scalar: np.ndarray) -> float:
    """Correlation of the scalars `[N]` with the length of the features `[N, F]` they were read from.

    A head that rewards length of hidden states rewards what a policy can raise without saying anything better.
    Source: `science.md` 2.10 (arXiv 2505.07271).
    """
    return metrics.pearson(np.linalg.norm(np.asarray(features, float), axis=1), scalar)


def unclipped(said: Sequence[RewardOutput]) -> np.ndarray:
    """What a reward model says before clipping of the seven dimensions, intensity and safety, `[N, K + 2]`."""
    return np.array(
        [[value for name, value in each.unclipped.items() if name in COMMON or name in EXTRA] for each in said], float
    )


def scalars(values: np.ndarray, manifold: Manifold) -> np.ndarray:
    """The weighted mean `[N]` of the dimensions in `[N, K ...]`, unclipped."""
    weights = np.array([dimension.weight for dimension in manifold.dimensions])
    return values[:, : len(weights)] @ weights / weights.sum()


def _residual_p(predicted: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, seed: int) -> np.ndarray:
    """Chance of so high a residual correlation, of each dimension and of their mean, `[K + 1]`."""
    whole = ~np.isnan(labels).any(axis=1)
    if whole.sum() < 3:
        return np.full(labels.shape[1] + 1, math.nan)
    ours, theirs = (metrics.residuals(values[whole]) for values in (predicted, labels))
    ours = (ours - ours.mean(axis=0)) / np.maximum(ours.std(axis=0), 1e-12)
    theirs = (theirs - theirs.mean(axis=0)) / np.maximum(theirs.std(axis=0), 1e-12)

    def agreement(rows: np.ndarray) -> np.ndarray:
        each = (ours * rows).mean(axis=0)
        return np.append(each, each.mean())

    return metrics.permutation_p(agreement, theirs, groups[whole], seed=seed)


def _ratio(values: np.ndarray) -> float:
    rows = values[~np.isnan(values).any(axis=1)]
    if len(rows) < 3 or (np.ptp(rows, axis=0) <= 1e-12).any():
        return math.nan
    return metrics.participation_ratio(metrics.correlation_matrix(rows))


def in_json(value):
    """Rounded floats, None for NaN: what JSON can hold."""
    if isinstance(value, dict):
        return {key: in_json(item) for key, item in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else round(float(value), 6)
    return value
