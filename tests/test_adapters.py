"""Adapters of every kind: on quantised bases, one on top of another, and added up in weight space."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

from hominem_mlx.cli import cli
from hominem_mlx.config import load_config
from hominem_mlx.errors import ConfigError, InputError, ModelError
from hominem_mlx.files import read_json, write_json
from hominem_mlx.models import backbone, lora
from hominem_mlx.models.merge import merge, truncate
from hominem_mlx.policy import dual
from hominem_mlx.policy.material import Material
from hominem_mlx.records import Preference, SftPair
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Row, collate

SLOW, FAST = lora.Shape(rank=4, scale=2.0), lora.Shape(rank=2, scale=0.5)
DORA = lora.Shape(rank=4, scale=2.0, kind="dora")
QUICK = ["dual.epochs=1", "dual.learning_rate=0.01", "dual.rank=2", "dual.batch_pairs=2", "dual.batch_memories=2"]
MEMORIES = [SftPair(id=f"m{i}", instruction=f"what is {i}?", response=f"thing {i}") for i in range(3)]
PAIRS = [
    Preference(id=f"p{i}", prompt=f"{i}?", chosen=f"kind {i}.", rejected=f"rude {i}!", target=0.9) for i in range(3)
]


def logits(lm, model=None):
    return np.array((model or lm.model)(mx.array([lm.prompt_tokens("Tell me what to do.")])))


def shake(lm, seed, size=0.1):
    """Give the topmost adapter values that matter."""
    rng = np.random.default_rng(seed)
    values = lora.adapter_parameters(lm.model)
    kick = {name: mx.array(size * rng.standard_normal(value.shape, np.float32)) for name, value in values.items()}
    # lengths stay near those of the base's rows
    lora.set_parameters(lm.model, {n: values[n] * (1 + kick[n]) if n.endswith(".m") else kick[n] for n in values})


def put_on(lm, shape, seed, *, head=False, on_top=False):
    lora.attach(lm, shape, seed=seed, keys=lora.targets(lm, linear=True, head=head), on_top=on_top)
    shake(lm, seed)


def saved(lm, folder, shape):
    folder.mkdir()
    lora.save_adapter(lm, folder, shape)
    return folder


@pytest.fixture
def two(tiny, tmp_path):
    """Folders of a slow adapter and of a fast one on top of it, and the logits of base, slow, slow and fast."""
    lm = tiny()
    seen = [logits(lm)]
    put_on(lm, SLOW, 1, head=True)
    slow = saved(lm, tmp_path / "0001-51051051", SLOW)
    lora.detach(lm)
    lora.load_adapter(lm, slow)
    seen.append(logits(lm))
    put_on(lm, FAST, 2, head=True, on_top=True)
    seen.append(logits(lm))
    return slow, saved(lm, tmp_path / "0002-fa57fa57", FAST), seen


@pytest.fixture
def quantised(tiny_folder, tmp_path):
    """The random model with its matrices packed, freshly loaded: `quantised(bits)`."""

    def make(bits):
        folder = tmp_path / f"q{bits}"
        if not folder.exists():
            shutil.copytree(tiny_folder, folder)
            model, config = quantize_model(mlx_lm.load(str(folder))[0], read_json(folder / "config.json"), 32, bits)
            save_model(folder, model)
            save_config(config, folder / "config.json")
        return backbone.load(str(folder))

    return make


@pytest.fixture
def pairs(registry, publish_pairs):
    """A published dataset of pairs and memories, in use."""
    published = publish_pairs(PAIRS, PAIRS[:1], MEMORIES)
    registry.use(published, pointer="pairs")
    return published


def dense(folder):
    """What a saved adapter adds to each layer, `[in, out]` float64."""
    values = {name: np.array(value, np.float64) for name, value in mx.load(str(folder / lora.WEIGHTS)).items()}
    scale = read_json(folder / lora.CONFIG)["lora_parameters"]["scale"]
    layers = {name.rpartition(".")[0] for name in values}
    return {layer: scale * values[f"{layer}.lora_a"] @ values[f"{layer}.lora_b"] for layer in layers}


# --- over a quantised base --------------------------------------------------------------------------------------------


def float64_reference(lm, shape, keys, values, rows):
    """Loss and gradients by the naive formula, row by row and all logits, in float64 on the dequantised weights."""
    with mx.stream(mx.cpu):
        lm.model = dequantize_model(lm.model)
        lm.model.set_dtype(mx.float64)
        lora.attach(lm, shape, seed=0, keys=keys)
        lora.set_parameters(lm.model, {name: value.astype(mx.float64) for name, value in values.items()})

        def loss():
            total = mx.array(0.0, mx.float64)
            for row in rows:
                logits = lm.model(mx.array([row.prompt + row.response]))[0, len(row.prompt) - 1 : -1]
                logp = logits - mx.log(mx.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()
                total -= mx.take_along_axis(logp, mx.array(row.response)[:, None], axis=-1).sum()
            return total

        value, gradient = nn.value_and_grad(lm.model, loss)()
        assert value.dtype == mx.float64
        mx.eval(value, gradient)
        return float(value.item()), {name: np.array(part) for name, part in tree_flatten(gradient)}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base_loss_and_gradients_are_those_on_its_dequantised_weights(quantised, bits, kind):
    shape, lm = lora.Shape(rank=4, scale=2.0, kind=kind), quantised(bits)
    keys = lora.targets(lm, linear=True, head=kind == "lora")  # mlx-lm has no DoRA for a packed embedding
    lora.attach(lm, shape, seed=1, keys=keys)
    shake(lm, 3)
    values = lora.adapter_parameters(lm.model)
    texts = [("Is it flat?", "No, it is round."), ("Is it flat?", "Yes."), ("I feel tired.", "That sounds heavy")]
    rows = [Row(lm.prompt_tokens(prompt), lm.response_tokens(reply)) for prompt, reply in texts]
    wanted_loss, wanted = float64_reference(quantised(bits), shape, keys, values, rows)
    logprobs = LogProbs(lm)
    for batch in (collate(rows), logprobs.collate(rows)):
        loss, gradient = nn.value_and_grad(lm.model, lambda batch=batch: -logprobs(batch).sum())()
        assert loss.item() == pytest.approx(wanted_loss, rel=1e-5)
        found = dict(tree_flatten(gradient))
        assert found.keys() == wanted.keys() == values.keys()
        for name, value in found.items():
            assert np.abs(np.array(value) - wanted[name]).max() <= 1e-5 * np.abs(wanted[name]).max(), name


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base_an_adapter_learns_loads_in_mlx_lm_and_leaves_every_bit(registry, pairs, quantised, bits):
    lm = quantised(bits)
    before, digest = logits(lm), lm.fingerprint()
    packed = [name for name, value in tree_flatten(lm.model.parameters()) if value.dtype == mx.uint32]
    assert len(packed) == 2 * 7 + 1
    rows = [Row(lm.prompt_tokens(each.instruction), lm.response_tokens(each.response)) for each in MEMORIES]
    said = collate(rows)
    unlearnt = LogProbs(lm)(said).tolist()
    config = load_config(overrides=[*QUICK, "dual.learning_rate=0.05", "dual.memory_targets=all"])
    artifact = dual.train(registry, pairs, config, lm=lm)
    assert lm.fingerprint() == digest and np.array_equal(logits(lm), before)
    lora.load_adapter(lm, artifact.folder)
    learnt = logits(lm)
    after = LogProbs(lm)(said).tolist()
    assert all(now > then + 0.1 for now, then in zip(after, unlearnt, strict=True))
    theirs, _ = mlx_lm.load(str(lm.folder), adapter_path=str(artifact.folder))
    assert np.allclose(logits(lm, theirs), learnt, atol=1e-5)
    lora.detach(lm)
    assert lm.fingerprint() == digest and np.array_equal(logits(lm), before)


# --- DoRA -------------------------------------------------------------------------------------------------------------


def test_dora_is_the_row_lengths_times_the_directions_of_the_sum(tiny):
    lm = tiny()
    before = logits(lm)
    lora.attach(lm, DORA, seed=1, keys=["self_attn.q_proj"])
    assert np.allclose(logits(lm), before, atol=1e-6)
    shake(lm, 2)
    layer = lm.model.layers[0].self_attn.q_proj
    weight, a, b, m = (np.array(x, np.float64) for x in (layer.linear.weight, layer.lora_a, layer.lora_b, layer.m))
    adapted = weight + 2.0 * (a @ b).T
    rows = m[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
    x = np.random.default_rng(0).standard_normal((5, weight.shape[1]))
    wanted = x @ rows.T
    assert np.abs(np.array(layer(mx.array(x, mx.float32))) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_dora_adapter_is_learnt_and_loads_here_and_in_mlx_lm_with_the_same_logits(registry, pairs, tiny):
    lm = tiny()
    before, digest = logits(lm), lm.fingerprint()
    config = load_config(overrides=[*QUICK, "dual.kind=dora", "dual.memory_targets=all"])
    artifact = dual.train(registry, pairs, config, lm=lm)
    assert lm.fingerprint() == digest
    assert read_json(artifact.file(lora.CONFIG))["fine_tune_type"] == "dora"
    ours = backbone.load(str(lm.folder), adapter=artifact.folder)
    lengths = [name for name in lora.adapter_parameters(ours.model) if name.endswith(".m")]
    base = dict(tree_flatten(lm.model.parameters()))
    for name in lengths:
        start = mx.linalg.norm(base[name.removesuffix("m") + "weight"], axis=1)
        assert not np.array_equal(lora.adapter_parameters(ours.model)[name], start), name
    assert len(lengths) == 15 and np.abs(logits(ours) - before).max() > 0.01
    theirs, _ = mlx_lm.load(str(lm.folder), adapter_path=str(artifact.folder))
    assert np.array_equal(logits(lm, theirs), logits(ours))
    lora.detach(ours)
    assert np.array_equal(logits(ours), before)


def test_a_lora_adapter_goes_on_top_of_a_dora_one_but_not_the_other_way_round(tiny, tmp_path):
    lm = tiny()
    put_on(lm, DORA, 1, head=True)
    lora.load_adapter(fresh := tiny(), saved(lm, tmp_path / "dora", DORA))
    under = logits(fresh)
    put_on(fresh, FAST, 2, head=True, on_top=True)
    assert np.abs(logits(fresh) - under).max() > 0.1
    both = logits(fresh)
    with pytest.raises(ModelError, match="cannot go on top"):
        lora.attach(fresh, DORA, seed=3, on_top=True)
    assert np.array_equal(logits(fresh), both)
    lora.detach(fresh, keep=1)
    assert np.array_equal(logits(fresh), under)


def test_a_base_with_a_row_of_zeros_gets_no_dora_adapter(student):
    before = student.fingerprint()
    with pytest.raises(ModelError, match=r"has a row of nothing but zeros.*use dual.kind = lora"):
        lora.attach(student, DORA, seed=0)
    assert not student.adapters and student.fingerprint() == before
    lora.attach(student, lora.Shape(rank=4), seed=0)


def test_what_dora_cannot_do_is_said_and_changes_nothing(quantised):
    lm = quantised(4)
    before = logits(lm)
    with pytest.raises(ModelError, match="no DoRA for a quantised embedding"):
        lora.attach(lm, DORA, seed=0, keys=lora.targets(lm, linear=True, head=True))
    lm.model.layers[1].mlp.up_proj.to_lora = lambda **settings: 1 / 0  # a layer with a way of its own, for LoRA alone
    lm.model.layers[1].mlp.up_proj.__class__ = type("Odd", (nn.Module,), {})
    with pytest.raises(ModelError, match="cannot put a dora adapter"):
        lora.attach(lm, DORA, seed=0, keys=["self_attn.q_proj", "mlp.up_proj"])
    lm.model.layers[1].mlp.up_proj.__class__ = nn.QuantizedLinear
    assert np.array_equal(logits(lm), before) and not lora.adapter_parameters(lm.model)
    with pytest.raises(ConfigError, match="head_rank needs kind = lora"):
        load_config(overrides=["dual.kind=dora", "dual.head_rank=1"])


# --- one on top of another --------------------------------------------------------------------------------------------


def test_two_adapters_are_base_plus_slow_plus_fast(tiny, two):
    slow, fast, (base, with_slow, with_both) = two
    lm = tiny()
    weights = dict(tree_flatten(lm.model.parameters()))
    for folder, wanted in ((slow, with_slow), (fast, with_both)):
        for layer, delta in dense(folder).items():
            turned = delta if lora.is_head(layer) else delta.T  # the embedding is stored the other way round
            weights[f"{layer}.weight"] = mx.array(np.array(weights[f"{layer}.weight"], np.float64) + turned, mx.float32)
        lm.model.load_weights(list(weights.items()))
        assert np.abs(logits(lm) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(with_slow - base).max() > 0.1 and np.abs(with_both - with_slow).max() > 0.1


def test_taking_the_fast_one_off_and_putting_it_on_again_restores_every_bit(tiny, two):
    slow, fast, (base, with_slow, with_both) = two
    lm = tiny()
    digest = lm.fingerprint()
    lora.load_adapter(lm, fast)  # brings the slow one along
    assert lm.adapters == [str(slow), str(fast)] and np.array_equal(logits(lm), with_both)
    with lora.without_adapter(lm, keep=1):
        assert np.array_equal(logits(lm), with_slow)
    with lora.without_adapter(lm):
        assert np.array_equal(logits(lm), base)
    assert np.array_equal(logits(lm), with_both) and lm.fingerprint() == digest
    lora.detach(lm, keep=1)
    assert lm.adapter == str(slow) and np.array_equal(logits(lm), with_slow)
    lora.load_adapter(lm, fast)
    assert np.array_equal(logits(lm), with_both)
    lora.detach(lm)
    assert lm.adapters == [] and np.array_equal(logits(lm), base)


def test_only_the_topmost_adapter_learns_and_is_saved(tiny, two):
    slow, fast, _ = two
    lm = tiny()
    lora.load_adapter(lm, slow)
    alone = dict(tree_flatten(lm.model.trainable_parameters()))
    lora.load_adapter(lm, fast)
    both = dict(tree_flatten(lm.model.trainable_parameters()))
    assert alone.keys() == both.keys() == dict(mx.load(str(fast / lora.WEIGHTS))).keys()
    assert {value.shape[1] for name, value in both.items() if name.endswith("lora_a")} == {2}
    lora.detach(lm, keep=1)
    back = dict(tree_flatten(lm.model.trainable_parameters()))
    assert all(np.array_equal(back[name], value) for name, value in alone.items())


def test_a_fast_adapter_may_reach_fewer_layers_than_the_slow_one_or_others(tiny, tmp_path):
    lm = tiny()
    before = logits(lm)
    lora.attach(lm, lora.Shape(rank=2, scale=2.0, num_layers=1), seed=1, keys=["self_attn.q_proj", "mlp.up_proj"])
    shake(lm, 1)
    slow = saved(lm, tmp_path / "slow", lora.Shape(rank=2, scale=2.0, num_layers=1))
    lora.load_adapter(lm := tiny(), slow)
    under = logits(lm)
    lora.attach(lm, FAST, seed=2, keys=["self_attn.q_proj", "mlp.gate_proj"], on_top=True)
    assert np.array_equal(logits(lm), under)
    shake(lm, 2)
    both = logits(lm)
    fast = saved(lm, tmp_path / "fast", FAST)
    lora.load_adapter(again := tiny(), fast)
    assert np.array_equal(logits(again), both)
    lora.detach(lm, keep=1)
    assert np.array_equal(logits(lm), under)
    (tmp_path / "sum").mkdir()
    assert merge([slow, fast], tmp_path / "sum", rank=4)["energy_lost"] < 1e-12
    assert "model.layers.0.self_attn.q_proj" in read_json(tmp_path / "sum" / lora.CONFIG)["lora_parameters"]["keys"]
    lora.detach(lm)
    assert np.array_equal(logits(lm), before)
    lora.load_adapter(lm, tmp_path / "sum")
    theirs, _ = mlx_lm.load(str(lm.folder), adapter_path=str(tmp_path / "sum"))
    for summed in (logits(lm), logits(lm, theirs)):
        assert np.abs(summed - both).max() <= 1e-5 * np.abs(both).max()


def test_a_fast_adapter_without_its_slow_one_is_refused_and_leaves_no_trace(tiny, two, tmp_path):
    slow, fast, _ = two
    lm = tiny()
    before = logits(lm)
    put_on(lm, FAST, 5)
    with pytest.raises(InputError, match=r"trained on top of the adapter 51051051, and .* detach it"):
        lora.load_adapter(lm, fast)
    with pytest.raises(ModelError, match="already has an adapter"):
        lora.load_adapter(lm, slow)
    with pytest.raises(ModelError, match="never saved"):
        lora.attach(lm, FAST, seed=6, on_top=True)
        saved(lm, tmp_path / "third", FAST)
    lora.detach(lm)
    elsewhere = tmp_path / "elsewhere" / "fast"
    shutil.copytree(fast, elsewhere)
    with pytest.raises(InputError, match="is not beside it"):
        lora.load_adapter(lm, elsewhere)
    values = dict(mx.load(str(fast / lora.WEIGHTS)))
    mx.save_safetensors(str(fast / lora.WEIGHTS), {**values, "model.layers.0.mlp.up_proj.lora_a": mx.zeros((1, 1))})
    with pytest.raises(InputError, match="has shape"):
        lora.load_adapter(lm, fast)
    assert lm.adapters == [] and np.array_equal(logits(lm), before)


def test_training_on_top_of_an_adapter_leaves_it_alone_and_is_measured_against_it(registry, pairs, tiny):
    lm = tiny()
    before = logits(lm)
    config = load_config(overrides=[*QUICK, "dual.anchor_weight=1"])
    slow = dual.train(registry, pairs, config, lm=lm)
    files = {path.name: path.read_bytes() for path in slow.folder.iterdir()}
    fast = dual.train(registry, pairs, config, lm=lm, on_top_of=slow)
    assert fast.metadata["parents"] == [pairs.ref, slow.ref]
    assert {path.name: path.read_bytes() for path in slow.folder.iterdir()} == files
    assert lm.adapters == [] and np.array_equal(logits(lm), before)
    assert len(list(registry.home.glob("locks/dual-*.lock"))) == 2  # two runs, that cannot go on from each other
    lora.load_adapter(lm, slow.folder)
    material = Material(lm, config.dual, None, None)
    channels = {channel.name: channel for channel in material.channels(PAIRS, MEMORIES)}
    lora.attach(lm, FAST, seed=0, keys=lora.targets(lm, linear=True, head=False), on_top=True)
    for name, key in (("preference", "displacement"), ("anchor", None)):  # nothing has moved from base and slow
        loss, measured = channels[name].loss(channels[name].batch_at(0))
        assert (measured[key] if key else loss).item() == pytest.approx(0, abs=1e-6)


# --- added up ---------------------------------------------------------------------------------------------------------


def test_truncation_by_hand():
    """diag(3, 4) has energies 16 and 9; the best product of rank 1 is diag(0, 4) and loses 9 of 25."""
    a, b, energy = truncate(np.array([[3.0, 0.0], [0.0, 4.0]]), np.eye(2), 1)
    assert a @ b == pytest.approx(np.diag([0.0, 4.0])) and energy == pytest.approx([16, 9])
    assert np.linalg.norm(a) == pytest.approx(2) == np.linalg.norm(b)


@pytest.mark.parametrize(("size", "rank"), [((30, 20, 6), 4), ((30, 20, 6), 6), ((5, 40, 8), 3), ((5, 40, 8), 7)])
def test_truncation_is_the_best_of_its_rank(size, rank):
    inputs, outputs, inner = size
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((inputs, inner)), rng.standard_normal((inner, outputs))
    left, strength, right = np.linalg.svd(a @ b, full_matrices=False)
    best = (left[:, :rank] * strength[:rank]) @ right[:rank]
    short_a, short_b, energy = truncate(a, b, rank)
    assert short_a.shape == (inputs, rank) and short_b.shape == (rank, outputs)
    assert np.abs(short_a @ short_b - best).max() < 1e-12 * np.abs(best).max() * 10
    assert energy[rank:].sum() == pytest.approx(((a @ b - best) ** 2).sum(), abs=1e-9)


def test_slow_and_fast_added_up_stand_alone_and_say_what_both_said(tiny, two, tmp_path):
    slow, fast, (_, _, with_both) = two
    (tmp_path / "sum").mkdir()
    found = merge([slow, fast], tmp_path / "sum", rank=6)
    assert found["rank"] == 6 and found["layers"] == 15 and 0 <= found["energy_lost"] < 1e-12
    ours = backbone.load(str(tiny().folder), adapter=tmp_path / "sum")
    theirs, _ = mlx_lm.load(str(ours.folder), adapter_path=str(tmp_path / "sum"))
    for summed in (logits(ours), logits(ours, theirs)):
        assert np.abs(summed - with_both).max() <= 1e-5 * np.abs(with_both).max()


def test_at_the_slow_rank_each_layer_is_the_best_there_is_and_the_lost_energy_is_told(two, tmp_path):
    slow, fast, _ = two
    (tmp_path / "sum").mkdir()
    found = merge([slow, fast], tmp_path / "sum")
    made, first, second = dense(tmp_path / "sum"), dense(slow), dense(fast)
    lost, total = {}, {}
    for layer in made:
        whole = first[layer] + second[layer]
        left, strength, right = np.linalg.svd(whole, full_matrices=False)
        best = (left[:, :4] * strength[:4]) @ right[:4]
        assert np.abs(made[layer] - best).max() <= 1e-5 * np.abs(best).max()
        lost[layer], total[layer] = (strength[4:] ** 2).sum(), (strength**2).sum()
    assert found["rank"] == 4 and found["energy_lost"] == pytest.approx(sum(lost.values()) / sum(total.values()))
    shares = {layer: lost[layer] / total[layer] for layer in lost}
    assert found["worst_layer"] == max(shares, key=shares.get) and 0 < found["energy_lost"] < 0.2
    assert found["worst_layer_lost"] == pytest.approx(max(shares.values()))


def test_adapters_that_cannot_be_added_up_are_refused_with_every_reason(two, tmp_path):
    slow, fast, _ = two
    other, dora = tmp_path / "other", tmp_path / "dora"
    for folder in (other, dora):
        shutil.copytree(slow, folder)
    config = read_json(slow / lora.CONFIG)
    write_json(dora / lora.CONFIG, config | {"fine_tune_type": "dora"})
    write_json(other / lora.CONFIG, config | {"base": {"name": "stranger", "hash": "0" * 64}})
    values = dict(mx.load(str(slow / lora.WEIGHTS)))
    up, down, gate, q = (
        f"model.layers.0.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj")
    )
    values[f"{up}.lora_a"] = mx.zeros((7, 4))
    values[f"{down}.lora_a"] = mx.zeros((64, 3))
    values[f"{gate}.lora_a"] = mx.full((32, 4), float("inf"))
    del values[f"{q}.lora_b"]
    mx.save_safetensors(str(other / lora.WEIGHTS), values)
    with pytest.raises(InputError) as error:
        merge([slow, other, dora, fast], tmp_path / "sum")
    text = str(error.value)
    for reason in ("belongs to stranger", f"{up} maps 7 to 64", f"{down} has factors (64, 3) and (4, 32)"):
        assert reason in text
    for reason in (f"{gate} holds NaN or infinity", f"{q} lacks lora_b", "DoRA adapter rescales"):
        assert reason in text
    assert len(error.value.problems) == 6 and not (tmp_path / "sum").exists()
    with pytest.raises(InputError, match="name that one before it"):
        merge([fast, slow], tmp_path / "sum")


def test_files_that_are_no_adapter_are_named(two, tmp_path):
    slow, _, _ = two
    for broken, reason in (([], "lora_parameters need"), ({"fine_tune_type": "full"}, "is lora or dora")):
        write_json(slow / lora.CONFIG, broken)
        with pytest.raises(InputError, match=reason):
            lora.read(slow)


def test_from_the_command_line_an_adapter_on_top_is_trained_judged_and_merged(registry, pairs, tiny):
    base = [f"student.base={tiny().folder}", *QUICK]

    def hominem(*words):
        return CliRunner().invoke(cli, list(words))

    nothing = hominem("train", "dual", "--on-top-of", "current", *base)
    assert nothing.exit_code == 2 and "no such adapter" in nothing.output
    assert hominem("train", "dual", *base).exit_code == 0
    done = hominem("train", "dual", "--on-top-of", "lora/1", "dual.rank=1", *base)
    slow, fast = registry.artifacts("lora")
    assert done.exit_code == 0 and f"hominem artifacts merge {slow.ref} {fast.ref}" in " ".join(done.output.split())
    shown = hominem("evaluate", "compare", "-p", "1?", "--adapter", fast.ref, "--json", "-", *base)
    assert shown.exit_code == 0, shown.output
    done = hominem("artifacts", "merge", slow.ref, "2", "--json", "-")
    found = json.loads(done.stdout)
    made = registry.find(found["artifact"])
    assert made.metadata["parents"] == found["parents"] == [slow.ref, fast.ref] and found["rank"] == 2
    assert made.metadata["metrics"]["merge"]["energy_lost"] == found["energy_lost"] < 0.5
    assert hominem("artifacts", "use", made.ref).exit_code == 0
    again = json.loads(hominem("artifacts", "merge", "current", "--rank", "1", "--json", "-").stdout)
    assert again["rank"] == 1 and again["parents"] == [made.ref] and again["energy_lost"] > 0
    for words, reason in (((slow.ref,), "--rank"), ((slow.ref, "1"), "twice"), ((fast.ref, slow.ref), "before it")):
        refused = hominem("artifacts", "merge", *words)
        assert refused.exit_code == 2 and reason in refused.output
    assert len(registry.artifacts("lora")) == 4
