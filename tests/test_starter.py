"""The starter corpus keeps the promises that make training on it meaningful."""

import collections
import difflib
import re

import numpy as np
import pytest

from hominem_mlx.data.split import by_split, near_duplicates, split_of, words
from hominem_mlx.files import read_jsonl
from hominem_mlx.models.backbone import STARTER
from hominem_mlx.records import Fixture, Label, Prompt, RecallQuestion, SftPair
from hominem_mlx.schema import MANIFOLD

FOLDER = STARTER.parent
STOP = frozenset(
    "a an the my me i you your is are was were do does did of to in on at for with what which who whom where when how "  # noqa: SIM905
    "and or it its that this can could would tell please have has had be been s".split()
)


@pytest.fixture(scope="module")
def labels():
    return read_jsonl(FOLDER / "reward_samples.jsonl", Label)


@pytest.fixture(scope="module")
def prompts():
    return read_jsonl(FOLDER / "prompts.jsonl", Prompt)


@pytest.fixture(scope="module")
def memories():
    return read_jsonl(FOLDER / "memory.jsonl", SftPair)


@pytest.fixture(scope="module")
def questions():
    return read_jsonl(FOLDER / "recall.jsonl", RecallQuestion)


def vectors(labels):
    return np.array([label.reward.vector() for label in labels])


def test_size_and_breadth(labels, prompts):
    assert len(prompts) >= 96 and len(labels) >= 400
    assert len({prompt.category for prompt in prompts}) == 7
    own = collections.Counter(label.prompt_id for label in labels if label.edit_of is None)
    every = collections.Counter(label.prompt_id for label in labels)
    assert min(every.values()) >= 4 and min(own[prompt.id] for prompt in prompts) >= 2
    assert {prompt.id: prompt.prompt for prompt in prompts} == {label.prompt_id: label.prompt for label in labels}
    for label in labels:
        assert label.rationale and None not in label.reward.model_dump().values()
        assert label.metadata.keys() >= {"category", "difficulty", "seed", "timestamp"}
        assert label.reward.scalar == pytest.approx(MANIFOLD.scalar(label.reward.vector()), abs=1e-3)


def test_contrast_edits_lower_one_dimension_and_nothing_else(labels):
    rows = {label.id: label for label in labels}
    edits = [label for label in labels if label.edit_of]
    assert len(edits) >= 0.30 * len(labels)
    lowered = collections.Counter(edit.lowered for edit in edits)
    assert min(lowered[name] for name in MANIFOLD.names) >= 15
    for edit in edits:
        before, after = rows[edit.edit_of], edit
        for name, old, new in zip(MANIFOLD.names, before.reward.vector(), after.reward.vector(), strict=True):
            if name == edit.lowered:
                assert old - new >= 0.4 - 1e-9, edit.id
            else:
                assert abs(old - new) <= 0.15 + 1e-9, (edit.id, name)
        a, b = words(before.response), words(after.response)
        same = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
        assert 0.03 <= 1 - same / max(len(a), len(b)) <= 0.60, edit.id


def test_there_is_no_halo_and_length_tells_nothing(labels):
    matrix = vectors(labels)
    correlation = np.corrcoef(matrix.T)
    off = np.abs(correlation[~np.eye(7, dtype=bool)])
    assert 49 / (correlation**2).sum() >= 2.5 and off.mean() <= 0.7
    length = np.log([len(words(label.response)) for label in labels])
    assert abs(np.corrcoef(length, matrix.mean(1))[0, 1]) <= 0.15
    assert (matrix.mean(1) < -0.5).mean() <= 0.10
    repeated = collections.Counter(tuple(label.reward.model_dump().values()) for label in labels)
    assert sum(count - 1 for count in repeated.values()) <= 0.05 * len(labels)


def test_nothing_is_said_twice(labels, prompts):
    assert near_duplicates([prompt.prompt for prompt in prompts], threshold=0.5) == []
    own = [label for label in labels if label.edit_of is None]
    assert near_duplicates([label.response for label in own], threshold=0.6) == []


def test_a_second_blind_rating_agrees(labels):
    first = {label.id: label for label in labels}
    second = read_jsonl(FOLDER / "relabels.jsonl", Label)
    assert len(second) >= 0.10 * len(labels)
    assert [label.id for label in second] != [label.id for label in labels if label.id in {s.id for s in second}]
    assert all(first[label.id].response == label.response for label in second)
    a, b = vectors([first[label.id] for label in second]), vectors(second)
    raw = [np.corrcoef(a[:, k], b[:, k])[0, 1] for k in range(7)]
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    residual = [np.corrcoef(a[:, k], b[:, k])[0, 1] for k in range(7)]
    assert min(raw) >= 0.7 and min(residual) >= 0.4


def test_enough_is_held_out(prompts, labels):
    parts = by_split(labels)
    held_out = {prompt.id for prompt in prompts if split_of(prompt.id) == "test"}
    assert len(held_out) >= 24
    scores = collections.defaultdict(list)
    for label in parts["test"]:
        scores[label.prompt_id].append(label.reward.overall())
    pairs = sum(abs(a - b) >= 0.3 for group in scores.values() for i, a in enumerate(group) for b in group[:i])
    assert pairs >= 80


def content(text):
    return {word for word in words(text) if word not in STOP}


def test_facts_are_asked_for_in_other_words_than_they_were_taught(memories, questions):
    facts = collections.defaultdict(list)
    for memory in memories:
        if "fact_id" in memory.metadata:
            facts[memory.metadata["fact_id"]].append(memory)
            assert re.search(rf"\b{re.escape(memory.metadata['key'])}\b", memory.response, re.I)
    assert len(memories) >= 48 and len(facts) >= 24 and len(questions) >= 48
    asked = collections.Counter(question.fact_id for question in questions)
    assert asked.keys() == facts.keys() and min(asked.values()) >= 2
    taught = {memory.instruction.lower() for memory in memories}
    for question in questions:
        assert question.question.lower() not in taught
        key = {memory.metadata["key"] for memory in facts[question.fact_id]}
        assert key == {question.key}
        known = set().union(*(content(f"{m.instruction} {m.response}") for m in facts[question.fact_id]))
        asked_for = content(question.question)
        assert len(asked_for & known) <= 0.5 * len(asked_for), question.id
    keys = [next(iter({m.metadata["key"] for m in group})).casefold() for group in facts.values()]
    assert len(set(keys)) == len(keys)


def test_fixtures_say_what_must_not_regress():
    fixtures = read_jsonl(FOLDER / "fixtures.jsonl", Fixture)
    assert len(fixtures) >= 24
    for fixture in fixtures:
        assert fixture.why and (fixture.must_contain or fixture.must_not_contain or (fixture.better and fixture.worse))
