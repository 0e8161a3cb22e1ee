"""What a judge says of replies to one prompt, on which numbers they differ, and what goes with such differences."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hominem_mlx import metrics
from hominem_mlx.schema import RewardOutput, Scorer

SMALLEST = 0.1  # a difference people would not argue about; also the limit where a judge reports no uncertainty
SURE = 2.0  # standard deviations that chance stays within in 95 of 100 cases
OVERALL = ("reward_intensity", "safety_score", "scalar")  # the numbers beside the dimensions
ENOUGH = 10  # pairs of replies, below which a correlation says nothing
ENOUGH_PROMPTS = 5  # below which its interval says nothing


def probe(scorer: Scorer, prompt: str, replies: Sequence[str]) -> dict[str, Any]:
    """Judge candidate replies side by side.

    Returns: `candidates` (text and numbers of each), `differences` of every number between its highest and lowest
        candidate (see `differences`), and `changed`: the dimensions that really differ, widest difference first.
    """
    return told(prompt, replies, scorer.score_many([(prompt, reply) for reply in replies]))


def told(prompt: str, replies: Sequence[str], outputs: Sequence[RewardOutput]) -> dict[str, Any]:
    """The probe of replies that are judged already."""
    return {
        "prompt": prompt,
        "candidates": [{"reply": reply, **numbers(said)} for reply, said in zip(replies, outputs, strict=True)],
        "differences": differences(outputs),
        "changed": changed(outputs),
    }


def numbers(said: RewardOutput) -> dict[str, Any]:
    """A judgement as plain JSON values, `scalar` first."""
    return {
        "scalar": said.scalar,
        "reward_vector": dict(said.reward_vector),
        "reward_intensity": said.reward_intensity,
        "safety_score": said.safety_score,
        "uncertainty": dict(said.uncertainty),
        "width": dict(said.width),
        "flags": list(said.flags),
    }


def values(said: RewardOutput) -> dict[str, float]:
    """Every number of a judgement by name: dimensions, intensity, safety, scalar."""
    return {**said.reward_vector, **{name: getattr(said, name) for name in OVERALL}}


def doubt(first: RewardOutput, second: RewardOutput, name: str) -> float:
    """Standard deviation of the difference of two judgements in one number, >= 0, in its unit.

    Members are compared one by one: they err alike on texts that are alike, so the doubt in a difference is often far
    less than that in either number. A judge that does not tell its members is taken to err independently each time.
    """
    ours, theirs = first.members.get(name, ()), second.members.get(name, ())
    if ours and len(ours) == len(theirs):
        return float(np.std(np.subtract(ours, theirs)))
    return math.hypot(first.uncertainty.get(name, 0.0), second.uncertainty.get(name, 0.0))


def is_beyond_doubt(difference: float, noise: float) -> bool:
    """Whether a difference is more than two standard deviations; where the judge reports none, more than 0.1."""
    return abs(difference) > (SURE * noise if noise > 0 else SMALLEST)


def differences(outputs: Sequence[RewardOutput]) -> dict[str, dict[str, Any]]:
    """By how much the best and the worst candidate differ, number by number.

    Returns: `difference`, `noise` (see `doubt`), and which candidates are `highest` and `lowest`.
    """
    found = {}
    for name in values(outputs[0]) if outputs else ():
        column = [values(said)[name] for said in outputs]
        top, bottom = max(range(len(column)), key=column.__getitem__), min(range(len(column)), key=column.__getitem__)
        noise = doubt(outputs[top], outputs[bottom], name)
        found[name] = {"difference": column[top] - column[bottom], "noise": noise, "highest": top, "lowest": bottom}
    return found


def changed(outputs: Sequence[RewardOutput]) -> dict[str, dict[str, Any]]:
    """Dimensions on which candidates differ beyond doubt and by more than 0.1, as `differences`, the widest first."""
    found = {
        name: row
        for name, row in differences(outputs).items()
        if name not in OVERALL and row["difference"] > SMALLEST and is_beyond_doubt(row["difference"], row["noise"])
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["difference"]))


def relations(judged: Sequence[Sequence[RewardOutput]], *, seed: int = 0) -> dict[str, Any]:
    """What goes with a change of each dimension, over all pairs of replies to the same prompt.

    Args:
        judged: judgements of the replies to each prompt.
        seed: of the bootstrap.

    Returns: `pairs`, `prompts`, and by dimension `changed` (share of pairs that differ beyond doubt and by more than
        0.1), `size` (mean |change|), and four correlations `{"r", "low", "high"}`: of |change| with the mean
        `intensity` and the mean `safety` of the two replies (do large changes go with weighty, with unsafe replies?),
        and of the change with that of intensity and of safety (`intensity_change`, `safety_change`: do they rise
        together?), these two through the origin, so that it does not matter which reply comes first. `r` is None below
        10 pairs, its 95 % interval, by bootstrap over prompts, below 5 prompts.
    """
    pairs = [
        (number, first, second)
        for number, outputs in enumerate(judged)
        for first, second in itertools.combinations(outputs, 2)
    ]
    owners = np.array([number for number, _, _ in pairs])
    found: dict[str, Any] = {"pairs": len(pairs), "prompts": len(set(owners.tolist())), "dimensions": {}}

    def both(name: str) -> np.ndarray:
        return np.array([[values(first)[name], values(second)[name]] for _, first, second in pairs])

    overall = {name: both(name) for name in OVERALL}
    for name in pairs[0][1].reward_vector if pairs else ():
        change = both(name) @ (1, -1)
        really = [
            abs(by) > SMALLEST and is_beyond_doubt(by, doubt(first, second, name))
            for by, (_, first, second) in zip(change.tolist(), pairs, strict=True)
        ]
        row: dict[str, Any] = {"changed": float(np.mean(really)), "size": float(np.abs(change).mean())}
        for key, beside in (("intensity", "reward_intensity"), ("safety", "safety_score")):
            level, step = overall[beside].mean(axis=1), overall[beside] @ (1, -1)
            row[key] = _correlation(metrics.pearson, np.abs(change), level, owners, seed)
            row[f"{key}_change"] = _correlation(_through_origin, change, step, owners, seed)
        found["dimensions"][name] = row
    return found


def _correlation(measure, a: np.ndarray, b: np.ndarray, owners: np.ndarray, seed: int) -> dict[str, float | None]:
    if len(a) < ENOUGH:
        return {"r": None, "low": None, "high": None}
    drawn = 500 if len(set(owners.tolist())) >= ENOUGH_PROMPTS else 0
    found = metrics.bootstrap_statistic(lambda rows: measure(a[rows], b[rows]), owners, resamples=drawn, seed=seed)
    r, low, high = (None if math.isnan(value) else value for value in (found.mean, found.low, found.high))
    return {"r": r, "low": low, "high": high}


def _through_origin(a: np.ndarray, b: np.ndarray) -> float:
    """`sum ab / sqrt(sum a^2 sum b^2)`, in [-1, 1]; NaN where one never moves."""
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else math.nan


def as_text(probed: dict[str, Any]) -> str:
    """A probe as a table for a terminal: one line a number, one column a candidate."""
    candidates, apart = probed["candidates"], probed["differences"]
    width = max((len(name) for name in apart), default=0)
    told_widths = candidates[0]["width"] if candidates else {}
    many = len(candidates) > 1
    head = " " * width + "".join(f"{f'[{index + 1}]':>15}" for index in range(len(candidates)))
    head += ("     largest difference" if many else "") + ("  9 of 10 within" if told_widths else "")
    lines = [f"[{index + 1}] {candidate['reply']}{_flags(candidate)}" for index, candidate in enumerate(candidates)]
    lines += ["", head.rstrip()]
    for name, row in apart.items():
        cells = [_with_doubt(value_of(candidate, name), candidate["uncertainty"].get(name)) for candidate in candidates]
        line = f"{name:<{width}}" + "".join(f"{cell:>15}" for cell in cells)
        if many:
            mark = " *" if name in probed["changed"] else "  "
            line += f"{_with_doubt(row['difference'], row['noise'] or None):>21}{mark}"
        if name in told_widths:
            line += f"{told_widths[name]:>16.2f}"
        lines.append(line.rstrip())
    if many:
        lines.append(
            "* differs by more than 0.1 and more than two of its own standard deviations (±)"
            if probed["changed"]
            else "no dimension differs by more than 0.1 and two of its own standard deviations (±)"
        )
    return "\n".join(lines)


def value_of(candidate: dict[str, Any], name: str) -> float:
    """One number of a candidate of `told`, by name."""
    return candidate[name] if name in OVERALL else candidate["reward_vector"][name]


def _with_doubt(value: float, noise: float | None) -> str:
    return f"{value:+.2f}" + (f" ±{noise:.2f}" if noise is not None else "      ")


def _flags(candidate: dict[str, Any]) -> str:
    return f"  ({', '.join(candidate['flags'])})" if candidate["flags"] else ""
