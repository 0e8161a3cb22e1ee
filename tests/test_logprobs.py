"""Log-probabilities from chunks of logits and through checkpointed blocks: exact, gradients included, and smaller."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import gpt2, qwen3

from hominem_mlx.config import load_config
from hominem_mlx.errors import ConfigError
from hominem_mlx.models import lora
from hominem_mlx.training import logprobs as training_logprobs
from hominem_mlx.training import rows as training_rows
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.rows import Row, collate

LONG, SHORT = [5, 9, 2, 7] * 6, [7, 3, 11, 8, 4]
ROWS = [Row(LONG, [3, 4, 9]), Row(SHORT, [5, 2]), Row(LONG, [6, 7, 8, 9, 1]), Row(SHORT, [2, 2, 3, 1])]
WEIGHT = mx.array([1.0, -2.0, 0.5, 3.0])


@pytest.fixture
def random_lm(tiny):
    """Makes a Qwen3-shaped model of random weights with a random adapter on its blocks, or on `keys`."""

    def make(*, vocabulary=64, layers=2, hidden=32, tied=True, change=None, keys=None):
        lm = tiny()
        lm.prompt_tokens = lambda text: [1, 2, 3]
        mx.random.seed(1)
        shape = dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=2 * hidden, vocab_size=vocabulary)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6)
        other = dict(max_position_embeddings=4096, tie_word_embeddings=tied)
        lm.model = qwen3.Model(qwen3.ModelArgs(model_type="qwen3", **shape, **heads, **other))
        lm.model.update(tree_map(lambda v: mx.random.normal(v.shape) * 0.3 if v.ndim > 1 else v, lm.model.parameters()))
        if change:
            change(lm.model)
        lm.model.freeze()
        adapt(lm, keys)
        return lm

    return make


def adapt(lm, keys=None):
    lora.attach(lm, lora.Shape(rank=2, scale=2.0), seed=0, keys=keys)
    values = {k: mx.random.normal(v.shape) * 0.1 for k, v in lora.adapter_parameters(lm.model).items()}
    lora.set_parameters(lm.model, values)


def results(lm, rows=ROWS, **options):
    """Sums by reply, and the gradient of their weighted sum by the adapter."""
    logprobs = LogProbs(lm, **options)
    batch = logprobs.collate(rows)

    def loss():
        sums = logprobs(batch)
        return (sums * WEIGHT).sum(), sums

    (_, sums), gradient = nn.value_and_grad(lm.model, loss)()
    mx.eval(sums, gradient)
    return sums, dict(tree_flatten(gradient))


def same(ours, theirs, near=1e-5):
    sums, gradients = zip(ours, theirs)
    assert np.abs(np.array(sums[0]) - np.array(sums[1])).max() <= near * np.abs(np.array(sums[1])).max()
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        wanted = np.array(gradients[1][name], np.float64)
        assert np.abs(np.array(value, np.float64) - wanted).max() <= near * np.abs(wanted).max(), name


def in_float64(lm):
    """The same from all logits of one unpadded row after the other: log-softmax and its gradient in numpy, the blocks
    below it in float64."""
    model = lm.model
    model.set_dtype(mx.float64)
    head = np.array(model.lm_head.weight if "lm_head" in model else model.model.embed_tokens.weight)
    names, values = zip(*tree_flatten(model.trainable_parameters()))
    sums, totals = [], [0.0] * len(names)
    for row, weight in zip(ROWS, WEIGHT.tolist()):
        tokens = mx.array([row.prompt + row.response])
        start, wanted = len(row.prompt) - 1, np.array(row.response)

        def hidden(*values, tokens=tokens):
            model.update(tree_unflatten(list(zip(names, values))))
            return model.model(tokens)[0]

        with mx.stream(mx.cpu):
            read = np.array(hidden(*values))[start:-1]
            logits = read @ head.T
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            sums.append(np.log(shares[np.arange(len(wanted)), wanted]).sum())
            slopes = np.zeros((tokens.size, head.shape[1]))
            slopes[start:-1] = weight * (head[wanted] - shares @ head)
            _, gradients = mx.vjp(hidden, list(values), [mx.array(slopes, mx.float64)])
            totals = [total + np.array(gradient) for total, gradient in zip(totals, gradients)]
    return np.array(sums), dict(zip(names, totals))


PATHS = {
    "one block": (None, {}),
    "chunks": (4 * 64 * 4, {}),  # two tokens a lane and fewer
    "checkpoints": (None, {"checkpoint": True}),
    "chunks and checkpoints": (4 * 64 * 4, {"checkpoint": True}),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_log_softmax_in_float64(random_lm, monkeypatch, path, shares, tied):
    budget, options = PATHS[path]
    if budget:
        monkeypatch.setattr(training_logprobs, "LOGITS_BYTES", budget)
        monkeypatch.setattr(LogProbs, "_in_chunks", counted(LogProbs._in_chunks))
    monkeypatch.setattr(training_logprobs, "can_share", lambda model: shares)
    lm = random_lm(tied=tied)
    same(results(lm, **options), in_float64(lm))
    assert not budget or LogProbs._in_chunks.calls


def counted(function):
    def wrapper(*args, **kwargs):
        wrapper.calls += 1
        return function(*args, **kwargs)

    wrapper.calls = 0
    return wrapper


def with_bias(model):
    model.lm_head = nn.Linear(32, 64, bias=True)
    model.lm_head.bias = mx.random.normal((64,))


HEADS = {
    "quantised": dict(change=lambda model: nn.quantize(model, group_size=32, bits=4)),
    "quantised and untied": dict(change=lambda model: nn.quantize(model, group_size=32, bits=8), tied=False),
    "with a bias": dict(change=with_bias, tied=False),
    "bfloat16": dict(change=lambda model: model.set_dtype(mx.bfloat16)),
}


@pytest.mark.parametrize("head", HEADS)
def test_chunks_are_one_block_whatever_the_output_layer(random_lm, monkeypatch, head):
    lm = random_lm(**HEADS[head])
    whole = results(lm)
    monkeypatch.setattr(training_logprobs, "LOGITS_BYTES", 4 * 64 * 4)
    monkeypatch.setattr(LogProbs, "_in_chunks", counted(LogProbs._in_chunks))
    same(results(lm), whole, near=2e-2 if head == "bfloat16" else 1e-5)
    assert LogProbs._in_chunks.calls


@pytest.mark.parametrize("number", [1, 3])
def test_chunks_and_checkpoints_say_the_same_in_any_number_of_lanes(random_lm, monkeypatch, number):
    lm = random_lm()
    whole = results(lm)
    streams = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(number))
    for module in (training_rows, training_logprobs):
        monkeypatch.setattr(module, "lanes", lambda: streams)
    monkeypatch.setattr(training_logprobs, "LOGITS_BYTES", 4 * 64 * 4)
    same(results(lm, checkpoint=1.0), whole)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_layer_takes_the_plain_path_unless_it_is_frozen(random_lm, monkeypatch, tied):
    lm = random_lm(tied=tied, keys=["mlp.up_proj", "model.embed_tokens" if tied else "lm_head"])
    whole = results(lm)
    assert any(lora.is_head(name) for name in whole[1])
    monkeypatch.setattr(training_logprobs, "LOGITS_BYTES", 4 * 64 * 4)
    monkeypatch.setattr(LogProbs, "_in_chunks", counted(LogProbs._in_chunks))
    same(results(lm), whole)
    assert LogProbs._in_chunks.calls == 0
    head = lm.model.model.embed_tokens if tied else lm.model.lm_head
    head.freeze()
    same(results(lm), (whole[0], {name: value for name, value in whole[1].items() if not lora.is_head(name)}))
    assert LogProbs._in_chunks.calls


def test_references_come_in_chunks_too(random_lm, monkeypatch):
    lm = random_lm()
    wanted = reference_logprobs(LogProbs(lm), ROWS)
    monkeypatch.setattr(training_logprobs, "LOGITS_BYTES", 4 * 64 * 4)
    assert reference_logprobs(LogProbs(lm), ROWS) == pytest.approx(wanted, rel=1e-5)


def peak(compute):
    """Bytes that were there at once above those there before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    kept = compute()
    del kept
    return mx.get_peak_memory() - before


