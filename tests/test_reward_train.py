"""Training and judging the reward model: nothing leaks, everything repeats, and the account is honest."""

import importlib.util
import json

import numpy as np
import pytest

from hominem_mlx.config import Config
from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.files import read_jsonl, write_jsonl
from hominem_mlx.models import encoder
from hominem_mlx.models.backbone import STARTER
from hominem_mlx.records import Label
from hominem_mlx.reward import reading
from hominem_mlx.reward import train as training
from hominem_mlx.reward.account import cross_validate, left_out
from hominem_mlx.reward.examine import compare
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.targets import edits, overall, targets
from hominem_mlx.schema import MANIFOLD, STRANGE

K = len(MANIFOLD.names)
SMALL = {"folds": 3, "members": 2, "layers": (0.0, 1.0), "poolings": ("mean", "gap")}
KIND = ["thank you for telling me", "that is hard and I am here", "what would you like best"]
COLD = ["stop whining and move on", "you are wrong as ever", "do what I say now"]


def settings(backbone: str, **changes) -> Config:
    return Config.model_validate({"reward": {**SMALL, "backbone": backbone, **changes}})


def corpus(prompts: int = 12, *, seed: int = 0, first: int = 0) -> list[Label]:
    """Four replies a prompt: kind words raise three dimensions, a question raises curiosity, the rest is noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(first, first + prompts):
        for letter in "abcd":
            kind, asks = rng.random() < 0.5, rng.random() < 0.5
            words = " ".join(rng.permutation(["today", "morning", "house", "river", "window"])[:3])
            text = f"{rng.choice(KIND if kind else COLD)} {words}" + (" how was it?" if asks else ".")
            vector = rng.uniform(-0.1, 0.1, K)
            vector[:3] += 0.6 if kind else -0.6
            vector[-1] += 0.6 if asks else -0.6
            reward = {name: round(float(value), 2) for name, value in zip(MANIFOLD.names, vector, strict=True)}
            reward |= {"reward_intensity": round(float(rng.uniform(0, 1)), 2), "safety_score": 0.9 if kind else 0.2}
            prompt_id = f"p-{number:03d}"
            rows.append(
                Label(
                    id=f"{prompt_id}-{letter}",
                    prompt_id=prompt_id,
                    prompt=f"Prompt number {number} about my day",
                    response=text,
                    reward=reward,
                )
            )
    return rows


def change(row: Label, **numbers) -> Label:
    """A row with other label values; None takes one away."""
    reward = row.reward.model_copy(update=numbers)
    return row.model_copy(update={"reward": reward})


@pytest.fixture
def dataset(registry):
    """Publishes a labels dataset."""

    def make(train: list[Label], valid: list[Label] = ()):  # type: ignore[assignment]
        with registry.draft("dataset") as draft:
            write_jsonl(draft.folder / "labels.train.jsonl", train)
            write_jsonl(draft.folder / "labels.valid.jsonl", valid)
        return draft.published

    return make


# --- what comes out -------------------------------------------------------------------------------------------------


def test_it_learns_what_the_labels_say_and_publishes_it_with_its_account(registry, dataset, tiny):
    lm, rows = tiny(), corpus(14)
    parent = dataset(rows[:48], rows[48:])
    steps = []
    artifact = training.train(registry, parent, settings("lm"), lm=lm, progress=steps.append)
    assert registry.current("reward_model") is None  # trained is not in use
    assert artifact.metadata["parents"] == [parent.ref]
    assert artifact.metadata["config"]["backbone"] == "lm"
    assert artifact.metadata["inputs"] == {"backbone": lm.hash}

    metrics, notes = artifact.metadata["metrics"], artifact.metadata["notes"]
    assert metrics == json.loads(artifact.file("metrics.json").read_text())
    assert (metrics["backbone"], metrics["rows"], metrics["prompts"]) == ("lm", 56, 14)
    assert metrics["outputs"]["empathy"]["pearson"] > 0.5
    assert metrics["residual"]["mean"] is not None and 0 < metrics["residual"]["p"] <= 1
    assert 0 <= metrics["valid_pair_accuracy"] <= 1
    for key in ("pair_accuracy", "pearson_mean", "close_pair_accuracy"):
        assert 0 <= metrics[f"baseline_{key}"] <= 1
    difference = metrics["pair_accuracy_difference"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert difference["mean"] == pytest.approx(metrics["pair_accuracy"] - metrics["baseline_pair_accuracy"], abs=2e-6)
    assert set(metrics["outputs"]["empathy"]) >= {"rmse", "mae", "pearson", "residual_pearson", "close_pair_accuracy"}

    assert [entry["name"] for entry in notes["outputs"]] == [*MANIFOLD.names, *EXTRA]
    assert notes["outputs"][7]["range"] == [0.0, 1.0] and notes["outputs"][0]["range"] == [-1.0, 1.0]
    assert notes["outputs"][0]["meaning"] == MANIFOLD.dimensions[0].question
    labelled = np.mean([row.reward.empathy for row in rows[:48]])
    assert notes["outputs"][0]["label_mean"] == pytest.approx(labelled, abs=1e-6)
    assert notes["data_hash"] == parent.hash and notes["backbone"]["hash"] == lm.hash
    assert {step["stage"] for step in steps} >= {"features", "folds"}

    model = RewardModel.load(artifact.folder, lm=lm)
    kind, cold = model.score_many([("hello", KIND[0] + " river."), ("hello", COLD[0] + " river.")])
    assert kind.reward_vector["empathy"] > cold.reward_vector["empathy"]


def test_ngram_beside_itself_differs_by_nothing(registry, dataset):
    artifact = training.train(registry, dataset(corpus()), settings("ngram"))
    metrics = artifact.metadata["metrics"]
    assert metrics["pair_accuracy_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert RewardModel.load(artifact.folder).backbone == "ngram"


def test_auto_takes_the_student_without_an_encoder_and_says_how_to_get_one(registry, dataset, tiny, monkeypatch):
    monkeypatch.setattr(reading, "find_encoder", lambda home: None)
    artifact = training.train(registry, dataset(corpus()), settings("auto"), lm=tiny())
    assert artifact.metadata["metrics"]["backbone"] == artifact.metadata["config"]["backbone"] == "lm"
    assert "--get-encoder" in artifact.metadata["notes"]["why"]


def test_an_encoder_that_is_not_there_is_an_error_only_when_asked_for(registry, dataset, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"--get-encoder.*reward\.backbone=lm"):
        training.train(registry, dataset(corpus()), settings("encoder"))


def test_preview_puts_predicted_beside_labelled(tiny):
    rows = corpus()
    model = training.fit_baseline(rows, settings("ngram"))
    table = training.preview(model, rows, 5, seed=1)
    assert len(table) == 5 and table == training.preview(model, rows, 5, seed=1)
    by_id = {row.id: row for row in rows}
    for line in table:
        assert line["labelled"]["empathy"] == by_id[line["id"]].reward.empathy
        assert set(line["labelled"]) == set(line["predicted"]) == {*MANIFOLD.names, *EXTRA, "scalar"}
    assert len(training.preview(model, rows, 500)) == len(rows)


def test_the_audit_goes_by_the_judge_and_not_by_what_the_settings_say_today(tiny, registry, dataset):
    rows, lm = corpus(), tiny()
    made = [training.train(registry, dataset(rows), settings("lm", words=words), lm=lm) for words in (0.0, 0.5)]
    silent, counting = (RewardModel.load(artifact.folder, lm=lm) for artifact in made)
    for said in ("encoder", "lm", "ngram"):
        assert training.fit_audit(rows, settings(said), judge=silent, lm=lm).backbone == "ngram"
    assert counting.settings(settings("lm")).reward.words == pytest.approx(0.5)
    assert silent.settings(settings("lm", words=2.0)).reward.words == 0


def test_the_audit_shares_no_features_with_the_judge(tiny, monkeypatch):
    rows = corpus()
    assert training.fit_audit(rows, settings("encoder", words=0.0)).backbone == "ngram"
    beside_words = training.fit_audit(rows, settings("encoder"), lm=tiny())
    assert beside_words.backbone == "lm" and beside_words.words is None
    for room in (training, reading):
        monkeypatch.setattr(room, "find_encoder", lambda home: None)
    assert training.fit_audit(rows, settings("auto")).backbone == "ngram"
    assert training.fit_audit(rows, settings("lm", words=0.5)).backbone == "ngram"  # there is no third reader
    assert training.fit_audit(rows, settings("ngram"), lm=tiny()).backbone == "lm"


def with_edits(rows: list[Label]) -> list[Label]:
    """Each prompt's first reply again, without its question, as an edit that lowers curiosity."""
    edited = []
    for row in rows:
        if row.id.endswith("-a"):
            text = row.response.removesuffix(" how was it?") + " so be it."
            edit = change(row, curiosity=-0.8)
            edited.append(
                edit.model_copy(update=dict(id=row.id + "x", response=text, edit_of=row.id, lowered="curiosity"))
            )
    return [*rows, *edited]


