"""If the words were different, how would the reward shift? The same question is judged again in other words."""

import re
from collections.abc import Sequence
from typing import Any

from hominem_mlx.errors import InputError
from hominem_mlx.evaluation.probes import OVERALL, doubt, is_beyond_doubt, numbers, values
from hominem_mlx.schema import RewardOutput, Scorer

ARROW = "=>"


def counterfactuals(
    scorer: Scorer, prompt: str, reply: str, swaps: Sequence[str] = (), instead: Sequence[str] = ()
) -> dict[str, Any]:
    """Each change asked for, made by itself, and how it shifts every number.

    Args:
        scorer: the judge.
        prompt, reply: as they are.
        swaps: `old=>new`, in prompt and reply wherever `old` stands; an empty `new` leaves it out.
        instead: other prompts for the same reply.

    Returns: `prompt`, `reply`, `as_is` (see `probes.numbers`), and `counterfactuals`, each with `change` (what was
        asked for), `prompt`, `reply`, `judged` and `shifts` (see `shifts`).
    Raises: InputError for a swap that cannot be read, or whose `old` does not occur.
    """
    worlds = [(swap, *swapped(prompt, reply, swap)) for swap in swaps]
    worlds += [("another prompt", other, reply) for other in instead]
    as_is, *others = scorer.score_many([(prompt, reply), *((asked, said) for _, asked, said in worlds)])
    return {
        "prompt": prompt,
        "reply": reply,
        "as_is": numbers(as_is),
        "counterfactuals": [
            {"change": change, "prompt": asked, "reply": said, "judged": numbers(other), "shifts": shifts(as_is, other)}
            for (change, asked, said), other in zip(worlds, others, strict=True)
        ],
    }


def shifts(before: RewardOutput, after: RewardOutput) -> dict[str, dict[str, Any]]:
    """What each number (dimensions, intensity, safety, scalar) gains.

    Returns: `shift` (after less before), `noise` (see `probes.doubt`) and `is_sure`, whether it lies outside
        two standard deviations of chance.
    """
    found = {}
    for name, value in values(before).items():
        shift, noise = values(after)[name] - value, doubt(after, before, name)
        found[name] = {"shift": shift, "noise": noise, "is_sure": is_beyond_doubt(shift, noise)}
    return found


def swapped(prompt: str, reply: str, swap: str) -> tuple[str, str]:
    """Prompt and reply with `old` exchanged for `new` wherever it stands.

    Letters that come large and small, and digits, are matched as whole words, or `he=>she` would make `tshe` of `the`;
    scripts that write no spaces, or join words, are matched anywhere.
    """
    old, arrow, new = swap.partition(ARROW)
    old, new = old.strip(), new.strip()
    if not arrow or not old or old == new:
        raise InputError(
            f"a swap is 'old{ARROW}new', two different texts of which the second may be empty; got {swap!r}"
        )
    before, after = (r"(?<!\w)" if _is_spaced(old[0]) else ""), (r"(?!\w)" if _is_spaced(old[-1]) else "")
    pattern = re.compile(before + re.escape(old) + after)
    if not new:
        pattern = re.compile(rf"(?:^{pattern.pattern}[^\S\n]?|[^\S\n]?{pattern.pattern})")  # with a space beside it
    made = tuple(pattern.sub(lambda _: new, text) for text in (prompt, reply))
    if made == (prompt, reply):
        inside = "; it stands inside longer words only" if old in prompt or old in reply else ""
        raise InputError(f"the swap {swap!r}: {old!r} does not occur in the prompt or the reply{inside}")
    return made[0], made[1]


def _is_spaced(sign: str) -> bool:
    return sign.isdigit() or sign.lower() != sign.upper()


def as_text(found: dict[str, Any]) -> str:
    """Shifts as a table for a terminal: one line a number, one column a counterfactual."""
    worlds = found["counterfactuals"]
    lines = []
    for index, world in enumerate(worlds):
        lines.append(f"[{index + 1}] {world['change']}")
        lines += [f"    {key}: {world[key]}" for key in ("prompt", "reply") if world[key] != found[key]]
        lines += [f"    ({', '.join(world['judged']['flags'])})"] * bool(world["judged"]["flags"])
    as_is = found["as_is"]
    now = {**as_is["reward_vector"], **{name: as_is[name] for name in OVERALL}}
    width = max(map(len, now))
    head = " " * width + f"{'as it is':>10}" + "".join(f"{f'[{n + 1}]':>15}  " for n in range(len(worlds)))
    lines += ["", head.rstrip()]
    for name, value in now.items():
        line = f"{name:<{width}}{value:>+10.2f}"
        for world in worlds:
            row = world["shifts"][name]
            cell = f"{row['shift']:+.2f}" + (f" ±{row['noise']:.2f}" if row["noise"] else "      ")
            line += f"{cell:>15}" + (" *" if row["is_sure"] else "  ")
        lines.append(line.rstrip())
    return "\n".join([*lines, "shift ± its standard deviation; * outside two of them"])
