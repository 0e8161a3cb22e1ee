"""Files people have: prompt lists, JSON arrays, HelpSteer2 rows, what was rated in Open WebUI."""

import json
from collections import Counter

import pytest

from hominem_mlx.data import dataset, exports
from hominem_mlx.data import home as homes
from hominem_mlx.errors import InputError
from hominem_mlx.records import Label, Preference, Prompt, Thumb

LONG = "A reply."


def message(name, parent, role, content, rating=None, **annotation):
    found = {"id": name, "parentId": parent, "childrenIds": [], "role": role, "content": content}
    if rating is not None:
        found["annotation"] = {"rating": rating, **annotation}
    return found


def chat(*messages, title="Talk"):
    tree = {row["id"]: row for row in messages}
    return {"id": "c1", "user_id": "u", "title": title, "chat": {"title": title, "history": {"messages": tree}}}


def taken(home, tmp_path, value, name="export.json"):
    """What an import of `value` adds and leaves out."""
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    left_out = Counter()
    counts = dataset.import_file(home, path, left_out=left_out)
    return {kind: count["added"] for kind, count in counts.items()}, dict(left_out)


def test_a_list_of_prompts_comes_in_one_a_line(home, tmp_path):
    assert taken(home, tmp_path, "First?\n\n  Second one. \r\nFirst?\n", "mine.TXT") == ({"prompts": 2}, {})
    assert [row.prompt for row in homes.read(home, Prompt)] == ["First?", "Second one."]
    assert taken(home, tmp_path, "First?\n", "again.txt") == ({"prompts": 0}, {})


def test_a_text_file_of_json_objects_is_jsonl(home, tmp_path):
    rows = '\n{"prompt": "First?"}\n{"prompt": "Second?", "response": "Yes.", "good": true}\n'
    counts, left_out = taken(home, tmp_path, rows, "rows.txt")
    assert (counts, left_out) == ({"prompts": 1, "thumbs": 1}, {})
    assert homes.read(home, Prompt)[0].prompt == "First?"


def test_a_json_array_of_rows_comes_in_and_names_its_bad_items(home, tmp_path):
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}, {"id": "x", "prompt": "Why?"}]
    assert taken(home, tmp_path, rows)[0] == {"prompts": 1, "preferences": 1}
    with pytest.raises(InputError) as caught:
        taken(home, tmp_path, [*rows, {"id": "x", "prompt": "Other?"}, {"prompt": "Q", "chosen": "a"}, 3])
    problems = "\n".join(caught.value.problems)
    assert "export.json:item 3: id = 'x' is already used in item 2" in problems
    assert "export.json:item 4: rejected is missing" in problems and "item 5: a row must be an object" in problems


def test_rated_replies_of_open_webui_become_thumbs_with_what_was_said(home, tmp_path):
    exported = [
        chat(
            message("1", None, "user", "How do I rest?"),
            message("2", "1", "assistant", "Sleep.", -1, reason="not_helpful", comment="too short"),
        ),
        chat(message("1", None, "user", "Hello?"), message("2", "1", "assistant", "Hello you.", "1")),
        chat(message("1", None, "user", "Unrated?"), message("2", "1", "assistant", "Yes.")),
        chat(message("1", None, "user", "Zero?"), message("2", "1", "assistant", "Yes.", 0)),
    ]
    assert taken(home, tmp_path, exported) == ({"thumbs": 2}, {})
    bad, good = homes.read(home, Thumb)
    assert (bad.prompt, bad.response, bad.good) == ("How do I rest?", "Sleep.", False)
    assert bad.reason == "not_helpful: too short"
    assert (good.good, good.reason, good.prompt_id) == (True, "", homes.prompt_id("Hello?"))
    assert taken(home, tmp_path, exported)[0] == {"thumbs": 0}


def test_replies_to_one_message_that_were_rated_differently_become_a_pair(home, tmp_path):
    replies = [message(str(n), "1", "assistant", f"Reply {n}.", rating) for n, rating in ((2, 1), (3, -1), (4, None))]
    exported = chat(message("1", None, "user", "Which?"), *replies)
    assert taken(home, tmp_path, [exported]) == ({"preferences": 1}, {})
    (pair,) = homes.read(home, Preference)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Which?", "Reply 2.", "Reply 3.")


