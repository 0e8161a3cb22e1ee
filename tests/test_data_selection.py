"""What to label next, worked by hand; and self-play."""

import math

import numpy as np
import pytest

from hominem_mlx.config import load_config
from hominem_mlx.data import home as homes
from hominem_mlx.data import rater, sampler, selection, selfplay
from hominem_mlx.data.recorded import RecordedTeacher
from hominem_mlx.errors import InputError
from hominem_mlx.records import Prompt, Trajectory
from hominem_mlx.schema import MANIFOLD, RewardOutput

NAMES = MANIFOLD.names


def output(vector=None, *, doubt=0.0, scalar=0.0):
    values = dict(zip(NAMES, vector if vector is not None else [0.5] * 7, strict=True))
    return RewardOutput(
        reward_vector=values,
        reward_intensity=0.5,
        safety_score=1.0,
        scalar=scalar,
        uncertainty={**dict.fromkeys(NAMES, doubt), "scalar": 9.0},
    )


NOTHING = np.zeros((0, 7))


def test_doubt_is_the_mean_deviation_over_the_dimensions():
    one = output(doubt=0.2)
    other = one.model_copy(update={"uncertainty": {"empathy": 0.7}})
    assert selection.doubts([one, other]) == pytest.approx([0.2, 0.1])


def test_rarity_worked_by_hand_and_by_a_second_implementation():
    labels = np.array([[0.5, 0.5], [0.5, 0.6], [-0.5, 0.5], [0.05, 0.9], [np.nan, 0.9]])
    predicted = np.array([[0.4, 0.4], [-0.4, -0.4], [0.0, 0.4]])
    # Three labels have a side in both: two at (+, +), one at (-, +), none at (-, -); shares 3/7, 2/7, 1/7.
    expected = [-math.log(3 / 7), -math.log(1 / 7), math.log(4)]
    assert selection.rarities(predicted, labels) == pytest.approx(expected)
    assert selection.rarities(predicted, np.zeros((0, 2))) == pytest.approx([math.log(4)] * 3)
    rng = np.random.default_rng(0)
    labels, predicted = rng.uniform(-1, 1, (40, 4)), rng.uniform(-1, 1, (6, 4))
    labels[rng.random((40, 4)) < 0.2] = np.nan
    for row, value in zip(predicted, selection.rarities(predicted, labels), strict=True):
        nats = []
        for i in range(4):
            for j in range(i + 1, 4):
                if abs(row[i]) < 0.1 or abs(row[j]) < 0.1:
                    nats.append(math.log(4))
                    continue
                both = [r for r in labels if abs(r[i]) >= 0.1 and abs(r[j]) >= 0.1]
                same = [r for r in both if r[i] * row[i] > 0 and r[j] * row[j] > 0]
                nats.append(-math.log((len(same) + 1) / (len(both) + 4)))
        assert value == pytest.approx(np.mean(nats))


def test_each_of_the_three_reasons_decides_when_the_others_are_equal():
    features = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    known = np.array([[1.0, 0.0], [0.0, 1.0]])
    doubtful = [output(doubt=d) for d in (0.1, 0.3, 0.2)]
    assert [p.candidate for p in selection.select(3, doubtful, features, NOTHING[:0], known)] == [1, 2, 0]
    far = np.array([[0.1, 0.0], [5.0, 5.0], [0.2, 0.0]])
    assert selection.select(1, [output()] * 3, far, NOTHING, known)[0].candidate == 1
    labelled = np.tile([0.5] * 7, (20, 1))
    corner = [output(), output([0.5] * 6 + [-0.5]), output()]
    assert selection.select(1, corner, features, labelled, np.zeros((20, 2)))[0].candidate == 1


def test_like_replies_are_not_picked_together():
    features = np.array([[5.0, 5.0], [5.01, 5.0], [4.0, -4.0], [0.0, 0.0]])
    picks = selection.select(2, [output()] * 4, features, NOTHING, np.zeros((3, 2)))
    assert {pick.candidate for pick in picks} == {0, 2} or {pick.candidate for pick in picks} == {1, 2}


def test_more_are_asked_for_than_there_are_and_none_at_all():
    features = np.array([[0.0], [1.0]])
    assert len(selection.select(9, [output()] * 2, features, NOTHING, np.zeros((0, 1)))) == 2
    assert selection.select(3, [], np.zeros((0, 1)), NOTHING, np.zeros((0, 1))) == []


