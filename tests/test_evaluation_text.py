"""Reading answers word by word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx.evaluation.text import contains, distinct2, is_recalled, word_diff

OTHERS = ["Nora", "farrier"]


@pytest.mark.parametrize(
    ("answer", "recalled"),
    [
        ("Your sister is called Ottoline.", True),
        ("OTTOLINE, I think", True),
        ("'ottoline'", True),
        ("Ottolines are rare", False),  # whole words only
        ("Her name is Otto line", False),
        ("", False),
        ("Ottoline or Nora", False),  # naming another fact's key too is no memory
        ("Ottoline the Farrier", False),
        ("Ottoline, honorary farriers", True),  # no other key as a whole word
    ],
)
def test_recall_needs_this_key_as_a_whole_word_and_no_other(answer, recalled):
    assert is_recalled(answer, "Ottoline", OTHERS) is recalled


def test_a_key_shared_by_two_facts_does_not_refute_itself():
    assert is_recalled("it is blue", "Blue", ["blue", "green"])


def test_keys_with_marks_and_spaces_are_read_literally():
    assert contains("He plays the A.B. horn now", "a.b. horn")
    assert not contains("He plays the axb horn now", "a.b. horn")


def test_distinct2_counts_different_neighbouring_pairs():
    # "a b a b": ab ba ab -> 2 of 3; with "A b": ab again -> 2 of 4
    assert distinct2(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct2(["a b a b", "A b!"]) == pytest.approx(2 / 4)
    assert distinct2(["one", ""]) == 0.0


def test_word_diff_by_hand():
    assert word_diff("you should go home", "you could go home now") == [
        ("same", "you"),
        ("gone", "should"),
        ("new", "could"),
        ("same", "go home"),
        ("new", "now"),
    ]


@given(st.lists(st.sampled_from(["a", "b", "c", "d"])), st.lists(st.sampled_from(["a", "b", "c", "d"])))
def test_word_diff_gives_both_texts_back(before, after):
    pieces = word_diff(" ".join(before), " ".join(after))
    for kept, whole in (("gone", before), ("new", after)):
        assert " ".join(text for kind, text in pieces if kind in ("same", kept)).split() == whole
