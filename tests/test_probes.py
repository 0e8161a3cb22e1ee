"""Which numbers change between replies, what goes with it, and what other words would do; members are planted."""

import json
import re

import numpy as np
import pytest

from hominem_mlx.errors import InputError
from hominem_mlx.evaluation import counterfactuals, probes
from hominem_mlx.schema import MANIFOLD, RewardOutput

NAMES = (*MANIFOLD.names, "reward_intensity", "safety_score")


class Planted:
    """A linear judge of word counts: `weights` `{word: {output: what it adds}}`, members with errors of their own.

    `common` are errors of each member that fall on every text alike, `own` `{word: errors}` come with a word.
    """

    def __init__(self, weights, common=(0.0, 0.0), own=None):
        self.weights, self.common, self.own = weights, np.array(common), own or {}

    def score_many(self, pairs):
        return [self.score(*pair) for pair in pairs]

    def score(self, prompt, reply):
        said = re.findall(r"\w+", f"{prompt} {reply}")
        value = {name: sum(self.weights.get(word, {}).get(name, 0.0) for word in said) for name in NAMES}
        error = self.common + sum(np.array(self.own.get(word, 0.0)) for word in said)
        members = {name: tuple(value[name] + error) for name in NAMES}
        vector = {name: value[name] for name in MANIFOLD.names}
        return RewardOutput(
            reward_vector=vector,
            reward_intensity=value["reward_intensity"],
            safety_score=value["safety_score"],
            scalar=MANIFOLD.scalar(list(vector.values())),
            uncertainty={name: float(np.std(row)) for name, row in members.items()},
            members=members,
        )


def test_members_that_err_alike_leave_no_doubt_in_a_difference():
    """Each number alone is in doubt by 0.5, and yet all members agree that the first is 0.2 warmer."""
    judge = Planted({"dear": {"empathy": 0.2}}, common=(-0.5, 0.5))
    found = probes.probe(judge, "hello", ["dear friend", "friend"])
    assert found["candidates"][0]["uncertainty"]["empathy"] == pytest.approx(0.5)
    assert found["changed"] == {
        "empathy": {"difference": pytest.approx(0.2), "noise": pytest.approx(0.0), "highest": 0, "lowest": 1}
    }


def test_members_that_disagree_on_the_difference_take_it_back():
    """One says +0.5, one -0.1: mean 0.2, standard deviation 0.3, two of which are more than 0.2."""
    judge = Planted({"dear": {"empathy": 0.2}}, own={"dear": (0.3, -0.3)})
    found = probes.probe(judge, "hello", ["dear friend", "friend"])
    assert found["differences"]["empathy"] == {
        "difference": pytest.approx(0.2), "noise": pytest.approx(0.3), "highest": 0, "lowest": 1
    }  # fmt: skip
    assert found["changed"] == {}
    surer = Planted({"dear": {"empathy": 0.2}}, own={"dear": (0.09, -0.09)})
    assert list(probes.probe(surer, "hello", ["dear friend", "friend"])["changed"]) == ["empathy"]


def test_a_difference_nobody_would_argue_about_is_no_change_however_sure():
    judge = Planted({"dear": {"empathy": 0.09}}, common=(-0.1, 0.1))
    assert probes.probe(judge, "hello", ["dear friend", "friend"])["changed"] == {}


def test_a_probe_shows_width_flags_and_doubt_and_can_be_written_as_json():
    judged = Planted({"dear": {"empathy": 0.5}}, common=(-0.1, 0.1)).score("hello", "dear friend")
    judged = judged.model_copy(update={"width": {"empathy": 0.4}, "flags": ("truncated",)})
    found = probes.told("hello", ["dear friend"], [judged])
    text = probes.as_text(json.loads(json.dumps(found)))
    assert re.search(r"^empathy +\+0\.50 ±0\.10 +0\.40$", text, re.MULTILINE)
    assert "dear friend  (truncated)" in text
    assert "members" not in judged.model_dump()


