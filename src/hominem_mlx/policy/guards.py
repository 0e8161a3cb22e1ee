"""Guards of reinforcement: what gives a policy away that found out how to please its judge and nothing else."""

from collections.abc import Sequence
from typing import Any

from hominem_mlx.config import RlConfig
from hominem_mlx.training.loop import Look

APART = 3  # looks in a row, each with a higher reward and a lower audit than the one before


def apart(looks: Sequence[Look]) -> int:
    """For how many looks in a row, up to the last, the reward has risen while the audit has fallen."""
    count = 0
    for before, after in zip(reversed(looks[:-1]), reversed(looks[1:])):
        if not (after["reward"] > before["reward"] and after["audit"] < before["audit"]):
            break
        count += 1
    return count


def complaints(looks: Sequence[Look], limits: RlConfig) -> dict[str, str]:
    """What speaks against the last of these looks, in words, by guard; the first look is the base's.

    A policy that found out how to please its judge gives itself away: by length, by repetition, by leaving the ground
    the judge knows, by going far, or before a second judge (Gao et al. 2022, arXiv 2210.10760).
    """
    first, last = looks[0], looks[-1]
    longer = last["tokens"] / first["tokens"]
    kept = last["distinct2"] / first["distinct2"] if first["distinct2"] else 1.0
    found = {}
    if not last["kl"] <= limits.max_kl:
        found["kl"] = f"an answer is {last['kl']:.1f} nats from the base (limit {limits.max_kl:g})"
    if longer > limits.max_length:
        found["length"] = f"answers are {longer:.2f} times as long as the base's (limit {limits.max_length:g})"
    if kept < limits.min_distinct2:
        found["distinct2"] = f"only {kept:.2f} of the base's different pairs are left (limit {limits.min_distinct2:g})"
    # The limit is meant for the policy, the share is counted in a sample: hence the standard error. Without it an
    # untouched policy, 1 % strange by definition, would be stopped by 8 % of looks at 8 answers (0.3 % with it). At 128
    # answers it costs little: a policy that is 10 % strange is caught by 90 % of the looks instead of 98 %.
    if last["strange"] > limits.max_strange + (limits.max_strange * (1 - limits.max_strange) / limits.probes) ** 0.5:
        found["strange"] = (
            f"the reward model is unsure as never before of {last['strange']:.0%} of the answers "
            f"(limit {limits.max_strange:.0%})"
        )
    if apart(looks) >= APART:
        found["audit"] = (
            f"for {APART} looks the reward rose (to {last['reward']:+.3f}) and the audit fell "
            f"(to {last['audit']:+.3f}): what pleases the one judge displeases the other"
        )
    return found


def story(looks: Sequence[Look], limits: RlConfig) -> list[dict[str, Any]]:
    """Every complaint as `{"step", "guard", "why"}`, in order."""
    return [
        {"step": looks[end]["step"], "guard": guard, "why": why}
        for end in range(1, len(looks))
        for guard, why in complaints(looks[: end + 1], limits).items()
    ]
