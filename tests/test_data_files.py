"""The door for people's files: what comes in, what is refused and how, and who wins."""

import json

import pytest

from hominem_mlx.data import dataset, formats
from hominem_mlx.data import home as homes
from hominem_mlx.errors import InputError
from hominem_mlx.files import MAX_LINE_BYTES
from hominem_mlx.records import Fixture, Label, Preference, Prompt, RecallQuestion, SftPair, Thumb, Trajectory

GOOD = {
    "prompts": {"id": "a", "prompt": "Why is the sea salt?"},
    "trajectories": {"id": "a", "prompt_id": "p", "prompt": "Why?", "response": "So.", "candidate_index": 1},
    "labels": {"id": "a", "prompt_id": "p", "prompt": "Why?", "response": "So.", "reward": {"empathy": 0.5}},
    "preferences": {"id": "a", "prompt": "Why?", "chosen": "Because of x.", "rejected": "No."},
    "thumbs": {"id": "a", "prompt": "Why?", "response": "So.", "good": False},
    "memory": {"id": "a", "instruction": "My dog?", "response": "Rex."},
    "recall": {"id": "a", "fact_id": "f", "question": "How is my dog called?", "key": "Rex"},
    "fixtures": {"id": "a", "prompt": "What now?", "must_contain": ["x"]},
}
TEXTS = {"memory": "instruction", "recall": "question"}


def changed(kind, **values):
    return {**GOOD[kind], **values}


def snapshot(home):
    return {path: path.read_bytes() for path in sorted(home.rglob("*.jsonl"))}


def refused(home, path, kind=None):
    """The problems with a file; checks that nothing was written."""
    before = snapshot(home)
    with pytest.raises(InputError) as caught:
        dataset.import_file(home, path, kind)
    assert snapshot(home) == before
    assert caught.value.exit_code == 2
    return caught.value.problems


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "b", "prom', "not JSON"),
        ("[1, 2]", "must be an object"),
        ('"text"', "must be an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "endless number"),
        ('{"id": "b", "prompt": "' + "x" * MAX_LINE_BYTES + '"}', "longer than"),
    ],
    ids=["truncated", "list", "string", "deep", "endless", "huge"],
)
def test_a_line_that_is_no_row_is_named_with_file_and_line(home, write_rows, kind, line, reason):
    path = write_rows("mine.jsonl", [GOOD[kind], line])
    (problem,) = refused(home, path, kind)
    assert problem.startswith(f"{path}:2: ") and reason in problem


@pytest.mark.parametrize("kind", GOOD)
def test_wrong_values_are_all_named_at_once_with_field_and_value(home, write_rows, kind):
    text = TEXTS.get(kind, "prompt")
    missing = {name: value for name, value in GOOD[kind].items() if name != text}
    rows = [changed(kind, id="b", **{text: 17}), changed(kind, id="c", **{text: ""}), changed(kind, id="d")]
    rows += [changed(kind, id="d"), changed(kind, id=5), {**missing, "id": "e"}, changed(kind, id="f", **{text: " \n"})]
    path = write_rows("mine.jsonl", rows)
    problems = "\n".join(refused(home, path, kind))
    assert f"{path}:1: {text} = 17: input should be a valid string" in problems
    assert f"{path}:2: {text} = ''" in problems
    assert f"{path}:3" not in problems
    assert f"{path}:4: id = 'd' is already used in line 3" in problems
    assert f"{path}:5: id = 5" in problems
    assert f"{path}:6: {text} is missing" in problems
    assert f"{path}:7: " in problems and "white space" in problems


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ({"empathy": 1.7}, "reward.empathy = 1.7: input should be less than or equal to 1"),
        ({"empathy": "0.5"}, "reward.empathy = '0.5': input should be a valid number"),
        ({"reward_intensity": -0.1}, "reward.reward_intensity = -0.1"),
        ({"safety_score": -1.01}, "reward.safety_score = -1.01"),
        ({}, "reward has no number"),
        ({"kindness": 0.3}, "reward.kindness = 0.3: there is no dimension kindness"),
        (0.5, "reward = 0.5"),
    ],
)
def test_numbers_out_of_range_are_named(home, write_rows, reward, reason):
    path = write_rows("mine.jsonl", [changed("labels", reward=reward)])
    (problem,) = refused(home, path)
    assert problem.startswith(f"{path}:1: ") and reason in problem


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_wherever_they_stand(home, write_rows, number):
    label = json.dumps(GOOD["labels"]).replace("0.5", number)
    pair = json.dumps(changed("preferences", chosen_score=0.5)).replace("0.5", number)
    other = json.dumps(changed("memory", metadata={"x": 0.5})).replace("0.5", number)
    path = write_rows("mine.jsonl", [label, pair, other])
    problems = refused(home, path)
    assert [("reward.empathy" in problems[0]), ("chosen_score" in problems[1]), ("metadata" in problems[2])] == [
        True
    ] * 3


