"""Several processes train one adapter: the same as one process would make, and none goes on without the others."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from hominem_mlx.cli import cli
from hominem_mlx.config import load_config
from hominem_mlx.files import write_jsonl
from hominem_mlx.models import lora
from hominem_mlx.policy import dual
from hominem_mlx.records import Preference, SftPair
from hominem_mlx.training.loop import CHECKPOINT
from hominem_mlx.training.parallel import ALONE, Ranks

SETTINGS = (
    "dual.epochs=2", "dual.learning_rate=0.003", "dual.rank=2", "dual.batch_pairs=3", "dual.batch_memories=2",
    "dual.anchor_weight=0.5", "dual.batch_anchors=3", "dual.eval_every=2", "dual.max_displacement=0",
)  # fmt: skip
LONG = (*SETTINGS, "dual.epochs=4", "dual.save_every=2", "dual.eval_every=6")
SECONDS = 100  # after which a process that should have ended is ended by the test
REPLIES = ["kind and rather long.", "short", "a rude answer!", "so so"]
CHILD = """
import json, sys
import hominem_mlx
from hominem_mlx.config import load_config
from hominem_mlx.errors import TrainingError
from hominem_mlx.models import backbone
from hominem_mlx.policy import dual
from hominem_mlx.storage.registry import Registry
from hominem_mlx.training import parallel

work = json.loads(sys.argv[1])
ranks = parallel.join(patience=work["patience"])
registry, lm = Registry(work["home"]), backbone.load(work["base"])
pairs = registry.get("dataset", work["pairs"])
for settings in work["jobs"]:
    own = [word.removeprefix(f"rank {ranks.rank}: ") for word in settings]
    own = [word for word in own if not word.startswith("rank ")]
    learn = dual.train if ranks.is_first else dual.assist
    try:
        made = learn(registry, pairs, load_config(overrides=own), lm=lm, ranks=ranks)
        print(json.dumps(made.version if made else None), flush=True)
    except TrainingError as error:
        print(json.dumps(str(error)), flush=True)
        if "nothing was begun" not in str(error):
            sys.exit(2)
"""


def pair(number, prompt, chosen, rejected, **fields):
    texts = {"prompt": f"question {prompt}?", "chosen": REPLIES[chosen], "rejected": REPLIES[rejected]}
    return Preference(id=f"p{number}", **texts, **fields)


SIDES = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 3, 2), (2, 1, 2), (2, 0, 2)]
PAIRS = [pair(i, *sides, reward_intensity=0.4 + 0.1 * i, target=0.95 - 0.05 * i) for i, sides in enumerate(SIDES)]
UNSAFE = [pair(9, 2, 2, 3, safety_score=-0.6, rejected_safety_score=-0.9)]
MEMORIES = [
    SftPair(id=f"m{i}", instruction=f"what is {i}?", response="thing " * (1 + 3 * i), confidence=1 - 0.3 * i)
    for i in range(3)
]


@pytest.fixture
def pairs(registry):
    with registry.draft("dataset") as draft:
        write_jsonl(draft.folder / "preferences.train.jsonl", [*PAIRS, *UNSAFE])
        write_jsonl(draft.folder / "preferences.valid.jsonl", PAIRS[:3])
        write_jsonl(draft.folder / "memory.jsonl", MEMORIES)
    registry.use(draft.published, pointer="pairs")
    return draft.published


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def ring(home, pairs, tiny, tmp_path):
    """Starts two processes that do these jobs together; those that are left are ended."""
    started: list[subprocess.Popen] = []

    def start(*jobs, patience=SECONDS) -> list[subprocess.Popen]:
        hosts = tmp_path / "ring.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(2)]))
        work = {"home": str(home), "base": tiny().folder, "pairs": pairs.version, "jobs": jobs, "patience": patience}
        command = [sys.executable, "-c", CHILD, json.dumps(work, default=str)]
        pipe = subprocess.PIPE
        for rank in range(2):
            env = os.environ | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        return started[-2:]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process) -> tuple[int, list, str]:
    """Exit code, what it printed, what it complained about."""
    printed, complaint = process.communicate(timeout=SECONDS)
    return process.returncode, [json.loads(line) for line in printed.splitlines()], complaint


def weights(artifact):
    return {name: np.array(value) for name, value in mx.load(str(artifact.file(lora.WEIGHTS))).items()}


def assert_same_training(one, other):
    """Equal up to rounding, in how far every weight has gone and in all that was measured on the way."""
    assert one.hash != other.hash  # or nothing was shared: sums of shares round in another order
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-4 * np.abs(value).max(), name
    told, other_told = (numbers(artifact.metadata["metrics"]["training"]) for artifact in (one, other))
    assert other_told == pytest.approx(told, rel=1e-3, abs=1e-4)


def numbers(value, name="") -> dict[str, float]:
    """All numbers in a nested value, by where they are."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: number for key, item in inner for place, number in numbers(item, f"{name}.{key}").items()}
    return {name: value} if isinstance(value, int | float) else {}


# --- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_cover_a_batch_once_and_rank_0_is_never_without(size):
    for count in range(1, 8):
        index = np.arange(10, 10 + count)
        shares = [stub(rank, size).share(index) for rank in range(size)]
        assert np.concatenate(shares).tolist() == index.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(shares[0])


def stub(rank, size) -> Ranks:
    """A rank of a ring that is not there: enough to cut batches."""
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


