"""Reliability from a second asking, and several teachers' ratings made one."""

import json
import math

import numpy as np
import pytest

from fake_teacher import FakeTeacher, number
from hominem_mlx.config import load_config
from hominem_mlx.data import again, agreement, dataset, rater
from hominem_mlx.data import home as homes
from hominem_mlx.data.local import LocalTeacher
from hominem_mlx.data.recorded import RecordedTeacher
from hominem_mlx.data.split import split_of
from hominem_mlx.data.teacher import open_teacher
from hominem_mlx.errors import InputError, TeacherError
from hominem_mlx.files import write_jsonl
from hominem_mlx.records import Label, Reward, Trajectory
from hominem_mlx.schema import MANIFOLD


def label(name, labeller, **reward):
    return Label(
        id=name, prompt_id="p", prompt="Why?", response=f"Reply {name}.", reward=Reward(**reward), labeller=labeller
    )


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_reliability_is_the_correlation_of_test_and_retest_and_its_root_the_ceiling():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=400) * 0.2
    first = np.clip(truth + rng.normal(size=400) * 0.1, -1, 1)
    second = np.clip(truth + rng.normal(size=400) * 0.1, -1, 1)
    found = agreement.reliabilities(
        [label(str(n), "a", empathy=float(v), curiosity=0.5) for n, v in enumerate(first)],
        [label(str(n), "a", empathy=float(v), curiosity=0.5) for n, v in enumerate(second)],
    )
    by_number = {item.number: item for item in found}
    empathy = by_number["empathy"]
    assert empathy.n == 400 and empathy.reliability == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert empathy.reliability == pytest.approx(0.04 / 0.05, abs=0.05), "variance of the truth over that of a rating"
    assert empathy.ceiling == pytest.approx(math.sqrt(empathy.reliability))
    # What the ceiling says: the truth itself correlates with the ratings by no more.
    assert np.corrcoef(truth, first)[0, 1] == pytest.approx(empathy.ceiling, abs=0.05)
    assert by_number["curiosity"].reliability is None, "numbers that do not differ show nothing"
    assert by_number["scalar"].n == 0 and by_number["scalar"].ceiling is None


def test_a_reliability_below_zero_has_the_ceiling_zero_and_few_rows_none():
    rows = [label(str(n), "a", empathy=n / 20) for n in range(12)]
    turned = [label(str(n), "a", empathy=-n / 20) for n in range(12)]
    (empathy, *_) = agreement.reliabilities(rows, turned)
    assert (empathy.reliability, empathy.ceiling) == (pytest.approx(-1), 0)
    (few, *_) = agreement.reliabilities(rows[:9], turned[:9])
    assert (few.n, few.reliability) == (9, None)
    assert agreement.reliabilities(rows, [row.model_copy(update={"labeller": "b"}) for row in turned]) == []


@pytest.mark.parametrize(
    ("reliability", "weight"), [(0.5, 1.0), (0.8, 4.0), (0.75, 3.0), (0.0, 0.0), (-0.4, 0.0), (1.0, 19.0)]
)
def test_precision_worked_by_hand(reliability, weight):
    assert agreement.precision(reliability) == pytest.approx(weight)


def test_the_mix_is_the_mean_weighed_by_precision():
    opinions = [label("x", "a", empathy=1.0, curiosity=0.2), label("x", "b", empathy=0.0)]
    weights = {("a", "empathy"): 1.0, ("b", "empathy"): 4.0, ("a", "curiosity"): 2.0}
    mixed = agreement.mix(opinions, weights)
    assert mixed.empathy == pytest.approx(0.2)  # (1 * 1.0 + 4 * 0.0) / 5
    assert mixed.curiosity == pytest.approx(0.2) and mixed.scalar is None
    assert agreement.mix(opinions, {}).empathy == pytest.approx(0.5), "nothing known: all count alike"
    assert agreement.mix(opinions, {("a", "empathy"): 1.0}).empathy == pytest.approx(0.5)
    assert agreement.mix(opinions, dict.fromkeys(weights, 0.0)).empathy == pytest.approx(0.5)