def test_files_that_are_no_text_are_refused(home, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD["prompts"]).encode() + b'\n{"id": "b", "prompt": "\xff"}\n')
    assert refused(home, path) == [f"{path}:2: byte 69 is not UTF-8; save the file as UTF-8"]
    path.write_bytes(b"\n \n")
    assert refused(home, path) == [f"{path}: there is no row in it"]
    assert "no such file" in refused(home, tmp_path / "nothing.jsonl")[0]
    assert "is a folder" in refused(home, tmp_path)[0]


def test_half_characters_are_refused_not_stored(home, write_rows):
    rows = ['{"id": "a", "prompt": "x \\ud800"}', '{"id": "b", "prompt": "x", "metadata": {"a": "\\ud800"}}']
    problems = refused(home, write_rows("mine.jsonl", rows))
    assert "prompt" in problems[0] and "metadata" in problems[1]


def test_a_row_that_could_be_several_things_asks_which(home, write_rows):
    path = write_rows("mine.jsonl", [{"prompt": "a", "response": "b"}, {"x": 1}])
    problems = refused(home, path)
    assert "its keys (prompt, response)" in problems[0] and "memory" in problems[0] and f"{path}:2" in problems[1]
    assert "kinds are prompts" in refused(home, path, "nonsense")[0]


def test_a_file_of_another_kind_than_said_is_refused(home, write_rows):
    assert "reward is missing" in refused(home, write_rows("mine.jsonl", [GOOD["prompts"]]), "labels")[-1]


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "roles user, user; a conversation begins with user"),
        ({"messages": []}, "roles none"),
        ({"messages": [*TURNS, TURNS[0]]}, "leave out other roles and what was not answered"),
        ({"messages": [TURNS[0], {"role": "tool", "content": "b"}, TURNS[1]]}, "roles user, tool, assistant"),
        ({"messages": [*TURNS, TURNS[0], {"role": "assistant", "content": " "}]}, "response is only white space"),
        ({"instruction": "a", "response": "b", "history": TURNS[:1]}, "history must go user, assistant"),
        (
            {"chosen": [*TURNS, *TURNS], "rejected": "c"},
            "chosen holds the roles user, assistant, user, assistant; pref",
        ),
        ({"messages": "hello"}, "list of"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}, "response = 3"),
        ({"prompt": "a", "chosen": "b"}, "rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same text"),
        ({"prompt": [*TURNS, TURNS[0]], "chosen": "b", "rejected": "c"}, "keep the last user message alone"),
        ({"prompt": "a", "completion": ["b"]}, "response = ['b']"),
        ({"prompt": [*TURNS, TURNS[0]], "completion": "b", "label": True}, "keep the last user message alone"),
        ({"prompt": "a", "response": "b", "good": 2}, "good = 2: input should be a valid boolean"),
        ({"messages": TURNS, "label": False}, "label = False: a reply that was not liked is nothing to remember"),
        ({"prompt": "a", "completion": "b", "label": -1}, "label = -1: a reply that was not liked"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "label = 'False': a reply that was not liked"),
    ],
)
def test_neighbours_rows_that_cannot_be_learnt_from_say_why(home, write_rows, row, reason):
    path = write_rows("mine.jsonl", [row])
    problems = refused(home, path)
    assert problems[0].startswith(f"{path}:1: ") and reason in problems[0]


def test_a_memory_pair_that_gives_away_a_recall_question_is_refused(home, write_rows):
    dataset.import_file(home, write_rows("q.jsonl", [GOOD["recall"]]))
    path = write_rows("m.jsonl", [changed("memory", instruction="how is my dog called")])
    assert "held-out recall question" in refused(home, path)[0]
    dataset.import_file(home, write_rows("n.jsonl", [GOOD["memory"]]))
    assert (
        "instruction of a memory pair"
        in refused(home, write_rows("r.jsonl", [changed("recall", id="z", question="My dog?")]))[0]
    )


# --- what comes in --------------------------------------------------------------------------------------------------


def test_every_kind_is_told_by_its_keys_and_lands_in_its_file(home, write_rows):
    counts = dataset.import_file(home, write_rows("mine.jsonl", list(GOOD.values())))
    assert counts == {kind: {"added": 1, "replaced": 0, "kept": 0} for kind in GOOD}
    for kind, model in formats.KINDS.items():
        assert formats.kind_of(GOOD[kind]) == kind
        (row,) = homes.read(home, model)
        assert row.id == "a"


