"""What rationales hold and no dimension names: found where it is planted, silent where it is not or has a name."""

import json
import random

import numpy as np
import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli
from hominem_mlx.data import home as homes
from hominem_mlx.data import unnamed
from hominem_mlx.data.unnamed import unnamed_axis
from hominem_mlx.records import Label
from hominem_mlx.schema import MANIFOLD, Dimension, Manifold

PLAIN, VEILED = ["blunt", "straight", "plainly", "direct"], ["hedges", "vague", "evasive", "fog"]
WARM, COLD = ["warm", "kindly", "gentle"], ["cold", "harsh", "curt"]
OTHER = [f"word{number}" for number in range(30)]
DIRECTNESS = Dimension(name="directness", question="Does it say what it means?", low="hedges", high="says it")


def rated(prompts: int = 120, *, planted: float = 0.0, labelled: bool = False, seed: int = 0) -> list[Label]:
    """Three replies a prompt; reasons speak of the prompt, of warmth, which has a label, and in part of directness."""
    dice = random.Random(seed)
    rows = []
    for number in range(prompts):
        subject = dice.sample(["garden", "sister", "exam", "rent", "doctor", "journey", "letter", "kitchen"], 3)
        for letter in "abc":
            warm, plain = dice.choice((-1, 1)), dice.choice((-1, 1))
            reward = {name: round(dice.uniform(-0.5, 0.5), 2) for name in MANIFOLD.names} | {"empathy": 0.6 * warm}
            reward["scalar"] = round(0.5 * warm + 0.3 * plain * (dice.random() < planted), 2)
            said = [*subject, *(word for word in (WARM if warm > 0 else COLD) if dice.random() < 0.6)]
            said += [word for word in OTHER if dice.random() < 0.15]
            if dice.random() < planted:
                said += dice.sample(PLAIN if plain > 0 else VEILED, 2)
                if labelled:
                    reward["directness"] = 0.7 * plain
            elif labelled:
                reward["directness"] = 0.0
            dice.shuffle(said)
            rows.append(
                Label(
                    id=f"p{number:03d}-{letter}",
                    prompt_id=f"p{number:03d}",
                    prompt=f"Prompt {number}",
                    response=f"Reply {letter} to {number}",
                    reward=reward,
                    rationale=" ".join(said),
                )
            )
    return rows


def test_a_planted_axis_is_found_with_its_words_and_the_replies_at_its_ends():
    found = unnamed_axis(rated(planted=0.7))
    assert found.is_strong and found.p < 0.01 and found.agreement > 0.7
    ends = [set(end[:4]) for end in found.words]
    assert set(PLAIN) in ends and set(VEILED) in ends
    of_plain = found.ends[ends.index(set(PLAIN))]
    assert len(of_plain) == 3 and all(set(PLAIN) & set(row.rationale.split()) for row in of_plain)
    assert found.pull is not None and abs(found.pull) > 0.3  # the scalar follows what no dimension holds


def test_stats_say_so_and_show_both_ends(home):
    homes.write(home, Label, rated(planted=0.7))
    done = CliRunner().invoke(cli, ["data", "stats", "--json", str(home / "out.json")])
    assert done.exit_code == 0, done.output
    assert "Something that no dimension names" in done.output and "It goes with the scalar" in done.output
    found = json.loads((home / "out.json").read_text())["unnamed"]
    assert found["is_strong"] and all(row["id"] in done.output for end in found["ends"] for row in end)
    homes.write(home, Label, rated())
    assert "Nothing found that no dimension names" in CliRunner().invoke(cli, ["data", "stats"]).output


def test_nothing_is_found_where_nothing_was_planted():
    for seed in range(4):
        assert not unnamed_axis(rated(planted=0.0, seed=seed)).is_strong


def test_what_a_dimension_names_is_no_longer_found():
    rows = rated(planted=0.7, labelled=True)
    grown = Manifold(dimensions=(*MANIFOLD.dimensions, DIRECTNESS))
    assert unnamed_axis(rows).is_strong and not unnamed_axis(rows, grown).is_strong


def test_what_a_few_prompts_are_about_is_no_axis():
    """Words that go together because of the prompt are gone with its mean."""
    rows = [
        row.model_copy(update={"rationale": f"{row.rationale} {'grief funeral loss' if at % 6 < 3 else 'money debt'}"})
        for at, row in enumerate(rated(planted=0.0))
    ]
    assert not unnamed_axis(rows).is_strong


def test_too_few_rationales_say_so():
    found = unnamed_axis(rated(10))
    assert not found.is_strong and "30 rationales" in found.note and "60 are needed" in found.note
    silent = [row.model_copy(update={"rationale": ""}) for row in rated()]
    assert "0 rationales" in unnamed_axis(silent).note
    alike = [row.model_copy(update={"rationale": "as it should be"}) for row in rated()]
    assert "no word" in unnamed_axis(alike).note


def test_dealing_anew_keeps_every_word_within_its_prompt():
    rng = np.random.default_rng(0)
    values, owner = rng.normal(size=(12, 3)), np.array([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2])
    dealt = unnamed._dealt_anew(values, owner, rng)
    assert not np.allclose(dealt, values)
    for group in range(3):
        assert np.sort(dealt[owner == group], axis=0) == pytest.approx(np.sort(values[owner == group], axis=0))


def test_regression_leaves_what_least_squares_leaves():
    rng = np.random.default_rng(1)
    values, known = rng.normal(size=(20, 4)), rng.normal(size=(20, 3))
    known = np.concatenate([known, known[:, :1]], axis=1)  # and a column twice
    wanted = values - known @ np.linalg.lstsq(known, values, rcond=None)[0]
    assert unnamed._without(values, known) == pytest.approx(wanted, abs=1e-10)