def test_another_teachers_scale_is_brought_to_that_of_the_one_who_said_most():
    values = np.linspace(-0.5, 0.5, 12)
    mild = [label(str(n), "mild", empathy=float(v), curiosity=0.5) for n, v in enumerate(values)]
    strict = [label(str(n), "strict", empathy=float(0.5 * v - 0.2), curiosity=0.1) for n, v in enumerate(values[:11])]
    moved = agreement.on_one_scale([*mild, *strict])
    assert moved[:12] == mild
    assert [row.reward.empathy for row in moved[12:]] == pytest.approx(values[:11])
    assert [row.reward.curiosity for row in moved[12:]] == pytest.approx([0.5] * 11), "a constant is only shifted"
    few = [*mild, *strict[:9]]
    assert agreement.on_one_scale(few) == few, "nine in common show nothing"
    assert agreement.on_one_scale([]) == []
    steep = [row.model_copy(update={"reward": Reward(empathy=0.01 * row.reward.empathy)}) for row in strict]
    spread = np.std([row.reward.empathy for row in agreement.on_one_scale([*mild, *steep])[12:]])
    assert spread == pytest.approx(3 * np.std([row.reward.empathy for row in steep]))
    wide = [label(str(n), "wide", reward_intensity=0.9 - 0.05 * n) for n in range(12)]
    low = [label(str(n), "low", reward_intensity=0.3 - 0.02 * n) for n in range(11)]
    assert min(row.reward.reward_intensity for row in agreement.on_one_scale([*wide, *low])) >= 0


def held(labeller, values, part):
    """One rating for each value, of prompts in one split."""
    names = [f"p{n}" for n in range(400) if split_of(f"p{n}") == part]
    return [
        label(name, labeller, empathy=float(value)).model_copy(update={"prompt_id": name})
        for name, value in zip(names, values)
    ]


def test_held_out_replies_are_moved_but_do_not_say_how():
    values = np.linspace(-0.5, 0.5, 12)
    learnt = [*held("mild", values, "train"), *held("strict", values - 0.2, "train")]
    secret = [*held("mild", values, "test"), *held("strict", -0.3 * values + 0.4, "test")]
    found = agreement.on_one_scale([*learnt, *secret])
    assert found[:24] == agreement.on_one_scale(learnt)
    assert [row.reward.empathy for row in found[36:]] == pytest.approx(-0.3 * values + 0.6)
    assert agreement.on_one_scale(secret) == secret
    assert agreement.not_held_out([*learnt, *secret]) == learnt


def test_weights_come_from_retests_of_prompts_that_are_not_held_out(home):
    values = np.linspace(-0.5, 0.5, 24)
    labels = {part: held("judge", values, part) for part in ("train", "test")}
    homes.write(home, Label, [*labels["train"], *labels["test"]])
    other = [row.model_copy(update={"labeller": "other"}) for row in (*labels["train"], *labels["test"])]
    write_jsonl(home / homes.OPINIONS, [*labels["train"], *labels["test"], *other])
    with FakeTeacher() as server:
        config = configured(server, "teacher.model=other")
        for part, known in (("test", []), ("train", ["judge"])):
            write_jsonl(home / homes.RETESTS, labels[part])
            done = again.second(home, config, open_teacher(config, home))
            assert done.unknown == sorted({"judge", "other"} - set(known))


def test_no_other_weights_give_a_mean_nearer_to_the_truth():
    """Second implementation: the error of every mean on a grid, on simulated teachers; and Spearman-Brown for twins."""
    rng = np.random.default_rng(1)
    truth = rng.normal(size=200_000)
    noise = {0.8: math.sqrt(0.25), 0.5: 1.0}  # r = 1 / (1 + noise^2)
    a, b = (truth + sd * rng.normal(size=truth.size) for sd in noise.values())
    shares = np.linspace(0, 1, 101)
    errors = [np.mean((share * a + (1 - share) * b - truth) ** 2) for share in shares]
    weights = [agreement.precision(r) for r in noise]
    assert shares[int(np.argmin(errors))] == pytest.approx(weights[0] / sum(weights), abs=0.011)
    both = 2 * agreement.precision(0.6)
    assert both / (1 + both) == pytest.approx(2 * 0.6 / (1 + 0.6))


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(home):
    """A home with forty candidate replies."""
    rows = [
        Trajectory(id=f"p{n}-c0", prompt_id=f"p{n}", prompt=f"Question {n}?", response=f"Reply {n}.") for n in range(40)
    ]
    homes.write(home, Trajectory, rows)
    return home


def configured(server, *more):
    base = ["teacher.kind=anthropic", "teacher.model=judge", f"teacher.base_url={server.url}", "teacher.max_retries=0"]
    return load_config(overrides=[*base, *more])


