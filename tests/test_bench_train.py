"""The benchmark's own code runs, on the small shape and without neighbours, and writes well-formed figures."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hominem_mlx.config import DualConfig
from hominem_mlx.evaluation.goals import goals, holds
from hominem_mlx.policy.pairs import PairBatch, Pairs
from hominem_mlx.training import logprobs
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Parts

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_equality
import bench_figures
import bench_models
import bench_ours
import bench_profile
import bench_runs
import bench_train
import bench_worker
from bench_models import Case

SMALL = Case("T", 24, 8, 3)
TINY = bench_models.SHAPES["T"]
ONE_COPY = 4 * (TINY.weights + 3 * TINY.adapter)  # base, adapter and what Adam keeps of it
NEIGHBOURS = ("mlx-lm", "mlx-lm-lora", "mlx-tune", "mlx-tune-cache", "trl")


class Here:
    """A worker in this process, since starting one takes seconds; neighbours are not installed."""

    def __init__(self, path, case):
        self.path, self.step_once = path, None
        if path not in NEIGHBOURS:
            self.step_once = bench_worker.build({"path": path, **vars(case)})

    def answer(self):
        if self.step_once is None:
            raise bench_runs.CannotRun(f"{self.path}: is not installed")

    def step(self, steps=1):
        given = [self.step_once() for _ in range(steps)]
        return {"seconds": 0.5, "cpu_seconds": 0.5, "given": given[0], "peak": 4, "resident": ONE_COPY}

    def stop(self):
        pass


@pytest.fixture
def small(monkeypatch):
    """Every case is a small one, in this process."""
    monkeypatch.setattr(bench_runs, "Worker", Here)
    monkeypatch.setattr(bench_worker, "take_openblas", lambda: None)
    monkeypatch.setattr(bench_ours, "use_blas_threads", lambda count: None)
    monkeypatch.setattr(logprobs, "logsumexp", logprobs.logsumexp)  # the plain paths put MLX's own there
    monkeypatch.setattr(bench_profile, "ROUNDS", 1)
    monkeypatch.setattr(bench_equality, "BASES", {"float32": None, "4 bits": 4})
    for name in ("B", "B_LONG", "A", "A_LONG", "T", "T_LONG", "EQUALITY", "PROFILE"):
        monkeypatch.setattr(bench_figures, name, SMALL)
    monkeypatch.setattr(bench_figures, "CANDIDATES", dict.fromkeys(bench_figures.CANDIDATES, SMALL))


def test_every_figure_is_written_and_those_that_need_neighbours_say_why_they_are_missing(small, tmp_path):
    path = tmp_path / "out.json"
    bench_train.measure(["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8"], 1, path)
    report = json.loads(path.read_text())
    figures = report["figures"]
    assert set(figures) == {name for name in goals() if name.startswith("B")}
    for name, entry in figures.items():
        assert set(entry) == {"value", "goal", "holds", "n", "spread", "how"} and entry["how"]
        assert entry["holds"] == holds(entry["value"], entry["goal"]), name
    assert figures["B2"]["value"] is None and "mlx-lm-lora: is not installed" in figures["B2"]["how"]
    assert "mlx-tune" in figures["B3_plain_cache"]["how"] and "no GPU" in figures["B8_gpu"]["how"]
    assert figures["B1"]["holds"] and figures["B1_ln2"]["holds"] and figures["B5"]["value"] == 1.0
    assert figures["B7"]["value"] == 1.0  # both took half a second
    assert figures["B8"]["value"] > 0
    rows = {row["path"]: row for row in report["measurements"]}
    ours = {"ours", "ours-plain", "ours-flat", "ours-checkpointed", "ours-sft", "ours-sft-plain"}
    assert {*ours, "together", "one-by-one"} == set(rows)
    assert "trl: is not installed" in report["did_not_run"]
    losses = {path: row["loss_difference"] for path, row in rows.items() if "loss_difference" in row}
    assert set(losses) == ours and max(map(abs, losses.values())) < 1e-5
    assert bench_train.markdown(report).count("\n| ") >= len(figures) + len(rows)


def test_a_worker_steps_in_its_own_process_and_a_missing_neighbour_is_named():
    losses = bench_runs.once("naive", SMALL)
    assert losses["dpo"] > 0 and losses["sft"] > 0
    with pytest.raises(bench_runs.CannotRun, match="mlx-tune is not installed"):
        bench_runs.once("mlx-tune", SMALL)


def test_trl_has_an_environment_of_its_own_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_runs, "HERE", tmp_path / "benchmarks")
    assert bench_runs.interpreter("trl") == sys.executable
    python = tmp_path / ".venv-bench-trl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert bench_runs.interpreter("trl") == str(python)
    assert bench_runs.interpreter("mlx-tune") == sys.executable


def test_a_missing_trl_is_the_reason(monkeypatch):
    monkeypatch.setattr(bench_worker, "installed", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match="trl is not installed"):
        bench_worker.build({"path": "trl", **vars(SMALL)})


@pytest.mark.skipif(
    not (bench_worker.installed("trl") or (bench_train.TRL_VENV / "bin" / "python").exists()),
    reason="trl is not installed",
)
def test_the_loss_of_trl_is_that_of_the_formula():
    assert bench_runs.once("trl", SMALL) == pytest.approx(bench_runs.once("naive", SMALL)["dpo"], abs=1e-5)


def test_installed_tells_the_version_of_what_is_there(tmp_path):
    assert bench_worker.installed("mlx") and bench_worker.installed("mlx", [str(tmp_path)]) is None
    (tmp_path / "some_thing-1.2.dist-info").mkdir()
    (tmp_path / "some_thing-1.2.dist-info" / "METADATA").write_text("Name: some-thing\nVersion: 1.2\n")
    assert bench_worker.installed("some-thing", [str(tmp_path)]) == "1.2"


def test_the_measured_step_is_that_of_the_recipe(small):
    """Same loss as the recipe's preference channel with every weight 1, on the same rows."""
    step = bench_ours.Blended(TINY, bench_models.make_pairs(TINY.vocab, 24, 8, 3))
    settings = DualConfig(beta=bench_models.BETA, nll_weight=1.0)
    recipe = Pairs(LogProbs(step.lm), settings, [], np.zeros(0), [], np.zeros((2, 0), int), Parts())
    ones = mx.ones(3)
    rows = recipe.logprobs.collate(step.rows)
    learnt = mx.zeros(3, mx.bool_)
    batch = PairBatch(rows, step.reference, mx.arange(3), mx.arange(3) + 3, ones, ones, ones, learnt, 3)
    assert recipe.loss(batch)[0].item() == pytest.approx(step.loss(batch.rows).item(), rel=1e-6)