def test_a_rated_reply_that_came_later_is_left_out_and_counted(home, tmp_path):
    exported = chat(
        message("1", None, "user", "First?"),
        message("2", "1", "assistant", "Yes.", 1),
        message("3", "2", "user", "And then?"),
        message("4", "3", "assistant", "No.", -1),
        message("5", None, "assistant", "Out of nothing.", 1),
        message("6", "1", "assistant", [{"type": "image"}], 1),
    )
    assert taken(home, tmp_path, exported) == ({"thumbs": 1}, {exports.LATER: 1, exports.UNREADABLE: 2})
    with pytest.raises(InputError, match="no row in it to take; 1 rated replies that came later"):
        later = {**exported["chat"]["history"]["messages"]["2"], "annotation": {}}
        tree = {**exported["chat"]["history"]["messages"], "2": later}
        del tree["5"], tree["6"]
        taken(home, tmp_path, {"chat": {"history": {"messages": tree}}})


def test_thoughts_are_taken_out_of_a_rated_reply(home, tmp_path):
    said = '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> so\n</details>\nThe answer.'
    taken(home, tmp_path, [chat(message("1", None, "user", "Q?"), message("2", "1", "assistant", said, 1))])
    assert homes.read(home, Thumb)[0].response == "The answer."


def test_old_exports_with_a_plain_list_and_one_chat_a_line_are_read(home, tmp_path):
    turns = [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "A.", "annotation": {"rating": 1}},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "B.", "annotation": {"rating": 1}},
    ]
    lines = json.dumps({"id": "c", "chat": {"messages": turns}}) + "\n"
    assert taken(home, tmp_path, lines, "chats.jsonl") == ({"thumbs": 1}, {exports.LATER: 1})


def test_exported_feedback_is_read_from_its_snapshot(home, tmp_path):
    talk = chat(message("1", None, "user", "Q?"), message("2", "1", "assistant", "A."))
    feedback = {
        "id": "f",
        "type": "rating",
        "data": {"rating": -1, "reason": "dont_like_the_style", "comment": "cold", "model_id": "m"},
        "meta": {"message_id": "2", "chat_id": "c1"},
        "snapshot": {"chat": talk},
    }
    assert taken(home, tmp_path, [feedback]) == ({"thumbs": 1}, {})
    (thumb,) = homes.read(home, Thumb)
    assert (thumb.good, thumb.reason) == (False, "dont_like_the_style: cold")


@pytest.mark.parametrize(
    "value",
    [
        [{"chat": None}],
        [{"chat": {"history": {"messages": []}}}],
        [{"chat": {"messages": "x"}}],
        [{"snapshot": {"chat": 3}, "meta": {}, "data": {}}],
        [{"chat": {"history": {"messages": {"1": 3, "2": {"annotation": {"rating": [1]}}}}}}],
        {},
        [],
        "[1, 2",
        "null",
    ],
)
def test_what_is_no_export_is_refused_and_nothing_is_written(home, tmp_path, value):
    with pytest.raises(InputError, match=r"export\.json"):
        taken(home, tmp_path, value)
    assert not (home / "data").exists() or not list((home / "data").rglob("*.jsonl"))


def test_helpsteer_rows_become_labels_of_what_means_the_same(home, tmp_path):
    row = {"prompt": "Q?", "response": "A.", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1}
    talk = {**row, "prompt": "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nQ?"}
    lines = "".join(json.dumps(value) + "\n" for value in (row, talk))
    added, left_out = taken(home, tmp_path, lines, "train.jsonl")
    assert added == {"labels": 1} and list(left_out.values()) == [1]
    (label,) = homes.read(home, Label)
    assert label.reward.model_dump(exclude_none=True) == {"scalar": 0.5, "epistemic_integrity": 1.0}
    assert label.labeller == "helpsteer2" and label.metadata["helpsteer2"]["complexity"] == 1


@pytest.mark.parametrize("value", [5, -1, "3", True, None])
def test_helpsteer_numbers_out_of_range_are_named(home, tmp_path, value):
    row = {"prompt": "Q?", "response": "A.", "helpfulness": 3, "correctness": value}
    with pytest.raises(InputError, match="0 to 4" if value is not None else "keys"):
        taken(home, tmp_path, json.dumps(row) + "\n", "train.jsonl")


def test_axolotls_pairs_come_in(home, tmp_path):
    row = {"system": "s", "input": "Q?", "chosen": "a", "rejected": "b"}
    assert taken(home, tmp_path, json.dumps(row) + "\n", "pairs.jsonl")[0] == {"preferences": 1}
    assert homes.read(home, Preference)[0].prompt == "Q?"