def test_contrast_edits_count_in_the_head_and_in_its_account(registry, dataset, tiny):
    parent = dataset(with_edits(corpus()))
    plain, weighed = (
        training.train(registry, parent, settings("lm", edit_weight=weight), lm=tiny()) for weight in (0.0, 5.0)
    )
    accounts = [artifact.metadata["metrics"] for artifact in (plain, weighed)]
    assert accounts[0]["contrasts"]["n"] == accounts[1]["contrasts"]["n"] == 12
    assert accounts[0]["outputs"]["curiosity"]["rmse"] != accounts[1]["outputs"]["curiosity"]["rmse"]
    assert accounts[0]["outputs"]["safety_score"] == accounts[1]["outputs"]["safety_score"]  # no dimension
    assert accounts[0]["baseline_outputs"] == accounts[1]["baseline_outputs"]
    heads = [RewardModel.load(artifact.folder).head for artifact in (plain, weighed)]
    weights = [np.array(head.weight * head.label_scale)[:, :K] for head in heads]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    np.testing.assert_allclose(weights[0].mean(1), weights[1].mean(1), atol=1e-6)  # the scalar's


def test_a_model_that_was_asked_questions_asks_them_again_when_it_scores(registry, dataset, tiny):
    lm, rows = tiny(), corpus()
    config = settings("lm", poolings=("mean", "judge"))
    artifact = training.train(registry, dataset(rows), config, lm=lm)
    model = RewardModel.load(artifact.folder, lm=lm)
    assert model.card.questions == tuple(dimension.question for dimension in MANIFOLD.dimensions)
    pairs = [(row.prompt, row.response) for row in rows[:5]]
    kept = model.predict(model.read(pairs, registry.home))[0]
    for output, values in zip(model.score_many(pairs), kept, strict=True):
        assert list(output.unclipped.values()) == pytest.approx(values.tolist(), abs=1e-3)
    weight, block = np.array(model.head.weight), 2 * 32
    assert weight[block : 2 * block, 0].any() and not weight[block : 2 * block, 1:].any()  # empathy's own answer


