"""The command line is quick, quiet about what it does not need, and says in its exit code how things ended."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hominem_mlx.cli import cli

HEAVY = {"mlx", "mlx_lm", "anthropic", "transformers", "pydantic", "numpy", "rich", "prompt_toolkit", "tomlkit"}
WORDS = ["init", "data", "train", "evaluate", "score", "chat", "artifacts", "status", "demo", "doctor"]
START = "import sys; sys.argv[0] = 'hominem'; from hominem_mlx.cli import main; main()"
LOADED = f"""
import sys
sys.argv[0] = "hominem"
from hominem_mlx.cli import main
try:
    main()
finally:
    print(sorted({HEAVY!r} & {{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
"""


def run(*words, code=START, **options):
    """The command line in a process of its own."""
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, env=environment, **options
    )


def completion(line: str) -> dict[str, str]:
    return {"_HOMINEM_COMPLETE": "zsh_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}


def test_help_lists_exactly_the_words_of_now():
    shown = run("--help").stdout.split("Commands:")[1]
    assert [line.split()[0] for line in shown.splitlines() if line[:2] == "  " and line[2:3].strip()] == WORDS


@pytest.mark.parametrize("words", [["--help"], ["data", "--help"], ["artifacts", "use", "--help"], ["nonsense"]])
def test_help_imports_nothing_heavy(words):
    assert run(*words, code=LOADED).stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("line", "expected"),
    [("hominem da", "data"), ("hominem data spl", "split"), ("hominem train dual dual.ra", "dual.rank="),
     ("hominem artifacts list ra", "raw"), ("hominem chat --ad", "--adapter")],
)  # fmt: skip
def test_completion_imports_nothing_heavy_and_knows(line, expected):
    done = run(code=LOADED, env=completion(line))
    assert done.stderr.splitlines()[-1] == "[]"
    assert expected in done.stdout.split("\n")


def processor_time(*words, **options) -> float:
    """Seconds of one run."""
    before = os.times()
    assert run(*words, **options).returncode == 0
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_and_completion_take_no_more_than_a_sixth_of_a_second():
    """Processor time, since machines are busy (A7 in the README is wall-clock); a slow one gets three times click's.

    One of each in turn, since a machine's speed drifts, and of each the least of 7, since noise only adds.
    """
    runs = (
        lambda: processor_time(code="import click"),
        lambda: processor_time("--help"),
        lambda: processor_time(env=completion("hominem data spl")),
    )
    click, shown, completed = (min(column) for column in zip(*[[one() for one in runs] for _ in range(7)], strict=True))
    tick = 1 / os.sysconf("SC_CLK_TCK")  # the clock's own grain
    assert max(shown, completed) <= max(0.15, 3 * click) + tick


def test_every_one_line_help_is_that_of_the_command():
    for name, (_, text) in cli.lazy.items():
        if name != "demo":
            command = cli.get_command(None, name)
            assert text == command.help.split("\n")[0], name


def test_an_unknown_word_is_answered_with_the_nearest_and_exit_code_2():
    done = run("stauts")
    assert done.returncode == 2
    assert "'status'" in done.stderr


def test_an_unknown_setting_is_answered_with_the_nearest_and_exit_code_2():
    done = run("status", "dual.rnk=8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "dual.rank" in done.stderr


def test_a_word_that_is_no_setting_is_bad_input():
    done = run("status", "rank")
    assert done.returncode == 2
    assert "table.key=value" in done.stderr


def test_ctrl_c_ends_with_130(home):
    process = subprocess.Popen(
        [sys.executable, "-c", START, "chat", "inference.endpoint=http://127.0.0.1:9", "inference.model=none"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )  # fmt: skip
    assert "Talking with" in process.stderr.readline()
    time.sleep(0.2)  # now it reads
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said


def test_a_reader_that_goes_away_is_no_error_of_ours(home):
    (home / "data" / "raw").mkdir(parents=True)
    rows = [{"id": f"p{number}", "prompt": f"prompt {number}"} for number in range(3000)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = f"{START.replace('main()', '')}; import signal; main()"
    shell = f"'{sys.executable}' -c \"{program}\" data generate data.prompts=200 --json - 2>'{home}/err' | head -c 10"
    subprocess.run(["sh", "-c", shell], capture_output=True, timeout=60, check=True)
    assert "Traceback" not in (home / "err").read_text()
    assert "BrokenPipe" not in (home / "err").read_text()


def test_a_mistake_of_ours_is_not_taken_for_a_judgement(monkeypatch):
    from click.testing import CliRunner

    def broken(*args):
        raise KeyError("oops")

    monkeypatch.setattr("hominem_mlx.cli.session.Session.registry", property(broken))
    result = CliRunner().invoke(cli, ["artifacts", "list"])
    assert result.exit_code == 70
    assert "mistake in hominem itself" in result.output
