"""Several processes train one adapter: the same as one process would make, and none goes on without the others."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from hominem_mlx.cli import cli
from hominem_mlx.config import load_config
from hominem_mlx.files import write_jsonl
from hominem_mlx.models import backbone, lora
from hominem_mlx.policy import dual
from hominem_mlx.policy.material import Material
from hominem_mlx.records import Preference, SftPair, Thumb
from hominem_mlx.storage.registry import Registry
from hominem_mlx.training.footprint import GB
from hominem_mlx.training.loop import CHECKPOINT
from hominem_mlx.training.parallel import ALONE, Ranks
from hominem_mlx.training.rows import Order, Parts

SETTINGS = (
    "dual.epochs=2", "dual.learning_rate=0.003", "dual.rank=2", "dual.batch_pairs=3", "dual.batch_memories=2",
    "dual.anchor_weight=0.5", "dual.batch_anchors=3", "dual.batch_thumbs=3", "dual.eval_every=2",
    "dual.max_displacement=0", "dual.probes=0",
)  # fmt: skip
JOBS = {
    "normalised": (*SETTINGS, "dual.blend=normalised", "dual.loss=wpo", "dual.unsafe_pairs=npo", "dual.keep=best"),
    "alternate": (*SETTINGS, "dual.blend=alternate", "dual.preference_targets=head", "dual.head_rank=1"),
    "straight": (*SETTINGS, "dual.epochs=4", "dual.eval_every=6", "dual.save_every=2"),
}
LESS_MEMORY = 0.6  # of what one process takes: then rank 0 has to compute otherwise than rank 1
SECONDS = 300  # after which a process that should have ended is ended by the test
REPLIES = ["kind and rather long.", "short", "a rude answer!", "so so"]
CHILD = """
import json, sys
import hominem_mlx
import mlx.core as mx
from hominem_mlx.config import load_config
from hominem_mlx.errors import TrainingError
from hominem_mlx.models import backbone
from hominem_mlx.policy import dual
from hominem_mlx.storage.registry import Registry
from hominem_mlx.training import parallel

work = json.loads(sys.argv[1])
ranks = parallel.join()
registry, lm = Registry(work["home"]), backbone.load(work["base"])
pairs = registry.get("dataset", work["pairs"])
for settings in work["jobs"]:
    ranks.patience = 5 if settings is work["jobs"][-1] and ranks.is_first else 100
    own = [word.removeprefix(f"rank {ranks.rank}: ") for word in settings]
    own = [word for word in own if not word.startswith("rank ")]
    learn = dual.train if ranks.is_first else dual.assist
    try:
        made = learn(registry, pairs, load_config(overrides=own), lm=lm, ranks=ranks)
        print(json.dumps(made and [made.version, mx.get_peak_memory()]), flush=True)
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
THUMBS = [
    Thumb(id=f"t{i}", prompt=f"number {i % 3}?", response=f"it is {i}, I think", good=i % 3 == 0) for i in range(5)
]


# --- shares ---------------------------------------------------------------------------------------------------------


def stub(rank, size) -> Ranks:
    """A rank of a ring that is not there: enough to cut batches."""
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_cover_a_batch_once_and_rank_0_is_never_without(size):
    for count in range(1, 8):
        index = np.arange(10, 10 + count)
        shares = [stub(rank, size).share(index) for rank in range(size)]
        assert np.concatenate(shares).tolist() == index.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(shares[0])