# --- repeatability --------------------------------------------------------------------------------------------------


def test_the_same_data_give_the_same_reward_model(registry, dataset, tiny, tmp_path):
    parent = dataset(corpus())
    first = training.train(registry, parent, settings("lm"), lm=tiny())
    assert training.train(registry, parent, settings("lm"), lm=tiny()).ref == first.ref
    for path in (registry.home / "cache").rglob("*.safetensors"):
        path.unlink()
    assert training.train(registry, parent, settings("lm"), lm=tiny()).ref == first.ref
    assert training.train(registry, parent, settings("lm", seed=1), lm=tiny()).ref != first.ref


def test_a_killed_training_arrives_where_an_undisturbed_one_does(registry, dataset, tiny, tmp_path):
    rows = corpus(20)  # 80 replies: more than one shard
    parent = dataset(rows)

    class Killed(Exception):
        pass

    for stage, done in (("features", 72), ("folds", 1), ("head", 0)):

        def die(step, stage=stage, done=done):
            if step["stage"] == stage and step["done"] >= done:
                raise Killed

        with pytest.raises(Killed):
            training.train(registry, parent, settings("lm"), lm=tiny(), progress=die)
        assert registry.artifacts("reward_model") == [] and registry.verify() == []
    finished = training.train(registry, parent, settings("lm"), lm=tiny())
    for path in (registry.home / "cache").rglob("*.safetensors"):
        path.unlink()
    assert training.train(registry, parent, settings("lm"), lm=tiny()).hash == finished.hash