@pytest.mark.parametrize("mode", ["shuffled", "single"])
def test_a_retest_asks_anew_about_some_labels_and_leaves_them_as_they_are(answered, mode):
    with FakeTeacher() as server:
        config = configured(server, f"teacher.rate_mode={mode}")
        rater.rate(answered, config, open_teacher(config, answered))
        labels, asked = homes.read(answered, Label), len(server.requests)
        calls = 1 if mode == "shuffled" else 8
        assert again.retest_cost(answered, config, open_teacher(config, answered)).requests == 20 * calls
        done = again.retest(answered, config, open_teacher(config, answered))
        assert (done.rated, done.kept, len(server.requests) - asked) == (20, 0, 20 * calls)
        assert "repeat" not in json.dumps(server.requests[-1][1])
        retests = homes.read_aside(answered, homes.RETESTS)
        assert {row.id for row in retests} < {row.id for row in labels} and len(retests) == 20
        assert homes.read(answered, Label) == labels
        done = again.retest(answered, config, open_teacher(config, answered))
        assert (done.rated, done.kept, len(server.requests) - asked) == (0, 20, 20 * calls)
    (first, *_) = agreement.reliabilities(labels, retests)
    assert first.reliability == pytest.approx(1), "this teacher's numbers hang on the reply alone"


def test_a_retest_asks_for_the_dimensions_in_another_order(answered):
    with FakeTeacher() as server:
        config = configured(server)
        rater.rate(answered, config, open_teacher(config, answered))
        orders = {body["messages"][0]["content"].partition("</reply>")[0]: _order(body) for _, body in server.requests}
        before = len(server.requests)
        again.retest(answered, config, open_teacher(config, answered))
        changed = [
            _order(body) != orders[body["messages"][0]["content"].partition("</reply>")[0]]
            for _, body in server.requests[before:]
        ]
    assert sum(changed) > 10


def _order(body):
    return list(body["output_config"]["format"]["schema"]["properties"])


def test_a_retest_of_nothing_and_a_dear_one_are_refused(answered):
    with FakeTeacher() as server:
        config = configured(server)
        with pytest.raises(InputError, match="judge has labelled nothing"):
            again.retest(answered, config, open_teacher(config, answered))
        rater.rate(answered, config, open_teacher(config, answered))
        dear = configured(server, "teacher.usd_per_million_output=1000", "teacher.max_cost_usd=0.01")
        before = len(server.requests)
        with pytest.raises(TeacherError, match="nothing was sent"):
            again.retest(answered, dear, open_teacher(dear, answered))
        assert len(server.requests) == before


def test_the_recorded_teacher_has_no_second_thoughts_but_the_starter_corpus_brings_its_own(home):
    dataset.import_starter(home)
    dataset.import_starter(home)
    retests = homes.read_aside(home, homes.RETESTS)
    found = agreement.reliabilities(again.first_ratings(home), retests)
    assert len(retests) == 161 and {item.labeller for item in found} == {"starter"}
    assert all(item.reliability > 0.7 for item in found if item.number in MANIFOLD.names)
    done = again.retest(home, load_config(), RecordedTeacher())
    assert done.rated == 0 or "again" in next(iter(done.unanswered.values()))


def test_the_local_teacher_is_asked_again_with_its_scale_turned_round(tiny):
    teacher = LocalTeacher(tiny())
    asked = []

    def shares(text, options):
        asked.append(text)
        return [0, 0, 0, 0, 0, 0, 0, 0, 1]  # always the last digit

    teacher._shares = shares
    one = MANIFOLD.dimensions[:1]
    assert teacher.rate("Hi", "Yes.", dimensions=one, overall=False).reward == {"empathy": 1.0}
    assert teacher.rate("Hi", "Yes.", dimensions=one, overall=False, repeat=1).reward == {"empathy": -1.0}
    low, high = MANIFOLD.dimensions[0].low, MANIFOLD.dimensions[0].high
    assert f"1 ({low}) to 9 ({high})" in asked[0] and f"1 ({high}) to 9 ({low})" in asked[1]


# --- a second teacher -------------------------------------------------------------------------------------------------


def second(home, server, model="other", *more):
    config = configured(server, f"teacher.model={model}", *more)
    return again.second(home, config, open_teacher(config, home))


def test_a_second_opinion_becomes_part_of_the_label_and_all_opinions_stay(answered):
    with FakeTeacher() as server:
        config = configured(server)
        rater.rate(answered, config, open_teacher(config, answered))
        mine = homes.read(answered, Label)[0].model_copy(update={"labeller": "human"})
        homes.write(answered, Label, [mine, *homes.read(answered, Label)[1:]])
        before = homes.read(answered, Label)
        server.fault = lambda body, count: "500 oops" if "Reply 7." in body["messages"][0]["content"] else None
        done = second(answered, server)
        assert (done.rated, list(done.unanswered), done.unknown) == (38, ["p7-c0"], ["judge", "other"])
        labels = homes.read(answered, Label)
        assert labels[0] == mine, "a person's label stays what it is"
        assert labels[7] == before[7]
        assert {row.labeller for row in labels} == {"human", "judge", "judge+other"}
        said = "<reply>\nReply 4.\n</reply>"
        assert labels[4].reward.empathy == number(said, "empathy"), "both teachers say the same here"
        opinions = homes.read_aside(answered, homes.OPINIONS)
        assert sorted({row.labeller for row in opinions}) == ["judge", "other"] and len(opinions) == 76
        asked = len(server.requests)
        server.fault = lambda body, count: None
        assert second(answered, server).rated == 1 and len(server.requests) == asked + 1
        assert second(answered, server).rated == 0
        assert second(answered, server, "third").rated == 39
    assert homes.read(answered, Label)[4].labeller == "judge+other+third"


