"""From what two models did to numbers: order of held-out pairs, recall, reward of free answers, fixtures.

Pure functions; `before` is the base, `after` the same base with the adapter. Intervals are 95 % bootstraps by prompt.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hominem_mlx.config import EvaluationConfig
from hominem_mlx.evaluation.observe import Observed, Suite
from hominem_mlx.evaluation.text import contains, distinct2, is_recalled, words
from hominem_mlx.metrics import Interval, bootstrap, pair_margins, pair_outcomes, paired_bootstrap
from hominem_mlx.models.sampling import Answer
from hominem_mlx.records import Fixture, Label
from hominem_mlx.schema import RewardOutput

WORDS_LOST = "its answer no longer keeps the required words"
ORDER_LOST = "the worse reply is now the likelier one"
FLIP_NATS = 0.05  # a token; an order closer than this was a coin toss, and losing it is no regression


def preference(
    suite: Suite,
    before: Observed,
    after: Observed,
    lengths: np.ndarray,
    judged: Mapping[str, Sequence[RewardOutput]],
    config: EvaluationConfig,
) -> dict[str, Any] | None:
    """Order of held-out pairs by the adapter's implicit reward, and beside it by simpler rules. None without pairs.

    Implicit reward of a reply: `log p_after - log p_before`, so before training every margin is 0 and counts one half.
    Source: Rafailov et al. 2023, section 5 (arXiv 2305.18290).

    Args:
        lengths: tokens of each label's reply, `[N]`.
        judged: predictions on the same replies by name of the judge.
    """
    label = np.array([_overall(row) for row in suite.labels], float)
    groups = np.array([row.prompt_id for row in suite.labels])

    def outcomes(predicted) -> np.ndarray:
        return pair_outcomes(predicted, label, groups, low=config.min_margin)[0]

    margins, owners = pair_margins(after.labels - before.labels, label, groups, low=config.min_margin)
    if not len(margins):
        return None
    interval = _bootstrap(0.5 + 0.5 * np.sign(margins), owners, config)
    return {
        "n": len(margins),
        "prompts": len(np.unique(owners)),
        "min_margin": config.min_margin,
        "accuracy_before": 0.5,
        "accuracy_after": interval.mean,
        "interval": [interval.low, interval.high],
        "normalised_before": float(outcomes(before.labels / lengths).mean()),
        "normalised_after": float(outcomes(after.labels / lengths).mean()),
        "length_only": float(outcomes(lengths).mean()),
        "judges": {name: float(outcomes([said.scalar for said in outputs]).mean()) for name, outputs in judged.items()},
        "margins": margins.tolist(),
    }


def memory(suite: Suite, before: Observed, after: Observed, config: EvaluationConfig) -> dict[str, Any] | None:
    """Recall of taught facts by greedy answers: this fact's key, and no other fact's. None without questions."""
    if not suite.recall:
        return None
    keys = [(row.fact_id, row.key) for row in suite.recall]
    questions: list[dict[str, Any]] = []
    for row, first, second in zip(suite.recall, before.recall, after.recall, strict=True):
        others = [key for fact, key in keys if fact != row.fact_id]
        questions.append(
            {
                "id": row.id,
                "fact_id": row.fact_id,
                "question": row.question,
                "key": row.key,
                "before": is_recalled(first.text, row.key, others),
                "after": is_recalled(second.text, row.key, others),
                "answer_before": first.text,
                "answer_after": second.text,
            }
        )
    hits = np.array([question["after"] for question in questions], float)
    interval = _bootstrap(hits, [question["fact_id"] for question in questions], config)
    return {
        "total": len(questions),
        "facts": len({fact for fact, _ in keys}),
        "recalled_before": sum(question["before"] for question in questions),
        "recalled_after": sum(question["after"] for question in questions),
        "interval": [interval.low, interval.high],
        "missed": [question["id"] for question in questions if not question["after"]],
        "questions": questions,
    }


def generation(
    suite: Suite,
    before: Observed,
    after: Observed,
    judged: Mapping[str, tuple[Sequence[RewardOutput], Sequence[RewardOutput]]],
    config: EvaluationConfig,
) -> dict[str, Any] | None:
    """Free answers to held-out prompts, before and after. None without prompts.

    Args:
        judged: by judge (`training`, `audit`), its verdicts on `before.samples` and on `after.samples`.
    """
    if not before.samples:
        return None
    owners = np.repeat(list(suite.prompts), config.samples)
    found: dict[str, Any] = {"n": len(owners), "prompts": len(suite.prompts), "samples": config.samples}
    for name, observed in (("before", before), ("after", after)):
        texts = [answer.text for answer in observed.samples]
        lengths = [len(words(text)) for text in texts]
        found[name] = {
            "mean_words": float(np.mean(lengths)),
            "words": lengths,
            "distinct2": distinct2(texts),
            "unfinished": float(np.mean([not answer.finished for answer in observed.samples])),
        }
    for measure in ("mean_words", "distinct2"):
        base = found["before"][measure]
        found[f"{measure}_ratio"] = found["after"][measure] / base if base else None
    found["judges"] = {name: _judgement(first, second, owners, config) for name, (first, second) in judged.items()}
    found["answers"] = [
        {
            "prompt_id": owner,
            "prompt": suite.prompts[owner],
            "before": first.text,
            "after": second.text,
            **{name: [a[index].scalar, b[index].scalar] for name, (a, b) in judged.items()},
        }
        for index, (owner, first, second) in enumerate(zip(owners.tolist(), before.samples, after.samples, strict=True))
    ]
    return found


def fixtures(
    suite: Suite, before: Observed, after: Observed, better_lengths: np.ndarray, worse_lengths: np.ndarray
) -> dict[str, Any] | None:
    """What must not regress, and whether it did. None without fixtures.

    Two checks a fixture, each only where the fixture asks for it: its words in the greedy answer, and the better reply
    likelier than the worse one by log-probability per token. What the base fails already cannot regress.
    """
    if not suite.fixtures:
        return None

    def orders(observed: Observed) -> dict[str, float]:
        margins = observed.better / better_lengths - observed.worse / worse_lengths
        return {fixture.id: float(margin) for fixture, margin in zip(suite.ordered, margins, strict=True)}

    order_before, order_after = orders(before), orders(after)
    rows = []
    for fixture, first, second in zip(suite.fixtures, before.fixtures, after.fixtures, strict=True):
        words_before, words_after = _keeps_words(fixture, first), _keeps_words(fixture, second)
        order = [order_before.get(fixture.id), order_after.get(fixture.id)]
        reasons = []
        if words_before and words_after is False:
            reasons.append(WORDS_LOST)
        if (
            order[0] is not None
            and order[1] is not None
            and order[0] > 0 > order[1]
            and order[0] - order[1] > FLIP_NATS
        ):
            reasons.append(ORDER_LOST)
        rows.append(
            {
                "id": fixture.id,
                "prompt": fixture.prompt,
                "why": fixture.why,
                "words": [words_before, words_after],
                "order": order,
                "answers": [first.text, second.text],
                "regressed": reasons,
                "passed": [
                    kept is not False and (margin is None or margin > 0)
                    for kept, margin in zip((words_before, words_after), order, strict=True)
                ],
            }
        )
    return {
        "n": len(rows),
        "ordered": len(suite.ordered),
        "words_regressed": [row["id"] for row in rows if WORDS_LOST in row["regressed"]],
        "order_regressed": [row["id"] for row in rows if ORDER_LOST in row["regressed"]],
        "passed_before": sum(row["passed"][0] for row in rows),
        "passed_after": sum(row["passed"][1] for row in rows),
        "rows": rows,
    }


def drift_per_token(
    nats: np.ndarray, tokens: np.ndarray, suite: Suite, config: EvaluationConfig
) -> dict[str, Any] | None:
    """Base drift: KL per token of the base's own answers, from their sums `[N]` and token counts `[N]`."""
    if not len(nats):
        return None
    owners = np.repeat(list(suite.prompts), config.samples)
    interval = _bootstrap(nats / tokens, owners, config)
    return {
        "nats_per_token": float(nats.sum() / tokens.sum()),
        "interval": [interval.low, interval.high],
        "tokens": int(tokens.sum()),
    }


