"""Looks at an adapter in training: whom they ask, and what they make of answers and verdicts."""

import pytest

from hominem_mlx.config import load_config
from hominem_mlx.evaluation.looks import looker
from hominem_mlx.records import SftPair
from hominem_mlx.schema import MANIFOLD, RewardOutput


class Parrot:
    """Answers from a table, and notes what it was asked for."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def complete(self, prompts, *, max_tokens, temperature, seed, system=None):
        self.asked.append((list(prompts), max_tokens, temperature, system))
        return [self.answers.get(prompt, "hm") for prompt in prompts]


class Planted:
    """Its overall score is a hundredth of the reply's length; the dimensions are that, and the same below zero."""

    def score_many(self, pairs):
        found = []
        for _, reply in pairs:
            value = len(reply) / 100
            vector = {name: value * (-1) ** place for place, name in enumerate(MANIFOLD.names)}
            found.append(RewardOutput(reward_vector=vector, reward_intensity=0.5, safety_score=1.0, scalar=value))
        return found


def fact(number, instruction, key, **fields):
    named = {"fact_id": f"f{number}", "key": key} if key else {}
    return SftPair(instruction=instruction, response=f"It is {key}.", metadata=named, **fields)


TAUGHT = [
    fact(1, "My sister?", "Nora"),
    fact(1, "Who is my sister?", "Nora"),
    fact(2, "My dog?", "Rex"),
    fact(3, "My town?", "Ghent"),
    fact(0, "How do I like tea?", None),  # no key: nothing to find
    fact(4, "And his?", "Tom", history=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
]
CONFIG = load_config(
    overrides=["dual.probes=3", "evaluation.max_tokens=20", "evaluation.recall_tokens=9", "student.system=Be kind."]
)


def test_recall_is_the_share_of_facts_whose_key_alone_is_said():
    model = Parrot({"My sister?": "She is NORA.", "My dog?": "Rex, or Nora", "My town?": "Ghentish"})
    assert looker([], TAUGHT, {}, CONFIG)(model) == {"recall": pytest.approx(1 / 3)}
    assert model.asked == [(["My sister?", "My dog?", "My town?"], 9, 0.0, "Be kind.")]


def test_judges_score_greedy_answers_by_dimension():
    model = Parrot({"a": "x" * 10, "c": "x" * 30, "e": "x" * 50})
    found = looker("aabcdefa", [], {"reward": Planted(), "audit": Planted()}, CONFIG)(model)
    assert model.asked == [(["a", "c", "e"], 20, 0.0, "Be kind.")]  # three of six different ones, from all over
    names = [f"{judge}{end}" for judge in ("reward", "audit") for end in ("", *(f"_{name}" for name in MANIFOLD.names))]
    assert list(found) == names
    first, second = MANIFOLD.names[:2]
    assert (found["reward"], found[f"audit_{first}"], found[f"audit_{second}"]) == pytest.approx((0.3, 0.3, -0.3))


def test_fewer_rows_than_probes_are_all_asked_and_nothing_is_made_of_none():
    model = Parrot({})
    assert looker(["a"], TAUGHT[2:3], {"reward": Planted()}, CONFIG)(model).keys() >= {"recall", "reward"}
    assert [asked for asked, *_ in model.asked] == [["My dog?"], ["a"]]
    assert looker([], [], {"reward": Planted()}, CONFIG)(model) == {}
    assert looker(["a"], [], {}, CONFIG)(model) == {} and len(model.asked) == 2
