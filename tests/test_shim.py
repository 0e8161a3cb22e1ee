"""bin/hominem makes .venv once, repairs it after a kill, and lets one process at a time do so.

No network: a fake Python stands first on PATH. Its `-m venv` makes a folder whose python, also fake, logs what pip is
asked for and, where told to, sleeps or fails there.
"""

import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ZSH = [*ROOT.glob("bin/hominem-*"), *ROOT.glob("scripts/*.zsh"), ROOT / "scripts/completions/_hominem"]
LOCKS = sorted(ROOT.glob("requirements*.lock"))

FAKE_PYTHON = """#!/bin/sh
case $1 in
    -c) echo 3.14.0 ;;
    -m) mkdir -p "$3/bin" && cp "$FAKE/venv-python" "$3/bin/python" && echo venv >>"$FAKE/calls" ;;
esac
"""
FAKE_VENV_PYTHON = """#!/bin/sh
bin=${0%/*}
echo "$*" >>"$FAKE/calls"
[ ! -e "$FAKE/slow" ] || { sleep "$(cat "$FAKE/slow")"; echo slept >>"$FAKE/calls"; }
[ ! -e "$FAKE/broken" ] || { echo "no such package"; exit 1; }
case $* in
    *requirements.lock) echo "Collecting mlx" ;;
    *requirements-dev.lock) for tool in lint-imports ruff mypy pytest; do cp "$FAKE/tool" "$bin/$tool"; done ;;
    *" -e "*) printf '#!/bin/sh\\necho "ran $*"\\nexit "${EXIT:-0}"\\n' >"$bin/hominem"; chmod +x "$bin/hominem" ;;
esac
"""
FAKE_TOOL = """#!/bin/sh
tool=${0##*/}
echo "$tool $*" >>"$FAKE/calls"
[ ! -e "$FAKE/$tool-fails" ] || exit 7
"""


class Copy:
    """A copy of what the shim needs, and the fake Python it finds."""

    def __init__(self, folder: Path):
        self.root, self.fake = folder / "pro ject", folder / "fake"
        (self.root / "bin").mkdir(parents=True)
        self.fake.mkdir()
        for name in ("bin/hominem", "pyproject.toml", "requirements.lock", "requirements-dev.lock"):
            shutil.copy(ROOT / name, self.root / name)
        self.write("python3.14", FAKE_PYTHON)
        self.write("venv-python", FAKE_VENV_PYTHON)
        self.write("tool", FAKE_TOOL)
        self.path = f"{self.fake}:/usr/bin:/bin:/usr/sbin:/sbin"

    def write(self, name: str, text: str) -> None:
        file = self.fake / name
        file.write_text(text)
        file.chmod(0o755)

    def start(self, *arguments: str, shim: Path | None = None, **settings: str) -> subprocess.Popen:
        folder = str(self.fake)
        environment = {"PATH": self.path, "HOME": folder, "FAKE": folder, "HOMINEM_APT": "0", **settings}
        return subprocess.Popen(
            [shim or self.root / "bin/hominem", *arguments],
            cwd=self.fake,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **settings) -> tuple[int, str, str]:
        process = self.start(*arguments, **settings)
        out, error = process.communicate(timeout=30)
        return process.returncode, out, error

    def calls(self) -> list[str]:
        """What was run since the last look."""
        file = self.fake / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def wait_for_child(self) -> int:
        """The process that the first slow step runs in; the step before it, which makes the folder, is over."""
        for _ in range(200):
            calls = self.fake / "calls"
            if calls.exists() and len(calls.read_text().splitlines()) > 1:
                return int((self.root / ".venv.lock/child").read_text())
            time.sleep(0.02)
        raise AssertionError("no step began")


