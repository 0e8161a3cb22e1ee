"""Chat from a pipe and with a server; what doctor and status say; how output is divided between the two streams."""

import json
import os
import sys

import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli, console
from hominem_mlx.cli.chat import _talk
from hominem_mlx.cli.console import Console
from hominem_mlx.files import lock
from hominem_mlx.training import selftest


def hominem(*words, **options):
    return CliRunner().invoke(cli, [str(word) for word in words], **options)


@pytest.fixture
def base(tiny_folder):
    return f"student.base={tiny_folder}"


def test_piped_lines_are_answered_in_order_and_notes_stay_off_stdout(base):
    done = hominem(
        "chat", base, "--max-tokens", 3, "--temperature", 0, input="Hello\n\n/help\n/reset\nHello\n/quit\nno\n"
    )
    assert done.exit_code == 0
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:] != "\n", "a new conversation is a new conversation"
    assert "without an adapter" in done.stderr
    assert "/quit ends" in done.stderr


def test_the_conversation_so_far_is_what_the_model_is_given(capsys):
    given = []

    def speak(messages):
        given.append([(message["role"], message["content"]) for message in messages])
        yield from ("so ", "it is ")

    _talk(iter(["one", "two", "/reset", "three"]), speak, "Be brief.", False)
    system = ("system", "Be brief.")
    assert given == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "so it is"), ("user", "two")],
        [system, ("user", "three")],
    ]
    assert capsys.readouterr().out == "so it is \n" * 3


def test_ctrl_c_ends_an_answer_in_a_terminal_and_the_program_elsewhere(capsys):
    def speak(messages):
        yield "half"
        raise KeyboardInterrupt

    _talk(iter(["one"]), speak, None, True)
    assert capsys.readouterr().out == "half\n"
    with pytest.raises(KeyboardInterrupt):
        _talk(iter(["one"]), speak, None, False)


def test_a_server_answers_and_it_is_said_that_nothing_is_learnt(monkeypatch):
    monkeypatch.setattr(
        "hominem_mlx.data.teacher.HttpGenerator.stream", lambda self, messages, **options: iter(["from ", "afar"])
    )
    done = hominem("chat", "inference.endpoint=http://localhost:1", "inference.model=far", input="Hi\n")
    assert done.stdout == "from afar\n"
    assert "Nothing is learnt there" in done.stderr


def test_an_unknown_adapter_is_bad_input(base):
    assert hominem("chat", base, "--adapter", "9", input="Hi\n").exit_code == 2


def test_what_was_said_is_kept_nowhere(base, home):
    hominem("chat", base, "--max-tokens", 2, input="a rather particular sentence\n")
    assert [path for path in home.rglob("*") if path.is_file() and b"particular" in path.read_bytes()] == []


# --- status and doctor ----------------------------------------------------------------------------------------------


def test_status_of_an_empty_home_says_what_to_do_next_and_makes_nothing(home):
    done = hominem("status")
    assert done.exit_code == 0
    assert "Next: hominem init --starter" in done.output
    assert list(home.iterdir()) == []
    assert json.loads(hominem("status", "--json", "-").stdout)["rows"]["labels"] == 0


def test_status_says_where_texts_go(home):
    assert "stays here" in hominem("status").output
    assert "leave this machine" in hominem("status", "teacher.kind=anthropic").output
    assert "stays here" in hominem("status", "teacher.kind=anthropic", "teacher.base_url=http://localhost:1234").output


def test_doctor_names_who_holds_a_lock(home):
    with lock(home / "locks" / "data.lock", "rating candidates"):
        found = json.loads(hominem("doctor", "--json", "-").stdout)["findings"]
    held = next(row["found"] for row in found if row["what"] == "locks held")
    assert f"process {os.getpid()} (rating candidates)" in held
    free = json.loads(hominem("doctor", "--json", "-").stdout)["findings"]
    assert next(row["found"] for row in free if row["what"] == "locks held") == "none"


def test_the_selftest_holds_here_and_leaves_the_model_as_it_was(tiny):
    lm = tiny()
    before = lm.fingerprint()
    done = list(selftest.checks(lm))
    assert [check.what for check in done if not check.holds] == []
    assert len(done) == 6
    assert lm.fingerprint() == before
    assert lm.adapter is None


