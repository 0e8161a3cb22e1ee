"""Which reward models are let through: what warns, what refuses, and that the worst are named by their check."""

import json

import numpy as np
import pytest

from hominem_mlx import metrics
from hominem_mlx.cli import demo
from hominem_mlx.config import load_config
from hominem_mlx.data import home as homes
from hominem_mlx.errors import NotGoodEnough
from hominem_mlx.reward import categories, successor
from hominem_mlx.reward import train as training
from hominem_mlx.reward.acceptance import as_rows, checks, held_out, refusals
from hominem_mlx.reward.account import left_out
from hominem_mlx.reward.examine import compare, hidden_norm
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.schema import MANIFOLD
from test_reward_train import corpus, settings

K, PROMPTS, REPLIES = len(MANIFOLD.names), 130, 3
GROUPS = np.repeat(np.arange(PROMPTS), REPLIES)
N = len(GROUPS)
EDITS = [(row, row - 1, row % K) for row in range(1, N, REPLIES)]  # the second reply is an edit of the first


@pytest.fixture(scope="module")
def labels():
    """Seven dimensions that agree in part, and edits that lower one of them."""
    rng = np.random.default_rng(0)
    values = 0.25 * rng.normal(size=(N, K + 2)) + 0.2 * rng.normal(size=(N, 1))
    for edited, origin, dimension in EDITS:
        values[edited] = values[origin]
        values[edited, dimension] -= 0.7
    return values


def account(predicted, labels, *, baseline=None, edits=EDITS):
    worse = np.random.default_rng(9).normal(size=labels.shape) if baseline is None else baseline
    return compare(predicted, worse, labels, labels[:, :K].mean(axis=1), GROUPS, edits=edits)


@pytest.fixture(scope="module")
def calm(labels):
    """The account of a good model."""
    return account(good(labels), labels)


def by_name(found):
    return {check.check: check for check in found}


def good(labels, seed=1):
    return labels + 0.15 * np.random.default_rng(seed).normal(size=labels.shape)


def test_a_good_model_passes_every_check(calm):
    found = checks(calm)
    assert [check.check for check in found if not check.holds] == [] and refusals(found) == []
    names = ("label_directions", "clear_pairs", "correlation", "ngrams", "directions", "spread", "residual")
    assert [check.check for check in found] == [*names, "contrasts", "share", "without_one", "follows_one"]
    json.dumps(as_rows(found), allow_nan=False)
    assert set(as_rows(found)[0]) == {"check", "what", "value", "goal", "holds", "refuses"}


def test_one_number_in_disguise_is_refused_by_name(labels):
    one = labels[:, :K].mean(axis=1, keepdims=True) + 0.02 * np.random.default_rng(2).normal(size=labels.shape)
    found = by_name(checks(account(one, labels)))
    assert {name for name, check in found.items() if check.refuses} == {"directions", "residual", "contrasts"}
    assert found["clear_pairs"].holds, "by pairs alone it would have passed"
    assert found["directions"].value < 0.5 and found["residual"].value < 5


def test_too_few_dimensions_refuse_only_where_rows_are_many_or_none_is_found_at_all(calm):
    for whole, p, refuses in ((1000, 0.001, True), (999, 0.001, False), (999, 0.3, True), (299, 0.3, False)):
        seen = by_name(checks(calm | {"whole": whole, "residual": {"mean": 0.1, "p": p, "certain": 4}}))["residual"]
        assert seen.holds is False and seen.refuses is refuses


def test_a_dominated_scalar_is_refused_by_name(labels):
    ruled = good(labels)
    ruled[:, 3] *= 4
    found = by_name(checks(account(ruled, labels)))
    assert {name for name, check in found.items() if check.refuses} == {"share"}
    assert not found["without_one"].holds and not found["follows_one"].holds
    assert MANIFOLD.names[3] in found["share"].what and found["share"].goal == {"at_most": 0.35}
    [reason] = refusals([*found.values()])
    assert reason.startswith("share: 0.") and "≤ 0.35" in reason


