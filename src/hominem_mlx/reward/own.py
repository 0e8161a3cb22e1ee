"""What labels may hold beside the seven: dimensions that a person added, and axes of emotion. Each is learnt when there
are labels enough, and told apart from the seven.

What is measured of the seven, and the gates that hang on it, stay what they were: the others have lines of their own
in the account. Axes of emotion come after all other outputs and count in no scalar.
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
    """What cannot be learnt yet, and how many more prompts need labels in it: dimensions of the person's own, and axes
    of emotion that any label has.
    """
    counts = {dimension.name: _prompts(labels, dimension.name) for dimension in manifold.own}
    counts |= {axis.name: count for axis in manifold.emotions if (count := _prompts(labels, axis.name))}
    return {name: LEAST_PROMPTS - count for name, count in counts.items() if count < LEAST_PROMPTS}


def learnable(labels: Sequence[Label], manifold: Manifold) -> Manifold:
    """The manifold without these: a model of the others is better than none."""
    return manifold.without(not_learnt_yet(labels, manifold))


def felt(labels: Sequence[Label], manifold: Manifold) -> tuple[str, ...]:
    """The axes of emotion beside the manifold in use that the labels can teach."""
    return tuple(axis.name for axis in manifold.emotions if _prompts(labels, axis.name) >= LEAST_PROMPTS)


def _prompts(labels: Sequence[Label], name: str) -> int:
    return len({row.prompt_id for row in labels if name in row.reward.own})


def of_the_seven(manifold: Manifold, *values: np.ndarray) -> list[np.ndarray]:
    """Arrays `[..., K + 2]`, or more, of outputs without those of the person's own and without emotions."""
    kept = [place for place, name in enumerate((*manifold.names, *EXTRA)) if name in COMMON or name in EXTRA]
    return [each[..., kept] for each in values]


def own_lines(
    predicted: np.ndarray,
    baseline: np.ndarray,
    values: np.ndarray,
    groups: np.ndarray,
    manifold: Manifold,
    emotions: Sequence[str] = (),
) -> dict[str, dict]:
    """Measures of the person's dimensions and of emotions, `own` of the model and `baseline_own`, each by name.

    Args:
        predicted, baseline: out-of-fold predictions `[N, K + 2 + E]`; values: labels, NaN where there is none.
        groups: the prompt of each row.
        emotions: names of the last `E` outputs.
    """
    own = [dimension.name for dimension in manifold.own] + [*emotions]
    outputs = (*manifold.names, *EXTRA, *emotions)
    found: dict[str, dict] = {"own": {}, "baseline_own": {}} if own else {}
    for name in own:
        place = outputs.index(name)
        for key, said in (("own", predicted), ("baseline_own", baseline)):
            p, y = said[:, place], values[:, place]
            measured = {
                "rmse": metrics.rmse(p, y),
                "mae": metrics.mae(p, y),
                "pearson": metrics.pearson(p, y),
                "pair_accuracy": metrics.pair_accuracy(p, y, groups, low=CLEAR),
                "close_pair_accuracy": metrics.pair_accuracy(p, y, groups, low=CLOSE, high=CLEAR),
            }
            told = {measure: None if np.isnan(value) else round(value, 6) for measure, value in measured.items()}
            found[key][name] = told | {"rows": int((~np.isnan(y)).sum())}
    return found
