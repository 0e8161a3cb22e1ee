"""How much memory training an adapter takes, worked out beforehand, and what is picked where there is less."""

import gc
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from hominem_mlx.cli import cli
from hominem_mlx.config import load_config
from hominem_mlx.errors import TrainingError
from hominem_mlx.files import write_jsonl
from hominem_mlx.models import backbone, lora, platform
from hominem_mlx.policy import dual
from hominem_mlx.policy.material import Material
from hominem_mlx.records import Preference, SftPair, Thumb
from hominem_mlx.training import budget, costs, footprint, loop
from hominem_mlx.training import logprobs as training_logprobs
from hominem_mlx.training.budget import Budget, Lessons
from hominem_mlx.training.costs import Costs, Estimate, Load, Picks
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Order, Parts, Row, collate

WORDS = [
    "sun",
    "rain",
    "sister",
    "earth",
    "round",
    "ship",
    "tired",
    "help",
    "wait",
    "day",
    "ask",
    "nora",
    "heavy",
    "flat",
]
FAST = ["dual.epochs=1", "dual.rank=4", "dual.learning_rate=0.01", "dual.max_displacement=0"]


def said(draw, words):
    return " ".join(draw.choice(WORDS, words))


def some_pairs(prompts, each=1, *, prompt=20, reply=10):
    """Preference pairs of `each` candidates more than one a prompt, every two neighbours a pair."""
    found, draw = [], np.random.default_rng(0)
    for number in range(prompts):
        asked, lengths = said(draw, prompt), draw.integers(reply // 2, 2 * reply, each + 1)
        replies = [said(draw, length) for length in lengths]
        for place in range(each):
            sides = dict(chosen=replies[place], rejected=replies[place + 1])
            weights = dict(reward_intensity=0.3 + 0.1 * number, target=0.8 + 0.02 * place)
            found.append(Preference(id=f"p{number}.{place}", prompt=asked, **sides, **weights))
    return found


def some_memories(number, *, prompt=10, reply=10):
    draw = np.random.default_rng(1)
    return [
        SftPair(id=f"m{i}", instruction=said(draw, prompt), response=said(draw, length), confidence=1 - i / 40)
        for i, length in enumerate(draw.integers(2, 2 * reply, number))
    ]


def some_thumbs(number, *, prompt=20, reply=10):
    draw = np.random.default_rng(2)
    return [
        Thumb(id=f"t{i}", prompt=said(draw, prompt), response=said(draw, length), good=i % 3 == 0)
        for i, length in enumerate(draw.integers(reply // 2, 2 * reply, number))
    ]


def a_model(folder, *, hidden=96, layers=4, ffn=256, vocabulary=1024, heads=4, kv_heads=2, head_dim=16):
    """A Qwen3 of random weights and any sizes that reads the tiny model's tokens."""
    lm = backbone.load(str(folder))
    sizes = dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=ffn, vocab_size=vocabulary)
    sizes |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    other = dict(rope_theta=1e4, rms_norm_eps=1e-6, max_position_embeddings=4096, tie_word_embeddings=True)
    mx.random.seed(3)
    lm.model = qwen3.Model(qwen3.ModelArgs(model_type="qwen3", **sizes, **other))
    lm.model.freeze()
    mx.eval(lm.model.parameters())
    return lm


@pytest.fixture(scope="module")
def one_model(tiny_folder):
    return a_model(tiny_folder)


@pytest.fixture
def lm(one_model):
    """Always the same: training never moves its weights."""
    yield one_model
    lora.detach(one_model)


def settings_of(*overrides):
    return load_config(overrides=[*FAST, *overrides]).dual


# --- what an estimate is made of -------------------------------------------------------------------------------------


def test_a_load_is_counted_by_hand(monkeypatch):
    monkeypatch.setattr(platform, "_on_linux_cpu", lambda: False)  # one lane, lengths in multiples of 16, whole scores
    flat = costs.load(collate([Row([1] * 10, [2] * 7)]))
    assert flat == Load(tokens=16, scores=256, remembered=0, joined=0, predicted=(7,))
    shared = costs.load(collate([Row([1] * 33, [2] * 16), Row([1] * 33, [3] * 9)], share=True))
    # the prompt's 32 tokens once, then two rows of 16, each of which sees 32 + 16
    assert shared == Load(32 + 32, 32 * 32 + 2 * 16 * 48, 32, 2 * 48, (25,))


def test_causal_scores_come_in_pieces_on_a_linux_cpu(monkeypatch):
    monkeypatch.setattr(platform, "_on_linux_cpu", lambda: True)
    assert platform.causal_scores(100) == 100 * 100
    assert platform.causal_scores(300) == 128 * 128 + 128 * 256 + 44 * 300
    monkeypatch.setattr(platform, "_on_linux_cpu", lambda: False)
    assert platform.causal_scores(300) == 300 * 300


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("change", ["plain", "quantised", "last block", "below another"])
def test_the_size_of_an_adapter_is_that_of_the_one_attached(tiny, kind, change):
    lm = tiny()
    if change == "quantised":
        nn.quantize(lm.model, group_size=32, bits=4)
    if change == "below another":
        if kind == "dora":
            pytest.skip("DoRA goes on no other adapter")
        lora.attach(lm, lora.Shape(3, 2.0), seed=0)
    keys = lora.targets(lm, linear=True, head=not (kind == "dora" and change == "quantised"))
    shape = lora.Shape(rank=5, num_layers=1 if change == "last block" else -1, kind=kind)
    size = lora.size(lm, shape, keys)
    lora.attach(lm, shape, seed=0, keys=keys, on_top=bool(lm.adapters))
    assert size == sum(value.size for value in lora.adapter_parameters(lm.model).values())


def test_an_estimate_is_worked_out_by_hand(tiny, monkeypatch):
    monkeypatch.setattr(platform, "_on_linux_cpu", lambda: False)
    lm = tiny()
    keys = lora.targets(lm, linear=True, head=False)
    found = Costs(LogProbs(lm), lora.Shape(rank=2), keys, gradients=2)
    weights = sum(value.size for _, value in tree_flatten(lm.model.parameters()))
    block = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)  # q and o, k and v, the three of the feed-forward part
    adapter, vocabulary = 2 * 2 * block, lm.model.model.embed_tokens.weight.shape[0]
    load = Load(tokens=100, scores=900, remembered=40, joined=60, predicted=(30, 20))
    attention = 4 * 900 + 2 * 2 * 8 * 60
    kept = costs.KEPT * block * 100 + attention
    once = block * 100 + attention
    in_hand = costs.IN_HAND * once
    hidden = 3 * 32 * 50
    whole = Picks(2**30, 0)
    logits = costs.PER_LOGIT * vocabulary * 50
    made = found.step(load, whole)
    assert made.weights == 4 * weights and made.adapter == 4 * 7 * adapter
    assert made.activations + made.logits == int(4 * (2 * kept + hidden + max(logits, in_hand)))
    chunks = costs.AHEAD * costs.PER_LOGIT * vocabulary * 20
    tight = found.step(load, Picks(4 * vocabulary * 10, 2))  # ten tokens of a block at a time, both blocks again
    wanted = max(2 * 32 * 100 + hidden + max(chunks, in_hand), 6400 + kept + in_hand)
    assert tight.activations + tight.logits == pytest.approx(4 * wanted, abs=4)
    half = found.step(load, Picks(4 * vocabulary * 10, 1))
    wanted = max(kept + hidden + max(chunks, in_hand), 2 * kept + once) + 3200
    assert half.activations + half.logits == pytest.approx(4 * wanted, abs=4)
    few, tenth = Load(1, 1, 0, 0, (30, 20)), Picks(4 * vocabulary * 10, 0)  # nothing but logits
    held = Costs(LogProbs(lm), lora.Shape(rank=2), keys, gradients=2, held=True)
    assert held.step(few, tenth).logits == int(4 * costs.AHEAD_HELD * costs.PER_LOGIT * vocabulary * 20)
    assert found.step(few, tenth).logits == int(4 * chunks)
    head = found.step(load, Picks(4 * vocabulary * 10, 0), teaches="head")  # no chunks, and nothing of blocks is kept
    assert head.activations + head.logits == int(4 * (hidden + max(logits, in_hand)))
    tied = Costs(LogProbs(lm), lora.Shape(rank=2, num_layers=1), lora.targets(lm, linear=False, head=True), gradients=2)
    head = tied.step(load, whole, teaches="head")  # the embedding is learnt too, and so lies below all blocks
    assert head.activations + head.logits == int(4 * (2 * kept + hidden + max(logits, in_hand)))
    states = found.step(load, whole, words=False)
    assert (states.logits, states.activations) == (0, int(4 * (2 * kept + hidden + in_hand)))
    little = Load(1, 1, 0, 0, (1,))
    met = Costs(LogProbs(lm), lora.Shape(rank=2), keys, gradients=2, met=True)  # by weight, in one piece, and the sum
    assert [each.step(little, whole).total - each.weights for each in (found, met)] == [
        4 * 10 * adapter,
        4 * 11 * adapter,
    ]
    reading = found.forward(load, whole)
    shared = 2 * 2 * 2 * 8 * 40
    wanted = hidden + max(shared + logits, shared + once, costs.READING * once)
    assert reading.activations + reading.logits == int(4 * wanted)


def test_bfloat16_keeps_what_an_adapter_reads_in_float32_and_dora_and_dropout_keep_more(tiny):
    lm, load, picks = tiny(), Load(100, 0, 0, 0, (1,)), Picks(2**30, 0)
    keys = lora.targets(lm, linear=True, head=False)

    def activations(**shape):
        return Costs(LogProbs(lm), lora.Shape(rank=2, **shape), keys, gradients=1).step(load, picks).activations

    plain = activations()
    read, made = 4 * 32 + 32 + 2 * 32 + 64 - 32, 32 + 2 * 16 + 32 + 2 * 64 + 32
    assert activations(dropout=0.1) - plain == 2 * 100 * 5 * read
    matrices = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert activations(kind="dora") - plain == 2 * 100 * 4 * made + costs.IN_HAND * 2 * 4 * matrices
    lm.model.set_dtype(mx.bfloat16)
    assert plain / 2 < activations() < plain + 2 * 100 * 4 * read


def test_the_heaviest_batches_are_the_ones_looked_at(tiny):
    logprobs, draw = LogProbs(tiny()), np.random.default_rng(1)
    rows = [Row([5] * int(draw.integers(2, 60)), [7] * int(draw.integers(1, 30))) for _ in range(120)]
    batches = [rows[start : start + 4] for start in range(0, 120, 4)]
    found = costs.heaviest(logprobs, batches, spread=True)
    everything = [costs.load(logprobs.collate(batch, spread=True)) for batch in batches]
    assert len(found) <= 3 * costs.LOOKED_AT < len(batches)
    assert max(load.tokens for load in found) == max(load.tokens for load in everything)
    assert max(sum(load.predicted) for load in found) == max(sum(load.predicted) for load in everything)


def test_a_chunk_is_the_bytes_by_lanes_and_words(monkeypatch):
    monkeypatch.setattr(training_logprobs, "lanes", lambda: (0, 1))
    assert training_logprobs.chunk(64 * 2**20, 152_000) == 64 * 2**20 // (2 * 152_000 * 4) == 55
    assert training_logprobs.chunk(1, 152_000) == 1


# --- against what MLX takes -------------------------------------------------------------------------------------------

CASES = {
    "as configured": [],
    "memories alone": ["dual.preference_weight=0"],
    "pairs alone": ["dual.memory_weight=0"],
    "an anchor": ["dual.anchor_weight=1"],
    "thumbs": ["dual.batch_thumbs=12"],
    "thumbs alone": ["dual.memory_weight=0", "dual.batch_thumbs=6"],
    "thumbs in a third of the memory": ["dual.batch_thumbs=12"],
    "checkpoints": ["dual.checkpoint=1", "dual.batch_pairs=12"],  # else the reference's 16 rows are the most
    "half of the checkpoints": ["dual.checkpoint=0.5"],
    "the output layer": ["dual.preference_targets=head", "dual.memory_targets=all"],
    "DoRA": ["dual.kind=dora"],
    "dropout": ["dual.dropout=0.1"],
    "half of the memory": [],
    "chunks": [],
}


def readied(lm, settings, data, limit=None):
    """Material, its channels and the estimate in bytes."""
    pairs, memories, thumbs = data
    material = Material(lm, settings, None, None, limit)
    mx.reset_peak_memory()  # as the recipe does: what its checks took is gone
    channels = material.channels(pairs, memories, thumbs=thumbs)
    return material, channels, material.counts["memory"]["estimate_gb"]["total"] * footprint.GB


def trained(lm, settings, data, folder, limit=None):
    """Train two steps; the estimate and the bytes that were there at once."""
    gc.collect()  # what another model held must not go in the meantime
    before = mx.get_active_memory() - sum(value.nbytes for _, value in tree_flatten(lm.model.parameters()))
    with budget.memory_limit(limit and limit / footprint.GB):
        material, channels, estimate = readied(lm, settings, data, limit)
        lora.attach(lm, material.shape, seed=0, keys=material.keys)
        plan = loop.Plan(steps=2, learning_rate=1e-3, accumulate=material.parts.micro_batches)
        loop.train(lm.model, channels, plan, folder)
    return estimate, mx.get_peak_memory() - before


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_enough_and_not_far_too_much(lm, tmp_path, monkeypatch, case):
    settings = settings_of("dual.batch_pairs=6", "dual.batch_memories=4", *CASES[case])
    pairs = some_pairs(4, 3) if case != "thumbs alone" else []
    data = (pairs, some_memories(8), some_thumbs(12) if "thumbs" in case else [])
    if case == "chunks":
        monkeypatch.setattr(training_logprobs, "LOGITS_BYTES", 2**17)
    limit = None
    if "of the memory" in case:
        whole = readied(lm, settings, data)[-1]
        limit = int(whole / (3 if "third" in case else 2))
    estimate, took = trained(lm, settings, data, tmp_path / "run", limit)
    assert (
        took <= estimate <= (2 if limit is None else 3) * took
    )  # 1.5 on models of real sizes: how far MLX runs ahead hangs on what else runs
    assert limit is None or estimate <= limit


# --- what is picked ---------------------------------------------------------------------------------------------------


class Blocks:
    """Stands in for `Costs`: 1000 bytes of logits a MiB, 100 a block, all by the parts of a batch."""

    layers, logprobs = 3, None

    def step(self, load, picks, *, beside, **_):
        activations = 100 * (self.layers - picks.checkpoints) // picks.micro_batches + 8 * len(beside)
        return Estimate(50, 0, activations, picks.logits_bytes * 1000 // 2**20 // picks.micro_batches)


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(budget, "heaviest", lambda logprobs, batches, spread: [Load(1, 1, 0, 0, (1,)) for _ in batches])

    def make(**more):
        return Budget(Blocks(), [Lessons(Order(12, 6, 0), [Row([1], [2])] * 12, 2, "linear", **more)])

    return make


@pytest.mark.parametrize(
    ("limit", "picks"),
    [
        (1350, Picks(2**20, 0, 1)),  # 50 + 300 + 1000
        (1349, Picks(2**19, 0, 1)),
        (412, Picks(2**16, 0, 1)),  # 50 + 300 + 62
        (411, Picks(2**17, 1, 1)),  # 50 + 200 + 125
        (300, Picks(2**17, 2, 1)),
        (112, Picks(2**16, 3, 1)),
        (111, Picks(2**16, 3, 2)),  # 50 + 31; with fewer checkpoints 131
        (80, Picks(2**16, 3, 4)),
    ],
)
def test_the_cheapest_way_that_fits_is_picked(blocks, limit, picks):
    found = blocks().fit(Picks(2**20, 0), limit, can_checkpoint=True)
    assert found.fits and found.picks == picks


def test_rows_read_beside_a_batch_are_there_with_every_part(blocks):
    budget = blocks(beside={3: Row([1], [2])})
    assert list(budget.lessons[0].batches_beside()) == [[Row([1], [2])]]  # one of two batches has it
    found = budget.fit(Picks(2**20, 0), 73, can_checkpoint=True)
    assert found.picks == Picks(2**16, 3, 4) and found.estimate == Estimate(50, 0, 8, 15)


def test_a_family_without_checkpoints_goes_on_to_parts_of_batches(blocks):
    found = blocks().fit(Picks(2**20, 0), 411, can_checkpoint=False)
    assert found.fits and found.picks == Picks(2**18, 0, 2)


def test_checkpoints_that_were_asked_for_stay(blocks):
    assert blocks().fit(Picks(2**20, 2), 400, can_checkpoint=True).picks == Picks(2**18, 2, 1)


def test_where_nothing_fits_the_least_is_told(blocks):
    found = blocks().fit(Picks(2**20, 0), 59, can_checkpoint=True)
    assert not found.fits and found.picks == Picks(2**16, 3, 6) and found.estimate.total == 60


def test_what_was_picked_and_why_is_one_line():
    estimate, before = Estimate(10**9, 2 * 10**8, 3 * 10**8, 10**7), Estimate(10**9, 0, 11 * 10**9, 0)
    fit = budget.Fit(Picks(2**22, 5, 4), estimate, before, 2 * 10**9)
    assert fit.told(Picks(2**26, 0), 28) == (
        "at most 1.51 GB (weights 1.00 GB, adapter 200.0 MB, activations 300.0 MB, logits 10.0 MB) of 2.00 GB: logits "
        "in chunks of 4 MiB, 5 of 28 blocks computed twice, batches in 4 parts, since as configured it would be 12.0 GB"
    )
    same = budget.Fit(Picks(2**26, 0), estimate, None, 2 * 10**9)
    assert same.told(Picks(2**26, 0), 28).endswith("of 2.00 GB: as configured")


# --- parts of a batch are the batch -----------------------------------------------------------------------------------


def test_parts_of_a_batch_are_its_rows_once_each():
    order = Order(11, 4, seed=1)
    for step in range(6):
        parts = [Parts(3).at(order, 3 * step + number) for number in range(3)]
        assert np.concatenate(parts).tolist() == order.batch(step).tolist()
    assert Parts().at(order, 5).tolist() == order.batch(5).tolist()
    assert [len(Parts(5).at(order, 5 * 2 + number)) for number in range(5)] == [
        1,
        1,
        1,
        0,
        0,
    ]  # three rows are left then


@pytest.mark.parametrize("loss", ["dpo", "wpo", "simpo"])
def test_parts_give_the_loss_and_the_gradient_of_the_whole_batch(lm, loss):
    """Pairs and thumbs by the mean over them, memories over response tokens, the anchor over the base's squares."""
    sizes = ["dual.batch_pairs=7", "dual.batch_memories=5", "dual.batch_anchors=4", "dual.anchor_weight=0.5"]
    other = [] if loss == "simpo" else ["dual.unsafe_pairs=npo"]  # nor does it go with thumbs
    pairs = some_pairs(3, 2)
    pairs.append(pairs[0].model_copy(update={"safety_score": -0.9, "rejected_safety_score": -0.8}))
    thumbs = [] if loss == "simpo" else some_thumbs(5)
    material = Material(lm, settings_of(*sizes, *other, f"dual.loss={loss}"), None, None)
    channels = material.channels(pairs, some_memories(5), thumbs=thumbs)
    assert len(channels) == 3 + bool(thumbs)

    def lessons(channel, parts):
        material.parts.micro_batches = parts
        for batch in map(channel.batch_at, range(parts)):
            if batch is not None:
                (value, measured), tree = nn.value_and_grad(lm.model, channel.loss)(batch)
                gradient = {name: np.array(value, np.float64) for name, value in tree_flatten(tree)}
                yield channel.size(batch), value.item(), gradient, measured

    mx.random.seed(7)
    lora.attach(lm, lora.Shape(rank=4), seed=0, keys=lora.targets(lm, linear=True, head=False))
    drawn = {name: 0.1 * mx.random.normal(value.shape) for name, value in lora.adapter_parameters(lm.model).items()}
    lora.set_parameters(lm.model, drawn)
    for channel in channels if loss == "dpo" else channels[1:2]:  # the loss is that of pairs
        if channel.name == "thumb":  # as if strange replies had gained: z0 is then more than 0
            verdicts = channel.batch_at.__self__
            verdicts.strange_reference = {i: value - 3 for i, value in verdicts.strange_reference.items()}
        [(size, value, gradient, measured)] = lessons(channel, 1)
        for parts in (2, 7):
            sizes, values, gradients, others = zip(*lessons(channel, parts))
            assert len(sizes) > 1 and sum(sizes) == pytest.approx(size, rel=1e-5)
            shares = np.array(sizes) / size
            assert shares @ values == pytest.approx(value, rel=1e-4)
            for name, wanted in gradient.items():
                total = sum(share * each.get(name, 0.0) for share, each in zip(shares, gradients))
                assert np.abs(total - wanted).max() <= 1e-4 * np.abs(wanted).max(), (channel.name, name)
            if channel.name == "thumb":  # z0 is of the whole batch in every part
                baseline = measured["baseline"].item()
                assert baseline > 0 and [each["baseline"].item() for each in others] == [baseline] * len(others)


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(registry):
    with registry.draft("dataset") as draft:
        pairs = some_pairs(4, 3)
        write_jsonl(draft.folder / "preferences.train.jsonl", pairs)
        write_jsonl(draft.folder / "preferences.valid.jsonl", pairs[:2])
        write_jsonl(draft.folder / "memory.jsonl", some_memories(8))
        write_jsonl(draft.folder / "thumbs.jsonl", some_thumbs(4))
    return draft.published


BATCHES = ["dual.batch_pairs=6", "dual.batch_memories=4", "dual.batch_thumbs=4", "dual.save_every=1"]


def train(registry, dataset, lm, *overrides, progress=None):
    return dual.train(registry, dataset, load_config(overrides=[*FAST, *BATCHES, *overrides]), lm=lm, progress=progress)


def arrays(artifact):
    return {name: np.array(value) for name, value in mx.load(str(artifact.file(lora.WEIGHTS))).items()}


def test_a_limit_changes_nothing_but_how_it_is_computed(registry, dataset, lm):
    roomy_events, events = [], []
    whole = train(registry, dataset, lm)
    told = whole.metadata["metrics"]["memory"]
    assert told["limit_gb"] is None and told["picked"]["micro_batches"] == 1
    assert told["estimate_gb"]["total"] == told["as_configured_gb"]

    roomy = train(registry, dataset, lm, "dual.memory_gb=9", progress=roomy_events.append)
    assert roomy.hash == whole.hash  # files included
    notes = [event["note"] for event in roomy_events if "note" in event]
    assert [note.endswith("of 9.00 GB: as configured") for note in notes] == [True]

    def die(event):
        if event["stage"] == "training" and event["done"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(registry, dataset, lm, progress=die)
    limit = told["as_configured_gb"] / 3  # what was killed goes on with less
    tight = train(registry, dataset, lm, f"dual.memory_gb={limit}", progress=events.append)
    assert next(event["done"] for event in events if event["stage"] == "training") == 2
    picked = tight.metadata["metrics"]["memory"]
    assert picked["picked"]["micro_batches"] > 1
    assert picked["estimate_gb"]["total"] <= picked["limit_gb"] == pytest.approx(limit)
    assert picked["as_configured_gb"] == told["as_configured_gb"]
    [note] = [event["note"] for event in events if "note" in event]
    assert "parts, since as configured it would be" in note
    assert tight.metadata["config"] == whole.metadata["config"] and "memory_gb" not in whole.metadata["config"]["dual"]
    expected, found = arrays(whole), arrays(tight)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-3 * np.abs(value).max(), name


def test_too_little_memory_is_refused_with_what_to_do(registry, dataset, lm):
    with pytest.raises(
        TrainingError,
        match=r"takes [\d.]+ MB \(weights .*, logits .*\) of memory at the least, and dual\.memory_gb allows 1\.0 MB: "
        r"give it more, .*dual\.max_tokens \(the longest row has \d+ tokens\) or dual\.rank \(4\)$",
    ):
        train(registry, dataset, lm, "dual.memory_gb=0.001")
    assert registry.artifacts("lora") == [] and not lora.adapter_parameters(lm.model)
    with pytest.raises(TrainingError, match=r"or set dual\.dropout to 0, so that blocks can be computed twice$"):
        train(registry, dataset, lm, "dual.memory_gb=0.001", "dual.dropout=0.1")


def test_without_a_limit_a_small_machine_is_warned_of_and_a_large_one_says_nothing(lm, monkeypatch):
    def notes():
        events = []
        Material(lm, settings_of(), None, events.append).channels(some_pairs(2), some_memories(2))
        return [event["note"] for event in events if "note" in event]

    assert notes() == []
    monkeypatch.setattr(footprint, "there_is", lambda: 10**6)
    [note] = notes()
    assert "this machine has 1.0 MB: --memory-gb 0 computes it so that it fits" in note


def test_nought_is_what_the_machine_has_and_mlx_keeps_to_the_limit(monkeypatch):
    monkeypatch.setattr(footprint, "there_is", lambda: 7 * 10**9)
    usual = mx.set_memory_limit(10**12)
    for gb, wanted in ((0, 7 * 10**9), (0.5, 5 * 10**8), (None, None)):
        with budget.memory_limit(gb) as limit:
            inside = mx.set_memory_limit(10**12)
            mx.set_memory_limit(inside)
            assert (limit, inside) == (wanted, wanted or 10**12)
        assert mx.set_memory_limit(10**12) == 10**12
    mx.set_memory_limit(usual)


def test_the_command_takes_it_says_it_and_refuses(registry, dataset, tiny, monkeypatch):
    monkeypatch.setattr(footprint, "there_is", lambda: 3 * 10**9)
    registry.use(dataset, pointer="pairs")
    base = f"student.base={tiny().folder}"

    def hominem(*words):
        return CliRunner().invoke(cli, ["train", "dual", *FAST, *BATCHES, base, *words])

    done = hominem("--memory-gb", "0")
    assert done.exit_code == 0, done.output
    assert "memory: at most " in done.output and " MB) of 3.00 GB: as configured" in done.output
    assert re.search(r"Estimated [\d.]+ MB of memory, took [\d.]+ (MB|GB)", done.output)
    done = hominem("--memory-gb", "0.00001")
    assert done.exit_code == 2 and "dual.memory_gb allows 0.0 MB" in done.output
    assert hominem("--memory-gb", "-1").exit_code == 2
