"""What a judge says of replies to one prompt, and on which dimensions they differ."""

import math
from collections.abc import Sequence
from typing import Any

from hominem_mlx.schema import RewardOutput, Scorer

SMALLEST = 0.1  # a difference people would not argue about; also the floor where a judge reports no uncertainty


def probe(scorer: Scorer, prompt: str, replies: Sequence[str]) -> dict[str, Any]:
    """Judge candidate replies side by side.

    Returns: `candidates` (text and numbers of each) and `changed`: the dimensions whose values differ, by how much,
        which candidate is highest and lowest, widest difference first.
    """
    outputs = scorer.score_many([(prompt, reply) for reply in replies])
    return {
        "prompt": prompt,
        "candidates": [{"reply": reply, **numbers(said)} for reply, said in zip(replies, outputs, strict=True)],
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
    }


def changed(outputs: Sequence[RewardOutput]) -> dict[str, dict[str, Any]]:
    """Dimensions on which the best and the worst candidate differ by more than noise.

    Noise is the larger of 0.1 and the standard deviation of the difference, `sqrt(u1^2 + u2^2)`.
    """
    found = {}
    for name in outputs[0].reward_vector if outputs else ():
        values = [said.reward_vector[name] for said in outputs]
        top, bottom = max(range(len(values)), key=values.__getitem__), min(range(len(values)), key=values.__getitem__)
        noise = math.hypot(outputs[top].uncertainty.get(name, 0.0), outputs[bottom].uncertainty.get(name, 0.0))
        difference = values[top] - values[bottom]
        if difference > max(SMALLEST, noise):
            found[name] = {"difference": difference, "noise": noise, "highest": top, "lowest": bottom}
    return dict(sorted(found.items(), key=lambda item: -item[1]["difference"]))


def as_text(probed: dict[str, Any]) -> str:
    """A probe as a table for a terminal: one line a number, one column a candidate."""
    candidates = probed["candidates"]
    rows: list[tuple[str, list[float]]] = [
        (name, [candidate["reward_vector"][name] for candidate in candidates])
        for name in (candidates[0]["reward_vector"] if candidates else ())
    ]
    rows += [
        (key, [candidate[key] for candidate in candidates]) for key in ("reward_intensity", "safety_score", "scalar")
    ]
    width = max((len(name) for name, _ in rows), default=0)
    head = " " * width + "".join(f"{f'[{index + 1}]':>9}" for index in range(len(candidates)))
    lines = [f"[{index + 1}] {candidate['reply']}" for index, candidate in enumerate(candidates)] + ["", head]
    for name, values in rows:
        mark = "  *" if name in probed["changed"] else ""
        lines.append(f"{name:<{width}}" + "".join(f"{value:>+9.2f}" for value in values) + mark)
    lines.append("* differs by more than the judge's own uncertainty" if probed["changed"] else "no dimension differs")
    return "\n".join(lines)