def test_a_batch_is_cut_by_rank_and_then_into_micro_batches_by_each_for_itself():
    order, size = Order(23, 9, seed=1), 2
    for step in range(4):
        mine, other = (
            [Parts(parts, stub(rank, size)).at(order, step * parts + number) for number in range(parts)]
            for rank, parts in ((0, 3), (1, 2))
        )
        batch = order.batch(step)
        assert np.concatenate([*mine, *other]).tolist() == batch.tolist()
        assert np.concatenate(mine).tolist() == stub(0, size).share(batch).tolist()


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 1), (4, 1), (2, 2)])
def test_shares_weighed_by_size_give_loss_and_gradient_of_the_whole_batch(tiny, size, micro_batches):
    lm = tiny()
    material = Material(lm, load_config(overrides=[*SETTINGS, "dual.unsafe_pairs=npo"]).dual, None, None)
    channels = material.channels([*PAIRS, *UNSAFE], MEMORIES, thumbs=THUMBS)
    assert [channel.name for channel in channels] == ["memory", "preference", "thumb", "anchor"]
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    for key, value in lora.adapter_parameters(lm.model).items():
        if key.endswith("lora_b"):
            lora.set_parameters(lm.model, {key: mx.full(value.shape, 0.05)})

    def look(channel, batch):
        (loss, measured), tree = nn.value_and_grad(lm.model, channel.loss)(batch)
        assert tuple(measured) == channel.measures
        parts = [loss, *measured.values(), *(value for _, value in tree_flatten(tree))]
        return np.concatenate([np.array(part, np.float64).reshape(-1) for part in parts])

    for channel, step in itertools.product(channels, (0, 1)):
        material.parts.ranks, material.parts.micro_batches = ALONE, 1
        whole = look(channel, channel.batch_at(step))
        total, weight, without = 0.0, 0.0, 0
        for rank in range(size):
            material.parts.ranks, material.parts.micro_batches = stub(rank, size), micro_batches
            for place in range(step * micro_batches, (step + 1) * micro_batches):
                batch = channel.batch_at(place)
                if batch is None:
                    without += 1
                    continue
                own = channel.size(batch)
                total, weight = total + own * look(channel, batch), weight + own
        assert total / weight == pytest.approx(whole, rel=1e-4, abs=1e-6 * np.abs(whole).max())
        assert without >= size * micro_batches - 3  # batches of two and three rows
        assert np.abs(whole).max() > 1e-3


def test_a_rank_without_a_row_has_nothing_to_add(tiny):
    lm, ones = tiny(), ["dual.batch_pairs=1", "dual.batch_memories=1", "dual.anchor_weight=0", "dual.memory_gb=9"]
    material = Material(lm, load_config(overrides=[*SETTINGS, *ones]).dual, None, None, 9 * 10**9, stub(1, 2))
    channels = material.channels(PAIRS, MEMORIES[:1])
    assert [channel.batch_at(0) for channel in channels] == [None, None]
    memory = material.counts["memory"]["estimate_gb"]
    assert memory["weights"] > 0 and memory["activations"] + memory["logits"] > 0  # it reads references all the same


# --- two processes --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def processes(*commands):
    """Started side by side as `(command, environment)`; those that are left in the end are ended."""
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(list(map(str, words)), env=os.environ | more, stdout=pipe, stderr=pipe, text=True)
        for words, more in commands
    ]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()  # a launcher passes it on
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
            process.communicate()


def ended(process) -> SimpleNamespace:
    """Exit code, lines printed, what it complained about."""
    printed, complaint = process.communicate(timeout=SECONDS)
    return SimpleNamespace(code=process.returncode, printed=printed.splitlines(), complaint=complaint)


def checkpoints(runs: Path, *running) -> list[Path]:
    """The checkpoints of unfinished runs, once there are any."""
    deadline = time.monotonic() + SECONDS
    while not (found := list(runs.glob(f"*/{CHECKPOINT}"))):
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.005)
    return found


def whole(registry) -> bool:
    """Whether all that is there under its own name can be read and is what it should be."""
    for path in checkpoints(registry.home / "runs"):
        _, metadata = mx.load(str(path), return_metadata=True)
        if json.loads(metadata["story"])["step"] < 1:
            return False
    return registry.verify() == []