def test_opinions_weigh_by_reliability_and_weights_are_applied_when_they_become_known(answered):
    rows = [Label(**row.model_dump(include={"id", "prompt_id", "prompt", "response"}), reward=Reward(empathy=0.0))
            for row in homes.read(answered, Trajectory)]  # fmt: skip
    rng = np.random.default_rng(0)
    truth = np.clip(rng.normal(size=40) * 0.3, -0.6, 0.6)

    def rated(labeller, sd, seed):
        noise = np.random.default_rng(seed).normal(size=40) * sd
        return [
            row.model_copy(update={"labeller": labeller, "reward": Reward(empathy=float(np.clip(value, -1, 1)))})
            for row, value in zip(rows, truth + noise)
        ]

    good, poor = rated("good", 0.05, 1), rated("poor", 0.3, 2)
    homes.write(answered, Label, good)
    write_jsonl(answered / homes.OPINIONS, [*good, *poor])
    write_jsonl(answered / homes.RETESTS, [*rated("good", 0.05, 3), *rated("poor", 0.3, 4)])
    with FakeTeacher() as server:
        config = configured(server, "teacher.model=good")
        done = again.second(answered, config, open_teacher(config, answered))
        assert done.unknown == [] and server.requests == []
    mixed = np.array([row.reward.empathy for row in homes.read(answered, Label)])
    error = {name: np.mean((values - truth) ** 2) for name, values in {
        "mixed": mixed,
        "plain": np.array([(a.reward.empathy + b.reward.empathy) / 2 for a, b in zip(good, poor)]),
    }.items()}  # fmt: skip
    assert error["mixed"] < error["plain"] / 2


def test_a_second_opinion_is_asked_about_imported_labels_too(home):
    rows = [label(str(n), "peer", empathy=0.1) for n in range(5)]
    rows[4] = rows[4].model_copy(update={"edit_of": "3", "lowered": "empathy"})
    homes.write(home, Label, rows)
    with FakeTeacher() as server:
        config = configured(server)
        assert again.second_cost(home, config, open_teacher(config, home)).requests == 5
        assert second(home, server, "judge").rated == 5
        homes.write(home, Label, [])
        with pytest.raises(InputError, match="no reply has a label"):
            second(home, server, "third")
        homes.write(home, Label, rows)
    opinions = homes.read_aside(home, homes.OPINIONS)
    assert [row.edit_of for row in opinions if row.labeller == "judge"] == [None] * 4 + ["3"]


def test_labels_that_came_in_or_were_mended_since_are_not_mixed_over(answered):
    with FakeTeacher() as server:
        config = configured(server)
        rater.rate(answered, config, open_teacher(config, answered))
        second(answered, server)
        labels = homes.read(answered, Label)
        newer = labels[0].model_copy(update={"labeller": "newer", "reward": Reward(empathy=0.99), "metadata": {}})
        mended = labels[1].model_copy(update={"reward": labels[1].reward.model_copy(update={"empathy": 0.98})})
        same = labels[2].model_copy(update={"labeller": "judge", "reward": Reward(empathy=0.97)})
        homes.write(answered, Label, [newer, mended, same, *labels[3:]])
        second(answered, server)
        second(answered, server, "third")
    after = homes.read(answered, Label)
    assert after[:3] == [newer, mended, same]
    assert {row.labeller for row in after[3:]} == {"judge+other+third"}, "what nobody touched is mixed as ever"


def test_a_killed_second_opinion_arrives_where_an_undisturbed_one_does(answered, monkeypatch):
    with FakeTeacher() as server:
        config = configured(server)
        rater.rate(answered, config, open_teacher(config, answered))
        with monkeypatch.context() as patch:
            patch.setattr(homes, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                second(answered, server)
        assert {row.labeller for row in homes.read(answered, Label)} == {"judge"}
        asked = len(server.requests)
        second(answered, server)
        assert len(server.requests) == asked
    assert {row.labeller for row in homes.read(answered, Label)} == {"judge+other"}
    assert len(homes.read_aside(answered, homes.OPINIONS)) == 80