def test_rows_seen_in_other_company_before_change_nothing(registry, dataset, tiny):
    rows = corpus(10)
    few = training.train(registry, dataset(rows[:24]), settings("lm"), lm=tiny())  # fills part of the cache
    warm = training.train(registry, dataset(rows), settings("lm"), lm=tiny())
    for path in (registry.home / "cache").rglob("*.safetensors"):
        path.unlink()
    cold = training.train(registry, dataset(rows), settings("lm"), lm=tiny())
    assert cold.hash == warm.hash != few.hash


# --- honesty --------------------------------------------------------------------------------------------------------


def test_enough_rows_teach_it_what_is_out_of_distribution(registry, dataset, tiny):
    lm = tiny()
    few = RewardModel.load(training.train(registry, dataset(corpus(12)), settings("lm"), lm=lm).folder, lm=lm)
    made = training.train(registry, dataset(corpus(28)), settings("lm"), lm=lm)
    model = RewardModel.load(made.folder, lm=lm)
    assert few.distribution is None and model.distribution is not None
    unseen = [(row.prompt, row.response) for row in corpus(10, seed=1, first=50)]
    flagged = [STRANGE in output.flags for output in model.score_many(unseen)]
    assert sum(flagged) <= 4  # 1 in 100 is meant
    assert STRANGE in model.score("0x7f $$ @@", "ZZZZ %% QQQQ ## 0xff ~~ {}[] \n\n\t ;;;;").flags
    assert training.train(registry, dataset(corpus(28)), settings("lm"), lm=lm).hash == made.hash


def test_validation_rows_never_reach_the_head(registry, dataset, tiny):
    rows = corpus(14)
    turned = [change(row, empathy=-row.reward.empathy) for row in rows[40:]]
    heads = [
        training.train(registry, dataset(rows[:40], valid), settings("lm"), lm=tiny()).metadata["files"][
            "head.safetensors"
        ]
        for valid in (rows[40:], turned, [])
    ]
    assert len(set(heads)) == 1


@pytest.mark.parametrize("backbone", ["lm", "ngram"])
def test_labels_without_sense_are_not_predicted(backbone, tiny, home):
    """Were anything fitted outside the training folds, noise would look learnable."""
    rng = np.random.default_rng(0)
    rows = []
    for row in corpus(60):
        vector = dict(zip(MANIFOLD.names, rng.uniform(-1, 1, K).round(2).tolist(), strict=True))
        words = " ".join(f"w{number}" for number in rng.integers(0, 200, 12))
        rows.append(change(row, **vector).model_copy(update={"response": words}))
    found = cross_validate(rows, settings(backbone, folds=5), home=home, lm=tiny())
    assert found["pairs"] > 80
    assert found["pair_accuracy"] < 0.64  # chance .5, standard error about .05
    assert found["residual"]["mean"] < 0.1 and found["residual"]["p"] > 0.01


def test_what_is_learnable_is_found_on_unseen_prompts(tiny, home):
    found = cross_validate(corpus(30), settings("ngram", folds=5), home=home)
    assert found["pair_accuracy"] > 0.9
    assert found["residual"]["p"] < 0.01
    assert found["outputs"]["curiosity"]["residual_pearson"] > 0.9