@pytest.fixture(scope="module")
def shared(tiny_folder, tmp_path_factory) -> SimpleNamespace:
    """What became of a home in which two processes trained together: they start slowly, so all is done here once.

    First in a ring that is set up here: settings that differ, then all jobs, then one that does not end, in which
    rank 1 is frozen, and goes on when rank 0 has given up. Then by the command, whose rank 0 is killed after its
    first checkpoint, and by the same command once more.
    """
    found = SimpleNamespace(base=str(tiny_folder), registry=Registry(tmp_path_factory.mktemp("home")))
    registry, home = found.registry, found.registry.home
    with registry.draft("dataset") as draft:
        write_jsonl(draft.folder / "preferences.train.jsonl", [*PAIRS, *UNSAFE])
        write_jsonl(draft.folder / "preferences.valid.jsonl", PAIRS[:3])
        write_jsonl(draft.folder / "memory.jsonl", MEMORIES)
        write_jsonl(draft.folder / "thumbs.jsonl", THUMBS)
    registry.use(draft.published, pointer="pairs")
    found.pairs = draft.published

    lm = backbone.load(found.base)
    found.alone = {
        name: dual.train(registry, found.pairs, load_config(overrides=settings), lm=lm)
        for name, settings in JOBS.items()
    }
    needed = found.alone["normalised"].metadata["metrics"]["memory"]["estimate_gb"]["total"]
    less_memory = f"rank 0: dual.memory_gb={LESS_MEMORY * needed}"
    jobs = [
        [*SETTINGS, "rank 1: dual.beta=0.2"],
        *([*settings, *([less_memory] if name == "normalised" else [])] for name, settings in JOBS.items()),
        [*JOBS["straight"], "dual.epochs=500"],
    ]
    hosts = home / "ring.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(2)]))
    work = {"home": str(home), "base": found.base, "pairs": found.pairs.version, "jobs": jobs}
    command = [sys.executable, "-c", CHILD, json.dumps(work)]
    ring = ((command, {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}) for rank in range(2))
    with processes(*ring) as (first, other):
        lines = [first.stdout.readline() for _ in jobs[:-1]]
        assert lines[-1], f"{lines} {ended(first).complaint}"
        said = [json.loads(line) for line in lines]
        found.refusal = said[0]
        made = dict(zip(JOBS, said[1:], strict=True))
        found.together = {name: registry.get("lora", version) for name, (version, _) in made.items()}
        found.took = {name: peak for name, (_, peak) in made.items()}
        checkpoints(home / "runs", first, other)
        other.send_signal(signal.SIGSTOP)
        found.gave_up = ended(first)
        other.send_signal(signal.SIGCONT)
        found.left_alone = ended(other)
    found.whole_then = whole(registry)
    shutil.rmtree(home / "runs")

    hosts.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
    found.told = home / "made.json"
    words = ["--hosts", hosts, "--json", found.told, "--home", home, *JOBS["straight"], f"student.base={found.base}"]
    command = [sys.executable, "-c", "from hominem_mlx.cli import main; main()", "train", "dual", *words]
    with processes((command, {})) as (process,):
        [checkpoint] = checkpoints(home / "runs", process)
        holder = (home / "locks" / f"{checkpoint.parent.name}.lock").read_text()  # process 123 (training ...)
        os.kill(int(holder.split()[1]), signal.SIGKILL)
        found.killed = ended(process)
    found.whole_after_the_kill = whole(registry)
    with processes((command, {})) as (process,):
        found.resumed = ended(process)
    return found


def weights(artifact):
    return {name: np.array(value) for name, value in mx.load(str(artifact.file(lora.WEIGHTS))).items()}


def numbers(value, name="") -> dict[str, float]:
    """All numbers in a nested value, by where they are."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: number for key, item in inner for place, number in numbers(item, f"{name}.{key}").items()}
    return {name: value} if isinstance(value, int | float) else {}


def test_a_rank_with_other_settings_is_named_before_anything_begins(shared):
    assert "rank 1 has another settings than rank 0: nothing was begun" in shared.refusal


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_make_the_adapter_of_one(shared, name):
    """Equal up to rounding, in how far every weight has gone and in all that was measured on the way."""
    one, other = shared.alone[name], shared.together[name]
    assert one.hash != other.hash  # or nothing was shared: sums of shares round in another order
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for place, value in expected.items():
        assert np.abs(found[place] - value).max() <= 1e-4 * np.abs(value).max(), place
    told, other_told = (numbers(artifact.metadata["metrics"]["training"]) for artifact in (one, other))
    assert other_told == pytest.approx(told, rel=1e-3, abs=1e-4)
    assert one.metadata["metrics"]["kept_step"] == other.metadata["metrics"]["kept_step"]
    usual, memory = (artifact.metadata["metrics"]["memory"] for artifact in (one, other))
    assert (memory["picked"] != usual["picked"]) == (name == "normalised")
    assert shared.took[name] <= memory["estimate_gb"]["total"] * GB


def test_a_process_that_falls_silent_ends_the_other_and_one_left_alone_ends_itself(shared):
    assert shared.gave_up.code == 2
    assert "no word from another process" in shared.gave_up.complaint
    assert "give the same command again" in shared.gave_up.complaint
    assert shared.left_alone.code == 2
    said = json.loads(shared.left_alone.printed[-1])
    assert "another process of this run has ended" in said and "give the same command again" in said
    assert shared.whole_then


def test_a_killed_rank_ends_the_command_with_a_message_and_leaves_nothing_half_written(shared):
    assert shared.killed.code == 2
    assert "hominem: a rank failed, so all were stopped" in shared.killed.complaint
    assert shared.whole_after_the_kill


def test_the_same_command_ends_where_it_would_have_and_one_rank_prints(shared):
    assert shared.resumed.code == 0, shared.resumed.complaint
    assert "\n".join(shared.resumed.printed).count("is trained, not in use yet") == 1
    assert json.loads(shared.told.read_text())["artifact"] == shared.together["straight"].ref  # bit for bit


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