def test_a_thousand_tokens_of_thirty_thousand_words_need_a_third_of_the_memory_in_chunks(random_lm, monkeypatch):
    lm = random_lm(vocabulary=30_000, layers=1, hidden=16)
    draw = np.random.default_rng(0)
    rows = [Row(SHORT, draw.integers(0, 30_000, 260).tolist()) for _ in range(4)]
    needed = []
    for budget in (2**40, 16 * 2**20):
        monkeypatch.setattr(training_logprobs, "LOGITS_BYTES", budget)
        needed.append(peak(lambda: results(lm, rows)))
    assert needed[1] < needed[0] / 3


def test_checkpoints_need_a_third_of_the_memory_of_a_deep_model(random_lm):
    lm = random_lm(layers=12)
    draw = np.random.default_rng(0)
    prompt = draw.integers(0, 64, 120).tolist()
    rows = [Row(prompt, draw.integers(0, 64, 60).tolist()) for _ in range(4)]
    found = []

    def compute(**options):
        found.append(results(lm, rows, **options))

    needed = [peak(lambda share=share: compute(checkpoint=share)) for share in (0.0, 1.0, 0.5)]
    assert needed[1] < 0.4 * needed[0]  # in an order of MLX's own it would be half
    assert needed[2] < 0.75 * needed[0]
    same(found[1], found[0])
    same(found[2], found[0])


