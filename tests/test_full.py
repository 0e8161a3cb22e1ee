"""Full tuning: every weight moves and nothing else; the impossible is refused; kills and full disks lose nothing."""

import gc
import json
import math
import resource
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from hominem_mlx.cli import cli
from hominem_mlx.config import FullConfig, load_config
from hominem_mlx.errors import ModelError, RegistryError, TrainingError
from hominem_mlx.models import backbone, lora
from hominem_mlx.models.seeding import seeded
from hominem_mlx.policy import dual, full
from hominem_mlx.policy.memories import Memories
from hominem_mlx.records import Preference, SftPair
from hominem_mlx.training import footprint, loop
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Parts, Row, collate, to_row

FAST = ["full.learning_rate=3e-3", "full.epochs=2", "full.accumulate=4", "full.log_every=1", "full.save_every=2"]
MEMORIES = [
    SftPair(
        id=f"m{i}", instruction=f"what is {i}?", response=f"thing {i}" + " and more" * (i % 3), confidence=1 - i / 20
    )
    for i in range(7)
]
PAIRS = [Preference(id="p", prompt="a question?", chosen="kind.", rejected="rude!")]


@pytest.fixture
def dataset(publish_pairs):
    return lambda memories=MEMORIES: publish_pairs(PAIRS, memories=memories)


def train(registry, dataset, lm, *overrides, **options):
    return full.train(registry, dataset, load_config(overrides=[*FAST, *overrides]), lm=lm, **options)


def weights(artifact):
    return {name: np.array(value) for name, value in mx.load(str(artifact.file("model.safetensors"))).items()}


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def memory_rows(lm):
    return [to_row(lm, one.instruction, one.response, max_tokens=2048)[0] for one in MEMORIES]


def mean_loss(lm):
    rows = collate(memory_rows(lm))
    return (-LogProbs(lm)(rows).sum() / rows.lengths.sum()).item()