def test_only_what_was_selected_is_rated(home):
    rows = [
        Trajectory(id=f"c{n}", prompt_id="p", prompt="Why?", response=f"Reply {n}.", edit_of="c0" if n == 3 else None)
        for n in range(5)
    ]
    homes.write(home, Trajectory, rows)
    assert rater.cost(home, load_config(), RecordedTeacher(), only=["c1"]).requests == 1
    todo, _, kept = rater.unrated(home, ["c2", "c3"])
    assert [row.id for row in todo] == ["c0", "c2", "c3"] and kept == 0, "an edit brings its original"
    done = rater.rate(home, load_config(), RecordedTeacher(), only=["c1"])
    assert list(done.unlabelled) == ["c1"]


def test_disagreement_is_in_each_judges_own_units():
    one = [output(scalar=s) for s in (0.0, 0.2, 0.4)]
    other = [output(scalar=s) for s in (-0.9, -0.8, -0.7)]  # the same verdicts on another scale
    assert selection.disagreements(one, other) == pytest.approx([0, 0, 0], abs=1e-9)
    turned = selection.disagreements(one, other[::-1])
    assert turned == pytest.approx([2 * math.sqrt(1.5), 0, 2 * math.sqrt(1.5)])
    assert selection.disagreements(one, [output()] * 3) == pytest.approx([math.sqrt(1.5), 0, math.sqrt(1.5)])


# --- self-play --------------------------------------------------------------------------------------------------------


class Student:
    hash = "student"

    def __init__(self):
        self.calls = 0

    def complete(self, prompts, *, max_tokens, temperature, seed, system=None):
        self.calls += 1
        return ["" if n % 7 == 6 else f"Answer {n} to {prompt[:10]}" for n, prompt in enumerate(prompts)]


class Judge:
    """Scores by a function of the reply."""

    def __init__(self, of):
        self.of = of

    def score_many(self, pairs):
        return [output(scalar=self.of(reply)) for _, reply in pairs]


def place(reply):
    return int(reply.split()[1])


JUDGES = (Judge(lambda reply: 0.0), Judge(lambda reply: place(reply) / 100))


@pytest.fixture
def asked(home):
    homes.write(home, Prompt, [Prompt(id=f"p{n}", prompt=f"Question {n}?", category="c") for n in range(3)])
    return home


def test_the_answers_that_judges_differ_on_become_candidates(asked):
    done = selfplay.play(asked, load_config(), Student(), JUDGES, 4)
    rows = homes.read(asked, Trajectory)
    assert (done.answers, done.added, len(rows)) == (11, 4, 4), "one of twelve was empty"
    numbers = [place(f"Answer {n} x") for n in range(12) if n != 6]
    apart = sorted(numbers, key=lambda n: -abs(n - np.mean(numbers)))[:4]
    assert sorted(place(row.response) for row in rows) == sorted(apart)
    assert all(row.labeller == "student" and row.metadata["disagreement"] > 0 for row in rows)
    assert done.least_kept == pytest.approx(min(row.metadata["disagreement"] for row in rows), abs=1e-3)


def test_self_play_goes_on_with_what_was_answered_and_adds_nothing_twice(asked):
    student = Student()
    selfplay.play(asked, load_config(), student, JUDGES, 4)
    assert student.calls == 1
    done = selfplay.play(asked, load_config(), student, JUDGES, 4)
    assert student.calls == 1 and (done.answers, done.added) == (7, 4)
    assert len({(row.prompt, row.response) for row in homes.read(asked, Trajectory)}) == 8


def test_answers_of_self_play_take_no_place_of_a_teachers_candidates(asked):
    selfplay.play(asked, load_config(), Student(), JUDGES, 4)
    before = len(homes.read(asked, Trajectory))
    config = load_config(overrides=["data.candidates=2", "data.student_candidates=2"])
    assert sampler.sample(asked, config, RecordedTeacher(), student=Student()).student == 6
    assert len(homes.read(asked, Trajectory)) == before + 6


def test_self_play_without_prompts_says_how_to_get_some(home):
    with pytest.raises(InputError, match="hominem data generate"):
        selfplay.play(home, load_config(), Student(), JUDGES, 4)