def test_a_dimension_predicted_by_its_mean_is_refused_by_name(labels):
    flat = good(labels)
    flat[:, 5] = 0.05 * (flat[:, 5] - flat[:, 5].mean())
    found = by_name(checks(account(flat, labels)))
    assert [name for name, check in found.items() if check.refuses] == ["spread"]
    assert MANIFOLD.names[5] in found["spread"].what
    assert found["spread"].value == pytest.approx(flat[:, 5].std() / labels[:, 5].std(), abs=1e-5)


def test_below_the_goal_is_a_warning_as_long_as_it_is_not_broken(labels):
    weak = (
        labels[:, :K].mean(axis=1, keepdims=True)
        + 0.4 * labels
        + 0.3 * np.random.default_rng(3).normal(size=labels.shape)
    )
    found = by_name(checks(account(weak, labels)))
    assert found["contrasts"].holds is False and found["contrasts"].verdict == "not reached"
    assert refusals([*found.values()]) == []


def test_worse_than_ngrams_warns_and_says_what_is_better(labels):
    found = by_name(
        checks(account(good(labels) + np.random.default_rng(4).normal(size=labels.shape), labels, baseline=labels))
    )
    assert found["ngrams"].verdict == "not reached" and "reward.backbone=ngram" in found["ngrams"].what


def test_few_labels_are_no_fault(labels):
    few = slice(0, 30)
    noise = np.random.default_rng(5).normal(size=labels[few].shape)
    found = compare(noise, noise, labels[few], labels[few, :K].mean(axis=1), GROUPS[few], edits=EDITS[:10])
    assert [check.check for check in checks(found) if check.refuses] == []
    holes = labels[few].copy()
    holes[2:, 0] = np.nan
    none = by_name(checks(compare(noise, noise, holes, np.full(30, np.nan), GROUPS[few])))
    assert {name for name, check in none.items() if check.verdict == "not measured"} >= {
        *("label_directions", "clear_pairs", "ngrams", "directions", "residual", "contrasts"),
    }
    assert refusals([*none.values()]) == []


def test_labels_of_one_impression_are_refused_however_few(labels):
    halo = labels[:, :1] + 0.01 * labels
    found = by_name(checks(account(halo, halo)))
    assert found["label_directions"].refuses and found["label_directions"].value < 1.5


# --- steadiness -----------------------------------------------------------------------------------------------------


def test_a_jumpy_model_is_refused_and_a_restless_one_warned_of(calm):
    calm = calm | {"noise": {"ratio": 2.0}, "hidden_norm": -0.1}
    moved = {"n": 200, "median": 0.05, "q95": 0.3, "flips": 0.01}
    assert all(check.holds for check in checks(calm | {"smoothness": moved}))
    restless = by_name(checks(calm | {"smoothness": moved | {"median": 0.27, "q95": 0.8}}))
    assert [restless[f"edits_{key}"].verdict for key in ("median", "q95", "flips")] == ["not reached"] * 2 + ["holds"]
    jumpy = {"n": 200, "median": 0.5, "q95": 2.4, "flips": 0.26}
    assert [check.check for check in checks(calm | {"smoothness": jumpy}) if check.refuses] == [
        "edits_median",
        "edits_flips",
    ]
    assert refusals(checks(calm | {"smoothness": jumpy | {"n": 30}})) == []
    counted = by_name(checks(calm | {"smoothness": moved, "noise": None, "hidden_norm": None}))
    assert counted["noise_ratio"].verdict == counted["hidden_norm"].verdict == "not measured"
    stepped = by_name(checks(calm | {"smoothness": moved, "noise": {"ratio": 1.1}, "hidden_norm": -0.4}))
    assert stepped["noise_ratio"].holds is stepped["hidden_norm"].holds is False
    assert stepped["hidden_norm"].value == 0.4


def test_length_of_features_against_the_scalar_by_hand():
    features = np.array([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])  # lengths 5, 1, 10
    assert hidden_norm(features, np.array([0.5, 0.1, 1.0])) == pytest.approx(1.0)
    assert hidden_norm(features, np.array([1.0, 0.0, 0.0])) == pytest.approx(np.corrcoef([5, 1, 10], [1, 0, 0])[0, 1])


