"""The dual-channel recipe: what it learns from, what it refuses, and that weights mean what they say."""

import dataclasses
import itertools
import json
import math
import shutil
from types import SimpleNamespace
from typing import get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hominem_mlx.config import DualConfig, load_config
from hominem_mlx.errors import BusyError, TrainingError
from hominem_mlx.files import lock, sha256_json
from hominem_mlx.models import backbone, lora
from hominem_mlx.policy import dual
from hominem_mlx.policy.held_back import best_look
from hominem_mlx.policy.material import Material
from hominem_mlx.policy.pairs import gated, swap
from hominem_mlx.records import Preference, SftPair
from hominem_mlx.training import loop
from hominem_mlx.training.directions import HEAD_GAIN
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.loop import METRICS
from hominem_mlx.training.rows import Order, Row
from hominem_mlx.training.sketch import SKETCHES, read_sketches, sketch

FAST = ["dual.epochs=2", "dual.learning_rate=0.01", "dual.rank=2", "dual.batch_pairs=2", "dual.batch_memories=2"]


def pair(number, **fields):
    texts = {"prompt": f"question {number}?", "chosen": f"kind {number}.", "rejected": f"rude {number}!"}
    return Preference(id=f"p{number}", **{**texts, **fields})


MEMORIES = [SftPair(id=f"m{i}", instruction=f"what is {i}?", response=f"thing {i}") for i in range(3)]
PAIRS = [pair(i, reward_intensity=0.5 + 0.1 * i, target=0.9) for i in range(4)]


@pytest.fixture
def dataset(publish_pairs):
    return lambda pairs=PAIRS, memories=MEMORIES, valid=PAIRS[:2]: publish_pairs(pairs, valid, memories)


def train(registry, dataset, lm, *overrides):
    return dual.train(registry, dataset, load_config(overrides=[*FAST, *overrides]), lm=lm)


def weights(artifact):
    return {name: np.array(value) for name, value in mx.load(str(artifact.file(lora.WEIGHTS))).items()}