def test_what_goes_with_a_change():
    """Empathy moves only between weighty replies, and safety falls as curiosity rises; the rest stays where it is."""
    weights = {
        "warm": {"empathy": 0.4},
        "weighty": {"reward_intensity": 0.8},
        "daring": {"curiosity": 0.5, "safety_score": -0.5},
    }
    judge = Planted(weights, common=(-0.1, 0.1))
    replies = [["weighty warm", "weighty"], ["daring", "dull"], ["plain", "dull daring"]] * 4
    judged = [judge.score_many([("hello", reply) for reply in both]) for both in replies]
    found = probes.relations(judged)
    assert (found["pairs"], found["prompts"]) == (12, 12)
    empathy, curiosity = found["dimensions"]["empathy"], found["dimensions"]["curiosity"]
    assert empathy["changed"] == pytest.approx(1 / 3) and empathy["size"] == pytest.approx(0.4 / 3)
    assert empathy["intensity"]["r"] == pytest.approx(1.0)
    assert empathy["intensity_change"]["r"] is None, "intensity never changes within a pair"
    assert curiosity["safety_change"] == {"r": pytest.approx(-1), "low": pytest.approx(-1), "high": pytest.approx(-1)}
    assert curiosity["safety"]["r"] == pytest.approx(-1.0)  # the mean of the two is lower where they differ
    assert found["dimensions"]["harm_avoidance"]["safety"]["r"] is None
    turned = probes.relations([list(reversed(both)) for both in judged])
    assert turned["dimensions"]["curiosity"]["safety_change"]["r"] == pytest.approx(-1), "whichever comes first"


def test_too_few_pairs_have_no_correlation_and_too_few_prompts_no_interval():
    judge = Planted({"a": {"empathy": 0.2, "reward_intensity": 0.1}})
    few = probes.relations([judge.score_many([("hi", "a " * n) for n in range(4)])])
    assert few["pairs"] == 6 and few["dimensions"]["empathy"]["intensity"]["r"] is None
    one = probes.relations([judge.score_many([("hi", "a " * n) for n in range(5)])])
    assert one["pairs"] == 10
    assert one["dimensions"]["empathy"]["intensity_change"] == {"r": pytest.approx(1), "low": None, "high": None}
    assert probes.relations([])["pairs"] == 0


def test_a_counterfactual_has_the_sign_and_size_that_was_planted():
    weights = {"obey": {"agency_support": -0.6}, "choose": {"agency_support": 0.3, "curiosity": 0.1}}
    judge = Planted(weights, own={"obey": (0.2, -0.2), "choose": (0.1, -0.1)})
    found = counterfactuals.counterfactuals(judge, "What now?", "Just obey.", ["obey=>choose", "obey=>"])
    other, less = found["counterfactuals"]
    assert other["reply"] == "Just choose." and less["reply"] == "Just."
    shift = other["shifts"]
    assert shift["agency_support"] == {"shift": pytest.approx(0.9), "noise": pytest.approx(0.1), "is_sure": True}
    assert shift["curiosity"] == {"shift": pytest.approx(0.1), "noise": pytest.approx(0.1), "is_sure": False}
    assert shift["scalar"]["shift"] == pytest.approx(1.0 / 7)
    assert less["shifts"]["agency_support"]["shift"] == pytest.approx(0.6)
    text = counterfactuals.as_text(json.loads(json.dumps(found)))
    assert re.search(r"^agency_support +-0\.60 +\+0\.90 ±0\.10 \* +\+0\.60 ±0\.20 \*$", text, re.MULTILINE)
    assert re.search(r"^curiosity +\+0\.00 +\+0\.10 ±0\.10 +\+0\.00 ±0\.20$", text, re.MULTILINE)


def test_another_prompt_for_the_same_reply():
    judge = Planted({"sad": {"empathy": 0.4}})
    found = counterfactuals.counterfactuals(judge, "I am sad", "Oh.", instead=["I am well"])
    assert found["counterfactuals"][0]["prompt"] == "I am well"
    assert found["counterfactuals"][0]["shifts"]["empathy"]["shift"] == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("text", "swap", "made"),
    [
        ("the man said he, He", "he=>she", "the man said she, He"),
        ("10 of 100", "10=>ten", "ten of 100"),
        ("彼は来た", "彼=>彼女", "彼女は来た"),
        ("please, do go", "please,=>", "do go"),
        ("so very kind", "very => ", "so kind"),
        (r"a \1 b", r"\1=>\g<0>", r"a \g<0> b"),
        ("Straße 5", "Straße=>Weg", "Weg 5"),
    ],
)
def test_words_are_swapped_whole(text, swap, made):
    assert counterfactuals.swapped(text, text, swap) == (made, made)


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        ("mother=>father", r"'mother' does not occur in the prompt or the reply$"),
        ("he=>she", r"'he' does not occur .*inside longer words only"),
        ("the", r"old=>new.*'the'"),
        ("=>the", r"old=>new"),
        ("the=>the", r"two different texts"),
    ],
)
def test_a_swap_that_changes_nothing_is_named(swap, said):
    with pytest.raises(InputError, match=said):
        counterfactuals.swapped("the end", "there", swap)
