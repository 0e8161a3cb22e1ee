"""Files: what a person hands over is checked whole, what we write is there wholly or not at all."""

import gzip
import json
import multiprocessing
import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx import files
from hominem_mlx.errors import BusyError, HominemError, InputError
from hominem_mlx.records import Label, Preference, Prompt

GOOD = {"id": "a", "prompt_id": "p", "prompt": "hello", "response": "hi", "reward": {"empathy": 0.5}}


def bad(**fields):
    return json.dumps({**GOOD, **fields})


BAD_LABELS = {
    "wrong type": (bad(reward={"empathy": "high"}), "reward.empathy = 'high': input should be a valid number"),
    "missing field": (json.dumps({"id": "a", "reward": {"empathy": 0}}), "prompt is missing"),
    "out of range": (bad(reward={"empathy": 1.7}), "reward.empathy = 1.7: input should be less than or equal to 1"),
    "negative intensity": (bad(reward={"reward_intensity": -0.1}), "reward.reward_intensity = -0.1"),
    "NaN": (bad(reward={"empathy": float("nan")}), "reward.empathy = nan: input should be a finite number"),
    "no number at all": (bad(reward={}), "reward has no number"),
    "white space": (bad(response="  "), "response is only white space"),
    "truncated": (bad()[:-9], "not JSON"),
    "not an object": ("[1, 2]", "input should be"),
    "huge line": (bad(response="x" * (files.MAX_LINE_BYTES + 1)), "is longer than"),
    "deep": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_bad_row_is_named_with_file_line_field_and_value(write_rows, case):
    line, reason = BAD_LABELS[case]
    path = write_rows("labels.jsonl", [{**GOOD, "id": "first"}, line])
    with pytest.raises(InputError) as error:
        files.read_jsonl(path, Label)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)


def test_all_problems_of_a_file_come_at_once(write_rows):
    lines = [line for line, _ in BAD_LABELS.values()]
    with pytest.raises(InputError) as error:
        files.read_jsonl(write_rows("labels.jsonl", lines), Label)
    assert {int(problem.split(":")[1]) for problem in error.value.problems} == set(range(1, len(lines) + 1))


def test_a_duplicate_id_names_both_lines(write_rows):
    with pytest.raises(InputError, match=r":3: id = 'a' is already used in line 1"):
        files.read_jsonl(write_rows("labels.jsonl", [GOOD, {**GOOD, "id": "b"}, GOOD]), Label)


def test_packed_files_are_unpacked_and_damaged_ones_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": \n'))
    rows, problems = files.read_objects(path)
    assert rows == [(f"{path}:1", {"a": 1})] and problems[0].startswith(f"{path}:2: not JSON")
    whole = path.read_bytes()
    for damaged in (b"plain", whole[:-9], whole[:12] + b"\xff\xff\xff" + whole[15:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="not a whole gzip file"):
            files.read_objects(path)


def test_missing_empty_and_foreign_files_say_what_they_are(tmp_path, write_rows):
    with pytest.raises(InputError, match="there is no such file"):
        files.read_jsonl(tmp_path / "nowhere.jsonl", Label)
    with pytest.raises(InputError, match="is a folder"):
        files.read_jsonl(tmp_path, Label)
    with pytest.raises(InputError, match="no row"):
        files.read_jsonl(write_rows("empty.jsonl", []), Label)
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a"}\n{"id": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl:2: byte \d+ is not UTF-8"):
        files.read_jsonl(tmp_path / "latin.jsonl", Label)


def test_an_error_of_many_rows_stays_readable():
    error = InputError([f"line {i}" for i in range(500)])
    assert str(error).count("\n") == InputError.SHOWN and "460 more" in str(error)


def test_peers_preference_rows_load_and_unknown_keys_are_ignored(write_rows):
    row = {"prompt": "a?", "chosen": "b", "rejected": "c", "system": "s", "tools": []}
    assert files.read_jsonl(write_rows("p.jsonl", [row]), Preference, unique=None)[0].target == 1.0


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_text_survives_the_round_trip(text):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        files.write_jsonl(path, [Prompt(id="a", prompt=text)])
        assert files.read_jsonl(path, Prompt)[0].prompt == text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True} and sorted(os.listdir(tmp_path)) == ["a.json", "home"]


def _write_for_ever(path):
    while True:
        files.write_atomic(path, b"x" * 1_000_000)


def test_what_a_killed_write_leaves_is_found_once_its_writer_is_gone_and_it_is_old(tmp_path):
    folder = tmp_path / "data"
    for _ in range(20):  # until a kill lands within a write
        process = multiprocessing.Process(target=_write_for_ever, args=(folder / "a.bin",))
        process.start()
        deadline = time.monotonic() + 10
        while not (left := list(folder.glob(".a.bin.*"))) and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert files.leftovers(tmp_path, min_age_seconds=0) == [], "its writer lives"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if left := list(folder.glob(".a.bin.*")):
            break
    assert left
    assert files.leftovers(tmp_path, min_age_seconds=0) == left
    assert files.leftovers(tmp_path, min_age_seconds=3600) == []
    (folder / f".a.bin.{os.getpid()}-abcdefgh.tmp").touch()
    (folder / ".a.bin.tmp").touch()  # somebody else's
    os.utime(left[0], (0, 0))
    assert files.leftovers(tmp_path, min_age_seconds=3600) == left


def test_a_torn_tail_is_dropped_by_reader_and_next_writer(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_jsonl(path, [Prompt(id="a", prompt="one")])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "b", "pro')
    assert [row.id for row in files.read_jsonl(path, Prompt, torn_tail=True)] == ["a"]
    with pytest.raises(InputError, match="cut off"):
        files.read_jsonl(path, Prompt)
    files.append_jsonl(path, [Prompt(id="c", prompt="three")])
    assert [row.id for row in files.read_jsonl(path, Prompt)] == ["a", "c"]


def test_a_torn_line_longer_than_a_block_is_cut_too(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "one"}\n' + b"x" * 10_000)
    files.append_jsonl(path, [Prompt(id="c", prompt="three")])
    assert [row.id for row in files.read_jsonl(path, Prompt)] == ["a", "c"]


def _hold(path, ready):
    with files.lock(path, "holding on"):
        ready.set()
        time.sleep(30)


def test_a_held_lock_names_its_holder_and_dies_with_it(tmp_path):
    path, ready = tmp_path / "x.lock", multiprocessing.Event()
    process = multiprocessing.Process(target=_hold, args=(path, ready))
    process.start()
    assert ready.wait(10)
    with pytest.raises(BusyError, match=rf"process {process.pid} \(holding on\)"), files.lock(path, "me", wait=False):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with files.lock(path, "me", wait=False):
        pass


def test_hashes_of_json_do_not_hang_on_key_order():
    assert files.sha256_json({"a": 1, "b": [2]}) == files.sha256_json({"b": [2], "a": 1})


def test_every_error_of_ours_is_one_tree_and_survives_pickling():
    import pickle

    assert issubclass(InputError, HominemError)
    assert pickle.loads(pickle.dumps(InputError(["a", "b"]))).problems == ["a", "b"]


def test_what_cannot_be_written_is_named_and_not_its_temporary_file(tmp_path):
    path = tmp_path / ("x" * 250)  # fits, but nothing fits beside it
    with pytest.raises(OSError) as refused:
        files.write_atomic(path, "")
    assert refused.value.filename == str(path)
