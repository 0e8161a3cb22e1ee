"""Dimensions that a person added, in the reward model: learnt when there are labels enough, told apart from the seven.

What is measured of the seven, and the gates that hang on it, stay what they were when a dimension is added: it has
lines of its own in the account.
"""

from collections.abc import Sequence

import numpy as np

from hominem_mlx import metrics
from hominem_mlx.records import Label
from hominem_mlx.reward.examine import CLEAR, CLOSE
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.schema import COMMON, Manifold

LEAST_PROMPTS = 10  # with labels in it: two in each of five folds, by which its penalty is chosen


def not_learnt_yet(labels: Sequence[Label], manifold: Manifold) -> dict[str, int]:
    """Dimensions of the person's own that cannot be learnt yet, and how many more prompts need labels in each."""
    counts = {
        dimension.name: len({row.prompt_id for row in labels if dimension.name in row.reward.own})
        for dimension in manifold.own
    }
    return {name: LEAST_PROMPTS - count for name, count in counts.items() if count < LEAST_PROMPTS}


def learnable(labels: Sequence[Label], manifold: Manifold) -> Manifold:
    """The manifold without these: a model of the others is better than none."""
    return manifold.without(not_learnt_yet(labels, manifold))


def of_the_seven(manifold: Manifold, *values: np.ndarray) -> list[np.ndarray]:
    """Arrays `[..., K + 2]` of outputs without those of the person's own."""
    kept = [place for place, name in enumerate((*manifold.names, *EXTRA)) if name in COMMON or name in EXTRA]
    return [each[..., kept] for each in values]


def own_lines(
    predicted: np.ndarray, baseline: np.ndarray, values: np.ndarray, groups: np.ndarray, manifold: Manifold
) -> dict[str, dict]:
    """Measures of the person's dimensions, `own` of the model and `baseline_own`, each by name.

    Args:
        predicted, baseline: out-of-fold predictions `[N, K + 2]`; values: labels, NaN where there is none.
        groups: the prompt of each row.
    """
    found: dict[str, dict] = {"own": {}, "baseline_own": {}} if manifold.own else {}
    for dimension in manifold.own:
        place = manifold.names.index(dimension.name)
        for key, said in (("own", predicted), ("baseline_own", baseline)):
            p, y = said[:, place], values[:, place]
            measured = {
                "rmse": metrics.rmse(p, y),
                "mae": metrics.mae(p, y),
                "pearson": metrics.pearson(p, y),
                "pair_accuracy": metrics.pair_accuracy(p, y, groups, low=CLEAR),
                "close_pair_accuracy": metrics.pair_accuracy(p, y, groups, low=CLOSE, high=CLEAR),
            }
            told = {name: None if np.isnan(value) else round(value, 6) for name, value in measured.items()}
            found[key][dimension.name] = told | {"rows": int((~np.isnan(y)).sum())}
    return found
