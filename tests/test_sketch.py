"""Sketches keep inner products, and are the same wherever they are made."""

import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from hominem_mlx.errors import InputError
from hominem_mlx.models import lora
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.rows import Row
from hominem_mlx.training.sketch import SKETCHES, Sketches, read_sketches, sketch, write_sketches


def named(vector):
    return {"a": mx.array(vector[:300].reshape(3, 100)), "b": mx.array(vector[300:])}


def test_the_sketch_is_the_sum_by_bucket_with_signs_of_splitmix64():
    """Its first output from state 0 is 0xE220A8397B1DCDAF (Vigna's reference); hashes of names begin elsewhere."""
    import hashlib

    def bits(name, place):
        mask = 2**64 - 1
        x = int.from_bytes(hashlib.sha256(f"0 {name}".encode()).digest()[:8], "little") if name else 0
        x = (x + (place + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert bits("", 0) == 0xE220A8397B1DCDAF
    wanted = np.zeros(16)
    for name, value, place in (("a", 2.0, 0), ("a", -3.0, 1), ("b", 5.0, 0)):
        wanted[bits(name, place) % 16] += value if bits(name, place) >> 63 else -value
    assert sketch({"b": mx.array([[5.0]]), "a": mx.array([2.0, -3.0])}, width=16).tolist() == wanted.tolist()


def test_inner_products_are_kept_without_bias_and_within_their_variance():
    """Of unit vectors the variance is (1 + <a, b>^2 - 2 sum a_i^2 b_i^2) / k."""
    draw, width = np.random.default_rng(0), 256
    errors = []
    for seed in range(300):
        a, b = draw.standard_normal((2, 1000)).astype(np.float32)
        b = b / np.linalg.norm(b) + 0.5 * a / np.linalg.norm(a)  # so that the products are not all near 0
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        one, other = (sketch(named(vector), width=width, seed=seed) for vector in (a, b))
        variance = (1 + (a @ b) ** 2 - 2 * (a**2 * b**2).sum()) / width
        errors.append((one @ other - a @ b) / variance**0.5)
    assert np.mean(errors) == pytest.approx(0, abs=4 / 300**0.5)
    assert np.std(errors) == pytest.approx(1, rel=0.2)
    assert np.abs(errors).max() < 5


def test_a_sum_of_sketches_is_the_sketch_of_the_sum():
    one, other = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    wanted = 2 * sketch(named(one)) - sketch(named(other))
    assert np.allclose(sketch(named(2 * one - other)), wanted, atol=1e-5)


def test_an_adapter_of_fewer_layers_is_sketched_as_zeros_in_the_others():
    vector = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    part = {"b": named(vector)["b"]}
    assert np.array_equal(sketch(part), sketch({**part, "a": mx.zeros((3, 100))}))


def test_another_process_makes_the_same_sketch():
    code = (
        "import hominem_mlx, mlx.core as mx; from hominem_mlx.training.sketch import sketch;"
        "print(sketch({'model.layers.0.lora_a': mx.arange(500).reshape(5, 100) / 7}).tobytes().hex())"
    )
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()}
    here = sketch({"model.layers.0.lora_a": mx.arange(500).reshape(5, 100) / 7})
    assert said == {here.tobytes().hex()}


def test_cosines_of_the_tiny_model_s_pairs_are_kept(tiny):
    lm = tiny()
    replies = ["Nora.", "No, it is round.", "I feel tired", "rest", "you could ask her", "ships"]
    rows = [Row(lm.prompt_tokens("What is it?"), lm.response_tokens(reply)) for reply in replies]
    logprobs = LogProbs(lm)
    reference = mx.array(reference_logprobs(logprobs, rows))
    lora.attach(lm, lora.Shape(rank=4, scale=2.0), seed=0)
    mx.random.seed(3)
    values = {k: mx.random.normal(v.shape) * 0.1 for k, v in lora.adapter_parameters(lm.model).items()}
    lora.set_parameters(lm.model, values)

    def margin(chosen, rejected):
        gained = logprobs(logprobs.collate(rows)) - reference
        return gained[chosen] - gained[rejected]

    vectors = [
        dict(tree_flatten(nn.value_and_grad(lm.model, margin)(*pair)[1])) for pair in ((0, 1), (2, 3), (4, 5), (0, 5))
    ]
    full = np.stack([np.concatenate([np.array(v[name]).reshape(-1) for name in sorted(v)]) for v in vectors])
    short = np.stack([sketch(vector) for vector in vectors])
    cosines = [(m @ m.T) / np.outer(*[np.linalg.norm(m, axis=1)] * 2) for m in (full.astype(np.float64), short)]
    assert np.abs(cosines[0] - np.eye(4)).max() > 0.1  # something to tell apart
    assert np.abs(cosines[1] - cosines[0]).max() < 4 / 4096**0.5


KEPT = Sketches(np.ones((2, 4096), np.float32), np.array([0.5, -1.0], np.float32), np.array([0, 3]))


def test_sketches_are_read_as_they_were_written(tmp_path):
    write_sketches(KEPT, tmp_path)
    for name, value in vars(read_sketches(tmp_path)).items():
        assert np.array_equal(value, vars(KEPT)[name]) and value.dtype == vars(KEPT)[name].dtype


def test_what_cannot_be_read_or_compared_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no such file.*dual\.sketch_pairs"):
        read_sketches(tmp_path)
    (tmp_path / SKETCHES).write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot be read"):
        read_sketches(tmp_path)
    for metadata, cut in (({"seed": "1"}, 2), ({"seed": "0"}, 1)):
        save_file({**vars(KEPT), "margins": KEPT.margins[:cut]}, tmp_path / SKETCHES, metadata=metadata)
        with pytest.raises(InputError, match="4096 sums of seed 0: train the adapter again"):
            read_sketches(tmp_path)
    save_file(dict(vars(KEPT)), tmp_path / SKETCHES)
    with pytest.raises(InputError, match="cannot be read"):
        read_sketches(tmp_path)