def test_naive_losses_by_hand():
    """One pair: the chosen reply gains 2 nats on the reference and the rejected one loses 1, over 4 tokens."""
    pair = bench_models.Pair([5, 6], [1, 7, 7, 7], [2, 7])
    found = bench_models.naive_losses(np.array([[-8.0, -6.0]]), np.array([[-10.0, -5.0]]), [pair])
    assert found["dpo"] == pytest.approx(np.log(1 + np.exp(-0.3)), rel=1e-12)
    assert found["sft"] == found["sft_tokens"] == pytest.approx(2.0)
    assert bench_models.log_softmax(np.array([0.0, np.log(3.0)])) == pytest.approx(np.log([0.25, 0.75]))


def test_naive_gradients_are_the_slope_of_the_naive_loss():
    pairs = bench_models.make_pairs(TINY.vocab, 6, 4, 2)
    model = bench_models.make_model(TINY)
    bench_ours.as_mlx_lm_has_it()
    reference = bench_models.naive_logprobs(model, pairs)
    model = bench_models.add_adapter(model)
    _, gradients = bench_models.naive_gradients(model, reference, pairs)
    layer, step = model.layers[1].mlp.down_proj, 1e-2
    direction = gradients["model.layers.1.mlp.down_proj.lora_b"]
    start, losses = layer.lora_b, []
    for sign in (1, -1):
        layer.lora_b = start + sign * step * direction / mx.linalg.norm(direction)
        found = bench_models.naive_losses(bench_models.naive_logprobs(model, pairs), reference, pairs)
        losses.append(found["dpo"] + found["sft"])
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(mx.linalg.norm(direction).item(), rel=2e-2)


def test_shapes_count_their_weights():
    model = bench_models.make_model(TINY)
    assert sum(value.size for _, value in tree_flatten(model.parameters())) == TINY.weights
    adapter = bench_models.add_adapter(model).trainable_parameters()
    assert sum(value.size for _, value in tree_flatten(adapter)) == TINY.adapter
