"""Layers and poolings chosen by left-out prompts: read once, chosen on training rows alone, and kept on record."""

import math

import numpy as np
import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli
from hominem_mlx.config import Config
from hominem_mlx.files import write_jsonl
from hominem_mlx.records import Label
from hominem_mlx.reward import fit as fitting
from hominem_mlx.reward import layers
from hominem_mlx.reward import train as training
from hominem_mlx.reward.account import cross_validate, left_out
from hominem_mlx.reward.features import Backbone, LmReader
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.reading import open_backbone
from hominem_mlx.schema import MANIFOLD

NAN = math.nan
PAIRS = [("Hm?", "Yes, and thank you."), ("Why is that so?", "Nobody knows."), ("Hm?", "No")]


def settings(**changes) -> Config:
    fixed = {"backbone": "lm", "folds": 3, "members": 2, "penalties": [0.1, 1.0]}
    return Config.model_validate({"reward": {**fixed, **changes}})


@pytest.fixture
def rows() -> list[Label]:
    """Three replies to each of 12 prompts; a question raises curiosity, the rest is noise."""
    rng, found = np.random.default_rng(0), []
    for number in range(12):
        for letter in "abc":
            asks = rng.random() < 0.5
            vector = rng.uniform(-0.5, 0.5, 7)
            vector[-1] = 0.7 if asks else -0.7
            reward = dict(zip(MANIFOLD.names, vector.round(2).tolist(), strict=True))
            reward |= {"reward_intensity": 0.5, "safety_score": round(float(rng.uniform()), 2)}
            words = " ".join(rng.permutation(["morning", "house", "river", "window"])[:2])
            label = {"id": f"p{number}-{letter}", "prompt_id": f"p{number}", "prompt": f"Prompt {number}"}
            found.append(Label(**label, response=f"{words} {'how was it?' if asks else 'so be it.'}", reward=reward))
    return found


@pytest.fixture
def trained(registry, rows):
    """The reward model's artifact with these settings."""

    def make(lm, **changes):
        with registry.draft("dataset") as draft:
            write_jsonl(draft.folder / "labels.train.jsonl", rows[:27])
            write_jsonl(draft.folder / "labels.valid.jsonl", rows[27:])
        return training.train(registry, draft.published, settings(**changes), lm=lm)

    return make


def test_there_are_at_most_six_and_the_default_comes_first():
    default = Config().reward.reading("lm")
    assert layers.SETS[0] == (default.layers, default.poolings) and len(layers.SETS) <= 6


def test_a_choice_has_the_columns_that_reading_it_alone_gives(tiny):
    lm = tiny()
    reader = LmReader(lm)
    wide = open_backbone("lm", settings(choose_layers=True), None, lm)
    read, _ = wide.read(PAIRS)
    choices = layers.candidates(wide)
    assert len(choices) == 6 and choices[0] == ((0, 1), ("mean", "max", "std", "gap"))
    for choice in choices:
        alone, _ = Backbone(reader, *choice).read(PAIRS)
        np.testing.assert_array_equal(layers.part(read, wide, choice), alone)
    assert layers.candidates(Backbone(reader, *choices[0])) == [], "what is not read cannot be chosen"


def test_the_least_error_wins_each_output_in_its_own_unit():
    labels = np.array([[1.0, 100], [-1, -100], [1, NAN], [-1, NAN]])  # standard deviations 1 and 100
    errors = {
        "first": np.array([[0.5, 90], [0.5, 90], [0.5, NAN], [0.5, NAN]]),  # (4 * 0.25 + 2 * 0.81) / 6 = 0.437
        "better": np.array([[0.6, 10], [0.6, 10], [0.6, NAN], [0.6, NAN]]),  # (4 * 0.36 + 2 * 0.01) / 6 = 0.243
        "same": np.array([[0.6, 10], [0.6, 10], [0.6, NAN], [0.6, NAN]]),
        "unknown": np.full((4, 2), NAN),
    }
    assert layers.best(["unknown", "first", "better", "same"], errors.get, labels) == "better"
    assert layers.best(["unknown", "unknown"], errors.get, labels) == "unknown"


def test_the_chosen_model_is_the_one_that_its_settings_would_make(trained, registry, tiny):
    lm = tiny()
    made = trained(lm, choose_layers=True)
    model = RewardModel.load(made.folder, lm=lm)
    choice = layers.Choice(model.card.layers, model.card.poolings)
    (chosen, *_) = (
        {"layers": depths, "poolings": poolings}
        for depths, poolings in layers.SETS
        if (tuple(layers.layer_numbers(depths, lm.num_layers)), poolings) == choice
    )
    notes = made.metadata["notes"]["backbone"]
    assert (notes["layers"], notes["poolings"]) == ([*choice.layers], [*choice.poolings])
    kept = sorted((registry.home / "cache").rglob("*.safetensors"))
    plain = trained(lm, **chosen)
    assert sorted((registry.home / "cache").rglob("*.safetensors")) == kept, "nothing is read twice"
    assert RewardModel.load(plain.folder, lm=lm).fingerprint() == model.fingerprint()
    key = "valid_pair_accuracy"
    assert made.metadata["metrics"][key] == plain.metadata["metrics"][key]
    told = made.metadata["metrics"]["layers"]
    assert sum(each["folds"] for each in told) == 3 and set(told[0]) == {"layers", "poolings", "folds"}
    assert "layers" not in plain.metadata["metrics"]


def test_a_fold_is_never_part_of_the_choice_made_for_it(rows, home, tiny, monkeypatch):
    seen, real = [], fitting._chosen

    def spy(rows, values, words, config):
        seen.append(({*rows.groups}, len(values), len(rows.features)))
        return real(rows, values, words, config)

    monkeypatch.setattr(fitting, "_chosen", spy)
    cross_validate(rows, settings(choose_layers=True), home=home, lm=tiny())
    everything = {row.prompt_id for row in rows}
    assert len(seen) == 3 and all(count == 24 == number for _, count, number in seen)
    out = [everything - prompts for prompts, *_ in seen]
    assert sorted(prompt for prompts in out for prompt in prompts) == sorted(everything)


def test_parts_left_out_are_told_by_what_each_model_chose_and_by_a_fixed_one(rows, home, tiny):
    config, lm, parts = settings(choose_layers=True), tiny(), np.arange(36) // 18
    wide = open_backbone("lm", config, home, lm)
    pairs = [(row.prompt, row.response) for row in rows]
    found = left_out(rows, parts, wide.read(pairs)[0], wide, config)
    assert found.shape == (36, 9) and np.isfinite(found).all()
    narrow = Backbone(wide.reader, (1,), ("mean",))
    fixed = left_out(rows, parts, narrow.read(pairs)[0], narrow, config)
    alike = settings(layers=(0.5,), poolings=("mean",))
    np.testing.assert_array_equal(fixed, left_out(rows, parts, narrow.read(pairs)[0], narrow, alike))


def test_the_command_line_says_what_was_chosen(home, registry, rows, tiny_folder):
    with registry.draft("dataset") as draft:
        write_jsonl(draft.folder / "labels.train.jsonl", rows)
        write_jsonl(draft.folder / "labels.valid.jsonl", [])
    registry.use(draft.published, pointer="labels")
    told = ["reward.backbone=lm", "reward.choose_layers=true", "reward.folds=2", "reward.members=1"]
    done = CliRunner().invoke(cli, ["train", "reward", *told, f"student.base={tiny_folder}"])
    assert "Chosen to be read: layers " in done.output, done.output
