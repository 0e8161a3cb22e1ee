"""A refreshed reward model beside the one it would replace, on held-out labels that neither was fitted on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hominem_mlx import metrics
from hominem_mlx.records import Label
from hominem_mlx.reward.examine import CLEAR, in_json, scalars, unclipped
from hominem_mlx.reward.features import Backbone, LmReader
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.smoothness import under_noise
from hominem_mlx.reward.targets import overall, targets
from hominem_mlx.schema import MANIFOLD, Manifold
from hominem_mlx.storage.registry import Artifact


def against(
    model: RewardModel, before: Artifact, labels: Sequence[Label], *, seed: int = 0, curvature: bool = False
) -> dict[str, Any]:
    """Both models on the same held-out rows.

    Args:
        model: the new one.
        before: the reward model it would replace.
        labels: held-out rows.
        seed: of the bootstrap, and of directions.
        curvature: whether that is measured too, which takes hundreds of passes (see `smoothness.under_noise`).

    Returns: `name` of the predecessor, what `paired` finds, and with `curvature` `curvature_growth`, in [0, 1]: by how
        much more the curvature of the reward varies from reply to reply (`metrics.curvature_growth`); None for n-grams.
    Raises: InputError when the two have different dimensions, or the rows cannot tell.
    """
    pairs = [(row.prompt, row.response) for row in labels]
    groups = np.array([row.prompt_id for row in labels])
    values, scalar = targets(labels), overall(labels)
    reader = model.features.reader if isinstance(model.features, Backbone) else None
    lm = reader.lm if isinstance(reader, LmReader) else None  # one base in memory, where both read with it
    old = RewardModel.load(before.folder, lm=lm, manifold=model.card.manifold)
    now, then = (unclipped(judge.score_many(pairs)) for judge in (model, old))
    found = paired(now, then, values, scalar, groups, seed=seed, manifold=model.manifold.common)
    if curvature:
        bent = [
            (under_noise(judge, pairs, seed=seed) or {}).get("curvature_variance", math.nan) for judge in (model, old)
        ]
        found["curvature_growth"] = in_json(metrics.curvature_growth(*bent))
    return {"name": before.ref, **found}


def paired(
    now: np.ndarray,
    before: np.ndarray,
    labels: np.ndarray,
    scalar: np.ndarray,
    groups: np.ndarray,
    *,
    seed: int = 0,
    manifold: Manifold = MANIFOLD,
) -> dict[str, Any]:
    """How much better one set of predictions is than another.

    Args:
        now, before: `[N, K + 2]`; labels: `[N, K + 2]`, NaN where there is none; scalar: overall label `[N]`.
        groups: the prompt of each row.

    Returns: `pair_accuracy` of clear pairs (`pairs` of them, of `prompts`) and `residual`, the mean residual
        correlation, each `{"now", "before", "mean", "low", "high"}`: the difference and its 95 % interval by bootstrap
        over prompts; and `drift`, in [0, 1], how far the two differ in which replies they hold to be alike
        (`metrics.rdm_drift` of the dimensions in standard deviations).
    """
    size = len(manifold.names)
    first, owners = metrics.pair_outcomes(scalars(now, manifold), scalar, groups, low=CLEAR)
    second, _ = metrics.pair_outcomes(scalars(before, manifold), scalar, groups, low=CLEAR)
    ordered = {"now": _mean(first), "before": _mean(second)}
    whole = ~np.isnan(labels[:, :size]).any(axis=1)
    new, old, truth = (metrics.residuals(values[whole, :size]) for values in (now, before, labels))

    def gain(rows: np.ndarray) -> float:
        return _correlation(new[rows], truth[rows]) - _correlation(old[rows], truth[rows])

    views = [values[:, :size] / np.maximum(values[:, :size].std(axis=0), 1e-12) for values in (before, now)]
    return in_json(
        {
            "pairs": len(first),
            "prompts": len(np.unique(owners)),
            "pair_accuracy": ordered | metrics.paired_bootstrap(first, second, owners, seed=seed)._asdict(),
            "residual": {"now": _correlation(new, truth), "before": _correlation(old, truth)}
            | metrics.bootstrap_statistic(gain, groups[whole], seed=seed)._asdict(),
            "drift": metrics.rdm_drift(*views),
        }
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over columns of the correlations of `[N, K]` with `[N, K]`: for a bootstrap, which asks a thousand times."""
    if len(a) < 3:
        return math.nan
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    sizes = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return float(((a * b).sum(axis=0) / sizes).mean()) if (sizes > 1e-12).all() else math.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
