"""Kill -9 at seeded moments: every artifact stays whole, and going on arrives where an undisturbed run arrives.

One home a command takes kill after kill: each run goes on where the last was ended. A run that ends before its kill
must have arrived; then a fresh home takes its place.
"""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from fake_teacher import FakeTeacher
from hominem_mlx.cli import cli, main
from hominem_mlx.data import dataset
from hominem_mlx.data import home as homes
from hominem_mlx.files import sha256_bytes
from hominem_mlx.records import Label, Trajectory
from hominem_mlx.storage.registry import KINDS, Registry

KILLS = {"rate": 9, "reward": 8, "dual": 9, "rl": 2, "full": 2, "gc": 9, "demo": 5}
PAUSE_SECONDS = 0.03  # of the teacher before each answer
REWARD = ("reward.backbone=lm", "reward.folds=2", "reward.members=2")
PAIRS = ("pairs.max_per_prompt=2", "pairs.on_policy=1", "pairs.on_policy_max_tokens=4")
DUAL = ("dual.epochs=2", "dual.batch_pairs=4", "dual.batch_memories=4", "dual.save_every=2", "dual.eval_every=4")
SMALL = ("dual.rank=2", "dual.learning_rate=1e-3", "dual.max_displacement=0.0")
RL = ("rl.steps=4", "rl.batch_prompts=2", "rl.answers=2", "rl.max_tokens=24", "rl.probes=8", "rl.rank=2")
LOOKS = ("rl.learning_rate=1e-3", "rl.save_every=1", "rl.eval_every=2", "rl.max_length=9", "rl.max_strange=1")
FULL = ("full.epochs=2", "full.accumulate=1", "full.save_every=2", "full.learning_rate=1e-3", "full.max_tokens=64")
EVALUATION = tuple(
    f"evaluation.{setting}" for setting in ("samples=1", "max_tokens=4", "recall_tokens=4", "bootstrap=100")
)

# Loading the libraries takes longer than the work itself. So on Linux one process loads them, and each command runs in
# a fork of it; Metal would not survive a fork, so elsewhere each process loads them anew.
ROOMS = (
    *("cli.artifacts", "cli.data", "cli.demo", "cli.evaluate", "cli.train", "data.preferences", "data.rater"),
    *("data.teacher", "evaluation.looks", "evaluation.report", "evaluation.suite", "policy.dual", "policy.full"),
    *("policy.rl", "reward.acceptance", "reward.train"),
)
LOADED = ["hominem_mlx", *(f"hominem_mlx.{room}" for room in ROOMS), "mlx_lm.models.qwen3", "click.testing", "pytest"]
processes = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
processes.set_forkserver_preload(LOADED)


def command(words: list[str], starter: Path, output: Path, ready) -> None:
    """`hominem WORDS`, in a process of its own that says when everything is loaded."""
    for name in LOADED:
        importlib.import_module(name)
    homes.STARTER = starter
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    ready.send(True)
    sys.argv = ["hominem", *words]
    main()


class Crew:
    """Runs commands, to their end or their kill.

    Args:
        starter: folder of the corpus they find bundled.
        output: file for what the last of them printed.
    """

    def __init__(self, starter: Path, output: Path):
        self.starter, self.output = starter, output

    def run(self, words, *, kill_after=None) -> tuple[int | None, float]:
        """Run `hominem WORDS` to its end or its kill; returns its exit code (None: killed) and the seconds of work."""
        loaded, ready = processes.Pipe(duplex=False)
        arguments = [str(word) for word in words], self.starter, self.output, ready
        process = processes.Process(target=command, args=arguments, daemon=True)
        process.start()
        ready.close()
        loaded.recv()
        began = time.monotonic()
        process.join(kill_after)
        seconds = time.monotonic() - began
        process.kill()  # nothing happens to one that has ended
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return None, seconds
        assert process.exitcode in (0, 1), self.output.read_text()
        return process.exitcode, seconds


