"""Goals, and the one place where a measured value meets them. The goals themselves are in `benchmarks/goals.toml`."""

import functools
import math
import operator
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hominem_mlx.errors import ConfigError

HERE = Path(__file__).parent
PLACES = (HERE / "goals.toml", HERE.parents[2] / "benchmarks" / "goals.toml")  # in the wheel; in the source tree
BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge,
    "at_most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
    "equals": operator.eq,
}
SIGNS = {"at_least": "≥", "at_most": "≤", "above": ">", "below": "<", "equals": "="}
Value = float | int | bool | None


@functools.cache
def goals() -> dict[str, dict[str, Any]]:
    """All goals by figure id: `what`, `unit` and bounds."""
    path = next((place for place in PLACES if place.exists()), None)
    if path is None:
        raise ConfigError(f"goals.toml is neither in {PLACES[0].parent} nor in benchmarks/; install hominem_mlx again")
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    problems = []
    for name, entry in found.items():
        problems += [f"{path}: {name}: {key} is missing" for key in ("what", "unit") if key not in entry]
        unknown = set(entry) - {"what", "unit", "verdict", *BOUNDS}
        problems += [
            f"{path}: {name}.{key}: known are what, unit, verdict, {', '.join(BOUNDS)}" for key in sorted(unknown)
        ]
        if not set(entry) & set(BOUNDS):
            problems.append(f"{path}: {name} has no bound; give one of {', '.join(BOUNDS)}")
    if problems:
        raise ConfigError(problems)
    return found


def bounds(name: str) -> dict[str, Value]:
    """The bounds of one figure, for example `{"at_least": 0.75}`."""
    if name not in goals():
        raise ConfigError(f"no goal is called {name!r}; known: {', '.join(goals())}")
    return {key: value for key, value in goals()[name].items() if key in BOUNDS}


def holds(value: Value, goal: dict[str, Value]) -> bool:
    """Whether a value keeps every bound of its goal; a value that could not be measured keeps none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return all(BOUNDS[bound](value, limit) for bound, limit in goal.items())


def figure(name: str, value: Value, *, n: int, spread: Sequence[float] | None = None, how: str = "") -> dict[str, Any]:
    """One measured figure beside its goal.

    Args:
        name: id in `goals.toml`.
        value: what was measured; None or NaN when it could not be.
        n: how many things it was measured on.
        spread: `[low, high]` of its 95 % interval, or the smallest and largest of several runs.
        how: a sentence saying how it was measured.
    """
    goal = bounds(name)
    measured = None if isinstance(value, float) and math.isnan(value) else value
    return {
        "value": measured,
        "goal": goal,
        "holds": holds(measured, goal),
        "n": n,
        "spread": None if spread is None else [float(end) for end in spread],
        "how": how,
    }


def missed(figures: dict[str, dict[str, Any]]) -> list[str]:
    """One sentence for each figure whose goal does not hold."""
    return [
        f"{name}: {say(entry['value'])} where {say_goal(entry['goal'])} was asked ({goals()[name]['what']})"
        for name, entry in figures.items()
        if not entry["holds"]
    ]


def verdict(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Accepted when every measured goal that speaks of the adapter holds, else refused with a reason a missed goal."""
    reasons = missed({name: entry for name, entry in figures.items() if goals()[name].get("verdict", True)})
    return {"accepted": not reasons, "reasons": reasons}


def say(value: Value) -> str:
    """A value for people: `yes`, `no`, three decimals, or `not measured`."""
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:d}" if isinstance(value, int) else f"{value:.3f}"


def say_goal(goal: dict[str, Value]) -> str:
    """A goal for people: `≥ 0.8 and ≤ 1.2`."""
    return " and ".join(
        f"{SIGNS[bound]} {say(limit) if isinstance(limit, bool) else f'{limit:g}'}" for bound, limit in goal.items()
    )