def test_every_reply_of_a_conversation_is_a_memory_after_what_was_said_before(home, write_rows):
    said = ["Q1", "A1", "Q2", "A2", "Q2", "A2"]
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    path = write_rows("m.jsonl", [{"messages": [{"role": "system", "content": "s"}, *messages]}])
    assert dataset.import_file(home, path)["memory"] == {"added": 3, "replaced": 0, "kept": 0}
    rows = homes.read(home, SftPair)
    assert [(r.instruction, r.response, [t.content for t in r.history or []]) for r in rows] == [
        ("Q1", "A1", []),
        ("Q2", "A2", ["Q1", "A1"]),
        ("Q2", "A2", ["Q1", "A1", "Q2", "A2"]),
    ]
    assert dataset.import_file(home, path)["memory"] == {"added": 0, "replaced": 0, "kept": 3}
    assert "history" not in json.loads((home / homes.FILES[SftPair]).read_text().splitlines()[0])
    named = write_rows("n.jsonl", [{"id": "talk", "messages": [*messages[2:4], *messages[:2]]}])
    dataset.import_file(home, named)
    assert [row.id for row in homes.read(home, SftPair)][3:] == ["talk-1", "talk-2"]


def test_a_recall_question_asked_within_a_conversation_is_refused(home, write_rows):
    dataset.import_file(home, write_rows("q.jsonl", [GOOD["recall"]]))
    asked = [{"role": "user", "content": GOOD["recall"]["question"]}, TURNS[1], *TURNS]
    assert "held-out recall question" in refused(home, write_rows("m.jsonl", [{"messages": asked}]))[0]


def test_neighbours_formats_come_in(home, write_rows):
    turns = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    rows = [
        {"prompt": "Q1", "completion": "A1"},
        {"messages": [{"role": "system", "content": "s"}, *turns]},
        {"instruction": "Q3", "response": "A3", "category": None, "confidence": 0.5},
        {"prompt": "P1", "chosen": "c", "rejected": "r"},
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{"role": "assistant", "content": "r"}]},
        {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "r"}]},
        {"prompt": "P2", "response": "x", "reward": {"curiosity": 1, "scalar": 0}},
        {"prompt": "P3", "unknown": 1},
    ]
    counts = dataset.import_file(home, write_rows("mine.jsonl", rows))
    assert {kind: count["added"] for kind, count in counts.items()} == {
        "prompts": 1,
        "labels": 1,
        "preferences": 2,
        "memory": 3,
    }
    assert [(r.instruction, r.response) for r in homes.read(home, SftPair)] == [
        ("Q1", "A1"),
        ("Q2", "A2"),
        ("Q3", "A3"),
    ]
    assert [(r.prompt, r.chosen, r.rejected) for r in homes.read(home, Preference)] == [
        ("P1", "c", "r"),
        ("Q2", "A2", "r"),
    ]
    (label,) = homes.read(home, Label)
    assert label.prompt_id == homes.prompt_id("P2") and label.id
    assert all(row.id for row in homes.read(home, SftPair))


def test_a_reply_that_was_not_liked_is_a_thumb_and_never_a_memory(home, write_rows):
    asked, said = {"role": "user", "content": "Q4"}, {"role": "assistant", "content": "A4"}
    rows = [
        {"prompt": "Q1", "completion": "A1", "label": False},
        {"prompt": "Q2", "completion": "A2", "label": True},
        {"prompt": "Q3", "completion": "A3", "label": 0},
        {"prompt": [asked], "completion": [said], "label": False},
        {"prompt": "Q5", "completion": "A5", "label": "greeting"},
        {"prompt": "Q6", "completion": "A6", "label": None},
    ]
    path = write_rows("mine.jsonl", rows)
    counts = dataset.import_file(home, path)
    assert {kind: count["added"] for kind, count in counts.items()} == {"thumbs": 4, "memory": 2}
    thumbs = homes.read(home, Thumb)
    assert [(row.prompt, row.response, row.good) for row in thumbs] == [
        ("Q1", "A1", False),
        ("Q2", "A2", True),
        ("Q3", "A3", False),
        ("Q4", "A4", False),
    ]
    assert all(row.id and row.prompt_id == homes.prompt_id(row.prompt) for row in thumbs)
    problems = refused(home, path, "memory")
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert all("nothing to remember" in problem and "as thumbs" in problem for problem in problems)


def test_a_thumb_that_is_turned_replaces_the_old_one(home, write_rows):
    for number, good in enumerate((True, False)):
        dataset.import_file(home, write_rows(f"{number}.jsonl", [{"prompt": "P", "response": "x", "good": good}]))
    assert [row.good for row in homes.read(home, Thumb)] == [False]