def shortened(folder, kind):
    """The model of a folder, kept in another float type."""
    lm = backbone.load(str(folder))
    lm.model.set_dtype(kind)
    mlx_lm.utils.save_model(folder, lm.model)
    return backbone.load(str(folder))


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_every_weight_moves_the_loss_falls_and_the_base_stays_what_it_was(registry, dataset, tiny):
    lm = tiny()
    before, digest, on_disk = mean_loss(lm), lm.fingerprint(), files_of(lm.folder)
    start = {name: np.array(value) for name, value in tree_flatten(lm.model.parameters())}
    data = dataset()
    artifact = train(registry, data, lm)
    assert (lm.fingerprint(), files_of(lm.folder)) == (digest, on_disk)
    assert not tree_flatten(lm.model.trainable_parameters())
    trained = weights(artifact)
    assert trained.keys() == start.keys()
    assert {name for name in start if np.array_equal(trained[name], start[name])} == set()
    assert {"model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= start.keys()
    assert mean_loss(backbone.load(str(artifact.folder))) < before - 0.1
    assert artifact.metadata["parents"] == [data.ref] and artifact.metadata["inputs"] == {"base": lm.hash}
    logged = artifact.metadata["metrics"]["training"]["evaluations"]
    assert [entry["step"] for entry in logged] == list(range(1, 5)) and logged[-1]["memory"] < logged[0]["memory"]
    assert not list((registry.home / "runs").iterdir())


def test_the_result_has_mlx_lms_layout_and_its_logits(registry, dataset, tiny):
    lm = tiny()
    artifact = train(registry, dataset(), lm)
    beside = {path.name for path in lm.folder.iterdir() if "safetensors" not in path.name}
    assert {path.name for path in artifact.folder.iterdir()} == {
        *beside, "METADATA.json", "model.safetensors", "model.safetensors.index.json"
    }  # fmt: skip
    model, tokenizer = mlx_lm.load(str(artifact.folder))
    ours = backbone.load(str(artifact.folder))
    tokens = mx.array([tokenizer.encode("What is my sister called?")])
    assert tokenizer.encode("What is my sister called?") == lm.tokenizer.encode("What is my sister called?")
    assert mx.array_equal(model(tokens), ours.model(tokens))
    assert not mx.array_equal(model(tokens), lm.model(tokens))


def test_each_memory_is_learnt_from_once_an_epoch(registry, dataset, tiny):
    lm, seen = tiny(), []
    real = Memories.batch_at

    def spy(self, step):
        seen.append(step)
        return real(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memories, "batch_at", spy)
        artifact = train(registry, dataset(), lm, "full.epochs=3", "full.accumulate=4")
    assert seen == list(range(21))  # 5 steps of 4 and one more: the sixth is not filled up from a fourth epoch
    assert artifact.metadata["metrics"]["training"]["steps"] == 6


def test_memories_behind_a_shut_gate_without_confidence_or_a_word_are_left_out(registry, dataset, tiny):
    unsafe = SftPair(id="u", instruction="how?", response="like so", safety_score=-0.9)
    doubtful = SftPair(id="d", instruction="who?", response="me", confidence=0.0)
    left_out = weights(train(registry, dataset(), tiny()))
    silent = SftPair(id="s", instruction="well?", response="<think>hm</think>")
    refused = train(registry, dataset([unsafe, *MEMORIES, silent, doubtful]), tiny())
    assert all(np.array_equal(left_out[name], value) for name, value in weights(refused).items())
    assert refused.metadata["metrics"]["memories"] == {"given": 10, "all_thoughts": 1, "refused_by_gate": 2}


def test_a_reply_that_had_to_be_cut_is_counted(registry, dataset, tiny):
    artifact = train(registry, dataset(), tiny(), "full.max_tokens=8", "full.epochs=1")
    assert artifact.metadata["metrics"]["cut_responses"] > 0


# --- short floats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_rounding_takes_a_neighbour_and_keeps_the_mean(kind):
    value = mx.array(np.random.default_rng(0).standard_normal(2000).astype(np.float32))
    below = mx.minimum(value, 0) + mx.maximum(value, 0)
    with seeded(0):
        draws = mx.stack([full.rounded(below, kind).astype(mx.float32) for _ in range(400)])
    assert full.rounded(value, kind).dtype == kind
    epsilon = 2.0 ** -(23 - full.DROPPED_BITS[kind])
    assert (mx.abs(draws - value) < mx.abs(value) * epsilon).all().item()
    off = np.array((draws.mean(axis=0) - value) / (mx.abs(value) * epsilon))
    assert np.abs(off).mean() < 0.03 and abs(off.mean()) < 0.003  # to the nearest would be off by 0.17 each
    held = value.astype(kind)
    assert mx.array_equal(full.rounded(held.astype(mx.float32), kind), held)
    assert mx.array_equal(full.rounded(value, mx.float32), value)


def test_a_base_in_bfloat16_learns_what_its_own_steps_could_not_hold_and_stays_in_bfloat16(registry, dataset, tiny):
    lm = shortened(tiny().folder, mx.bfloat16)
    digest, before = lm.fingerprint(), mean_loss(lm)
    few = ["full.learning_rate=2e-5", "full.epochs=4", "full.accumulate=2"]
    data = dataset()
    artifact = train(registry, data, lm, *few)
    assert lm.fingerprint() == digest
    mine = backbone.load(str(artifact.folder))
    assert {value.dtype for _, value in tree_flatten(mine.model.parameters())} == {mx.bfloat16}
    whole = weights(train(registry, data, shortened(lm.folder, mx.float32), *few))
    learnt = backbone.load(str(lm.folder))
    learnt.model.load_weights([(name, mx.array(value)) for name, value in whole.items()])
    gained, kept = before - mean_loss(learnt), before - mean_loss(mine)
    assert gained > 0.03 and kept > 0.7 * gained  # rounded to the nearest, less than half would be left


# --- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_accumulated_micro_batches_are_one_big_batch(tiny, at_once):
    lm = tiny()
    lm.model.unfreeze()
    rows, weight = memory_rows(lm)[:6], np.linspace(0.3, 1, 6).astype(np.float32)
    assert len({len(row.response) for row in rows}) > 1
    lessons = Memories(LogProbs(lm), rows, weight, Parts(), batch=at_once, seed=0)
    whole = Memories(LogProbs(lm), rows, weight, Parts(), batch=6, seed=0)
    value_and_grad = nn.value_and_grad(lm.model, lessons.loss)
    channel = loop.Channel("memory", 1.0, lessons.batch_at, lessons.loss, size=lessons.size)
    (loss, _, gradient), size = loop._lesson(channel, value_and_grad, 0, 0.7, 6 // at_once)
    assert size == sum(len(row.response) for row in rows)
    (wanted_loss, _), tree = value_and_grad(whole.batch_at(0))
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    for name, wanted in tree_flatten(tree):
        assert mx.abs(gradient[name] - 0.7 * wanted).max().item() <= 1e-5 * (0.7 * mx.abs(wanted)).max().item(), name


def test_micro_batches_count_by_their_size_and_those_without_a_lesson_do_not():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = mx.array([[2.0]])
    said = {0: (1.0, 3.0), 1: None, 2: (5.0, 1.0)}  # slope and size
    channel = loop.Channel(
        "x", 1.0, said.get, lambda b: (b[0] * layer.weight.sum(), {"y": mx.array(b[0])}), size=lambda b: b[1]
    )
    (loss, measured, gradient), _ = loop._lesson(channel, nn.value_and_grad(layer, channel.loss), 0, 1.0, 3)
    assert (loss.item(), measured["y"].item(), gradient["weight"].item()) == (4.0, 2.0, 2.0)  # (3 * 1 + 1 * 5) / 4
    assert loop._lesson(channel, nn.value_and_grad(layer, channel.loss), 1, 1.0, 3) == (None, 0)


def test_training_by_micro_batches_ends_where_training_by_big_ones_does(registry, dataset, tiny):
    even = dataset(MEMORIES[:6])
    big = weights(train(registry, even, tiny(), "full.batch=6", "full.accumulate=1"))
    small = weights(train(registry, even, tiny(), "full.batch=2", "full.accumulate=3"))
    assert all(np.allclose(big[name], small[name], atol=2e-4) for name in big)
    assert any(not np.array_equal(big[name], small[name]) for name in big)


# --- interruptions --------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("dies_at", [1, 3])
def test_a_resumed_run_gives_the_same_bits(registry, dataset, tiny, dies_at):
    data, lm = dataset(), tiny()

    def die(event):
        if event["done"] == dies_at:
            raise Killed

    digest = lm.fingerprint()
    with pytest.raises(Killed):
        train(registry, data, lm, progress=die)
    assert lm.fingerprint() == digest and registry.artifacts("full") == []
    seen = []
    resumed = train(registry, data, tiny(), progress=lambda event: seen.append(event["done"]))
    assert seen[0] == dies_at // 2 * 2 + 1
    resumed_weights = weights(resumed)
    shutil.rmtree(resumed.folder)
    straight = train(registry, data, tiny())
    assert straight.hash == resumed.hash
    assert all(np.array_equal(value, resumed_weights[name]) for name, value in weights(straight).items())


def test_a_full_disk_stops_the_run_keeps_the_last_checkpoint_and_leaves_nothing_half_written(registry, dataset, tiny):
    data, old = dataset(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event):
        if event["done"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))  # no file longer than that

    try:
        with pytest.raises(TrainingError, match=r"step 4 could not be written .*That of step 2 is kept; make room"):
            train(registry, data, tiny(), progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    [run] = (registry.home / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {loop.CHECKPOINT, loop.METRICS}
    _, metadata = mx.load(str(run / loop.CHECKPOINT), return_metadata=True)
    assert json.loads(metadata["story"])["saved_step"] == 2
    assert train(registry, data, tiny()).metadata["metrics"]["training"]["steps"] == 4


def test_a_result_that_cannot_be_written_is_said_and_the_checkpoint_is_kept(registry, dataset, tiny, monkeypatch):
    data = dataset()

    def fail(*_):
        raise RuntimeError("[write] Unable to write 9 bytes to file.")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="could not be written"):
        patch.setattr(backbone.mlx_lm_utils, "save_model", fail)
        train(registry, data, tiny())
    assert registry.artifacts("full") == [] and not list((registry.root / "full").iterdir())
    seen = []
    train(registry, data, tiny(), progress=seen.append)
    assert seen == []  # all steps were in the checkpoint


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(registry, dataset, tiny, monkeypatch):
    real, calls = Memories.loss, []

    def bad(self, batch):
        calls.append(batch)
        loss, measured = real(self, batch)
        return loss * (math.nan if len(calls) == 10 else 1.0), measured

    monkeypatch.setattr(Memories, "loss", bad)
    with pytest.raises(TrainingError, match=r"memory channel is nan at step 2.*checkpoint of step 2 is kept"):
        train(registry, dataset(), tiny())
    assert registry.artifacts("full") == []


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_quantised_base_is_refused(registry, dataset, tiny):
    lm = tiny()
    nn.quantize(lm.model, group_size=32, bits=4)
    with pytest.raises(ModelError, match=r"is quantised \(.* and \d+ more\).*train dual.*not quantised"):
        train(registry, dataset(), lm)


def test_a_base_with_an_adapter_on_is_refused(registry, dataset, tiny):
    lm = tiny()
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    with pytest.raises(ModelError, match="has an adapter on"):
        train(registry, dataset(), lm)


def test_too_little_memory_is_refused_with_the_figures_before_anything_is_written(registry, dataset, tiny, monkeypatch):
    monkeypatch.setattr(footprint, "there_is", lambda: 100_000)
    lm = tiny()
    with pytest.raises(TrainingError, match=r"needs 0\.0 GB \(weights .*activations.*there is 0\.0 GB.*train dual"):
        train(registry, dataset(), lm)
    assert not (registry.home / "runs").exists() and registry.artifacts("full") == []


def test_too_little_disk_is_refused(registry, dataset, tiny, monkeypatch):
    monkeypatch.setattr(footprint, "free_disk", lambda folder: 100_000)
    with pytest.raises(TrainingError, match=r"GB of disk .*there is 0\.0 GB at .*make room"):
        train(registry, dataset(), tiny())


def test_nothing_to_learn_from_is_said(registry, dataset, tiny):
    with pytest.raises(TrainingError, match="has 1 memories, and none may be learnt"):
        train(registry, dataset([SftPair(id="u", instruction="how?", response="so", safety_score=-0.9)]), tiny())


# --- the estimate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "accumulate"), [(24, 1), (24, 3), (300, 1), (300, 3)])
def test_the_estimate_is_enough_and_not_far_too_much(student, tmp_path, tokens, accumulate):
    student.model.unfreeze()
    logprobs, row = LogProbs(student), Row([5] * (tokens // 2), [7] * (tokens // 2))
    rows = logprobs.collate([row])
    channel = loop.Channel("memory", 1.0, lambda step: rows, lambda batch: (-logprobs(batch).mean(), {}))

    def peak(name):
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory() - footprint.FLOAT * footprint.num_weights(student)
        plan = loop.Plan(steps=2, learning_rate=1e-9, accumulate=accumulate)
        loop.train(student.model, [channel], plan, tmp_path / name)
        return mx.get_peak_memory() - before

    took = max(peak("a"), peak("b"))  # after other files a peak was seen too low; why is not known
    assert took <= footprint.need(student, [row], batch=1).total <= 1.5 * took


def test_weights_and_moments_are_counted_by_hand(tiny):
    lm = tiny()
    size = sum(value.size for _, value in tree_flatten(lm.model.parameters()))
    need = footprint.need(lm, [Row([1] * 6, [2] * 4), Row([1] * 2, [2] * 5)], batch=2)
    assert (need.weights, need.gradients, need.moments) == (4 * size, 8 * size, 8 * size)
    block = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)  # q and o, k and v, the three of the feed-forward part
    vocabulary = lm.model.model.embed_tokens.weight.shape[0]
    by_hand = 4 * 2 * (10 * (1.5 * 2 * block + 2 * 4 * 10 * 2) + vocabulary * 5 * 4)
    assert need.activations == int(by_hand)
    assert need.total == 20 * size + int(by_hand)


def test_what_there_is_is_read_from_the_device_then_from_the_system(monkeypatch):
    assert 1e8 < footprint.there_is() < 1e14
    monkeypatch.setattr(footprint.mx, "device_info", lambda: {"max_recommended_working_set_size": 7})
    assert footprint.there_is() == 7
    monkeypatch.setattr(footprint.mx, "device_info", lambda: {"free_memory": 5})
    assert footprint.there_is() == 5 + mx.get_active_memory() + mx.get_cache_memory()


# --- as a base ------------------------------------------------------------------------------------------------------


def test_it_is_a_base_by_reference_and_by_folder_and_stands_in_the_lineage(registry, dataset, tiny):
    data = dataset()
    made = train(registry, data, tiny())
    by_name = backbone.load(made.ref, home=registry.home)
    by_folder = backbone.load(str(made.folder))
    assert (by_name.folder, by_name.hash, by_name.pointer) == (made.folder, by_folder.hash, by_folder.pointer)
    config = load_config(overrides=["dual.epochs=1", "dual.rank=2"])
    adapter = dual.train(registry, data, config, lm=by_name)
    again = train(registry, data, by_name, "full.seed=1")
    assert adapter.metadata["parents"] == again.metadata["parents"] == [data.ref, made.ref]
    assert registry.verify() == []


def test_the_hash_of_a_base_hangs_on_its_content_and_not_on_when_it_was_made(registry, dataset, tiny):
    made = train(registry, dataset(), tiny())
    before = backbone.model_hash(made.folder)
    path = made.folder / "METADATA.json"
    path.write_text(path.read_text().replace(made.metadata["created_at"], "2001-01-01T00:00:00+00:00"))
    assert backbone.model_hash(made.folder) == before


def test_a_base_of_ones_own_that_is_not_there_or_not_named_whole_is_said(registry, dataset, tiny):
    with pytest.raises(RegistryError, match="there is no full called '0009-3fa2c1d0'"):
        backbone.load("full/0009-3fa2c1d0", home=registry.home)
    made = train(registry, dataset(), tiny())
    with pytest.raises(ModelError, match=f"in full: {made.ref}"):
        backbone.load("full/1", home=registry.home)


# --- the command ----------------------------------------------------------------------------------------------------


def hominem(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_the_command_trains_makes_it_the_base_and_goes_back(registry, dataset, tiny, home):
    registry.use(dataset(), pointer="pairs")
    base = str(tiny().folder)
    (home / "hominem.toml").write_text(f'[student]\nbase = "{base}"\n')
    done = hominem("train", "full", *FAST)
    assert done.exit_code == 0, done.output
    [made] = registry.artifacts("full")
    assert f"student.base={made.ref}" in done.output and "Estimated 0.0 GB" in done.output
    assert hominem("artifacts", "use", made.ref).exit_code == 0
    assert load_config(home).student.base == made.ref
    assert registry.gc(min_age_seconds=0, dry_run=True) == []
    assert hominem("train", "full", *FAST, "full.seed=1").exit_code == 0
    assert registry.artifacts("full")[1].metadata["notes"]["base"] == made.ref
    assert hominem("doctor").exit_code == 0
    assert hominem("artifacts", "rollback", "full").exit_code == 0
    assert load_config(home).student.base == base


def test_the_command_refuses_with_exit_code_2(registry, dataset, tiny, home, monkeypatch):
    registry.use(dataset(), pointer="pairs")
    monkeypatch.setattr(footprint, "there_is", lambda: 0)
    done = hominem("train", "full", f"student.base={tiny().folder}")
    assert done.exit_code == 2 and "of memory, and there is 0.0 GB" in done.output


def test_the_shipped_settings_are_the_ones_agreed_on(home):
    values = load_config(home, Path(__file__).parents[1] / "configs" / "full.toml").full
    assert values == FullConfig()
    agreed = ("learning_rate", "epochs", "batch", "accumulate", "max_tokens", "warmup_steps", "weight_decay")
    assert [getattr(values, name) for name in agreed] == [5e-6, 3, 1, 32, 2048, 100, 0.01]
    assert (values.log_every, values.save_every) == (10, 500)