@pytest.fixture
def copy(tmp_path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture
def made(copy) -> Copy:
    assert copy.run()[0] == 0
    copy.calls()
    return copy


def hold(copy: Copy, pid: int | None, command: str = "") -> None:
    """A lock as another process would leave it."""
    lock = copy.root / ".venv.lock"
    lock.mkdir()
    (lock / "command").write_text(command)
    if pid is not None:
        (lock / "pid").write_text(f"{pid}\n")


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_first_call_installs_the_lock_with_hashes_then_the_project_without_network(copy):
    code, out, error = copy.run("data", "a b")
    assert (code, out) == (0, "ran data a b\n")
    venv, packages, project = copy.calls()
    assert venv == "venv"
    assert packages == f"-m pip install --require-hashes -r {copy.root}/requirements.lock"
    assert project == f"-m pip install --no-deps --no-build-isolation --no-index -e {copy.root}"
    assert "making .venv with Python 3.14.0" in error
    assert not (copy.root / ".venv.lock").exists()


def test_second_call_installs_nothing_says_nothing_and_passes_the_exit_code_on(made):
    assert made.run("x", EXIT="3") == (3, "ran x\n", "")
    assert made.calls() == []


def test_ready_environment_costs_less_than_50_milliseconds(made):
    spent = []
    for _ in range(7):
        begin = time.perf_counter()
        made.run()
        spent.append(time.perf_counter() - begin)
    assert min(spent) < 0.05


def test_shim_works_through_a_symbolic_link_from_anywhere(made, tmp_path):
    link = tmp_path / "linked"
    link.symlink_to("pro ject/bin/hominem")
    assert made.run("x", shim=link) == (0, "ran x\n", "")
    assert made.calls() == []


def test_no_python_ends_with_one_message_and_the_command_that_brings_one(copy):
    bare = copy.fake / "bare"
    bare.mkdir()
    tools = ["sh", "readlink", "cksum", "uname", "tr", "id", "mkdir", "mv", "rm", "cat", "sed", "tail", "kill", "sleep"]
    for tool in tools:
        (bare / tool).symlink_to(shutil.which(tool))
    (bare / "apt-get").symlink_to("/bin/true")
    copy.path = str(bare)
    code, out, error = copy.run()
    assert code == 2 and out == ""
    assert len(error.splitlines()) == 1
    assert "apt-get install -y python3 python3-venv" in error or "brew install python@3.12" in error
    assert not (copy.root / ".venv").exists() and not (copy.root / ".venv.lock").exists()


def test_a_python_that_is_found_but_does_not_run_is_passed_over(copy):
    (copy.fake / "python3.14").rename(copy.fake / "python3.13")
    copy.write("python3.14", "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    assert copy.run()[0] == 0
    assert "venv" in copy.calls()


def test_uv_brings_a_python_when_there_is_none(copy):
    for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3"):
        copy.write(name, "#!/bin/sh\nexit 1\n")
    copy.write(
        "uv",
        '#!/bin/sh\necho "uv $*" >>"$FAKE/calls"\nfor last; do :; done\n'
        'mkdir -p "$last/bin" && cp "$FAKE/venv-python" "$last/bin/python"\n',
    )
    assert copy.run("x")[:2] == (0, "ran x\n")
    assert copy.calls()[0] == f"uv venv --quiet --seed --python 3.12 {copy.root}/.venv"


def test_a_moved_folder_is_made_anew(made):
    made.root = made.root.rename(made.root.with_name("moved"))
    assert made.run("x")[:2] == (0, "ran x\n")
    assert made.calls()[0] == "venv"


def test_a_new_lock_makes_all_anew_and_a_new_pyproject_only_the_project(made):
    with open(made.root / "pyproject.toml", "a") as file:
        file.write("\n")
    assert made.run()[0] == 0
    assert [" -e " in call for call in made.calls()] == [True]
    with open(made.root / "requirements.lock", "a") as file:
        file.write("\n")
    assert made.run()[0] == 0
    assert made.calls()[0] == "venv"


def test_another_interpreter_behind_the_link_makes_all_anew(made):
    python = made.root / ".venv/bin/python"
    python.rename(python.with_name("python3.99"))
    python.symlink_to("python3.99")
    assert made.run()[0] == 0
    assert made.calls()[0] == "venv"


@pytest.mark.parametrize("lost", ["bin/hominem", "bin/python", ".hominem-project", ".hominem-packages bin/hominem", ""])
def test_whatever_is_missing_from_the_environment_is_repaired(made, lost):
    for name in lost.split():
        (made.root / ".venv" / name).unlink()
    if not lost:  # what a kill in the very first moment leaves
        shutil.rmtree(made.root / ".venv")
        (made.root / ".venv").mkdir()
    assert made.run("x")[:2] == (0, "ran x\n")
    assert made.run("x") == (0, "ran x\n", "")


def test_a_kill_at_any_step_is_repaired_by_the_next_call(copy):
    for delay in (0.0, 0.1, 0.2, 0.5):
        (copy.fake / "slow").write_text("0.2")
        shutil.rmtree(copy.root / ".venv", ignore_errors=True)
        process = copy.start()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        (copy.fake / "slow").unlink()
        assert copy.run("x")[:2] == (0, "ran x\n")
        assert not (copy.root / ".venv.lock").exists()


def test_what_a_killed_call_was_running_has_ended_before_the_environment_is_made_anew(copy):
    (copy.fake / "slow").write_text("1.5")
    process = copy.start()
    copy.wait_for_child()
    process.kill()
    process.communicate(timeout=30)
    (copy.fake / "slow").unlink()
    code, out, error = copy.run("x")
    assert (code, out) == (0, "ran x\n")
    assert f"took over the lock of process {process.pid}" in error
    calls = copy.calls()
    assert calls.index("slept") < calls.index("venv", 1)


@pytest.mark.parametrize("holder", ["dead", "another program with that number", "half-way through a takeover"])
def test_a_stale_lock_is_taken_over(copy, holder):
    hold(copy, os.getpid() if holder.startswith("another") else dead_pid(), "/bin/sh bin/hominem demo ")
    if holder.startswith("half"):
        (copy.root / ".venv.lock/pid").unlink()
    code, out, error = copy.run("x")
    assert (code, out) == (0, "ran x\n")
    assert "took over the lock" in error
    assert not (copy.root / ".venv.lock").exists()


def test_the_second_of_two_waits_and_says_for_whom(copy):
    (copy.fake / "slow").write_text("0.5")
    first = copy.start("one")
    copy.wait_for_child()
    code, out, error = copy.run("two")
    assert (code, out) == (0, "ran two\n")
    assert f"process {first.pid} (" in error and "bin/hominem one" in error and "waiting" in error
    assert first.communicate(timeout=30)[0] == "ran one\n"
    assert copy.calls().count("venv") == 1


def test_of_many_on_a_stale_lock_one_makes_the_environment(copy):
    hold(copy, dead_pid())
    processes = [copy.start(str(number)) for number in range(3)]
    for number, process in enumerate(processes):
        assert process.communicate(timeout=30)[0] == f"ran {number}\n"
    assert copy.calls().count("venv") == 1


def test_a_terminated_call_stops_its_step_and_lets_go(copy):
    (copy.fake / "slow").write_text("20")
    process = copy.start()
    child = copy.wait_for_child()
    process.terminate()
    assert "stopped" in process.communicate(timeout=10)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert not (copy.root / ".venv.lock").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_failing_installation_shows_the_end_of_its_log_and_the_next_call_tries_again(copy):
    (copy.fake / "broken").touch()
    code, out, error = copy.run()
    assert (code, out) == (2, "")
    assert "no such package" in error and ".venv.log" in error
    assert not (copy.root / ".venv.lock").exists()
    (copy.fake / "broken").unlink()
    assert copy.run("x")[:2] == (0, "ran x\n")
    assert not (copy.root / ".venv.log").exists()


def test_the_tab_key_installs_nothing(copy):
    assert copy.run(_HOMINEM_COMPLETE="zsh_complete") == (0, "", "")
    assert copy.calls() == []


def test_test_command_runs_every_check_and_passes_its_arguments_to_pytest(made):
    code, _, error = made.run("test", "-k", "a or b")
    assert code == 0, error
    installed, *checks = made.calls()
    assert installed == f"-m pip install --require-hashes -r {made.root}/requirements-dev.lock"
    assert [check.split()[0] for check in checks] == ["lint-imports", "ruff", "ruff", "mypy", "pytest"]
    assert checks[-1] == "pytest -k a or b"
    assert made.run("test")[0] == 0
    *checks, tests = made.calls()
    assert not any("pip" in call for call in checks)
    assert tests == "pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder", (
        "all of them: on all cores"
    )


def test_test_command_stops_at_the_first_failing_check_with_its_exit_code(made):
    (made.fake / "mypy-fails").touch()
    code, _, error = made.run("test")
    assert code == 7
    assert error.splitlines()[-1].startswith("hominem: test: types failed with exit code 7")
    assert not any(call.startswith("pytest") for call in made.calls())


def test_a_kill_while_something_is_added_makes_all_anew_when_next_something_is_added(made):
    (made.root / ".venv/.hominem-begun").touch()
    assert made.run("x") == (0, "ran x\n", "")
    assert made.calls() == []
    assert made.run("test")[0] == 0
    assert made.calls()[0] == "venv"


def test_a_project_that_cannot_be_installed_costs_no_new_environment(made):
    (made.fake / "broken").touch()
    with open(made.root / "pyproject.toml", "a") as file:
        file.write("nonsense")
    assert made.run()[0] == 2
    assert "venv" not in made.calls()


def test_shell_files_parse():
    for file in (ROOT / "bin/hominem", ROOT / "scripts/lock.sh", ROOT / "scripts/plots.sh", ROOT / ".ci/run"):
        subprocess.run(["sh", "-n", file], check=True)
        assert os.access(file, os.X_OK), file
    if shutil.which("zsh"):
        for file in ZSH:
            subprocess.run(["zsh", "-n", file], check=True)


def test_zsh_commands_name_the_recipe(tmp_path):
    if not shutil.which("zsh"):
        return
    for file in ZSH[: len([*ROOT.glob("bin/hominem-*")])]:
        shutil.copy(file, tmp_path)
    (tmp_path / "hominem").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "hominem").chmod(0o755)

    def said(name, *arguments):
        return subprocess.run([tmp_path / name, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    assert said("hominem-train", "--home", "x") == "train dual --home x"
    assert said("hominem-train", "reward", "y") == "train reward y"
    assert said("hominem-chat") == "chat"
    assert said("hominem-use", "0007") == "artifacts use 0007"


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\\n]+)", (ROOT / name).read_text(), re.MULTILINE))


def test_locks_hold_hashes_and_no_address():
    names = [lock.name for lock in LOCKS]
    for kind in ("", "-dev", "-cuda12", "-cuda13", "-encoder", "-umap"):
        assert f"requirements{kind}.lock" in names
    for lock in LOCKS:
        text = lock.read_text()
        assert "://" not in text and "file:" not in text, lock.name
        blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
        assert blocks and all("--hash=sha256:" in block for block in blocks), lock.name
    assert not (ROOT / "uv.lock").exists()


def project_files():
    """Every file of the project but those that .gitignore leaves out: a plain folder is no clone to ask."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    patterns = [line.rstrip("/") for line in lines if line and not line.startswith("#")]

    def is_ours(path):
        place = f"/{path.relative_to(ROOT).as_posix()}"
        return not any(fnmatch(place if "/" in pattern else path.name, pattern) for pattern in patterns)

    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name != ".git" and is_ours(Path(folder, name))]
        yield from filter(is_ours, (Path(folder, name) for name in names))


def test_no_file_says_where_packages_come_from_or_where_it_was_made():
    """Locks and settings name packages and hashes; the index is whatever the machine they are installed on uses."""
    told = re.compile(
        "|".join(["-".join(["index", "url"]), "find" + "-links", "trusted" + "-host", "/simple" + "/"])
        + rf"|(?<![\w.~/-]){re.escape(str(ROOT))}/"
    )
    files = [path for path in project_files() if path.suffix not in (".safetensors", ".png")]
    assert {ROOT / name for name in ("README.md", ".ci/run", "requirements.lock", "tests/test_shim.py")} <= set(files)
    assert [str(path) for path in files if told.search(path.read_text(encoding="utf-8"))] == []


def test_test_lock_agrees_with_the_lock_of_users():
    core, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert core.items() <= dev.items()
    assert not {"torch", "mlx-cuda-12", "mlx-cuda-13"} & {*core, *dev}


def test_lock_of_umap_fits_into_what_users_have():
    """What both locks name has the same versions and hashes in both."""

    def packages(name: str) -> set[str]:
        pieces = re.split(r"^(?=[A-Za-z0-9])", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
        return {re.sub(r"\n    # .*", "", piece, flags=re.DOTALL).strip() for piece in pieces}

    users, umap = packages("requirements.lock"), packages("requirements-umap.lock")
    names = {package.split("==")[0] for package in users}
    assert {package for package in umap if package.split("==")[0] in names} <= users
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.match(r"[a-z-]+", line)[0] for line in extras["umap"]} <= pins("requirements-umap.lock").keys()


def test_lock_of_users_holds_every_dependency_and_the_build_tools():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0].replace("_", "-").lower() for line in wanted}
    assert names <= pins("requirements.lock").keys()