def test_checkpoints_leave_the_model_as_it_was(random_lm):
    lm = random_lm()
    layers = lm.model.model.layers
    before = dict(tree_flatten(lm.model.parameters()))
    results(lm, checkpoint=1.0)
    assert lm.model.model.layers is layers
    after = dict(tree_flatten(lm.model.parameters()))
    assert all(mx.array_equal(value, after[name]).item() for name, value in before.items())


def test_a_family_whose_blocks_cannot_be_checkpointed_is_found_out_and_trains_as_ever(random_lm, tiny, monkeypatch):
    elsewhere = gpt2.ModelArgs("gpt2", 64, 32, 2, 2, 64, 1e-5, 64)  # its blocks are not in `layers`
    lm = tiny()
    lm.model = gpt2.Model(elsewhere)
    lm.model.freeze()
    assert not LogProbs(lm, checkpoint=1.0).checkpoints
    given_more = random_lm()
    block = type(given_more.model.layers[0])
    call = block.__call__
    monkeypatch.setattr(block, "__call__", lambda self, x, mask=None, cache=None, more=None: call(self, x, mask, cache))
    body = type(given_more.model.model)
    reads = body.__call__

    def reads_with_more(self, *args, **kwargs):
        layers = self.layers
        self.layers = [lambda x, m, c, layer=layer: layer(x, m, c, more=mx.ones(3)) for layer in layers]
        out = reads(self, *args, **kwargs)
        self.layers = layers
        return out

    monkeypatch.setattr(body, "__call__", reads_with_more)
    logprobs = LogProbs(given_more, checkpoint=1.0)
    assert not logprobs.checkpoints
    assert np.isfinite(np.array(logprobs(collate(ROWS)))).all()


def test_dropout_and_checkpoints_do_not_go_together():
    with pytest.raises(ConfigError, match="checkpoint needs dropout = 0"):
        load_config(overrides=["dual.dropout=0.1", "dual.checkpoint=0.5"])