def _judgement(
    first: Sequence[RewardOutput], second: Sequence[RewardOutput], owners: np.ndarray, config: EvaluationConfig
) -> dict[str, Any]:
    """One judge's view: reward before and after, their spread, the paired difference, and the same by dimension."""
    before = np.array([said.scalar for said in first])
    after = np.array([said.scalar for said in second])
    spread = float(before.std(ddof=1)) if len(before) > 1 else 0.0
    difference = _paired(after, before, owners, config)
    in_sd = [value / spread if spread else None for value in difference]
    names = list(first[0].reward_vector)

    def both(read: Callable[[RewardOutput], float]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([read(said) for said in first]), np.array([read(said) for said in second])

    axes = {name: both(functools.partial(_dimension, name=name)) for name in names}
    axes["intensity"] = both(lambda said: said.reward_intensity)
    axes["safety"] = both(lambda said: said.safety_score)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "sd": spread,
        "difference": list(difference),
        "difference_in_sd": in_sd,
        "dimensions": {
            name: {
                "before": float(a.mean()),
                "after": float(b.mean()),
                "difference": list(_paired(b, a, owners, config)),
            }
            for name, (a, b) in axes.items()
        },
    }


def _dimension(said: RewardOutput, name: str) -> float:
    return said.reward_vector[name]


def _overall(label: Label) -> float:
    value = label.reward.overall()
    return np.nan if value is None else value


def _keeps_words(fixture: Fixture, answer: Answer) -> bool | None:
    if not (fixture.must_contain or fixture.must_not_contain):
        return None
    has_all = all(contains(answer.text, phrase) for phrase in fixture.must_contain)
    return has_all and not any(contains(answer.text, phrase) for phrase in fixture.must_not_contain)


def _bootstrap(values: np.ndarray, groups: Sequence[str] | np.ndarray, config: EvaluationConfig) -> Interval:
    return bootstrap(values, np.asarray(groups), resamples=config.bootstrap, seed=config.seed)


def _paired(a: np.ndarray, b: np.ndarray, groups: np.ndarray, config: EvaluationConfig) -> Interval:
    return paired_bootstrap(a, b, groups, resamples=config.bootstrap, seed=config.seed)