@pytest.mark.parametrize("name", ["memory", "preference", "anchor"])
@pytest.mark.parametrize("size", [2, 4])
def test_shares_weighed_by_size_give_loss_and_gradient_of_the_whole_batch(tiny, name, size):
    lm = tiny()
    material = dual.Material(lm, load_config(overrides=[*SETTINGS, "dual.unsafe_pairs=npo"]).dual, None, None)
    channel = {each.name: each for each in material.channels([*PAIRS, *UNSAFE], MEMORIES)}[name]
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    for key, value in lora.adapter_parameters(lm.model).items():
        if key.endswith("lora_b"):
            lora.set_parameters(lm.model, {key: mx.full(value.shape, 0.05)})

    def look(batch):
        (loss, measured), tree = nn.value_and_grad(lm.model, channel.loss)(batch)
        assert tuple(measured) == channel.measures
        parts = [loss, *measured.values(), *(value for _, value in tree_flatten(tree))]
        return np.concatenate([np.array(part, np.float64).reshape(-1) for part in parts])

    # places live where batches are cut, and pair batches read them through `material`
    cutter = channel.batch_at.__self__ if name == "memory" else material
    for step in range(3):
        cutter.ranks = ALONE
        whole = look(channel.batch_at(step))
        total, weight, without = 0.0, 0.0, 0
        for rank in range(size):
            cutter.ranks = stub(rank, size)
            batch = channel.batch_at(step)
            if batch is None:
                without += 1
                continue
            own = channel.size(batch)
            total, weight = total + own * look(batch), weight + own
        assert total / weight == pytest.approx(whole, rel=1e-4, abs=1e-6 * np.abs(whole).max())
        assert without >= size - 3  # batches of two and three rows
    assert np.abs(whole).max() > 1e-3


# --- two processes --------------------------------------------------------------------------------------------------


def test_two_processes_make_the_adapter_of_one_and_a_silent_one_ends_the_other(registry, pairs, tiny, ring, home):
    jobs = [
        [*SETTINGS, "rank 1: dual.beta=0.2"],
        [*SETTINGS, "dual.blend=normalised", "dual.loss=wpo", "dual.unsafe_pairs=npo"],
        [*SETTINGS, "dual.blend=alternate", "dual.preference_targets=head", "dual.head_rank=1"],
    ]
    first, other = ring(*jobs, [*LONG, "dual.epochs=100000"], patience=3)
    printed = [json.loads(first.stdout.readline()) for _ in jobs]
    assert "rank 1 has another settings than rank 0" in printed[0]
    for settings, version in zip(jobs[1:], printed[1:]):
        alone = dual.train(registry, pairs, load_config(overrides=settings), lm=tiny())
        assert_same_training(alone, registry.get("lora", version))
    checkpoints(home / "runs", first, other)
    other.send_signal(signal.SIGSTOP)
    code, _, complaint = ended(first)
    assert code == 2
    assert "no word from another process" in complaint and "give the same command again" in complaint
    assert_whole(registry)


def checkpoints(runs: Path, *processes) -> list[Path]:
    """The checkpoints of unfinished runs, once there are any."""
    deadline = time.monotonic() + SECONDS
    while not (found := list(runs.glob(f"*/{CHECKPOINT}"))):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.005)
    return found


def assert_whole(registry) -> None:
    """All that is there under its own name can be read and is what it should be."""
    assert registry.verify() == []
    for path in checkpoints(registry.home / "runs"):
        _, metadata = mx.load(str(path), return_metadata=True)
        assert json.loads(metadata["story"])["step"] > 0


def test_a_rank_that_dies_ends_all_and_the_same_command_ends_where_it_would_have(registry, pairs, tiny, ring, home):
    lm = tiny()
    first, other = ring(LONG, [*LONG, "dual.epochs=100000"])
    straight = registry.get("lora", json.loads(first.stdout.readline()))
    assert_same_training(dual.train(registry, pairs, load_config(overrides=LONG), lm=lm), straight)
    checkpoints(home / "runs", first, other)
    other.kill()
    code, [said], _ = ended(first)
    assert code == 2
    assert "another process of this run has ended" in said and "give the same command again" in said
    assert_whole(registry)
    shutil.rmtree(home / "runs")

    hosts, made = home / "hosts.json", home / "made.json"
    hosts.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
    words = ["train", "dual", "--hosts", hosts, "--json", made, *LONG, f"student.base={lm.folder}"]
    with started(*words) as process:
        [checkpoint] = checkpoints(home / "runs", process)
        holder = (home / "locks" / f"{checkpoint.parent.name}.lock").read_text()  # process 123 (training ...)
        os.kill(int(holder.split()[1]), signal.SIGKILL)
        code, _, complaint = ended(process)
    assert code == 2
    assert "hominem: a rank failed, so all were stopped" in complaint
    assert_whole(registry)
    with started(*words) as process:
        printed, complaint = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, complaint
    assert printed.count("is trained, not in use yet") == 1  # one rank prints
    assert json.loads(made.read_text())["artifact"] == straight.ref


@contextlib.contextmanager
def started(*words):
    """`hominem WORDS`, ended when the block ends."""
    command = [sys.executable, "-c", "from hominem_mlx.cli import main; main()", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it passes this on
        process.communicate()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "two machines or more"),
        ('{"hosts": [{"ssh": "a", "ips": ["10.0.0.1"]}]}', "two machines or more"),
        ('[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": []}]', "machine 1 needs"),
        ('[{"ssh": "a"}, {"ssh": "b"}]', "machine 0 needs"),
        ("[", "not JSON"),
    ],
)
def test_a_file_that_is_no_hostfile_is_said(tmp_path, text, reason):
    (tmp_path / "hosts.json").write_text(text)
    done = CliRunner().invoke(cli, ["train", "dual", "--hosts", str(tmp_path / "hosts.json")])
    assert done.exit_code == 2
    assert reason in done.output and "hosts.json" in done.output