def test_held_out_rows_are_judged_in_other_dress_too(tiny, home):
    rows = corpus(20)
    model = training.fit_baseline(rows[:40], settings("ngram"))
    found = held_out(model, model, rows[40:], wanted=20)
    assert found["smoothness"]["n"] >= 20 and found["noise"] is None and found["hidden_norm"] is None
    model = training.fit_judge(rows[:40], settings("lm"), kind="lm", home=home, lm=tiny())
    found = held_out(model, model, rows[40:], wanted=20)
    assert found["noise"]["n"] == 32 and 1.5 < found["noise"]["ratio"] < 2.5
    assert abs(found["hidden_norm"]) <= 1
    assert {"edits_median", "noise_ratio", "hidden_norm"} <= by_name(checks(found)).keys()


# --- categories -----------------------------------------------------------------------------------------------------


def test_the_largest_drop_is_found_where_it_is(labels, calm):
    names = np.array(["home", "work", "play", "rare"])[np.minimum(GROUPS // 42, 3)]
    unseen = good(labels)
    unseen[names == "work"] = np.random.default_rng(1).normal(size=(126, K + 2))
    scalar = 3 * labels[:, :K].mean(axis=1)  # so that many pairs are clear
    found = categories.drops(good(labels), unseen, labels, scalar, GROUPS, names)
    assert found["pair_accuracy_drop"]["of"] == found["residual_drop"]["of"] == "work"
    work = found["categories"]["work"]
    assert work["rows"] == 126 and work["pair_accuracy"] > 0.9 > 0.65 > work["pair_accuracy_unseen"]
    assert found["residual_drop"]["value"] == pytest.approx(work["residual"] - work["residual_unseen"], abs=1e-5)
    here = names == "work"
    alone = metrics.residual_correlations(good(labels)[here, :K], labels[here, :K]).mean()
    assert work["residual"] == pytest.approx(alone, abs=1e-5)
    assert found["categories"]["rare"]["rows"] == 12 and found["categories"]["rare"]["residual"] is None
    told = by_name(checks(calm | {"categories": found}))
    assert told["category_residual"].verdict == "not reached" and "(work)" in told["category_residual"].what


def test_a_category_left_out_is_not_learnt_from():
    """Kind words mean the reverse in one category: unseen, it is predicted the wrong way round."""
    rows = [
        row.model_copy(update={"category": ("plain", "other", "reverse")[index % 3]})
        for index, row in ((int(row.prompt_id[2:]), row) for row in corpus(36))
    ]
    turned = [
        row.model_copy(update={"reward": row.reward.model_copy(update={"empathy": -row.reward.empathy})})
        if row.category == "reverse"
        else row
        for row in rows
    ]
    parts = np.array([row.category for row in turned])
    said = left_out(turned, parts, None, None, settings("ngram"))
    empathy = np.array([row.reward.empathy for row in turned])
    assert metrics.pearson(said[parts == "reverse", 0], empathy[parts == "reverse"]) < -0.8
    found = categories.carried_over(turned, None, None, settings("ngram"))
    assert {name: said["rows"] for name, said in found["categories"].items()} == dict.fromkeys(
        ["other", "plain", "reverse"], 48
    )
    assert found["residual_drop"]["of"] == "reverse" and found["residual_drop"]["value"] > 0.05
    assert categories.carried_over(rows[:48], None, None, settings("ngram")) is None


# --- a successor ----------------------------------------------------------------------------------------------------


def test_paired_differences_by_hand(labels, calm):
    scalar = labels[:, :K].mean(axis=1)
    same = successor.paired(good(labels), good(labels), labels, scalar, GROUPS)
    assert same["pair_accuracy"]["mean"] == same["residual"]["low"] == same["residual"]["high"] == same["drift"] == 0
    worse = good(labels) + 0.5 * np.random.default_rng(7).normal(size=labels.shape)
    found = successor.paired(worse, good(labels), labels, scalar, GROUPS)
    assert found["residual"]["mean"] == pytest.approx(found["residual"]["now"] - found["residual"]["before"], abs=2e-6)
    assert found["residual"]["now"] == pytest.approx(
        metrics.residual_correlations(worse[:, :K], labels[:, :K]).mean(), abs=1e-6
    )
    assert found["pair_accuracy"]["mean"] == pytest.approx(
        metrics.pair_accuracy(worse[:, :K].mean(axis=1), scalar, GROUPS, low=0.3)
        - metrics.pair_accuracy(good(labels)[:, :K].mean(axis=1), scalar, GROUPS, low=0.3),
        abs=1e-5,
    )
    assert found["residual"]["high"] < 0 and 0.1 < found["drift"] < 1
    told = by_name(checks(calm | {"against": {"name": "reward_model/1", **found}}))
    assert told["against_residual"].refuses and "reward_model/1" in told["against_residual"].what
    one_prompt = np.isin(GROUPS, GROUPS[:1])  # which cannot tell
    few = successor.paired(*(values[one_prompt] for values in (worse, good(labels), labels, scalar, GROUPS)))
    assert refusals(checks(calm | {"against": {"name": "1", **few}})) == []
    back = successor.paired(good(labels), worse, labels, scalar, GROUPS)
    assert refusals(checks(calm | {"against": {"name": "1", **back}})) == []


@pytest.mark.parametrize(
    ("now", "before", "expected"), [(1.0, 1.0, 0.0), (16.15, 1.0, 1.0), (0.2, 1.0, 0.0), (3.03, 1.0, 0.397)]
)
def test_curvature_growth_by_hand(now, before, expected):
    # 3.03: log2(3.04 / 1.01) / 4
    assert metrics.curvature_growth(now, before) == pytest.approx(expected, abs=1e-3)


def test_curvature_growth_needs_a_reference():
    assert np.isnan(metrics.curvature_growth(1.0, 0.0)) and np.isnan(metrics.curvature_growth(np.nan, 1.0))


def test_a_successor_is_read_beside_the_one_it_would_replace(registry, tiny):
    rows, lm = corpus(12), tiny()
    made = []
    for config, ours in ((settings("ngram"), rows[:28]), (settings("lm"), rows[:28])):
        with registry.draft("dataset", seed=len(made)) as draft:
            (draft.folder / "labels.train.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in ours))
            (draft.folder / "labels.valid.jsonl").write_text("")
        made.append(training.train(registry, draft.published, config, lm=lm))
    counted, read = made
    found = successor.against(RewardModel.load(read.folder, lm=lm), counted, rows[28:], curvature=True)
    assert found["name"] == counted.ref and found["pairs"] > 10 and found["curvature_growth"] is None
    itself = successor.against(RewardModel.load(read.folder, lm=lm), read, rows[28:], curvature=True)
    assert itself["drift"] == 0 and itself["curvature_growth"] == 0
    assert set(found["residual"]) == {"now", "before", "mean", "low", "high"}


# --- the last word is kept ------------------------------------------------------------------------------------------


def test_what_each_examination_said_last_is_remembered(registry):
    with registry.draft("reward_model") as draft:
        (draft.folder / "a").write_text("a")
    made = draft.published
    assert registry.refused(made) == []
    registry.examined(made, ["flat", "worse"], by="train reward")
    registry.examined(made, ["flat", "jumpy"], by="evaluate reward")
    assert registry.refused(made) == ["flat", "worse", "jumpy"]
    registry.examined(made, [], by="train reward")
    assert registry.refused(made) == ["flat", "jumpy"]


def test_the_demo_uses_no_reward_model_that_was_refused(registry, share_of_starter, tiny_folder, monkeypatch):
    share = share_of_starter(train=6, valid=2, test=2, memory=1, recall=1, fixtures=1)
    monkeypatch.setattr(homes, "STARTER", share)
    monkeypatch.setattr("hominem_mlx.reward.acceptance.refusals", lambda found: ["flat"] * (len(found) > 10))
    config = load_config(overrides=[f"student.base={tiny_folder}", "reward.backbone=ngram", "reward.folds=2"])
    with pytest.raises(NotGoodEnough, match="kept but not used:\nflat"):
        demo.run(registry, config, progress=None, note=print, began=0.0)
    assert registry.current("reward_model") is None and len(registry.artifacts("reward_model")) == 1
