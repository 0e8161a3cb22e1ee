"""Is a reward model fit to teach with? Gates on the account training left, and that account on held-out rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hominem_mlx.records import Label
from hominem_mlx.reward.examine import compare
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.train import edits, overall, targets

MIN_PARTICIPATION = 2.5  # independent directions of the labels; below, one impression colours all (`science.md` 2.8)


def refusals(account: dict[str, Any]) -> list[str]:
    """Why a reward model should not be used, one sentence each; empty when every gate passes.

    Args:
        account: measures on rows it was not fitted on, as `examine.compare` returns them. What could not be measured
            (None) refuses nothing: few labels are no fault.
    """
    reasons = []
    accuracy, ratio = account["pair_accuracy"], account["label_participation_ratio"]
    if accuracy is not None and accuracy <= 0.5:
        reasons.append(f"it orders clear pairs no better than a coin ({accuracy:.2f} of {account['pairs']})")
    high = account["pair_accuracy_difference"]["high"]
    if high is not None and high < 0:
        worse = -account["pair_accuracy_difference"]["mean"]
        reasons.append(f"it is clearly worse than counting n-grams (by {worse:.2f} of the pairs)")
    if ratio is not None and ratio < MIN_PARTICIPATION:
        reasons.append(f"its labels have {ratio:.1f} independent directions, want {MIN_PARTICIPATION}: relabel")
    mean = account["pearson_mean"]
    if mean is not None and mean <= 0:
        reasons.append(f"its dimensions are predicted no better than by their means (mean correlation {mean:.2f})")
    return reasons


def held_out(model: RewardModel, baseline: RewardModel, labels: Sequence[Label], *, seed: int = 0) -> dict[str, Any]:
    """The account on rows that neither was fitted on; see `examine.compare`.

    Args:
        model: the reward model.
        baseline: n-grams fitted on the same training rows.
        labels: held-out rows.
    """
    pairs = [(row.prompt, row.response) for row in labels]
    predicted, plain = (
        np.array([[said.unclipped[name] for name in model.card.outputs] for said in judge.score_many(pairs)])
        for judge in (model, baseline)
    )
    groups = np.array([row.prompt_id for row in labels])
    return compare(
        predicted,
        plain,
        targets(labels),
        overall(labels),
        groups,
        edits=edits(labels, model.manifold),
        seed=seed,
        manifold=model.manifold,
    )