def test_importing_twice_changes_nothing(home, write_rows):
    path = write_rows("mine.jsonl", list(GOOD.values()))
    dataset.import_file(home, path)
    before = snapshot(home)
    counts = dataset.import_file(home, path)
    assert all(count == {"added": 0, "replaced": 0, "kept": 1} for count in counts.values())
    assert snapshot(home) == before


def test_windows_line_ends_and_byte_order_marks_are_fine(home, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD["prompts"]).encode() + b"\r\n\r\n")
    assert dataset.import_file(home, path)["prompts"]["added"] == 1


# --- who wins -------------------------------------------------------------------------------------------------------


def rated(name, value, labeller="teacher", response="So.", **more):
    return {
        "id": name,
        "prompt_id": "p",
        "prompt": "Why?",
        "response": response,
        "reward": {"empathy": value},
        "labeller": labeller,
        **more,
    }


def labels(home):
    return {row.id: (row.reward.empathy, row.labeller, row.response) for row in homes.read(home, Label)}


def test_a_persons_label_wins_over_the_teachers_of_the_same_id_or_texts(home, write_rows):
    teachers = [rated("a", 0.1), rated("b", 0.2, response="Or so.", edit_of="a", lowered="empathy")]
    dataset.import_file(home, write_rows("t.jsonl", teachers))
    mine = [rated("a", 0.9, "human", response="Because."), rated("x", -0.9, "human", response="Or so.")]
    counts = dataset.import_file(home, write_rows("m.jsonl", mine))
    assert counts["labels"] == {"added": 0, "replaced": 2, "kept": 0}
    assert labels(home) == {"a": (0.9, "human", "Because."), "b": (-0.9, "human", "Or so.")}
    assert homes.read(home, Label)[1].edit_of == "a", "the row stays the edit it was"
    dataset.import_file(home, write_rows("t2.jsonl", [rated("a", 0.3), rated("b", 0.3, response="Or so.")]))
    assert labels(home)["a"][0] == 0.9 and labels(home)["b"][0] == -0.9


def test_a_person_may_think_again_and_a_teacher_too(home, write_rows):
    for number, (value, labeller) in enumerate([(0.1, "t1"), (0.2, "t2"), (0.3, "human"), (0.4, "t1"), (0.5, "human")]):
        dataset.import_file(home, write_rows(f"{number}.jsonl", [rated("a", value, labeller)]))
        expected = [0.1, 0.2, 0.3, 0.3, 0.5][number]
        assert labels(home)["a"][0] == expected


def test_labels_without_a_labeller_can_be_claimed(home, write_rows):
    row = rated("a", 0.5)
    del row["labeller"]
    dataset.import_file(home, write_rows("m.jsonl", [row]), labeller="human")
    assert labels(home)["a"][1] == "human"


def test_a_turned_preference_replaces_the_old_verdict(home, write_rows):
    dataset.import_file(home, write_rows("a.jsonl", [{"prompt": "P", "chosen": "x", "rejected": "y"}]))
    counts = dataset.import_file(home, write_rows("b.jsonl", [{"prompt": "P", "chosen": "y", "rejected": "x"}]))
    assert counts["preferences"]["replaced"] == 1
    assert [row.chosen for row in homes.read(home, Preference)] == ["y"]


def test_the_starter_comes_in_once_and_overwrites_nobody(home, write_rows):
    first = homes.STARTER / "reward_samples.jsonl"
    row = json.loads(first.read_text().splitlines()[0]) | {"labeller": "human", "id": "mine"}
    row["reward"] = {"empathy": -1.0}
    dataset.import_file(home, write_rows("mine.jsonl", [row]))
    counts = dataset.import_starter(home)
    assert counts["labels"]["kept"] == 1 and counts["labels"]["added"] >= 399
    assert labels(home)["mine"][0] == -1.0
    before = snapshot(home)
    again = dataset.import_starter(home)
    assert all(count["added"] == count["replaced"] == 0 for count in again.values())
    assert snapshot(home) == before
    assert all(homes.read(home, model) for model in (Prompt, Label, SftPair, RecallQuestion, Fixture))
    assert homes.read(home, Trajectory) == []


def test_rows_written_by_hand_into_the_home_are_checked_on_reading(home):
    path = home / homes.FILES[Label]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rated("a", 0.5)) + "\n" + json.dumps(rated("a", 3.0)) + "\n")
    with pytest.raises(InputError, match=r"reward_samples\.jsonl:2: reward\.empathy = 3\.0"):
        homes.read(home, Label)
    path.write_text((json.dumps(rated("a", 0.5)) + "\n") * 2)
    with pytest.raises(InputError, match="used twice"):
        homes.read(home, Label)