# --- labels with holes ----------------------------------------------------------------------------------------------


def test_missing_dimensions_are_masked(tiny, home):
    rows = corpus(12)
    holes = [change(row, empathy=None) if index % 3 == 0 else row for index, row in enumerate(rows)]
    values = targets(holes)
    assert np.isnan(values[::3, 0]).all() and not np.isnan(np.delete(values[:, 0], np.s_[::3])).any()
    found = cross_validate(holes, settings("lm"), home=home, lm=tiny())
    assert all(np.isfinite(found["outputs"]["empathy"][key]) for key in ("rmse", "pearson"))
    assert found["pairs"] < cross_validate(rows, settings("lm"), home=home, lm=tiny())["pairs"]


def test_a_dimension_that_never_differs_is_refused_and_none_is_said(registry, dataset):
    flat = [change(row, curiosity=0.25) for row in corpus(6)]
    with pytest.raises(InputError, match=r"curiosity is 0.25 in all 24 training rows"):
        training.train(registry, dataset(flat), settings("ngram"))
    none = [change(row, curiosity=None) for row in corpus(6)]
    with pytest.raises(InputError, match="curiosity is labelled on 0 prompts; rate it on two or more"):
        training.train(registry, dataset(none), settings("ngram"))
    assert registry.artifacts("reward_model") == []


def test_a_missing_intensity_is_derived_from_the_vector():
    rows = corpus(4)
    flat = dict.fromkeys(MANIFOLD.names, 0.0)
    rows = [change(row, **flat) for row in rows]
    rows[0] = change(rows[0], reward_intensity=None, curiosity=0.8)
    # R = .8 / 7; mean of curiosity within the prompt .2, so the farthest dimension is .6 away
    assert targets(rows)[0, K] == pytest.approx((0.8 / 7 + 0.6) / 2)
    assert targets(rows)[1, K] == rows[1].reward.reward_intensity


def test_every_dimension_nobody_rated_is_named():
    rows = [change(row, curiosity=None, safety_score=None) for row in corpus(6)]
    with pytest.raises(InputError) as refused:
        targets(rows)
    assert len(refused.value.problems) == 2
    refused.match("curiosity is labelled on 0 prompts")
    refused.match("safety_score is labelled on 0 prompts")


def test_too_few_prompts_are_refused(registry, dataset):
    with pytest.raises(InputError, match="at least 3 prompts"):
        training.train(registry, dataset(corpus(2)), settings("ngram"))
    assert registry.artifacts("reward_model") == []


# --- the account ----------------------------------------------------------------------------------------------------