def test_the_first_preference_loss_is_log_two_plus_the_likelihood_term(registry, dataset, tiny):
    lm = tiny()
    material = Material(lm, load_config(overrides=FAST).dual, None, None)
    _, channel = material.channels([pair(0), pair(1)], [])
    loss, measured = channel.loss(channel.batch_at(0))
    batch = channel.batch_at(0)
    nll = (-material.logprobs(batch.rows) / batch.rows.lengths)[batch.chosen].mean().item()
    assert loss.item() == pytest.approx(math.log(2) + 0.2 * nll, abs=1e-5)
    assert measured["displacement"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_first_preference_loss_is_log_two_in_bfloat16_too(tiny, dtype):
    lm = tiny()
    lm.model.set_dtype(dtype)
    material = Material(lm, load_config(overrides=[*FAST, "dual.nll_weight=0.0"]).dual, None, None)
    pairs = [
        pair(i, prompt=f"which of {'many ' * (i % 5)}?", chosen="yes " * (1 + 3 * i), rejected="no " * (20 - i))
        for i in range(20)
    ]
    _, channel = material.channels(pairs, [])
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    # references are computed in other batches than those of the steps
    first = [channel.loss(channel.batch_at(step))[0].item() for step in range(10)]
    assert first == pytest.approx([math.log(2)] * 10, abs=1e-5)


def softplus(x):
    return math.log1p(math.exp(x))


def by_hand(name, pair, now, base, tokens):
    """The loss of one pair at its target, from sums of log-probabilities and token counts by reply."""
    (a, b), p = (pair.chosen, pair.rejected), pair.target
    won, lost = now[a] - base[a], now[b] - base[b]
    per_token = {reply: now[reply] / tokens[reply] for reply in now}
    logit = {
        "dpo": 0.1 * (won - lost),
        "wpo": 0.1 * (won - lost),
        "simpo": 0.1 * (per_token[a] - per_token[b]) - 0.4,
        "odpo": 0.1 * (won - lost) - 0.3 * math.log(pair.score_margin or 1.0),
        "rdpo": 0.1 * (won - lost) + 0.05 * (tokens[a] - tokens[b]),
    }.get(name, 0.0)
    if name == "ipo":
        return p * (won - lost - 5) ** 2 + (1 - p) * (lost - won - 5) ** 2
    if name == "dpop":
        gone = 2 * max(0.0, -won)
        return p * softplus(-0.1 * (won - lost - gone)) + (1 - p) * softplus(0.1 * (won - lost + gone))
    weight = 1.0
    if name == "wpo":
        usual = np.mean([math.exp(base[x] / tokens[x] + base[y] / tokens[y]) for x, y in SIDES])
        weight = math.exp(per_token[a] + per_token[b]) / usual
    return weight * (p * softplus(-logit) + (1 - p) * softplus(logit))


SIDES = [("a long kind reply", "rude"), ("rude", "so so"), ("a long kind reply", "so so")]


@pytest.mark.parametrize("name", get_args(DualConfig.model_fields["loss"].annotation))
def test_every_loss_reaches_the_recipe_with_its_numbers(tiny, name):
    own = ["dual.simpo_gamma=0.4", "dual.dpop_lambda=2", "dual.odpo_alpha=0.3", "dual.rdpo_alpha=0.05"]
    settings = load_config(overrides=[*FAST, f"dual.loss={name}", *own, "dual.nll_weight=0", "dual.batch_pairs=8"]).dual
    lm = tiny()
    pairs = [
        pair(i, prompt="which?", chosen=a, rejected=b, target=0.7 + 0.1 * i, score_margin=(None, 0.4, 1.7)[i])
        for i, (a, b) in enumerate(SIDES)
    ]
    material = Material(lm, settings, None, None)
    _, channel = material.channels(pairs, [])
    replies = sorted({reply for sides in SIDES for reply in sides})
    tokens = {reply: len(lm.response_tokens(reply)) for reply in replies}

    def logps():
        rows = [Row(lm.prompt_tokens("which?"), lm.response_tokens(reply)) for reply in replies]
        return {reply: material.logprobs(material.logprobs.collate([row])).item() for reply, row in zip(replies, rows)}

    base = logps()
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    for key, value in lora.adapter_parameters(lm.model).items():
        if key.endswith("lora_b"):
            lora.set_parameters(lm.model, {key: mx.full(value.shape, 0.05)})
    now = logps()
    assert min(now[reply] - base[reply] for reply in replies) < 0  # what dpop counts
    wanted = np.mean([by_hand(name, each, now, base, tokens) for each in pairs])
    assert channel.loss(channel.batch_at(0))[0].item() == pytest.approx(wanted, rel=1e-4)


def test_odpo_without_any_score_says_where_scores_come_from(tiny):
    settings = load_config(overrides=[*FAST, "dual.loss=odpo"]).dual
    with pytest.raises(TrainingError, match=r"none of 4 preference pairs has one above 0.*hominem data pair"):
        Material(tiny(), settings, None, None).channels(PAIRS, [])


def test_pairs_unsafe_on_both_sides_are_left_out_or_both_made_less_likely(registry, dataset, tiny):
    lm = tiny()
    unsafe = [pair(i, safety_score=-0.6, rejected_safety_score=-0.9) for i in (7, 8)]
    data = dataset([*PAIRS, *unsafe], [], valid=unsafe)
    dropped = train(registry, data, lm, "dual.epochs=8")
    assert dropped.metadata["metrics"]["preferences"] == {"given": 6, "refused_by_gate": 2, "unlearnt": 0}
    unlearnt = train(registry, data, lm, "dual.unsafe_pairs=npo")
    assert unlearnt.metadata["metrics"]["preferences"] == {"given": 6, "refused_by_gate": 0, "unlearnt": 2}
    alone = train(registry, dataset(unsafe, [], valid=unsafe), lm, "dual.epochs=8", "dual.unsafe_pairs=npo")
    rows = [
        Row(lm.prompt_tokens(each.prompt), lm.response_tokens(reply))
        for each in unsafe
        for reply in (each.chosen, each.rejected)
    ]
    adapted = backbone.load(str(lm.folder), adapter=alone.folder)
    before, after = (np.array(reference_logprobs(LogProbs(model), rows)) for model in (lm, adapted))
    assert (after < before).all()


def test_an_unsafe_pair_is_unlearnt_at_a_tenth_and_is_no_part_of_what_is_measured(tiny):
    settings = load_config(overrides=[*FAST, "dual.unsafe_pairs=npo", "dual.nll_weight=0.5"]).dual
    material = Material(tiny(), settings, None, None)
    _, channel = material.channels([pair(7, safety_score=-0.6, rejected_safety_score=-0.9)], [])
    loss, measured = channel.loss(channel.batch_at(0))
    # both sides at the reference: 0.1 / 2 * 2 * (2 / 0.1) * log 2, no likelihood term
    assert loss.item() == pytest.approx(0.1 * 2 * math.log(2), rel=1e-5)
    assert {name: value.item() for name, value in measured.items()} == {"accuracy": 0, "displacement": 0}
    _, channel = material.channels([pair(0), pair(7, safety_score=-0.6, rejected_safety_score=-0.9)], [])
    batch = channel.batch_at(0)
    [safe] = [place for place, unlearn in enumerate(batch.unlearn.tolist()) if not unlearn]
    up = mx.zeros(batch.reference.shape).at[batch.chosen].add(3.0)  # every chosen reply has gained 3 nats
    _, measured = channel.loss(dataclasses.replace(batch, reference=batch.reference - up))
    assert measured["accuracy"].item() == 1
    length = batch.rows.lengths[batch.chosen[safe]].item()
    assert measured["displacement"].item() == pytest.approx(3 / length, rel=1e-4)


def test_few_rows_weigh_less_and_the_weights_stand_in_the_metadata(tiny):
    settings = load_config(overrides=[*FAST, "dual.ideal_memories=12", "dual.ideal_pairs=4"]).dual
    material = Material(tiny(), settings, None, None)
    material.channels(PAIRS, MEMORIES)
    # 3 of 12 memories: 0.4 * sqrt(1/4) = 0.2 against 0.6
    assert material.counts["weights"] == pytest.approx({"memory": 0.25, "preference": 0.75})


@pytest.mark.parametrize("blend", ["normalised", "alternate"])
def test_a_blend_learns_both_channels(registry, dataset, tiny, blend):
    artifact = train(registry, dataset(), tiny(), f"dual.blend={blend}", "dual.epochs=6", "dual.anchor_weight=0.1")
    training = artifact.metadata["metrics"]["training"]
    steps = {name: channel["steps"] for name, channel in training["channels"].items()}
    if blend == "normalised":
        shares = {name: channel["share_of_update"] for name, channel in training["channels"].items()}
        assert steps == {"memory": 12, "preference": 12, "anchor": 12}
        assert shares["memory"] / shares["preference"] == pytest.approx(0.4 / 0.6, rel=0.35)
    else:
        # 2 batches of memories a pass at 0.4 of the steps: 6 * 2 / 0.4
        assert training["steps"] == 30 == steps["memory"] + steps["preference"]
        assert steps["anchor"] == steps["memory"] > 5 < steps["preference"]
    assert training["evaluations"][-1]["valid_accuracy"] == 1.0


def test_training_prefers_the_chosen_remembers_and_leaves_the_base_bit_identical(registry, dataset, tiny):
    lm = tiny()
    digest = lm.fingerprint()
    artifact = train(registry, dataset(), lm, "dual.epochs=12")
    assert lm.fingerprint() == digest and not lora.adapter_parameters(lm.model)
    training = artifact.metadata["metrics"]["training"]
    assert training["evaluations"][-1]["valid_accuracy"] == 1.0
    assert 0 < training["channels"]["memory"]["share_of_update"] < 1
    assert artifact.metadata["config"]["base"] == lm.hash
    adapted = backbone.load(str(lm.folder), adapter=artifact.folder)
    logprobs = LogProbs(lm), LogProbs(adapted)
    row = LogProbs(lm).collate([Row(lm.prompt_tokens("what is 1?"), lm.response_tokens("thing 1"))])
    assert logprobs[1](row).item() > logprobs[0](row).item() + 1


def test_a_memory_with_a_history_is_learnt_as_a_chat_would_ask_for_it(tiny):
    lm = tiny()
    history = [{"role": "user", "content": "my dog is Rex"}, {"role": "assistant", "content": "a fine name"}]
    memory = SftPair(instruction="what is he called?", response="Rex", history=history)
    material = Material(lm, load_config(overrides=FAST).dual, "Be kind.", None)
    channel, _ = material.channels([], [memory])
    rows = channel.batch_at(0).rows
    said = [{"role": "system", "content": "Be kind."}, *history, {"role": "user", "content": "what is he called?"}]
    prompt, reply = lm.chat_tokens(said), lm.response_tokens("Rex")
    [block] = rows.blocks
    read = [*prompt, *reply[:-1]]  # the last token is predicted, never read
    assert block.tokens[0, : len(read)].tolist() == read
    assert (block.where.tolist(), block.targets.tolist()) == ([len(prompt) - 1 + i for i in range(len(reply))], reply)


def test_every_adapter_matrix_moves(registry, dataset, tiny):
    fresh = tiny()
    lora.attach(fresh, lora.Shape(2, 2.0), seed=0)
    start = {name: np.array(value) for name, value in lora.adapter_parameters(fresh.model).items()}
    trained = weights(train(registry, dataset(), tiny()))
    assert trained.keys() == start.keys()
    assert all(not np.array_equal(trained[name], start[name]) for name in start)


def test_dropout_is_for_lessons_alone_and_drawn_from_the_step(registry, dataset, tiny):
    data = dataset()
    made = train(registry, data, tiny(), "dual.dropout=0.5")
    mx.random.seed(77)
    assert train(registry, data, tiny(), "dual.dropout=0.5").version == made.version
    kept, whole = weights(made), weights(train(registry, data, tiny()))
    assert any(not np.array_equal(kept[name], whole[name]) for name in whole)
    lm = tiny()
    lora.load_adapter(lm, made.folder)
    tokens = mx.array([lm.prompt_tokens("what is 1?")])
    assert mx.array_equal(lm.model(tokens), lm.model(tokens)).item()


def test_the_same_run_twice_is_one_artifact(registry, dataset, tiny):
    data = dataset()
    assert train(registry, data, tiny()).version == train(registry, data, tiny()).version


def test_a_pair_whose_gate_is_shut_equals_the_pair_deleted(registry, dataset, tiny):
    unsafe = pair(9, safety_score=-0.6, rejected_safety_score=-0.9)
    left_out = weights(train(registry, dataset(PAIRS), tiny()))
    refused = train(registry, dataset([*PAIRS[:2], unsafe, *PAIRS[2:]]), tiny())
    assert all(np.array_equal(left_out[name], value) for name, value in weights(refused).items())
    assert refused.metadata["metrics"]["preferences"]["refused_by_gate"] == 1


def test_a_memory_of_no_confidence_equals_the_memory_deleted(registry, dataset, tiny):
    doubtful = SftPair(id="m9", instruction="what is 9?", response="thing 9", confidence=0.0)
    left_out = weights(train(registry, dataset(), tiny()))
    refused = weights(train(registry, dataset(memories=[doubtful, *MEMORIES]), tiny()))
    assert all(np.array_equal(left_out[name], value) for name, value in refused.items())


def test_nothing_left_to_learn_is_said_and_publishes_nothing(registry, dataset, tiny):
    with pytest.raises(TrainingError, match="nothing to learn from"):
        train(registry, dataset([pair(0, safety_score=-1.0)], []), tiny())
    assert registry.artifacts("lora") == []


@pytest.mark.parametrize("weight", ["memory", "preference"])
def test_a_channel_of_weight_zero_is_as_if_it_had_no_rows(registry, dataset, tiny, weight):
    without = dataset(memories=[]) if weight == "memory" else dataset([], valid=[])
    zero = train(registry, dataset(), tiny(), f"dual.{weight}_weight=0.0")
    absent = train(registry, without, tiny(), f"dual.{weight}_weight=0.0")
    a, b = weights(zero), weights(absent)
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_an_anchor_keeps_memories_from_moving_other_replies(registry, dataset, tiny):
    lm, moved = tiny(), {}
    rows = LogProbs(lm).collate([Row(lm.prompt_tokens(p.prompt), lm.response_tokens(p.chosen)) for p in PAIRS])
    base = np.array(LogProbs(lm).hidden(rows))
    for weight in (0, 50):
        values = ["dual.epochs=6", "dual.preference_targets=head", f"dual.anchor_weight={weight}"]
        artifact = train(registry, dataset(), lm, *values)
        adapted = backbone.load(str(lm.folder), adapter=artifact.folder)
        moved[weight] = np.square(np.array(LogProbs(adapted).hidden(rows)) - base).mean()
    assert 0 < moved[50] < 0.5 * moved[0]


def test_the_anchor_is_the_share_of_the_squared_state_that_moved(tiny):
    settings = load_config(overrides=[*FAST, "dual.anchor_weight=1"]).dual
    lm = tiny()
    channels = {channel.name: channel for channel in Material(lm, settings, None, None).channels(PAIRS, MEMORIES)}
    batch = channels["anchor"].batch_at(0)
    assert channels["anchor"].loss(batch)[0].item() == pytest.approx(0, abs=1e-10)
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    for name, value in lora.adapter_parameters(lm.model).items():
        if name.endswith("lora_b"):
            lora.set_parameters(lm.model, {name: mx.full(value.shape, 0.05)})
    states, base = np.array(LogProbs(lm).hidden(batch.rows)), np.array(batch.base)
    expected = ((states - base) ** 2).sum() / (base**2).sum()
    assert channels["anchor"].loss(batch)[0].item() == pytest.approx(expected, rel=1e-4) and expected > 1e-4


@pytest.mark.parametrize("head_rank", [1, 2])
def test_the_output_layer_reads_only_the_strongest_directions(registry, dataset, tiny, head_rank):
    lm = tiny()
    aimed = ["dual.rank=4", "dual.preference_targets=head", f"dual.head_rank={head_rank}"]
    settings = load_config(overrides=[*FAST, *aimed]).dual
    material = Material(lm, settings, None, None)
    material.channels(PAIRS, MEMORIES)
    directions = np.array(material.head_directions())
    hidden = np.array(material.logprobs.hidden(LogProbs(lm).collate(material.valued_rows)))
    readings = hidden @ directions.T
    assert np.sqrt((readings**2).mean(axis=0)) == pytest.approx(HEAD_GAIN, rel=1e-3)
    _, vectors = np.linalg.eigh(hidden.T @ hidden)  # a second way to the same axes
    for found, wanted in zip(directions, vectors.T[::-1]):
        assert abs(found @ wanted) == pytest.approx(np.linalg.norm(found), rel=1e-3)
    head = {
        name: value for name, value in weights(train(registry, dataset(), lm, *aimed)).items() if lora.is_head(name)
    }
    ranks = [np.linalg.matrix_rank(value, tol=1e-6) for value in head.values()]
    assert ranks == [head_rank, head_rank]


def test_memories_alone_need_no_direction(registry, dataset, tiny):
    artifact = train(registry, dataset([], valid=[]), tiny(), "dual.preference_targets=head", "dual.head_rank=1")
    assert not any(lora.is_head(name) for name in weights(artifact))


def test_swapping_twice_gives_the_pair_back():
    one = pair(1, safety_score=-0.8, rejected_safety_score=0.7, chosen_score=0.2, rejected_score=0.1, score_margin=0.1)
    assert swap(swap(one)) == one


def test_a_clearly_unsafe_choice_is_turned_round_only_when_allowed():
    unsafe = pair(1, safety_score=-0.8, rejected_safety_score=0.7)
    for allowed, expected in (("false", []), ("true", [swap(unsafe)])):
        settings = load_config(overrides=[*FAST, f"dual.allow_swap={allowed}"]).dual
        pairs, gates = gated([unsafe], settings)
        assert pairs == expected and gates.tolist() == [0.5] * len(expected)


def test_intensity_weighs_pairs_against_each_other_but_not_the_whole_batch_away(tiny):
    material = Material(tiny(), load_config(overrides=[*FAST, "dual.nll_weight=0.0"]).dual, None, None)
    _, channel = material.channels([pair(0, reward_intensity=0.2), pair(1, reward_intensity=0.6)], [])
    batch = channel.batch_at(0)
    assert sorted(batch.weight.tolist()) == pytest.approx([0.5, 1.5])  # 0.2 / 0.4 and 0.6 / 0.4
    assert channel.loss(batch)[0].item() == pytest.approx(math.log(2), abs=1e-6)


def test_order_is_without_replacement_and_differs_between_epochs():
    order = Order(7, 3, seed=1)
    epochs = [np.concatenate([order.batch(3 * epoch + i) for i in range(3)]).tolist() for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]


def test_rows_of_a_group_stand_together_in_an_order():
    groups = list("abacbbca")
    order = Order(8, 3, seed=3, groups=groups)
    epochs = [np.concatenate([order.batch(3 * epoch + i) for i in range(3)]).tolist() for epoch in range(8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    turns = {"".join(groups[row] for row in epoch) for epoch in epochs}
    assert all(turn.count(name * groups.count(name)) == 1 for turn in turns for name in "abc") and len(turns) > 2


def test_a_reply_that_several_pairs_share_is_computed_once_and_gives_the_loss_of_pairs_apart(tiny):
    lm, settings = tiny(), load_config(overrides=[*FAST, "dual.batch_pairs=8"]).dual
    pairs = [
        pair(i, prompt="which?", chosen=f"reply {a}", rejected=f"reply {b}", reward_intensity=0.3 + 0.1 * i)
        for i, (a, b) in enumerate([(3, 2), (3, 1), (3, 0), (2, 1), (2, 0), (1, 0)])
    ]
    material = Material(lm, settings, None, None)
    _, channel = material.channels(pairs, [])
    batch = channel.batch_at(0)
    assert len(batch.rows.lengths) == 4 and batch.target.shape == (6,)
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    for name, value in lora.adapter_parameters(lm.model).items():
        if name.endswith("lora_b"):
            lora.set_parameters(lm.model, {name: mx.full(value.shape, 0.05)})

    def logp(reply):
        return material.logprobs(
            LogProbs(lm).collate([Row(lm.prompt_tokens("which?"), lm.response_tokens(reply))])
        ).item()

    now = {f"reply {i}": logp(f"reply {i}") for i in range(4)}
    with lora.without_adapter(lm):
        base = {reply: logp(reply) for reply in now}
    expected = 0.0
    for each in pairs:
        delta = (now[each.chosen] - base[each.chosen]) - (now[each.rejected] - base[each.rejected])
        loss = -each.target * math.log(1 / (1 + math.exp(-settings.beta * delta)))
        loss -= (1 - each.target) * math.log(1 / (1 + math.exp(settings.beta * delta)))
        loss -= settings.nll_weight * now[each.chosen] / len(lm.response_tokens(each.chosen))
        expected += each.reward_intensity / 0.55 * loss / 6
    assert channel.loss(batch)[0].item() == pytest.approx(expected, rel=1e-4)


def test_a_batch_holds_whole_prompts_and_each_of_their_replies_once(tiny):
    sides = [("a", 1, 2), ("b", 1, 2), ("a", 2, 3), ("b", 2, 3), ("a", 1, 3), ("b", 1, 3)]
    pairs = [pair(i, prompt=p, chosen=f"{c}", rejected=f"{r}") for i, (p, c, r) in enumerate(sides)]
    settings = load_config(overrides=[*FAST, "dual.batch_pairs=3"]).dual
    _, channel = Material(tiny(), settings, None, None).channels(pairs, [])
    assert [len(channel.batch_at(step).rows.lengths) for step in range(4)] == [3, 3, 3, 3]


def test_two_runs_of_one_kind_do_not_meet(registry, dataset, tiny):
    data, lm, config = dataset(), tiny(), load_config(overrides=FAST)
    settings = config.dual.model_dump(mode="json", exclude={"memory_gb"})
    resolved = {"dual": settings, "system": None, "base": lm.hash, "recipe": dual.RECIPE}
    name = f"dual-{sha256_json([data.hash, resolved])[:16]}"
    with (
        lock(registry.home / "locks" / f"{name}.lock", "a test"),
        pytest.raises(BusyError, match=r"held by process \d+ \(a test\)"),
    ):
        dual.train(registry, data, config, lm=lm)


def test_validation_pairs_are_sketched_at_the_end_when_asked_for(registry, dataset, tiny):
    lm, data = tiny(), dataset(valid=PAIRS)
    artifact = train(registry, data, lm, "dual.sketch_pairs=2")
    found = read_sketches(artifact.folder)
    assert found.pairs.tolist() == [0, 2] and found.gradients.shape == (2, 4096)
    assert SKETCHES in artifact.metadata["files"] and not lora.adapter_parameters(lm.model)
    adapted = LogProbs(backbone.load(str(lm.folder), adapter=artifact.folder))
    rows = [Row(lm.prompt_tokens(PAIRS[2].prompt), lm.response_tokens(PAIRS[2].chosen))]
    rows.append(Row(rows[0].prompt, lm.response_tokens(PAIRS[2].rejected)))
    reference = mx.array(reference_logprobs(LogProbs(lm), rows))

    def margin():
        gained = adapted(adapted.collate(rows)) - reference
        return 0.1 * (gained[0] - gained[1])

    value, gradient = nn.value_and_grad(adapted.lm.model, margin)()
    assert found.margins[1] == pytest.approx(value.item(), rel=1e-4)
    wanted = sketch(dict(tree_flatten(gradient)))
    assert np.abs(found.gradients[1] - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert not (train(registry, data, lm).folder / SKETCHES).exists()


def test_checkpoints_train_the_same_adapter(registry, dataset, tiny):
    plain, checkpointed = (train(registry, dataset(), tiny(), f"dual.checkpoint={on}") for on in (0, 1))
    assert checkpointed.metadata["metrics"]["checkpointed"] > 0 and "checkpointed" not in plain.metadata["metrics"]
    for name, value in weights(plain).items():
        assert np.abs(weights(checkpointed)[name] - value).max() <= 1e-4 * np.abs(value).max(), name


# --- looks, the best of them, and when to stop ----------------------------------------------------------------------


def a_look(step, accuracy, displacement):
    return {"step": step, "valid_accuracy": accuracy, "valid_displacement": displacement}


@pytest.mark.parametrize(
    ("looks", "best"),
    [
        ([(0.5, 0.0)], 1),
        ([(0.5, 0.3), (0.75, -0.4), (0.7, 0.9)], 2),  # order comes first
        ([(0.75, -0.1), (0.75, 0.2), (0.75, 0.1)], 2),  # then what chosen replies gained
        ([(0.75, 0.1), (0.75, 0.1)], 1),  # then the earlier
    ],
)
def test_the_best_look_orders_most_pairs_and_makes_their_chosen_replies_likeliest(looks, best):
    assert best_look([a_look(step, *each) for step, each in enumerate(looks, 1)])["step"] == best


# most in order after step 3; step 4 is as good by order, and its chosen replies gained less
COURSE = {1: (0.5, 0.0), 2: (0.5, 0.1), 3: (0.75, 0.2), 4: (0.75, 0.1), 5: (0.5, 0.3), 6: (0.5, 0.4), 7: (0.75, 0.0)}
LOOKING = ("dual.epochs=4", "dual.eval_every=1", "dual.save_every=3", "dual.max_displacement=0.25")


@pytest.fixture
def course(monkeypatch):
    """Plants what the looks at the validation part find, by step."""

    def plant(values):
        def validation(material, preferences):
            return lambda step: dict(zip(("valid_accuracy", "valid_displacement"), values.get(step, (0.5, 0.0))))

        monkeypatch.setattr(dual, "validation", validation)

    return plant


def states_of(registry, data, lm, *overrides):
    """The adapter after every step, by step, and the artifact."""
    states = {}

    def note(event):
        if event["stage"] == "training":
            states[event["step"]] = {n: np.array(v) for n, v in lora.adapter_parameters(lm.model).items()}

    config = load_config(overrides=[*FAST, *LOOKING, *overrides])
    return states, dual.train(registry, data, config, lm=lm, progress=note)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "steps", "kept"),
    [
        ((), 8, 8),
        (("dual.keep=best",), 8, 3),
        (("dual.patience=3",), 6, 6),
        (("dual.keep=best", "dual.patience=1"), 4, 3),
        (("dual.keep=best", "dual.patience=6"), 8, 3),
    ],
)
def test_the_best_adapter_is_published_and_a_run_that_gets_no_better_ends(
    registry, dataset, tiny, course, overrides, steps, kept
):
    course(COURSE)
    states, made = states_of(registry, dataset(), tiny(), *overrides)
    told = made.metadata["metrics"]
    assert (told["training"]["steps"], told["kept_step"]) == (steps, kept)
    assert same(weights(made), states[kept]) and not same(states[kept], states[kept - 1])
    stopped = f"{steps - 3} looks without a better one than that of step 3" if steps < 8 else None
    assert told["training"]["stopped"] == stopped


def test_chosen_replies_that_get_lost_end_a_run_and_what_lost_them_is_not_the_best(registry, dataset, tiny, course):
    course({**COURSE, 4: (1.0, -0.26)})
    states, made = states_of(registry, dataset(), tiny(), "dual.keep=best")
    told = made.metadata["metrics"]
    assert (told["training"]["steps"], told["kept_step"]) == (4, 3) and same(weights(made), states[3])
    assert told["training"]["stopped"] == "chosen replies lost 0.26 nats a token (limit 0.25)"
    course({1: (1.0, -0.26)})
    states, made = states_of(registry, dataset(), tiny(), "dual.keep=best")
    assert made.metadata["metrics"]["kept_step"] == 1 and same(weights(made), states[1])


def test_without_preferences_to_learn_no_look_is_better_than_another(registry, dataset, tiny, course):
    course(COURSE)
    _, made = states_of(registry, dataset(), tiny(), "dual.preference_weight=0", "dual.keep=best", "dual.patience=1")
    assert made.metadata["metrics"]["kept_step"] == made.metadata["metrics"]["training"]["steps"] == 8


def test_without_a_validation_part_the_last_adapter_is_published(registry, dataset, tiny):
    states, made = states_of(registry, dataset(valid=[]), tiny(), "dual.keep=best", "dual.patience=1")
    assert made.metadata["metrics"]["kept_step"] == 8 and same(weights(made), states[8])
    assert not (made.folder / METRICS).exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("dies_at", [4, 6, 8])  # the best was kept ahead of the checkpoint, within it, at the end
def test_a_resumed_run_keeps_the_same_adapter_and_the_same_looks(registry, dataset, tiny, course, dies_at):
    course(COURSE)
    data, config = dataset(), load_config(overrides=[*FAST, *LOOKING, "dual.keep=best", "dual.save_every=5"])

    def look(lm):
        return {"seen": float(lm.model(mx.array([[1, 2]]))[0, -1, 0])}

    def die(event):
        if event["stage"] == "training" and event["step"] == dies_at:
            raise Killed

    straight = dual.train(registry, data, config, lm=tiny(), look=look)
    shutil.rmtree(straight.folder)
    with pytest.raises(Killed):
        dual.train(registry, data, config, lm=tiny(), look=look, progress=die)
    resumed = dual.train(registry, data, config, lm=tiny(), look=look)
    assert resumed.hash == straight.hash
    assert resumed.metadata["metrics"] == straight.metadata["metrics"]
    assert resumed.metadata["metrics"]["kept_step"] == 3
    assert not list((registry.home / "runs").iterdir())


def test_looks_are_noted_beside_the_adapter_and_change_nothing_else(registry, dataset, tiny):
    data, lm, seen = dataset(), tiny(), []
    config = load_config(overrides=[*FAST, "dual.eval_every=2"])

    def look(model):
        assert model is lm
        seen.append(len(lm.complete(["question 0?"], max_tokens=3, temperature=0.7, seed=1)[0]))
        return {"recall": 0.25 * len(seen)}

    plain = dual.train(registry, data, config, lm=tiny())
    made = dual.train(registry, data, config, lm=lm, look=look)
    assert same(weights(made), weights(plain)) and len(seen) == 3
    told = made.metadata["metrics"]
    assert told["before"] == {"recall": 0.25} and plain.metadata["metrics"]["before"] == {}
    assert [look["recall"] for look in told["training"]["evaluations"]] == [0.5, 0.75]
    rows = [json.loads(line) for line in made.file(METRICS).read_text().splitlines()]
    assert rows == [{"step": 0, "recall": 0.25}, *told["training"]["evaluations"]]
    assert rows[-1]["step"] == 4 and {"valid_accuracy", "valid_displacement", "memory", "preference"} <= rows[-1].keys()
    assert [json.loads(line) for line in plain.file(METRICS).read_text().splitlines()] == [
        {name: value for name, value in row.items() if name != "recall"} for row in rows[1:]
    ]


def test_progress_counts_the_tokens_of_all_channels(registry, dataset, tiny, monkeypatch):
    lm, events, seconds = tiny(), [], itertools.count(10, 2)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    config = load_config(overrides=[*FAST, "dual.epochs=1", "dual.anchor_weight=0.1"])
    dual.train(registry, dataset(), config, lm=lm, progress=events.append)
    sides = [(each.prompt, reply) for each in PAIRS for reply in (each.chosen, each.rejected)]
    memories = [(memory.instruction, memory.response) for memory in MEMORIES]
    learnt = [*memories, *sides, *sides, *sides]  # each step anchors all eight replies
    tokens = sum(len(lm.prompt_tokens(prompt)) + len(lm.response_tokens(reply)) for prompt, reply in learnt)
    assert events[-1]["step"] == 2 and events[-1]["tokens_per_second"] == tokens / 4


def test_thoughts_are_not_learnt_and_replies_of_nothing_else_are_left_out_and_counted(registry, dataset, tiny):
    plain = weights(train(registry, dataset(), tiny()))
    thought, silent = "<think>\nhm\n</think>\n\n", "<think>hm</think>"
    memories = [MEMORIES[0].model_copy(update={"response": thought + MEMORIES[0].response}), *MEMORIES[1:]]
    pairs = [PAIRS[0].model_copy(update={"rejected": thought + PAIRS[0].rejected}), *PAIRS[1:]]
    data = dataset([*pairs, pair(8, chosen=silent)], [*memories, SftPair(id="m8", instruction="8?", response=silent)])
    made = train(registry, data, tiny())
    assert all(np.array_equal(plain[name], value) for name, value in weights(made).items())
    counts = made.metadata["metrics"]
    assert counts["all_thoughts"] == 2 and counts["thoughts_left_out"] == 2
    assert (counts["preferences"]["given"], counts["memories"]["given"]) == (4, 3)


def test_a_row_that_the_template_writes_otherwise_is_named(registry, dataset, tiny):
    lm = tiny()
    lm.tokenizer.chat_template = lm.tokenizer.chat_template.replace("assistant\\n", "assistant\\n<think>\\n")
    with pytest.raises(TrainingError, match="memory m0: the chat template of"):
        train(registry, dataset(), lm)
    with pytest.raises(TrainingError, match="pair p0: the chat template of"):
        train(registry, dataset(memories=[]), lm)
