"""Counts of words beside states: the numbers by hand, the vocabulary by prompts, and where in a reply they stand."""

import math

import numpy as np
import pytest

from hominem_mlx.errors import InputError
from hominem_mlx.reward.words import MOST, WordCounts, pieces

PAIRS = [("p", "Sit down, friend."), ("p", "Sit still."), ("q", "Sit down and rest and rest."), ("r", "No.")]
GROUPS = ["p", "p", "q", "r"]


def test_pieces_are_words_and_two_in_a_row_with_their_places():
    found = list(pieces("Don't SIT, now"))
    assert found == [
        ("don't", 0, 5), ("sit", 6, 9), (",", 9, 10), ("now", 11, 14),
        ("don't sit", 0, 9), ("sit ,", 6, 10), (", now", 9, 14),
    ]  # fmt: skip
    assert list(pieces(" \n")) == []


def test_the_numbers_by_hand():
    counts = WordCounts.fit(PAIRS, GROUPS, 0.5)
    # "still", ", ", "and" and the rest stand with one prompt only; "friend ." too
    assert counts.vocabulary == [".", "down", "sit", "sit down"]
    dot, two = math.log(4 / 4) + 1, math.log(4 / 3) + 1  # with all 3 prompts, with 2 of them
    lengths = [dot**2 + 3 * two**2, dot**2 + two**2, dot**2 + 3 * two**2, dot**2]
    scale = math.sqrt(0.5 / np.mean(lengths))
    short = math.sqrt(0.5) / (scale * math.sqrt(lengths[0]))  # the first row is longer than is usual
    expected = [[dot * short, two * short, two * short, two * short], [dot, 0, two, 0]]
    np.testing.assert_allclose(counts.read(PAIRS[:2]), scale * np.array(expected), rtol=1e-6)
    assert np.linalg.norm(counts.read(PAIRS[:1])) == pytest.approx(math.sqrt(0.5))
    once, twice = counts.read([("x", "."), ("x", ". .")])[:, 0]
    assert twice / once == pytest.approx(1 + math.log(2))


def test_a_long_reply_says_no_more_than_a_usual_one():
    counts = WordCounts.fit(PAIRS, GROUPS, 0.5)
    assert np.linalg.norm(counts.read([("x", "Sit down. " * 400)])) == pytest.approx(math.sqrt(0.5), rel=1e-5)


def test_what_stands_with_one_prompt_only_is_not_known():
    counts = WordCounts.fit(PAIRS, ["p", "p", "p", "p"], 0.5)
    assert counts.vocabulary == []
    assert counts.read(PAIRS).shape == (4, 0)
    assert counts.added(PAIRS[0], ["Sit", " down"], np.zeros((0, 2))).tolist() == [[0, 0], [0, 0]]


def test_a_vocabulary_keeps_the_most_widespread_pieces():
    rare = " . ".join(f"word{number}" for number in range(MOST // 2))
    counts = WordCounts.fit([("a", rare), ("b", rare), ("c", "sit")] + [("d", "sit")], list("abcd"), 1.0)
    assert len(counts.vocabulary) == MOST
    assert {".", "sit"} < set(counts.vocabulary)


def test_what_tokens_add_is_all_that_words_add_and_stands_where_they_do():
    counts = WordCounts.fit(PAIRS, GROUPS, 0.5)
    worth = np.random.default_rng(0).normal(size=(4, 2))
    pair = ("p", "Oh, sit down. Sit!")
    tokens = ["Oh", ",", " s", "it", " down", ".", " Sit", "!"]
    added = counts.added(pair, tokens, worth)
    np.testing.assert_allclose(added.sum(axis=0), counts.read([pair])[0] @ worth, rtol=1e-6)
    dot, down, sit, both = counts.read([pair])[0][:, None] * worth
    np.testing.assert_allclose(added[[0, 1, 7]], 0.0, atol=1e-12)
    np.testing.assert_allclose(added[5], dot, rtol=1e-6)
    # "sit" has six letters in two places, "sit down" eight with the space between
    np.testing.assert_allclose(added[2], sit / 6 + both / 8, rtol=1e-6)
    np.testing.assert_allclose(added[4], down + 5 * both / 8, rtol=1e-6)
    np.testing.assert_allclose(added[6], 3 * sit / 6, rtol=1e-6)


def test_of_a_reply_that_was_cut_the_last_token_has_what_stands_behind_it():
    counts = WordCounts.fit(PAIRS, GROUPS, 0.5)
    worth, pair = np.ones((4, 1)), ("p", "Well. Sit down.")
    added = counts.added(pair, ["Well", "."], worth)
    np.testing.assert_allclose(added.sum(), counts.read([pair]).sum(), rtol=1e-6)
    assert added[0] == 0.0


def test_what_is_written_is_what_is_read():
    counts = WordCounts.fit(PAIRS, GROUPS, 0.5)
    again = WordCounts.from_json(counts.as_json(), "vocabulary.json")
    np.testing.assert_array_equal(again.read(PAIRS), counts.read(PAIRS))


@pytest.mark.parametrize(
    "change", [{"pieces": None}, {"weights": [1.0]}, {"weights": [float("nan")] * 4}, {"usual": 0.0}, {"usual": "far"}]
)
def test_what_does_not_belong_together_is_refused(change):
    made = WordCounts.fit(PAIRS, GROUPS, 0.5).as_json() | change
    with pytest.raises(InputError, match=r"vocabulary\.json"):
        WordCounts.from_json(made, "vocabulary.json")
