"""Rows, log-probabilities, and the loop: exact, resumable, and still when there is nothing to learn."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hominem_mlx.errors import TrainingError
from hominem_mlx.models import lora, platform
from hominem_mlx.training import kept, loop
from hominem_mlx.training import logprobs as training_logprobs
from hominem_mlx.training import rows as training_rows
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.rows import Row, collate, fit

SHAPE = lora.Shape(rank=2, scale=2.0)


def rows_of(lm):
    return [
        Row(lm.prompt_tokens("What is my sister called?"), lm.response_tokens("Nora.")),
        Row(lm.prompt_tokens("Is it flat?"), lm.response_tokens("No, it is round, as ships found.")),
        Row(lm.prompt_tokens("I feel tired."), lm.response_tokens("😀 rest")),
    ]


def naive_logprob(lm, row):
    """One unpadded sequence, all logits, float64."""
    tokens = row.prompt + row.response
    logits = np.array(lm.model(mx.array([tokens]))[0], np.float64)
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return sum(logp[i - 1, tokens[i]] for i in range(len(row.prompt), len(tokens)))


def test_padded_log_probabilities_equal_the_naive_formula(tiny):
    lm = tiny()
    rows = rows_of(lm)
    wanted = [naive_logprob(lm, row) for row in rows]
    assert LogProbs(lm)(collate(rows)).tolist() == pytest.approx(wanted, rel=1e-5)
    assert reference_logprobs(LogProbs(lm), rows, batch=2) == pytest.approx(wanted, rel=1e-5)


def test_lanes_share_rows_of_equal_length_evenly_and_each_computes_its_own_block(tiny, monkeypatch):
    lm, seen = tiny(), []
    body, head = lm.body_and_head()
    logprobs = LogProbs(lm)
    logprobs._split = (lambda tokens: (seen.append(mx.default_stream(mx.cpu)), body(tokens))[1], head)
    lanes = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(4))
    for module in (training_rows, training_logprobs):
        monkeypatch.setattr(module, "lanes", lambda: lanes)
    batch = collate([Row([1, 2, 3], [4, 5])] * 8)
    assert [len(block.tokens) for block in batch.blocks] == [2, 2, 2, 2]
    mx.eval(logprobs(batch))
    assert len({str(stream) for stream in seen}) == 4


def test_there_is_one_lane_on_a_mac(monkeypatch):
    assert len(platform.lanes()) == min(8, len(os.sched_getaffinity(0)))
    monkeypatch.setattr(platform.sys, "platform", "darwin")
    assert len(platform.lanes()) == 1


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_batch_keeps_every_lane_busy_and_says_the_same(tiny, monkeypatch, number):
    streams = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(number))
    for module in (training_rows, training_logprobs):
        monkeypatch.setattr(module, "lanes", lambda: streams)
    lm = tiny()
    rows = [*rows_of(lm), *rows_of(lm)[::-1]]
    batch = collate(rows)
    assert {block.lane for block in batch.blocks} == set(range(number))
    assert sum(len(block.tokens) for block in batch.blocks) == 6
    assert LogProbs(lm)(batch).tolist() == pytest.approx([naive_logprob(lm, row) for row in rows], rel=1e-5)


def test_a_model_whose_head_cannot_be_split_takes_the_whole_path(tiny):
    lm = tiny()
    logprobs = LogProbs(lm)
    split = logprobs(collate(rows_of(lm)))
    logprobs._split = None
    assert np.allclose(np.array(logprobs(collate(rows_of(lm)))), np.array(split), rtol=1e-5)


def test_the_gradient_of_a_reply_equals_finite_differences(tiny):
    lm = tiny()
    lora.attach(lm, SHAPE, seed=0)
    values = lora.adapter_parameters(lm.model)
    lora.set_parameters(lm.model, {name: 0.1 * mx.ones(value.shape) for name, value in values.items()})
    rows, logprobs = collate(rows_of(lm)), LogProbs(lm)
    import mlx.nn as nn

    _, gradient = nn.value_and_grad(lm.model, lambda: logprobs(rows).sum())()
    flat = dict(tree_flatten(gradient))
    name = next(name for name in flat if name.endswith("layers.1.mlp.down_proj.lora_b"))
    start = lora.adapter_parameters(lm.model)[name]
    direction = mx.array(np.random.default_rng(0).standard_normal(start.shape).astype(np.float32))
    sums = []
    for sign in (1, -1):
        lora.set_parameters(lm.model, {name: start + sign * 1e-2 * direction})
        sums.append(logprobs(rows).sum().item())
    assert (flat[name] * direction).sum().item() == pytest.approx((sums[0] - sums[1]) / 2e-2, rel=2e-2)


def test_fit_cuts_the_prompt_first_and_says_when_a_reply_is_cut():
    row = Row(list(range(10)), list(range(100, 105)))
    assert fit(row, 15) == (row, 0)
    assert fit(row, 8) == (Row([7, 8, 9], row.response), 0)
    assert fit(row, 4) == (Row([9], [100, 101, 102]), 2)


@pytest.mark.parametrize("share", [False, True])
def test_a_batch_counts_every_token_of_its_rows_and_no_padding(tiny, share):
    rows = rows_of(tiny())
    rows += [Row(row.prompt, [1, 2]) for row in rows]
    assert collate(rows, share=share).num_tokens == sum(len(row.prompt) + len(row.response) for row in rows)


def make_channel(lm, weight=1.0, none_at=()):
    rows, logprobs = rows_of(lm), LogProbs(lm)

    def batch_at(step):
        return None if step in none_at else collate([rows[step % 3]])

    return loop.Channel(
        "memory", weight, batch_at, lambda batch: (-logprobs(batch).sum(), {}), tokens=lambda batch: batch.num_tokens
    )


def run(lm, folder, steps=6, **options):
    lora.attach(lm, SHAPE, seed=0)
    plan = loop.Plan(steps=steps, learning_rate=1e-2, warmup_steps=2, eval_every=2, save_every=2)
    summary = loop.train(lm.model, [make_channel(lm, **options.pop("channel", {}))], plan, folder, **options)
    return summary, {name: np.array(value) for name, value in lora.adapter_parameters(lm.model).items()}


def test_training_lowers_the_loss_and_leaves_the_base_alone(tiny, tmp_path):
    lm = tiny()
    digest, rows = lm.fingerprint(), collate(rows_of(lm))
    before = -LogProbs(lm)(rows).sum().item()
    run(lm, tmp_path, steps=12)
    assert -LogProbs(lm)(rows).sum().item() < before - 1
    assert lm.fingerprint() == digest


class Killed(Exception):
    pass


@pytest.mark.parametrize("dies_at", [1, 2, 3, 5])
def test_a_resumed_run_ends_bit_for_bit_where_the_straight_run_does(tiny, tmp_path, dies_at):
    _, straight = run(tiny(), tmp_path / "straight")

    def die(event):
        if event["step"] == dies_at:
            raise Killed

    with pytest.raises(Killed):
        run(tiny(), tmp_path / "killed", progress=die)
    _, resumed = run(tiny(), tmp_path / "killed")
    assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def test_steps_without_a_lesson_change_neither_weights_nor_optimiser(tiny, tmp_path):
    summary, values = run(tiny(), tmp_path / "a", steps=4, channel={"none_at": (2, 3)})
    assert summary["skipped_steps"] == 2
    saved = mx.load(str(tmp_path / "a" / loop.CHECKPOINT))
    assert saved["optimizer.step"].item() == 2
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    two, stopped_early = run(tiny(), tmp_path / "c", steps=2, channel={"none_at": (2, 3)})
    assert two["skipped_steps"] == 0 and values.keys() == stopped_early.keys()


def test_the_same_seed_gives_the_same_bytes(tiny, tmp_path):
    _, first = run(tiny(), tmp_path / "a")
    _, second = run(tiny(), tmp_path / "b")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_stops_and_names_channel_step_and_checkpoint(tiny, tmp_path):
    lm = tiny()
    lora.attach(lm, SHAPE, seed=0)
    good = make_channel(lm)
    bad = loop.Channel("memory", 1.0, good.batch_at, lambda batch: (good.loss(batch)[0] * float("nan"), {}))
    with pytest.raises(TrainingError, match=r"memory channel is nan at step 0"):
        loop.train(lm.model, [bad], loop.Plan(steps=3, learning_rate=1e-2), tmp_path)


def test_an_early_stop_gives_its_reason_and_ends_the_run(tiny, tmp_path):
    seen = []

    def should_stop(looks):
        seen.append([look["x"] for look in looks])
        return "x" * (looks[-1]["x"] >= 4)

    summary, _ = run(tiny(), tmp_path, evaluate=lambda step: {"x": step}, should_stop=should_stop)
    assert summary["steps"] == 4 and summary["stopped"] == "x"
    assert seen == [[2], [2, 4]]
    lines = [json.loads(line) for line in (tmp_path / loop.METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


class Watch:
    """A clock that goes on by two seconds each time it is read."""

    seconds = 0.0

    def perf_counter(self):
        self.seconds += 2
        return self.seconds


def test_progress_tells_tokens_a_second_time_left_and_peak_memory(tiny, tmp_path, monkeypatch):
    lm, events = tiny(), []
    tokens = [row.num_tokens for row in rows_of(lm)]

    def note(event):
        events.append(event)
        assert event["peak_gb"] == mx.get_peak_memory() / 1e9 > 0
        if len(events) == 4:
            raise Killed

    monkeypatch.setattr(loop, "time", Watch())
    with pytest.raises(Killed):
        run(lm, tmp_path, progress=note, channel={"none_at": (2,)})
    speeds = [tokens[0] / 2, sum(tokens[:2]) / 4, sum(tokens[:2]) / 6, (2 * tokens[0] + tokens[1]) / 8]
    assert [event["tokens_per_second"] for event in events] == pytest.approx(speeds)
    assert [event["seconds_left"] for event in events] == pytest.approx([10, 8, 6, 4])
    events.clear()
    run(tiny(), tmp_path, progress=note)  # goes on after step 4; what was before does not count
    assert [event["step"] for event in events] == [5, 6]
    assert [event["tokens_per_second"] for event in events] == pytest.approx([tokens[1] / 2, sum(tokens[1:]) / 4])
    assert [event["seconds_left"] for event in events] == pytest.approx([2, 0])


# --- what is set aside ----------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_what_was_kept_last_comes_back_to_the_bit(tiny, run_folder):
    lm = tiny()
    lora.attach(lm, SHAPE, seed=0)
    assert kept.take_back(lm.model, run_folder) is None
    for step in (3, 5):
        kept.keep(lm.model, run_folder, step)
        wanted = {name: np.array(value) for name, value in lora.adapter_parameters(lm.model).items()}
        lora.set_parameters(lm.model, {name: mx.array(value) + 1 for name, value in wanted.items()})
    assert kept.take_back(lm.model, run_folder) == 5
    found = lora.adapter_parameters(lm.model)
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())
    assert [path.name for path in run_folder.iterdir()] == [kept.KEPT]


def test_what_cannot_be_kept_is_said_and_leaves_what_was(tiny, run_folder, monkeypatch):
    lm = tiny()
    lora.attach(lm, SHAPE, seed=0)
    kept.keep(lm.model, run_folder, 3)

    def full(path, arrays, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("[write] Unable to write 9 bytes to file.")

    monkeypatch.setattr(kept.mx, "save_safetensors", full)
    with pytest.raises(TrainingError, match=r"the adapter of step 4 could not be kept .*Make room"):
        kept.keep(lm.model, run_folder, 4)
    assert kept.take_back(lm.model, run_folder) == 3
    assert [path.name for path in run_folder.iterdir()] == [kept.KEPT]
