"""From answers to numbers, worked by hand."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx.config import EvaluationConfig
from hominem_mlx.evaluation import measures
from hominem_mlx.evaluation.observe import Observed, Suite, kl
from hominem_mlx.models.sampling import Answer
from hominem_mlx.records import Fixture, Label, RecallQuestion, Reward
from hominem_mlx.schema import MANIFOLD, RewardOutput

CONFIG = EvaluationConfig(samples=2, bootstrap=200)


def label(prompt: str, reply: str, scalar: float) -> Label:
    return Label(id=f"{prompt}-{reply}", prompt_id=prompt, prompt=prompt, response=reply, reward=Reward(scalar=scalar))


def said(scalar: float, **axes: float) -> RewardOutput:
    vector = {name: axes.get(name, scalar) for name in MANIFOLD.names}
    return RewardOutput(reward_vector=vector, reward_intensity=0.5, safety_score=1.0, scalar=scalar)


def answer(text: str, *, finished: bool = True) -> Answer:
    return Answer(text, [1] * len(text.split()), finished)


def observed(**parts) -> Observed:
    empty = {"labels": np.zeros(0), "better": np.zeros(0), "worse": np.zeros(0)}
    return Observed(**{**empty, "recall": [], "fixtures": [], "samples": [], **parts})


SUITE = Suite(
    [label("p", "a", 0.8), label("p", "b", 0.5), label("p", "c", 0.4), label("q", "a", 0.0), label("q", "b", -0.5)],
    [],
    [],
)


def test_pair_accuracy_counts_pairs_from_the_margin_on_by_implicit_reward():
    # p: a-b (0.3 exactly) and a-c count, b-c (0.1) does not; q: a-b counts
    before = observed(labels=np.array([-10.0, -12, -14, -8, -9]))
    after = observed(labels=np.array([-9.0, -12, -11, -9, -9.5]))  # implicit: +1, 0, +3, -1, -0.5
    lengths = np.array([5.0, 6, 5, 4, 3])
    found = measures.preference(SUITE, before, after, lengths, {"x": [said(v) for v in (0.1, 0.2, 0, 0, 0)]}, CONFIG)
    assert found["n"] == 3 and found["prompts"] == 2
    assert sorted(found["margins"]) == [-2.0, -0.5, 1.0]
    assert found["accuracy_after"] == pytest.approx(1 / 3)
    assert found["accuracy_before"] == 0.5
    # per token before: -2, -2, -2.8, -2, -3: a-b tie (0.5), a-c right, q right
    assert found["normalised_before"] == pytest.approx(2.5 / 3)
    # per token after: -1.8, -2, -2.2, -2.25, -3.17: all right
    assert found["normalised_after"] == 1.0
    # longer is better? a-b no, a-c tie, q yes
    assert found["length_only"] == pytest.approx(1.5 / 3)
    # judge: a-b wrong, a-c right, q tie
    assert found["judges"]["x"] == pytest.approx(1.5 / 3)


def test_an_adapter_that_changes_nothing_has_accuracy_one_half():
    same = observed(labels=np.array([-10.0, -12, -14, -8, -9]))
    found = measures.preference(SUITE, same, same, np.ones(5), {}, CONFIG)
    assert found["accuracy_after"] == 0.5 and found["interval"] == [0.5, 0.5]


def test_without_pairs_there_is_no_preference_figure():
    suite = Suite([label("p", "a", 0.1), label("p", "b", 0.0)], [], [])
    assert (
        measures.preference(suite, observed(labels=np.zeros(2)), observed(labels=np.zeros(2)), np.ones(2), {}, CONFIG)
        is None
    )


def test_recall_counts_questions_whose_own_key_alone_is_named():
    rows = [("q1", "f1", "Nora"), ("q2", "f1", "Nora"), ("q3", "f2", "Paris")]
    suite = Suite([], [RecallQuestion(id=i, fact_id=f, question="?", key=k) for i, f, k in rows], [])
    before = observed(recall=[answer("no idea"), answer("Paris"), answer("hm")])
    after = observed(recall=[answer("She is nora."), answer("Nora of Paris"), answer("paris!")])
    found = measures.memory(suite, before, after, CONFIG)
    assert (found["recalled_before"], found["recalled_after"], found["total"], found["facts"]) == (0, 2, 3, 2)
    assert found["missed"] == ["q2"]


def test_reward_change_is_in_sd_of_the_untrained_answers_and_paired_by_prompt():
    suite = Suite([label("p", "a", 0.1), label("q", "a", 0.1)], [], [])
    before = observed(
        samples=[answer("one two"), answer("one two three four"), answer("a b"), answer("a b", finished=False)]
    )
    after = observed(samples=[answer("one two three"), answer("x y z"), answer("u v w"), answer("k l m")])
    first, second = [said(v) for v in (0.0, 0.2, 0.4, 0.6)], [said(v) for v in (0.1, 0.3, 0.5, 0.7)]
    found = measures.generation(suite, before, after, {"training": (first, second)}, CONFIG)
    judge = found["judges"]["training"]
    spread = np.std([0.0, 0.2, 0.4, 0.6], ddof=1)
    assert judge["before"] == pytest.approx(0.3) and judge["after"] == pytest.approx(0.4)
    assert judge["difference_in_sd"] == pytest.approx([0.1 / spread] * 3)  # the same change everywhere: no width
    assert judge["dimensions"]["empathy"]["difference"] == pytest.approx([0.1] * 3)
    assert judge["dimensions"]["safety"]["difference"] == pytest.approx([0.0] * 3)
    assert found["before"]["mean_words"] == 2.5 and found["mean_words_ratio"] == pytest.approx(3 / 2.5)
    # before: "one two" twice and "a b" twice among 1+3+1+1 pairs
    assert found["before"]["distinct2"] == pytest.approx(4 / 6) and found["after"]["distinct2"] == 1.0
    assert found["before"]["unfinished"] == 0.25 and found["after"]["unfinished"] == 0.0
    assert [row["prompt_id"] for row in found["answers"]] == ["p", "p", "q", "q"]


FIXTURES = [
    Fixture(id="words", prompt="x", must_contain=["help line"], must_not_contain=["stop"]),
    Fixture(id="order", prompt="x", better="good", worse="bad"),
    Fixture(id="both", prompt="x", must_not_contain=["never"], better="good", worse="bad"),
]
KEPT = ["Ring the Help Line.", "", "fine"]


def fixtures_found(before: list[str], after: list[str], order_before: list[float], order_after: list[float]):
    """Better replies of 2 tokens and worse ones of 4; `order` is the margin in nats a token."""
    suite = Suite([], [], FIXTURES)

    def seen(texts, order):
        worse = np.array([-8.0, -8.0])
        return observed(fixtures=[answer(t) for t in texts], better=2 * (worse / 4 + np.array(order)), worse=worse)

    lengths = np.array([2.0, 2.0]), np.array([4.0, 4.0])
    return measures.fixtures(suite, seen(before, order_before), seen(after, order_after), *lengths)


def test_nothing_regresses_when_nothing_changes():
    found = fixtures_found(KEPT, KEPT, [0.5, 0.5], [0.5, 0.5])
    assert found["words_regressed"] == found["order_regressed"] == []
    assert found["passed_before"] == found["passed_after"] == 3 and found["ordered"] == 2


def test_lost_words_and_a_flipped_order_are_regressions():
    found = fixtures_found(KEPT, ["Ring the helpline.", "", "never mind"], [0.5, 0.5], [-0.2, 0.1])
    assert found["words_regressed"] == ["words", "both"] and found["order_regressed"] == ["order"]
    assert found["rows"][1]["order"] == pytest.approx([0.5, -0.2])
    assert found["passed_after"] == 0


def test_what_the_base_fails_already_cannot_regress():
    found = fixtures_found(["stop", "", "never"], ["stop", "", "never"], [-0.5, -0.1], [-0.9, -0.9])
    assert found["words_regressed"] == found["order_regressed"] == [] and found["passed_before"] == 0


def test_an_order_as_close_as_a_coin_toss_is_not_a_regression():
    assert fixtures_found(KEPT, KEPT, [0.02, 0.5], [-0.02, 0.5])["order_regressed"] == []
    assert fixtures_found(KEPT, KEPT, [0.02, 0.5], [-0.04, 0.5])["order_regressed"] == ["order"]


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 9), st.floats(0.1, 20))
def test_kl_equals_a_numpy_one_and_is_never_negative(seed, rows, vocabulary, scale):
    rng = np.random.default_rng(seed)
    policy, base = (scale * rng.normal(size=(rows, vocabulary)) for _ in range(2))
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (policy, base))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = np.sum(np.where(p > 0, p * (np.log(p + 1e-300) - np.log(q + 1e-300)), 0), 1)
    found = np.array(kl(mx.array(policy.astype(np.float32)), mx.array(base.astype(np.float32))))
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (found >= -1e-5).all()


def test_kl_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 0.75 log 1.5 + 0.25 log 0.5
    policy, base = mx.array([[np.log(3.0), 0.0]]), mx.array([[7.0, 7.0]])
    assert kl(policy, base).item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-6)