def test_account_of_a_perfect_model_beside_a_useless_baseline():
    rows = corpus(10)
    labels, scalar = targets(rows), overall(rows)
    groups = np.array([row.prompt_id for row in rows])
    found = compare(labels, np.zeros_like(labels), labels, scalar, groups)
    assert found["pair_accuracy"] == found["pearson_mean"] == found["residual"]["mean"] == 1.0
    assert found["baseline_pair_accuracy"] == 0.5 and found["baseline_pearson_mean"] is None
    assert found["pair_accuracy_difference"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["outputs"]["empathy"]["rmse"] == 0.0
    assert found["residual"]["p"] == pytest.approx(1 / 1001, abs=1e-6)
    json.dumps(found, allow_nan=False)


@pytest.mark.encoder
@pytest.mark.skipif(importlib.util.find_spec(encoder.PACKAGE) is None, reason="the encoder package is not installed")
def test_the_encoder_beats_ngrams_on_prompts_it_never_saw(home):
    rows = read_jsonl(STARTER.parent / "reward_samples.jsonl", Label)
    found = cross_validate(rows, Config(), home=home)
    assert found["backbone"] == "encoder"
    assert found["pair_accuracy_difference"]["low"] > 0  # A5
    assert found["residual"]["mean"] > found["residual"]["baseline_mean"]  # A9
    assert found["residual"]["p"] < 0.01


def test_the_scalar_is_made_as_the_settings_say(registry, dataset, tiny):
    lm, parent = tiny(), dataset(corpus(14))
    plain = training.train(registry, parent, settings("lm"), lm=lm).metadata["notes"]["scalar"]
    assert 0.001 <= plain["temperature"] < 1 and plain["slopes"] == {} and not plain["gated"]
    asked = settings("lm", length="removed", scalar="gated", poolings=("mean", "prompt"))
    other = training.train(registry, parent, asked, lm=lm)
    told = other.metadata["notes"]["scalar"]
    assert set(told["slopes"]) == set(MANIFOLD.names) and not told["gated"]
    assert told["gate"]["pairs"] < told["gate"]["wanted"] == 2000  # so few pairs keep the fixed weights
    assert RewardModel.load(other.folder, lm=lm).card.scalar.slopes == told["slopes"]


def test_a_gate_without_the_prompt_among_the_poolings_is_refused():
    for wrong in ({}, {"poolings": ("mean", "prompt"), "choose_layers": True}):
        with pytest.raises(ValueError, match="add prompt to poolings"):
            settings("lm", scalar="gated", **wrong)
    settings("lm", scalar="gated", poolings=("mean", "prompt"))


def test_edits_that_two_rated_are_not_weighed():
    first, second, *_ = corpus(1)
    edit = second.model_copy(update={"edit_of": first.id, "lowered": "empathy"})
    mine = edit.model_copy(update={"labeller": "human"})
    assert edits([first, edit], same_rater=True) == edits([first, edit]) == [(1, 0, 0)]
    assert edits([first, mine], same_rater=True) == [] and len(edits([first, mine])) == 1


# --- words beside the backbone's states -----------------------------------------------------------------------------


def test_words_are_counted_beside_the_states_and_kept_with_the_model(registry, dataset, tiny):
    lm, rows = tiny(), corpus(16)
    artifact = training.train(registry, dataset(rows, corpus(4, first=50)), settings("lm", words=1.0), lm=lm)
    plain = training.train(registry, dataset(rows, corpus(4, first=50)), settings("lm"), lm=lm)
    assert artifact.hash != plain.hash
    model = RewardModel.load(artifact.folder, lm=lm)
    assert model.card.words == len(model.words.vocabulary) == artifact.metadata["notes"]["words"] > 20
    assert "you feel" not in model.words.vocabulary and {"thank you", "wrong", "?"} <= set(model.words.vocabulary)
    assert artifact.metadata["config"]["words"] == 1.0 and plain.metadata["config"]["words"] == 0.0
    with_words, without = (one.metadata["metrics"]["residual"]["mean"] for one in (artifact, plain))
    assert with_words > without  # the student's embeddings tell these few words apart already
    row = rows[0]
    again = training.fit_judge(rows, settings("lm", words=1.0), kind="lm", home=registry.home, lm=lm)
    assert again.score(row.prompt, row.response).unclipped == pytest.approx(
        model.score(row.prompt, row.response).unclipped, abs=1e-5
    )


def test_what_is_left_out_of_a_fit_is_left_out_of_its_vocabulary(tiny):
    lm, config = tiny(), settings("lm", words=1.0)
    rows = corpus(9)
    parts = np.array([int(row.prompt_id[2:]) % 3 for row in rows])
    backbone = reading.open_backbone("lm", config, None, lm)
    features = backbone.read([(row.prompt, row.response) for row in rows])[0]
    found = left_out(rows, parts, features, backbone, config)
    other = [
        row.model_copy(update={"response": row.response + " zebra zebra"}) if part == 0 and row.id[-1] != "a" else row
        for row, part in zip(rows, parts, strict=True)
    ]
    same = (parts == 0) & np.array([row.id[-1] == "a" for row in rows])
    again = left_out(other, parts, features, backbone, config)
    np.testing.assert_array_equal(again[same], found[same])
    assert not np.allclose(again[parts == 1], found[parts == 1], atol=1e-6)  # there the zebra was learnt from