def test_the_selftest_prints_rows_for_the_page_and_fails_with_a_failing_check(monkeypatch):
    checks = [selftest.Check("good", True, "1e-7", 0.1), selftest.Check("bad", False, "a | b", 0.2)]
    monkeypatch.setattr("hominem_mlx.models.backbone.load", lambda base: None)
    monkeypatch.setattr(selftest, "checks", lambda lm: iter(checks[:1]))
    done = hominem("doctor", "--selftest")
    assert done.exit_code == 0
    assert "| good | yes: 1e-7 (0.10 s) |" in done.output
    monkeypatch.setattr(selftest, "checks", lambda lm: iter(checks))
    done = hominem("doctor", "--selftest", "--json", "-")
    assert done.exit_code == 1
    assert [row["holds"] for row in json.loads(done.stdout)["selftest"]] == [True, False]
    assert "| bad | NO: a / b (0.20 s) |" in done.stderr


def test_a_selftest_check_that_raises_is_a_finding(tiny, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("[metal] no")

    monkeypatch.setattr(selftest.mx, "quantize", broken)
    failed = [check for check in selftest.checks(tiny()) if not check.holds]
    assert [check.measured for check in failed] == ["RuntimeError: [metal] no"]


# --- the console ----------------------------------------------------------------------------------------------------


def test_with_json_on_stdout_everything_else_is_on_stderr(capsys):
    console = Console("-")
    console.say("a line")
    console.table(["name"], [["x"]])
    console.result({"n": 1})
    said = capsys.readouterr()
    assert json.loads(said.out) == {"n": 1}
    assert "a line" in said.err
    assert "name" in said.err


def test_a_piped_table_is_whole_aligned_and_without_colour(capsys):
    Console().table(["name", "value"], [["a" * 200, 1.0], ["b\nc", None]])
    head, first, second = capsys.readouterr().out.splitlines()
    assert first == "a" * 200 + "  1.000"
    assert head.endswith("  value")
    assert second == "b c"


@pytest.mark.parametrize("plain", [False, True])
def test_a_table_in_a_terminal_has_colour_unless_no_color_is_set(plain, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Console().table(["name"], [["[red]x" * 30]])
    out = capsys.readouterr().out
    assert "[red]x" in out, "texts are not markup"
    assert out.replace("\n", "").count("[red]x") >= 25, "nothing is cut off"
    assert ("\x1b[3" in out) is False or not plain


def test_progress_without_a_terminal_is_a_line_a_stage(capsys):
    with Console().progress() as report:
        for done in range(1, 11):
            report({"stage": "training", "done": done, "total": 10, "memory": 1.5, "preference": 0.25})
        report({"stage": "judging", "done": 1, "total": 1})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["training: 10/10, 0 s, loss: memory 1.500, preference 0.250", "judging: 1/1, 0 s"]


TRAINING = {"stage": "training", "memory": 1.5, "tokens_per_second": 1234.5, "peak_gb": 3.14}


def test_progress_of_training_tells_speed_memory_and_the_loops_own_time_left(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with Console().progress() as report:
        # it went on where it was: by steps and seconds of this process alone nothing would seem left
        report({**TRAINING, "done": 90, "total": 100, "seconds_left": 40.4})
        report({**TRAINING, "done": 100, "total": 100, "seconds_left": 0.0})
    assert capsys.readouterr().err.splitlines() == [
        "training: 90/100, 0 s, about 40 s left, loss: memory 1.500, 1234 tokens/s, peak 3.1 GB",
        "training: 100/100, 0 s, loss: memory 1.500, 1234 tokens/s, peak 3.1 GB",
    ]


def test_progress_in_a_terminal_is_drawn_on_stderr(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Console("-").progress() as report:
        report({"stage": "rate", "done": 3, "total": 3})
        report({"stage": "rate", "done": 1, "total": 2})
        report({**TRAINING, "done": 100, "total": 100})
    out, err = capsys.readouterr()
    assert out == ""
    assert "rate" in err and "1234 tokens/s" in err


def test_a_json_file_is_replaced_whole(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    Console(str(path)).result({"folder": tmp_path})
    assert json.loads(path.read_text()) == {"folder": str(tmp_path)}
