"""A compiled gradient is the gradient, and a run that compiles resumes to the bit."""

import shutil
import sys
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hominem_mlx.config import load_config
from hominem_mlx.models.seeding import seeded
from hominem_mlx.policy import full
from hominem_mlx.policy.dual import Material
from hominem_mlx.training import compiled, loop
from hominem_mlx.training.loop import Channel, Plan

needs_compiler = pytest.mark.skipif(
    sys.platform == "linux" and shutil.which("g++") is None, reason="MLX compiles for a Linux CPU with g++"
)


@dataclass(frozen=True)
class Batch:
    x: mx.array
    parts: tuple
    name: str
    count: int = field(compare=False, default=0)


def batch(rows, name="plain", seed=0):
    x = mx.array(np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32))
    return Batch(x, (x, [mx.ones(rows)]), name, seed)


def make_model():
    mx.random.seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1))
    mx.eval(model.parameters())
    return model


def loss_of(model, calls=()):
    def loss(batch):
        if isinstance(calls, list):
            calls.append(batch.x.shape)
        weight = batch.parts[1][0] * (2.0 if batch.name == "double" else 1.0)
        value = (weight * mx.square(model(batch.x)[:, 0])).sum()
        return value, {"rows": weight.sum()}

    return loss


def test_a_batch_comes_together_again_with_each_array_once():
    given, arrays = batch(3), []
    kind = compiled._take_apart(given, arrays, {})
    assert len(arrays) == 2 and arrays[0] is given.x
    again = compiled._put_together(kind, arrays)
    assert again.x is again.parts[0] is given.x and again.parts[1][0] is given.parts[1][0]
    assert (again.name, again.count, type(again.parts[1])) == ("plain", None, list)


def test_kinds_differ_in_shapes_and_in_all_else_but_what_is_not_compared():
    def kind(value):
        return compiled._take_apart(value, [], {})

    assert kind(batch(3, seed=1)) == kind(batch(3, seed=2))
    assert len({kind(batch(3)), kind(batch(2)), kind(batch(3, "double")), kind([batch(3)]), kind((batch(3),))}) == 5
    x = mx.zeros(2)
    assert kind([x, x]) != kind([x, mx.zeros(2)]) and kind(x) != kind(x.astype(mx.int32))


@needs_compiler
def test_a_compiled_gradient_is_the_gradient_and_each_kind_is_written_down_once():
    model, calls = make_model(), []
    plain = nn.value_and_grad(model, loss_of(model))
    run = compiled.compiled(model, nn.value_and_grad(model, loss_of(model, calls)))
    for number, rows in enumerate((3, 2, 3, 3, 2)):
        given = batch(rows, seed=number)
        with seeded(number):  # of dropout
            (loss, measured), gradient = run(given)
        with seeded(number):
            (wanted_loss, _), wanted = plain(given)
        assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-6) and measured["rows"].item() == rows
        for (name, one), (_, other) in zip(tree_flatten(gradient), tree_flatten(wanted), strict=True):
            assert np.allclose(one, other, rtol=1e-5, atol=1e-6), name
        model.update({"layers": [{"bias": model.layers[0].bias + 1}]})  # parameters are read, not written down
    assert calls == [(3, 4), (2, 4)]


@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setattr(loop, "compiles", lambda: True)


def trained(folder, *, compile, progress=None):
    model = make_model()
    channel = Channel("memory", 1.0, lambda step: batch(2 + step % 2, seed=step), loss_of(model))
    plan = Plan(steps=6, learning_rate=1e-2, warmup_steps=1, save_every=2, compile=compile)
    loop.train(model, [channel], plan, folder, progress=progress)
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


@needs_compiler
def test_a_run_that_compiles_ends_where_one_that_does_not_and_resumes_to_the_bit(tmp_path, compiling):
    straight = trained(tmp_path / "straight", compile=True)
    for name, value in trained(tmp_path / "plain", compile=False).items():
        assert np.allclose(value, straight[name], rtol=1e-5, atol=1e-6), name

    class Killed(Exception):
        pass

    def die(event):
        if event["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path / "killed", compile=True, progress=die)
    resumed = trained(tmp_path / "killed", compile=True)
    assert all(np.array_equal(straight[name], resumed[name]) for name in straight)


def test_the_option_reaches_the_loop_and_is_off_by_default(tiny):
    for value in (False, True):
        settings = load_config(overrides=[f"dual.compile={value}".lower(), f"full.compile={value}".lower()])
        material = Material(tiny(), settings.dual, None, None)
        material.num_memories, material.num_pairs, material.num_thumbs = 1, 0, 0
        material.counts["weights"] = {"memory": 1.0, "preference": 0.0}
        assert material.plan().compile is full._plan(settings.full, 1).compile is value
    assert load_config().dual.compile is load_config().full.compile is False
