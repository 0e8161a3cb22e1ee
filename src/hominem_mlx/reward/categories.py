"""Does it carry over to a kind of prompt it never saw? Each category of prompts left out in turn."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hominem_mlx import metrics
from hominem_mlx.config import Config
from hominem_mlx.records import Label
from hominem_mlx.reward import head as heads
from hominem_mlx.reward.account import left_out
from hominem_mlx.reward.examine import CLEAR, in_json, scalars
from hominem_mlx.reward.features import Backbone, Progress
from hominem_mlx.reward.targets import overall, targets
from hominem_mlx.schema import MANIFOLD, Manifold

FEWEST = 30  # rows, or clear pairs, of a category; fewer tell nothing


def carried_over(
    labels: Sequence[Label],
    features: np.ndarray | None,
    backbone: Backbone | None,
    config: Config,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """What leaving out a whole category costs, beside leaving out as many prompts of all.

    Args:
        labels: rows `[N]` that may be learnt from, with the category of each one's prompt.
        features, backbone: as in `account.left_out`.
        config: its `reward` table.
        progress: called with `{"stage", "done", "total"}`.

    Returns: see `drops`; None where there are fewer than two categories with rows enough.
    """
    categories = np.array([row.category for row in labels])
    if (np.unique(categories, return_counts=True)[1] >= FEWEST).sum() < 2:
        return None
    groups = np.array([row.prompt_id for row in labels])
    fold = heads.grouped_folds(groups, config.reward.folds, seed=config.reward.seed)
    seen, unseen = (
        left_out(labels, parts, features, backbone, config, stage=stage, progress=progress)
        for parts, stage in ((fold, "folds"), (categories, "categories left out"))
    )
    return drops(seen, unseen, targets(labels), overall(labels), groups, categories)


def drops(
    seen: np.ndarray,
    unseen: np.ndarray,
    labels: np.ndarray,
    scalar: np.ndarray,
    groups: np.ndarray,
    categories: np.ndarray,
    *,
    manifold: Manifold = MANIFOLD,
) -> dict[str, Any]:
    """Measures of each category by two sets of predictions, and where they fall apart most.

    Args:
        seen, unseen: predictions `[N, K + 2]` that left out some prompts of every category, and the whole category.
        labels: `[N, K + 2]`; scalar: overall label `[N]`; groups, categories: `[N]`.

    Returns: `categories`, by name `rows`, `pairs` (clear ones), `pair_accuracy` and `residual` (mean residual
        correlation) of `seen` and, as `..._unseen`, of `unseen`; and by measure the largest drop: `pair_accuracy_drop`
        and `residual_drop`, each `{"value", "of"}`. None where there are fewer than 30 pairs, or rows.
    """
    size, found = len(manifold.names), {}
    for name in np.unique(categories).tolist():
        rows = categories == name
        said: dict[str, Any] = {"rows": int(rows.sum())}
        for suffix, predicted in (("", seen[rows]), ("_unseen", unseen[rows])):
            if np.isnan(predicted).any():  # what was left could not teach every output
                said |= {"pairs": 0, f"pair_accuracy{suffix}": float("nan"), f"residual{suffix}": float("nan")}
                continue
            right, _ = metrics.pair_outcomes(scalars(predicted, manifold), scalar[rows], groups[rows], low=CLEAR)
            said["pairs"] = len(right)
            said[f"pair_accuracy{suffix}"] = float(right.mean()) if len(right) >= FEWEST else float("nan")
            residual = metrics.residual_correlations(predicted[:, :size], labels[rows, :size])
            said[f"residual{suffix}"] = float(residual.mean()) if said["rows"] >= FEWEST else float("nan")
        found[name] = said
    return in_json(
        {"categories": found, **{f"{key}_drop": _largest(found, key) for key in ("pair_accuracy", "residual")}}
    )


def _largest(found: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    lost = {name: said[key] - said[f"{key}_unseen"] for name, said in found.items()}
    lost = {name: value for name, value in lost.items() if not np.isnan(value)}
    name = max(lost, key=lambda each: lost[each], default=None)
    return {"value": lost[name] if name else float("nan"), "of": name}