@pytest.fixture(scope="module")
def starter(share_of_starter) -> Path:
    """A small share of the corpus: twelve prompts to learn from, three to watch, four to be examined with."""
    return share_of_starter(train=12, valid=3, test=4, memory=6, recall=4, fixtures=2)


@pytest.fixture
def crew(starter, tmp_path, monkeypatch) -> Crew:
    """Runs commands on the small share of the corpus, which this process has in place of the whole, too."""
    monkeypatch.setattr(homes, "STARTER", starter)
    return Crew(starter, tmp_path / "output")


@pytest.fixture
def filled(home, crew) -> Path:
    """A home with the small corpus in it."""
    dataset.import_starter(home)
    return home


def here(*words) -> int:
    """Run a command in this process, to its end; returns its exit code."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code in (0, 1), done.output
    return done.exit_code


def arrived(home: Path) -> dict:
    """What a home holds in the end: artifacts and pointers by content, the bytes of its data, unfinished runs."""
    registry = Registry(home)
    hashes = {artifact.ref: artifact.hash for artifact in registry.artifacts()}
    data = [*homes.FILES.values(), homes.UNLABELLED]
    return {
        "artifacts": sorted((ref.partition("/")[0], content) for ref, content in hashes.items()),
        "pointers": {
            kind: {pointer: hashes[f"{kind}/{version}"] for pointer, version in registry.pointers(kind).items()}
            for kind in KINDS
        },
        "data": {name: sha256_bytes((home / name).read_bytes()) for name in data if (home / name).exists()},
        "answers": answers(home),
        "unfinished": sorted(path.name for path in home.glob("runs/*")),
    }


def answers(home: Path) -> list[str]:
    path = home / homes.ANSWERS
    return sorted(path.read_text().splitlines()) if path.exists() else []


def survives(crew: Crew, template: Path, words, kills: int, *, look=arrived) -> int:
    """Kill `words(home)` so many times; returns the number of homes that took it.

    Args:
        template: the home to begin with; copied, never touched.
        words: the command for a home.
        kills: how many kills have to land in running work; most attempts must.
        look: what the ends of an undisturbed and of a disturbed home are compared by.
    """
    taken = 0

    def fresh() -> Path:
        nonlocal taken
        taken += 1
        return Path(shutil.copytree(template, template.with_name(f"home-{taken}")))

    undisturbed = fresh()
    code, seconds = crew.run(words(undisturbed))
    goal = look(undisturbed)
    assert Registry(undisturbed).verify() == []

    dice, landed, attempts, home = random.Random(kills), 0, 0, fresh()
    while landed < kills:
        attempts += 1
        assert attempts <= 2 * kills, f"only {landed} of {attempts} kills landed in {seconds:.2f} s of work"
        ended, _ = crew.run(words(home), kill_after=seconds * dice.uniform(0.02, 0.8))
        assert Registry(home).verify() == []
        if ended is None:
            landed += 1
        else:
            assert (ended, look(home)) == (code, goal)
            home = fresh()
    # All forks hash texts alike and this process does not: whatever hangs on the order of a set would not arrive.
    assert (here(*words(home)), look(home)) == (code, goal)
    assert Registry(home).verify() == []
    print(f"{words(home)[:2]}: {landed} of {attempts} kills landed in {seconds:.2f} s of work")
    return taken


def test_there_are_forty_kills():
    assert sum(KILLS.values()) >= 40


def test_rating_goes_on_after_a_kill_and_asks_for_nothing_twice(filled, crew):
    labels = homes.read(filled, Label)[:48]
    given = [
        Trajectory(id=f"t-{row.id}", **row.model_dump(include={"prompt_id", "prompt", "response"})) for row in labels
    ]
    homes.write(filled, Trajectory, given)
    homes.write(filled, Label, [])

    def pause(body, count):
        time.sleep(PAUSE_SECONDS)

    with FakeTeacher(fault=pause) as teacher:
        settings = ("teacher.kind=anthropic", f"teacher.base_url={teacher.url}", "teacher.model=fake")
        words = ("data", "rate", "--yes", *settings, "teacher.concurrency=2")
        taken = survives(crew, filled, lambda home: (*words, "--home", home), KILLS["rate"])
        assert len(homes.read(filled.with_name("home-1"), Label)) == len(given)
        at_most = taken * len(given) + 2 * KILLS["rate"]  # two were on their way at each kill
        assert taken * len(given) <= len(teacher.requests) + len(given) <= at_most + len(given)


def test_reward_training_arrives_after_kills(filled, crew, tiny_folder):
    here("data", "split", "--home", filled)
    words = ("train", "reward", f"student.base={tiny_folder}", *REWARD)
    survives(crew, filled, lambda home: (*words, "--home", home), KILLS["reward"])


def test_dual_training_arrives_after_kills(filled, crew, tiny_folder):
    here("data", "split", "--home", filled)
    here("data", "pair", "--home", filled, PAIRS[0])
    words = ("train", "dual", f"student.base={tiny_folder}", *DUAL, *SMALL, *EVALUATION)
    survives(crew, filled, lambda home: (*words, "--home", home), KILLS["dual"])


def test_reinforcement_arrives_after_kills(filled, crew, tiny_folder):
    base = f"student.base={tiny_folder}"
    here("data", "split", "--home", filled)
    here("train", "reward", base, *REWARD, "--home", filled)
    registry = Registry(filled)
    [model] = registry.artifacts("reward_model")
    registry.use(model)  # whether it is good enough is not the question here
    words = ("train", "rl", base, *REWARD, *RL, *LOOKS)
    survives(crew, filled, lambda home: (*words, "--home", home), KILLS["rl"])


def test_full_training_arrives_after_kills(filled, crew, tiny_folder):
    here("data", "split", "--home", filled)
    here("data", "pair", "--home", filled, PAIRS[0])
    words = ("train", "full", f"student.base={tiny_folder}", *FULL)
    survives(crew, filled, lambda home: (*words, "--home", home), KILLS["full"])


def test_collecting_garbage_takes_nothing_it_must_keep_whenever_it_is_killed(home, crew):
    registry = Registry(home)

    def make(kind, number, parents=()):
        with registry.draft(kind, parents=parents, seed=number) as draft:
            for name in "abc":
                (draft.folder / name).write_text(f"{number} {name}" * 1000)
        return draft.published

    kept = [make("dataset", 0)]
    kept.append(make("lora", 0, kept))
    registry.use(kept[1], pointer="some-base")
    kept.append(make("reward_model", 0))
    registry.tag(kept[2], "mine")
    for number in range(1, 61):
        make("lora", number)
    for name in (".draft-999999999-left", ".trash-0099-00000000"):
        (home / "artifacts" / "lora" / name).mkdir()
        (home / "artifacts" / "lora" / name / "file").write_text("of a writer that is gone")

    (home / "data").mkdir()
    (home / "data" / ".rows.jsonl.999999999-abcdefgh.tmp").write_text("of a writer that is gone")

    def look(home):
        audit = [json.loads(line) for line in (home / "audit.jsonl").read_text().splitlines()]
        return {
            **arrived(home),
            "left": sorted(path.name for place in ("artifacts/*/.*", "data/.*") for path in home.glob(place)),
            "deleted": sorted(row["ref"] for row in audit if row["action"] == "delete"),
        }

    words = ("artifacts", "gc", "--all", "--yes")
    survives(crew, home, lambda home: (*words, "--home", home), KILLS["gc"], look=look)
    ended = look(home.with_name("home-1"))
    assert ended["artifacts"] == sorted((artifact.kind, artifact.hash) for artifact in kept)
    assert ended["left"] == []
    assert len(set(ended["deleted"])) == len(ended["deleted"]) == 61, "each once, the trash of an older kill too"


def test_the_demo_arrives_after_kills(home, crew, tiny_folder):
    settings = (*REWARD, *PAIRS, *DUAL, *SMALL, *EVALUATION)
    words = ("demo", f"student.base={tiny_folder}", *settings)
    survives(crew, home, lambda home: (*words, "--home", home), KILLS["demo"])
