"""Is a reward model fit to teach with? Named checks on the account of rows it was not fitted on (`science.md` 2.10).

A check that misses its goal is said by name. It refuses the model only where that is certainly broken, and where there
were rows enough to tell; see "Checks that warn and checks that refuse" in docs/ARCHITECTURE.md.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hominem_mlx.records import Label
from hominem_mlx.reward.examine import CERTAIN, compare, hidden_norm, in_json, unclipped
from hominem_mlx.reward.features import Backbone
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.smoothness import WANTED, under_edits, under_noise
from hominem_mlx.reward.targets import edits, overall, targets

ROWS, PAIRS, CONTRASTS = 300, 30, 120  # fewer refuse nothing
SUCCESSOR_PAIRS, SUCCESSOR_PROMPTS = 10, 4  # fewer do not tell a model from its predecessor
MANY_ROWS = 1000  # find a residual correlation of .1 in four cases of five; 300 one of .2 in nearly nine of ten
BY_FAR = 5  # times its goal: where an edit that means nothing refuses a model
BOUNDS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt}
SIGNS = {"at_least": "≥", "at_most": "≤", "above": ">"}


@dataclass(frozen=True)
class Check:
    """One measure beside its goal.

    `check` is its name, `what` says in words what is measured. `value` is None where it could not be measured, and then
    so is `holds`. `goal` holds bounds (`at_least`, `at_most`, `above`), all to be kept. `refuses`: this value alone
    means that the model should not be used.
    """

    check: str
    what: str
    value: float | None
    goal: dict[str, float]
    holds: bool | None
    refuses: bool

    @property
    def verdict(self) -> str:
        """In words."""
        if self.holds is None:
            return "not measured"
        return "holds" if self.holds else "REFUSED" if self.refuses else "not reached"

    @property
    def shown_goal(self) -> str:
        """`≥ 0.8`, or `≥ 1.5 and ≤ 2.5`."""
        return " and ".join(f"{SIGNS[bound]} {limit:.3g}" for bound, limit in self.goal.items())


def checks(account: dict[str, Any]) -> list[Check]:
    """Every check of an account, in the order of `science.md` 2.10.

    Args:
        account: what `examine.compare` found; where they are there also `smoothness`, `noise` and `hidden_norm`
            (see `held_out`), `categories` (`categories.carried_over`) and `against` (`successor.against`, and `name`).
    """
    manifold = [name for name in account["outputs"] if name not in EXTRA]
    whole = account["whole"] >= ROWS
    told, chance = account["pairs"] >= PAIRS, 1 / (2 * len(manifold))
    ratio = _over(account["participation_ratio"], account["label_participation_ratio"])
    spreads = {name: account["outputs"][name]["spread"] for name in manifold}
    flattest = min(
        (name for name in manifold if spreads[name] is not None), key=lambda each: spreads[each], default=None
    )
    spread = spreads[flattest] if flattest else None
    contrasts, even, chance_of_none = account["contrasts"], account["dominance"], account["residual"]["p"]
    ngrams = account["pair_accuracy_difference"]
    found = [
        _check(
            "label_directions",
            "independent directions of the labels; fewer are one impression in disguise: relabel",
            account["label_participation_ratio"],
            broken=account["whole"] >= PAIRS,
            at_least=2.5,
        ),
        _check("clear_pairs", "clear pairs in order; a coin has .5", account["pair_accuracy"], broken=told, above=0.5),
        _check("correlation", "mean correlation with the labels", account["pearson_mean"], broken=whole, above=0.0),
        _check(
            "ngrams",
            "clear pairs beyond counting n-grams, at best; below 0, reward.backbone=ngram is better",
            ngrams["high"],
            at_least=0.0,
        ),
        _check(
            "directions",
            "independent directions of the predictions over those of the labels",
            ratio,
            broken=whole and _below(ratio, 0.5),
            at_least=0.8,
        ),
        _check(
            "spread",
            f"standard deviation of the predictions over that of the labels, flattest dimension{_of(flattest)}",
            spread,
            broken=whole and _below(spread, 0.1),
            at_least=0.5,
        ),
        _check(
            "residual",
            "dimensions found beside the mean of all (residual correlation, p < .01)",
            account["residual"]["certain"] if chance_of_none is not None else None,
            broken=account["whole"] >= MANY_ROWS or (whole and not _below(chance_of_none, CERTAIN)),
            at_least=math.ceil(5 * len(manifold) / 7),
        ),
        _check(
            "contrasts",
            f"edits of one dimension that move it most; chance {chance:.2f}",
            contrasts["share"],
            broken=contrasts["n"] >= CONTRASTS and contrasts["low"] <= chance,
            at_least=0.6,
        ),
        _check(
            "share",
            f"largest share of the scalar's variance{_of(even['share_of'])}",
            even["share"],
            broken=whole and even["share_of"] not in even["declared"] and not _below(even["share"], 0.5),
            at_most=even["allowed"],
        ),
        _check(
            "without_one",
            f"rank correlation of the scalar with itself without one dimension{_of(even['without_of'])}",
            even["without"],
            at_least=0.9,
        ),
        _check(
            "follows_one",
            f"correlation of the scalar with one dimension, less the median{_of(even['follows_of'])}",
            even["follows"],
            at_most=0.15,
        ),
    ]
    return [*found, *_hidden_norm(account), *_steadiness(account), *_categories(account), *_against(account)]


def refusals(found: Sequence[Check]) -> list[str]:
    """Why a reward model should not be used, one sentence each; empty where nothing refuses it."""
    return [
        f"{check.check}: {check.value:.3g} where {check.shown_goal} is asked ({check.what})"
        for check in found
        if check.refuses
    ]


def as_rows(found: Sequence[Check]) -> list[dict[str, Any]]:
    """Checks as JSON."""
    return [in_json(asdict(check)) for check in found]


def held_out(
    model: RewardModel, baseline: RewardModel, labels: Sequence[Label], *, seed: int = 0, wanted: int = WANTED
) -> dict[str, Any]:
    """The account on rows that neither was fitted on: `examine.compare`, and how steady the model is there.

    Args:
        model: the reward model.
        baseline: n-grams fitted on the same training rows.
        labels: held-out rows.
        seed: of bootstrap, permutations, edits and noise.
        wanted: edits that mean nothing, to be judged.
    """
    pairs = [(row.prompt, row.response) for row in labels]
    seven = model.manifold.common
    groups, overalls = np.array([row.prompt_id for row in labels]), overall(labels, seven)
    said = model.score_many(pairs)
    scalar = np.array([output.scalar for output in said])
    account = compare(
        unclipped(said),
        unclipped(baseline.score_many(pairs)),
        targets(labels, seven),
        overalls,
        groups,
        edits=edits(labels, seven),
        seed=seed,
        manifold=seven,
    )
    moved = under_edits(
        lambda edited: np.array([output.scalar for output in model.score_many(edited)]),
        pairs,
        scalar,
        overalls,
        groups,
        wanted=wanted,
        seed=seed,
    )
    norm = hidden_norm(model.features.plain.read(pairs)[0], scalar) if isinstance(model.features, Backbone) else None
    return {
        **account,
        **in_json({"smoothness": moved, "noise": under_noise(model, pairs, seed=seed), "hidden_norm": norm}),
    }


def _hidden_norm(account: dict[str, Any]) -> list[Check]:
    if "hidden_norm" not in account:
        return []
    what, value = (
        "correlation of the scalar with the length of what the head reads, without its sign",
        account["hidden_norm"],
    )
    return [_check("hidden_norm", what, None if value is None else abs(value), at_most=0.3)]


def _steadiness(account: dict[str, Any]) -> list[Check]:
    if "smoothness" not in account:
        return []
    moved, noise = account["smoothness"], account["noise"] or {}
    enough, found = moved["n"] >= WANTED, []
    for key, what, goal in (
        ("median", "change by edits that mean nothing, median, in standard deviations of the scalar", 0.1),
        ("q95", "the same, 95th percentile", 0.5),
        ("flips", "clear pairs that such edits turn round", 0.05),
    ):
        broken = enough and not _below(moved[key], BY_FAR * goal)
        found.append(_check(f"edits_{key}", what, moved[key], broken=broken, at_most=goal))
    what = "change by noise on the tokens' vectors, twice as much over once"
    return [*found, _check("noise_ratio", what, noise.get("ratio"), at_least=1.5, at_most=2.5)]


def _categories(account: dict[str, Any]) -> list[Check]:
    if "categories" not in account:
        return []
    found, lost = [], account["categories"] or {}
    for key, what in (("pair_accuracy", "clear pairs in order"), ("residual", "mean residual correlation")):
        drop = lost.get(f"{key}_drop", {"value": None, "of": None})
        what = f"{what}: largest loss on a category of prompts that was never seen{_of(drop['of'])}"
        found.append(_check(f"category_{key}", what, drop["value"], at_most=0.1))
    return found


def _against(account: dict[str, Any]) -> list[Check]:
    beside = account.get("against")
    if beside is None:
        return []
    found = []
    for key, what in (("pair_accuracy", "clear pairs in order"), ("residual", "mean residual correlation")):
        what = f"{what}: gain over {beside['name']}, at the best end of the interval"
        told = beside["pairs"] >= SUCCESSOR_PAIRS and beside["prompts"] >= SUCCESSOR_PROMPTS
        found.append(_check(f"against_{key}", what, beside[key]["high"], broken=told, at_least=0.0))
    return found


def _check(name: str, what: str, value: float | None, *, broken: bool = False, **goal: float | None) -> Check:
    bounds = {bound: limit for bound, limit in goal.items() if limit is not None}
    if value is None:
        return Check(name, what, None, bounds, None, False)
    holds = all(BOUNDS[bound](value, limit) for bound, limit in bounds.items())
    return Check(name, what, value, bounds, holds, broken and not holds)


def _below(value: float | None, limit: float) -> bool:
    return value is not None and value < limit


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _of(name: str | None) -> str:
    return f" ({name})" if name else ""
