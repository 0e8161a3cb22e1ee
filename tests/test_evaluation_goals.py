"""Goals are written once and compared in one place."""

import tomllib
from pathlib import Path

import pytest

from hominem_mlx.errors import ConfigError
from hominem_mlx.evaluation import goals

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("value", "goal", "kept"),
    [
        (0.75, {"at_least": 0.75}, True),
        (0.7499, {"at_least": 0.75}, False),
        (0.60, {"above": 0.60}, False),
        (0.61, {"above": 0.60}, True),
        (0, {"at_most": 0}, True),
        (1, {"at_most": 0}, False),
        (0.01, {"below": 0.01}, False),
        (True, {"equals": True}, True),
        (False, {"equals": True}, False),
        (1.2, {"at_least": 0.8, "at_most": 1.2}, True),
        (0.79, {"at_least": 0.8, "at_most": 1.2}, False),
        (1.21, {"at_least": 0.8, "at_most": 1.2}, False),
        (None, {"at_most": 0}, False),
        (float("nan"), {"at_least": 0}, False),
    ],
)
def test_a_goal_holds_only_inside_every_bound(value, goal, kept):
    assert goals.holds(value, goal) is kept


def test_a_missed_figure_says_so_and_keeps_its_value():
    entry = goals.figure("A2", 0.7, n=90, spread=(0.6, 0.8), how="tried")
    assert entry == {
        "value": 0.7,
        "goal": {"at_least": 0.75},
        "holds": False,
        "n": 90,
        "spread": [0.6, 0.8],
        "how": "tried",
    }
    reasons = goals.missed({"A2": entry, "A3_before": goals.figure("A3_before", 0.0, n=60)})
    assert len(reasons) == 1 and reasons[0].startswith("A2: 0.700 where ≥ 0.75 was asked")


def test_what_could_not_be_measured_is_null_and_does_not_hold():
    entry = goals.figure("A4_train", float("nan"), n=0)
    assert entry["value"] is None and entry["holds"] is False
    assert "not measured" in goals.missed({"A4_train": entry})[0]


def test_goals_of_the_issue_stand_in_the_file():
    wanted = {
        "A1": {"at_most": 180},
        "A2": {"at_least": 0.75},
        "A2_low": {"above": 0.6},
        "A3": {"at_least": 0.9},
        "A3_before": {"at_most": 0},
        "A4_train": {"at_least": 0.5},
        "A4_audit": {"above": 0},
        "A5": {"above": 0},
        "A6": {"equals": True},
        "A7": {"at_most": 0.15},
        "A8": {"at_most": 720},
        "A9": {"above": 0},
    }
    assert {name: goals.bounds(name) for name in wanted} == wanted


def test_an_unknown_figure_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'Z7'.*known: A1"):
        goals.figure("Z7", 1, n=1)


def test_the_wheel_carries_the_goals_where_they_are_looked_for():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    target = build["wheel"]["force-include"]["benchmarks/goals.toml"]
    assert (ROOT / "src" / target) == goals.PLACES[0]
    assert goals.PLACES[1] == ROOT / "benchmarks" / "goals.toml" and goals.PLACES[1].exists()
    assert "/benchmarks/goals.toml" in build["sdist"]["include"]


def test_every_mistake_in_a_goals_file_is_named_at_once(tmp_path, monkeypatch):
    file = tmp_path / "goals.toml"
    file.write_text('[X]\nunit = "s"\nat_last = 3\n')
    monkeypatch.setattr(goals, "PLACES", (file,))
    goals.goals.cache_clear()
    try:
        with pytest.raises(ConfigError) as caught:
            goals.goals()
    finally:
        goals.goals.cache_clear()
    text = str(caught.value)
    assert "what is missing" in text and "X.at_last" in text and "no bound" in text
