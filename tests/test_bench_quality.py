"""The benchmark of judged sets: what it reads, what it fits, and that nothing held out is ever learnt from."""

import gzip
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx.errors import InputError
from hominem_mlx.evaluation.goals import goals, holds
from hominem_mlx.metrics import spearman
from hominem_mlx.reward.head import grouped_folds
from hominem_mlx.reward.ridge import Ridge

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_folds
import bench_kinds
import bench_manifold
import bench_quality
from bench_counts import Counted, length_rows
from bench_folds import Dense, left_out, stack
from bench_quality import COUNT_PENALTIES, PENALTIES, READINGS, STATES, Reading, as_items, examine, pick, predict_fold
from bench_sets import read_sets

COLOURS = ("red", "blue", "green", "white", "black", "brown")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(bench_quality, "RESAMPLES", 40)
    monkeypatch.setattr(bench_kinds, "KINDS", 16)
    monkeypatch.setattr(bench_kinds, "REPLIES", 8)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def graded(prompts: int = 40, seed: int = 0) -> list[dict]:
    """Three replies a prompt; those that say please are kind, whatever else they say."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(3 * prompts):
        words = rng.choice(COLOURS, 5).tolist()
        kind = bool(rng.random() < 0.5)
        words[rng.integers(5)] = "please" if kind else "stone"
        mood = ("glad", "calm", "sad")[rng.integers(3)]
        labels = {"kind": int(kind), "mood": mood, "warmth": float(kind) + round(float(rng.random()), 3)}
        rows.append({"prompt": f"colour {number // 3}?", "response": " ".join(words), "labels": labels})
    return rows


def paired(prompts: int = 40, seed: int = 0) -> list[dict]:
    """The chosen reply says please."""
    rng = np.random.default_rng(seed)
    said = [[" ".join([*rng.choice(COLOURS, 4), last]) for last in ("please", "stone")] for _ in range(prompts)]
    return [{"prompt": f"q {at}", "chosen": good, "rejected": bad} for at, (good, bad) in enumerate(said)]


def a_set(tmp_path: Path, rows: list[dict], name: str = "some"):
    write(tmp_path / f"{name}.jsonl", rows)
    return next(judged for judged in read_sets(tmp_path) if judged.name == name)


def reading_of(judged, vectors: np.ndarray) -> Reading:
    """Features as if a backbone had read the texts; every reading is all of them but one of the last."""
    number = vectors.shape[1]
    without = {name: np.delete(np.arange(number), number - 1 - place) for place, name in enumerate(READINGS)}
    of = {which: without[name] for name, which in STATES.items()}
    return Reading(dict(zip(judged.texts, vectors)), lambda *which: of[which], without["kinds"], 0.0, 0.0)


def test_every_reading_is_of_its_own_columns(tmp_path):
    judged = a_set(tmp_path, graded())
    reading, fold = planted(judged), grouped_folds(judged.groups, 5, seed=0)
    values, targets = as_items(reading.of(judged.texts), judged), judged.labels[0].values[:, None]
    found = predict_fold(judged, fold, 0, Counted(judged), values, reading, targets)
    columns = {name: reading.columns(*which) for name, which in STATES.items()} | {"kinds": reading.kinds}
    for name in READINGS:
        alone = left_out(Dense(values[:, columns[name]], fold != 0), targets, fold, 0, PENALTIES)
        np.testing.assert_allclose(found[name], alone)


def planted(judged, seed: int = 1) -> Reading:
    """Twelve directions of noise and one that knows the word."""
    vectors = np.random.default_rng(seed).normal(size=(len(judged.texts), 12))
    vectors[:, 3] += [3.0 * ("please" in response) for _, response in judged.texts]
    return reading_of(judged, vectors)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_both_shapes_are_read_packed_or_not_with_a_manifest_or_without(tmp_path):
    write(tmp_path / "deep" / "one.jsonl.gz", graded())
    write(tmp_path / "two.jsonl", paired())
    write(tmp_path / "sft.jsonl", [{"prompt": "p", "response": "r"}])  # nobody judged anything
    bare = read_sets(tmp_path)
    write_manifest = [{"set": "first", "shape": "graded", "file": "deep/one.jsonl.gz", "rows": 120}]
    (tmp_path / "manifest.json").write_text(json.dumps(write_manifest))
    listed = read_sets(tmp_path)
    assert [(found.name, found.shape, len(found.groups)) for found in bare] == [
        ("one", "graded", 120),
        ("two", "pair", 40),
    ]
    assert [found.name for found in listed] == ["first", "two"]
    assert [found.name for found in read_sets(tmp_path, ["two"])] == ["two"]
    pairs = bare[1]
    assert len(pairs.texts) == 80 and "please" in pairs.texts[0][1] and "stone" in pairs.texts[40][1]


def test_labels_become_a_column_each_and_words_one_a_word(tmp_path):
    rows = graded()
    rows[5]["labels"]["kind"] = None
    rows[6]["labels"]["rare"] = 1
    labels = {label.name: label for label in a_set(tmp_path, rows).labels}
    assert list(labels) == ["kind", "mood=calm", "mood=glad", "mood=sad", "warmth"]
    assert [label.metric for label in labels.values()] == ["AUROC"] * 4 + ["Spearman"]
    assert np.isnan(labels["kind"].values[5]) and np.isnan(labels["kind"].values).sum() == 1
    assert sum(labels[f"mood={mood}"].values for mood in ("calm", "glad", "sad")).tolist() == [1.0] * 120
    assert a_set(tmp_path, rows).left_out == ("rare",)


def test_two_words_are_one_column_and_knowledge_belongs_to_the_prompt(tmp_path):
    rows = [
        {"prompt": f"p{at}", "knowledge": "the sky", "response": f"r{at}", "labels": {"right": ("no", "yes")[at % 2]}}
        for at in range(24)
    ]
    judged = a_set(tmp_path, rows)
    assert [label.name for label in judged.labels] == ["right=no"] and judged.labels[0].values[0] == 1
    assert judged.texts[0] == ("p0\nthe sky", "r0") and judged.groups[0] == "p0"


def test_every_wrong_row_is_named_at_once_with_its_file_and_line(tmp_path):
    good = paired()
    wrong = [
        good[0] | {"chosen": 3},
        {"prompt": "p", "chosen": "a"},
        good[0] | {"chosen": "  "},
        good[0] | {"rejected": None},
        graded()[0],
        "a text",
    ]
    write(tmp_path / "pairs.jsonl", good[:10] + wrong)
    rows = graded()[:12]
    rows[1]["labels"] = {}
    rows[2]["labels"] = {"kind": float("nan")}
    rows[3]["labels"] = {"kind": [1]}
    del rows[4]["response"]
    write(tmp_path / "graded.jsonl.gz", rows)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "p", \n{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(InputError) as caught:
        read_sets(tmp_path)
    said = "\n".join(caught.value.problems)
    for line, reason in (
        ("pairs.jsonl:11: ", "chosen = 3: must be a text"),
        ("pairs.jsonl:12: ", "rejected is missing"),
        ("pairs.jsonl:13: ", "chosen is empty"),
        ("pairs.jsonl:14: ", "rejected = None: must be a text"),
        ("pairs.jsonl:15: ", "not a row of shape pair"),
        ("pairs.jsonl:16: ", "'a text' is no row"),
        ("graded.jsonl.gz:2: ", "at least one label"),
        ("graded.jsonl.gz:3: ", "must be finite"),
        ("graded.jsonl.gz:4: ", "labels.kind = [1]"),
        ("graded.jsonl.gz:5: ", "response is missing"),
        ("broken.jsonl:1: ", "not JSON"),
    ):
        assert any(line in problem and reason in problem for problem in caught.value.problems), (line, said)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "x.jsonl.gz").write_bytes(b"no gzip"), "not a whole gzip file"),
        (lambda folder: write(folder / "x.jsonl", paired(4)), "has 4 prompts"),
        (lambda folder: (folder / "x.jsonl").write_text(""), "no row"),
        (lambda folder: (folder / "manifest.json").write_text('[{"set": "a", "file": "a.jsonl"}]'), "is not there"),
        (lambda folder: (folder / "manifest.json").write_text('[{"set": "a"}]'), "needs `set` and `file`"),
        (lambda folder: (folder / "nothing").mkdir(), "no judged set"),
    ],
)
def test_folders_that_cannot_be_read_say_why(tmp_path, change, reason):
    change(tmp_path)
    with pytest.raises(InputError, match=reason):
        read_sets(tmp_path)


def test_sets_that_are_not_there_are_named(tmp_path):
    write(tmp_path / "two.jsonl", paired())
    with pytest.raises(InputError, match="no such set; it has two"):
        read_sets(tmp_path, ["three"])
    with pytest.raises(InputError, match="no such folder"):
        read_sets(tmp_path / "nowhere")


# --- regressions ------------------------------------------------------------------------------------------------------


def problem(rows: int = 60, features: int = 20, labels: int = 2):
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, (rows, features))
    y = x @ rng.normal(size=(features, labels)) * 0.1 + rng.normal(size=(rows, labels))
    fold = grouped_folds([str(at // 2) for at in range(rows)], 5, seed=0)
    return x, y, fold


@pytest.mark.parametrize("features", [20, 90])
def test_the_regression_is_the_products(features):
    x, y, fold = problem(features=features)
    rows, inside = Dense(x, fold != 1), fold != 1
    found = left_out(rows, y, fold, 1, (0.1, 2.0))
    ridge = Ridge(rows.z)
    for number, penalty in enumerate((0.1, 2.0)):
        weight, bias = ridge.solve(np.flatnonzero(inside), y, np.array([penalty] * 2))
        expected = rows.z @ weight + bias - y[inside].mean(axis=0)
        assert found[number, ~inside] == pytest.approx(expected[~inside], abs=1e-4)
    assert rows.z[inside].mean(axis=0) == pytest.approx(0, abs=1e-6)
    assert np.square(rows.z[inside]).sum(axis=1).mean() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("intercept", [True, False])
def test_conjugate_gradients_find_what_the_normal_equations_give(monkeypatch, intercept):
    x, y, fold = problem()
    y[::7, 1] = np.nan
    rows = Dense(x, fold != 2, centre=intercept)
    exact = left_out(rows, y, fold, 2, (0.1, 2.0), intercept=intercept)
    monkeypatch.setattr(bench_folds, "DUAL_ROWS", 0)
    monkeypatch.setattr(bench_folds, "TOLERANCE", 1e-4)
    monkeypatch.setattr(bench_folds, "MAX_STEPS", 300)
    found = left_out(rows, y, fold, 2, (0.1, 2.0), intercept=intercept)
    assert found == pytest.approx(exact, abs=2e-3)
    assert not np.isnan(found).any()


@pytest.mark.parametrize("intercept", [True, False])
def test_ending_early_changes_no_order_of_predictions(monkeypatch, intercept):
    x, y, fold = problem(rows=400, features=60)
    rows = Dense(x, fold != 2, centre=intercept)
    exact = left_out(rows, y, fold, 2, (0.1, 2.0), intercept=intercept)
    monkeypatch.setattr(bench_folds, "DUAL_ROWS", 0)
    found = left_out(rows, y, fold, 2, (0.1, 2.0), intercept=intercept)
    for one, other in zip(found.reshape(2, -1), exact.reshape(2, -1), strict=True):
        assert spearman(one, other) > 0.999


def test_a_row_is_never_predicted_by_a_regression_that_saw_it():
    x, y, fold = problem()
    rows = Dense(x, fold != 0)
    before = left_out(rows, y, fold, 0, (0.1,))
    for number in (0, 3):
        changed = y.copy()
        changed[fold == number] += 100.0
        after = left_out(rows, changed, fold, 0, (0.1,))
        assert after[:, fold == number] == pytest.approx(before[:, fold == number], abs=1e-9)
    assert not np.allclose(after[:, fold == 0], before[:, fold == 0])  # fold 3 is learnt from for fold 0


def test_a_stack_takes_what_helps_and_never_turns_a_sign():
    rng = np.random.default_rng(0)
    y = (rng.random(400) < 0.5).astype(float)
    good, other, against = y + rng.normal(0, 1, 400), y + rng.normal(0, 1, 400), -y + rng.normal(0, 0.5, 400)
    inside = np.arange(400) < 300
    said, weights = stack(np.stack([good, other, against]), y, inside)
    assert weights[0] > 0 and weights[1] > 0 and weights[2] == 0
    error = np.square(said - y)[~inside].mean()
    alone, _ = stack(good[None], y, inside)
    assert error < np.square(alone - y)[~inside].mean()
    changed = y.copy()
    changed[~inside] = 7.0
    assert stack(np.stack([good, other, against]), changed, inside)[1] == pytest.approx(weights)


# --- kinds of tokens --------------------------------------------------------------------------------------------------


def test_kinds_are_shares_of_tokens_by_their_cosines():
    rng = np.random.default_rng(0)
    hidden, centres = rng.normal(size=(2, 5, 4)), rng.normal(size=(3, 4))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    expected = np.zeros((2, 3))
    for row, (start, stop) in enumerate([(1, 4), (3, 5)]):
        for token in hidden[row, start:stop]:
            share = np.exp(bench_kinds.SHARPNESS * (centres @ token) / np.linalg.norm(token))
            expected[row] += share / share.sum()
    found = bench_kinds.kinds(mx.array(hidden), mx.array([[1, 4], [3, 5]]), mx.array(centres))
    assert np.array(found) == pytest.approx(np.sqrt(expected), abs=1e-5)
    assert np.square(np.array(found)).sum(axis=1) == pytest.approx([3, 2], abs=1e-4)  # every token counts once


def test_centres_lie_where_tokens_are(monkeypatch):
    monkeypatch.setattr(bench_kinds, "KINDS", 3)
    rng = np.random.default_rng(1)
    three = np.eye(5)[:3]
    states = np.repeat(three, 40, axis=0) + rng.normal(0, 0.05, (120, 5))
    monkeypatch.setattr(bench_kinds, "SEED", 3)  # one of each is drawn
    centres = bench_kinds.find_centres(states / np.linalg.norm(states, axis=1, keepdims=True))
    assert np.linalg.norm(centres, axis=1) == pytest.approx(1, abs=1e-5)
    assert sorted((centres @ three.T).argmax(axis=1)) == [0, 1, 2] and (centres @ three.T).max(axis=1).min() > 0.99


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [graded(), paired()])
def test_sparse_rows_multiply_as_the_array_they_stand_for(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("bench_counts.BLOCK", 1 << 12)  # several blocks
    judged = a_set(tmp_path, rows)
    inside = grouped_folds(judged.groups, 5, seed=0) != 0
    for weighed in Counted(judged).rows(inside):
        array = weighed.times(np.eye(weighed.width, dtype=np.float32))
        values = np.random.default_rng(0).normal(size=(weighed.count, 3)).astype(np.float32)
        assert weighed.gram() == pytest.approx(array @ array.T, abs=1e-5)
        assert weighed.transposed_times(values) == pytest.approx(array.T @ values, abs=1e-4)
    if judged.shape == "graded":
        for part in weighed.parts[1:]:  # replies and prompts, each of length 1
            assert np.diag(part.gram())[inside] == pytest.approx(1, abs=1e-5)
    else:  # the difference of two texts of length 1, which share some words
        assert 0 < np.diag(weighed.parts[1].gram())[inside].mean() < 2


def test_words_that_only_the_held_out_fold_knows_weigh_nothing(tmp_path):
    rows = graded()
    judged = a_set(tmp_path, rows)
    fold = grouped_folds(judged.groups, 5, seed=0)
    products = []
    for word in ("", " ξψ"):
        for at in np.flatnonzero(fold == 0):
            rows[at]["response"] += word
        products.append(Counted(a_set(tmp_path, rows)).rows(fold != 0)[0].parts[1].gram())
    assert products[1] == pytest.approx(products[0], abs=1e-6)
    seen = Counted(a_set(tmp_path, rows)).rows(fold != 1)[0].parts[1].gram()
    assert not np.allclose(seen, products[0], atol=1e-2)


def test_length_alone_finds_length(tmp_path):
    rows = paired()
    for row in rows:
        row["chosen"] += " and more, and more"
    judged = a_set(tmp_path, rows)
    fold = grouped_folds(judged.groups, 5, seed=0)
    found = left_out(
        length_rows(judged, fold != 0), judged.labels[0].values[:, None], fold, 0, (1e-3,), intercept=False
    )
    assert (found[0, fold == 0] > 0).all()


# --- whole sets -------------------------------------------------------------------------------------------------------


def test_a_planted_signal_is_found_and_noise_is_not(tmp_path):
    judged = a_set(tmp_path, graded())
    found = examine(judged, planted(judged))
    kind = found["labels"][0]
    assert kind["label"] == "kind" and kind["alone"]["mean"] > 0.9 and kind["stacked"]["mean"] > 0.95
    assert kind["ngram"]["mean"] > 0.9 and 0.3 < kind["length"]["mean"] < 0.7
    mood = next(entry for entry in found["labels"] if entry["label"] == "mood=sad")
    assert all(0.25 < mood[way]["mean"] < 0.75 for way in ("alone", "stacked", "ngram"))
    assert mood["minus_ngram"]["alone"]["low"] < 0 < mood["minus_ngram"]["alone"]["high"]
    values = [entry["alone"]["mean"] for entry in found["labels"]]
    assert found["together"]["alone"]["mean"] == pytest.approx(np.mean(values))


def test_pairs_are_learnt_from_differences(tmp_path):
    judged = a_set(tmp_path, paired())
    entry = examine(judged, planted(judged))["together"]
    assert entry["alone"]["mean"] > 0.9 and entry["ngram"]["mean"] > 0.9 and entry["chance"] == 0.5
    turned = as_items(planted(judged).of(judged.texts[40:] + judged.texts[:40]), judged)
    assert turned == pytest.approx(-as_items(planted(judged).of(judged.texts), judged), abs=1e-5)
    noise = reading_of(judged, np.random.default_rng(5).normal(size=(80, 12)))
    assert 0.2 < examine(judged, noise)["together"]["alone"]["mean"] < 0.8


def test_choices_are_right_when_the_right_one_is_highest(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        choices = [f"{colour} {number}" for colour in rng.permutation(COLOURS)[:4]]
        right = int(rng.integers(4))
        choices[right] += " please"
        rows.append({"prompt": f"which {number}", "choices": choices, "answer": choices[right], "subject": "you"})
    judged = a_set(tmp_path, rows)
    found = examine(judged, planted(judged))["together"]
    assert found["metric"] == "accuracy" and found["chance"] == pytest.approx(0.25)
    assert found["ngram"]["mean"] > 0.9 and found["alone"]["mean"] > 0.8


def test_folds_never_share_a_prompt_and_no_more_than_sixteen_configurations_are_tried(tmp_path):
    judged = a_set(tmp_path, graded())
    fold = grouped_folds(judged.groups, bench_folds.FOLDS, seed=bench_quality.SEED)
    assert len(set(zip(judged.groups, fold))) == len(set(judged.groups))
    assert len(READINGS) * len(PENALTIES) <= 16


def test_nothing_of_the_held_out_fold_is_chosen_or_stacked_by(tmp_path):
    """With other labels in the held-out fold: the same configuration, the same weights, the same predictions of it."""
    judged = a_set(tmp_path, graded())
    reading, counted = planted(judged), Counted(judged)
    fold = grouped_folds(judged.groups, 5, seed=0)
    values, label = as_items(reading.of(judged.texts), judged), judged.labels[0]
    out, told = fold == 2, []
    for targets in (label.values, np.where(out, 1 - label.values, label.values)):
        found = predict_fold(judged, fold, 2, counted, values, reading, targets[:, None])
        changed = type(label)(label.name, label.metric, targets)
        picked = [pick(changed, found[way][..., 0], ~out) for way in (*READINGS, "ngram")]
        said, weights = stack(np.stack([said for _, said in picked]), targets, ~out)
        told.append(([index for index, _ in picked], weights, said[out]))
    assert told[0][0] == told[1][0]
    assert told[0][1] == pytest.approx(told[1][1]) and told[0][2] == pytest.approx(told[1][2])
    assert found["ngram"].shape == (4 * len(COUNT_PENALTIES), 120, 1)  # replies, and prompts; words and letters, words


def test_f1_is_given_where_the_readme_asks_for_it(tmp_path):
    (tmp_path / "README.md").write_text("Report macro F1.")
    judged = a_set(tmp_path, graded())
    found = examine(judged, planted(judged))["labels"]
    assert found[0]["f1"]["alone"] > 0.8 and found[-1]["f1"]["alone"] is None


# --- the run ----------------------------------------------------------------------------------------------------------


def test_what_a_model_read_is_kept_and_figures_are_well_formed(tmp_path, tiny_folder, monkeypatch):
    write(tmp_path / "data" / "one.jsonl", graded(20))
    write(tmp_path / "data" / "hh_harmless.jsonl.gz", paired(20))
    arguments = [str(tmp_path / "data"), str(tiny_folder), str(tmp_path / "cache")]
    reports = []
    for name in ("first", "again"):
        command = "bench --backbone lm --only one,hh_harmless --no-install --data {} --model {} --cache {}".format(
            *arguments
        )
        monkeypatch.setattr(sys, "argv", [*command.split(), "--json", str(tmp_path / f"{name}.json")])
        assert bench_quality.main() == 0
        reports.append(json.loads((tmp_path / f"{name}.json").read_text()))
    first, again = reports
    assert first["minutes"]["reading_now"] > 0 == again["minutes"]["reading_now"]
    assert again["minutes"]["reading"] == pytest.approx(first["minutes"]["reading"])
    assert [entry["together"] for entry in first["sets"]] == [entry["together"] for entry in again["sets"]]
    figures = again["figures"]
    assert set(figures) == {name for name in goals() if name.split("_")[0] == "C1"}
    for name, entry in figures.items():
        assert set(entry) == {"value", "goal", "holds", "n", "spread", "how"} and entry["how"], name
        assert entry["holds"] == holds(entry["value"], entry["goal"])
    assert figures["C1_hh_harmless"]["value"] == again["sets"][0]["together"]["stacked"]["mean"]
    assert figures["C1_diasafety"]["value"] is None and "not measured" in figures["C1_diasafety"]["how"]
    assert figures["C1"]["n"] == 2
    assert figures["C1_minutes"]["value"] is None and "not all" in figures["C1_minutes"]["how"]  # --only was given
    assert "hh_harmless" in bench_quality.markdown(again)


def test_without_an_encoder_the_baselines_are_measured_and_the_rest_says_why(tmp_path, monkeypatch):
    write(tmp_path / "hh_harmless.jsonl", paired(20))
    monkeypatch.setattr("hominem_mlx.reward.model.find_encoder", lambda home: None)
    report = bench_quality.run(read_sets(tmp_path), "encoder", None, tmp_path / "cache", tmp_path / "out.json")
    figures = report["figures"]
    assert figures["C1"]["value"] is None and "is not here" in figures["C1"]["how"] and not figures["C1"]["holds"]
    assert figures["C1_hh_harmless"]["value"] is None
    assert figures["C1_ngram_hh_harmless"]["value"] > 0.9
    assert "alone" not in report["sets"][0]["together"]


def test_wrong_rows_end_the_run_before_anything_is_read(tmp_path, monkeypatch, capsys):
    write(tmp_path / "two.jsonl", [*paired(), {"prompt": 1, "chosen": "a", "rejected": "b"}])
    monkeypatch.setattr(sys, "argv", ["bench", "--data", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert bench_quality.main() == 2
    assert "two.jsonl:41: prompt = 1: must be a text" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def account_of(certain: int) -> dict:
    """What `cross_validate` says of a reward model, as far as C2 to C5 ask."""
    outputs = dict.fromkeys([f"dimension {k}" for k in range(7)] + ["reward_intensity", "safety_score"], 0.02)
    return {
        "backbone": "lm",
        "rows": 100,
        "prompts": 20,
        "contrasts": {"share": 0.7, "low": 0.6, "high": 0.8, "n": 130},
        "baseline_contrasts": {"share": 0.4, "low": 0.3, "high": 0.5, "n": 130},
        "residual": {"mean": 0.4, "baseline_mean": 0.2, "certain": certain},
        "participation_ratio": 3.6,
        "label_participation_ratio": 4.0,
        "calibration": {
            "error": 0.03,
            "worst": 0.05,
            "outputs": outputs,
            "coverage": {"0.5": 0.52, "0.8": 0.7, "0.9": 0.9},
        },
    }


def test_the_manifold_on_the_starter_corpus_beside_its_goals():
    found = bench_manifold.from_account(account_of(certain=6))
    assert {name: (entry["value"], entry["holds"]) for name, entry in found.items()} == {
        "C2": (0.7, True),
        "C3": (0.9, True),
        "C4": (6, True),
        "C5": (0.03, True),
        "C5_50": (0.52, True),
        "C5_80": (0.7, False),
        "C5_90": (0.9, True),
    }
    assert found["C4"]["n"] == 7 and found["C2"]["spread"] == [0.6, 0.8] and found["C2"]["n"] == 130


def test_independent_predictions_count_only_where_they_are_about_something():
    found = bench_manifold.from_account(account_of(certain=4))
    assert not found["C4"]["holds"] and found["C3"]["value"] is None and "C4" in found["C3"]["how"]


def test_the_starter_corpus_without_an_encoder_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("hominem_mlx.reward.model.find_encoder", lambda home: None)
    report = bench_quality.run([], "encoder", None, tmp_path, tmp_path / "out.json", starter=True)
    assert set(report["figures"]) == set(bench_manifold.NAMES)
    assert all(entry["value"] is None and "is not here" in entry["how"] for entry in report["figures"].values())
    assert "C6" in bench_quality.markdown(report)
