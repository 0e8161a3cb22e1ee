"""Single thumbs: liked replies get likelier and others less likely, and without thumbs nothing is another bit."""

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx.config import load_config
from hominem_mlx.errors import TrainingError
from hominem_mlx.models import backbone, lora
from hominem_mlx.policy import dual, thumbs
from hominem_mlx.policy.material import Material
from hominem_mlx.records import Preference, SftPair, Thumb
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Row

FAST = ["dual.epochs=2", "dual.learning_rate=0.01", "dual.rank=2", "dual.batch_pairs=2", "dual.batch_thumbs=8"]
THUMBS = [
    Thumb(
        id=f"t{i}", prompt=f"number {i % 3}?", response=f"it is {i}, I think", good=i % 3 == 0, confidence=1 - 0.1 * i
    )
    for i in range(5)
]
PAIRS = [Preference(id=f"p{i}", prompt=f"q {i}?", chosen=f"kind {i}.", rejected=f"rude {i}!") for i in range(3)]
MEMORIES = [SftPair(id=f"m{i}", instruction=f"what is {i}?", response=f"thing {i}") for i in range(2)]


@pytest.fixture
def dataset(publish_pairs):
    return lambda judged=THUMBS, pairs=(), memories=(): publish_pairs(pairs, memories=memories, thumbs=judged)


def train(registry, dataset, lm, *overrides):
    return dual.train(registry, dataset, load_config(overrides=[*FAST, *overrides]), lm=lm)


def weights(artifact):
    return {name: np.array(value) for name, value in mx.load(str(artifact.file(lora.WEIGHTS))).items()}


def material(lm, *overrides):
    return Material(lm, load_config(overrides=[*FAST, *overrides]).dual, None, None)


def logps(lm, rows):
    logprobs = LogProbs(lm)
    return np.array([logprobs(logprobs.collate([row])).item() for row in rows])


def row_of(lm, prompt, response):
    return Row(lm.prompt_tokens(prompt), lm.response_tokens(response))


def test_good_and_bad_thumbs_count_alike_in_all():
    # 3 good, 1 bad: 4 / (2 * 3) and 4 / (2 * 1)
    assert thumbs.balance(np.array([True, True, True, False])).tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    assert thumbs.balance(np.array([True, True])).tolist() == [1, 1]
    assert thumbs.balance(np.array([False])).tolist() == [1]


@pytest.mark.parametrize(
    ("prompts", "found"),
    [([[1], [1], [2], [3]], 4), ([[2], [1], [2], [1]], 4), ([[1], [1], [1], [2]], 2), ([[1], [1]], 0), ([[1]], 0)],
)
def test_a_partner_has_another_prompt_and_serves_once(prompts, found):
    rows = [Row(prompt, [place]) for place, prompt in enumerate(prompts)]
    partners = thumbs.partners(rows).tolist()
    there = [other for other in partners if other >= 0]
    assert len(there) == len(set(there)) == found
    assert all(prompts[other] != prompts[row] for row, other in enumerate(partners) if other >= 0)


def test_the_loss_of_a_batch_is_that_worked_out_by_hand(tiny):
    lm = tiny()
    _, channel = material(lm).channels([], [], thumbs=THUMBS)
    rows = [row_of(lm, each.prompt, each.response) for each in THUMBS]
    other = thumbs.partners(rows)
    strange = [Row(row.prompt, rows[place].response) for row, place in zip(rows, other)]
    assert (other >= 0).all()
    before = logps(lm, rows), logps(lm, strange)
    first, measured = channel.loss(channel.batch_at(0))
    worth = np.array([1, 0.9, 0.8, 0.7, 0.6]) * np.where([each.good for each in THUMBS], 5 / 4, 5 / 6)
    assert first.item() == pytest.approx(worth.mean() / 2, rel=1e-5) and measured["baseline"].item() < 1e-5
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    baselines = []
    for sign in (0.05, -0.05):  # one of them moves strange replies up
        for key, value in lora.adapter_parameters(lm.model).items():
            if key.endswith("lora_b"):
                lora.set_parameters(lm.model, {key: mx.full(value.shape, sign)})
        gained = logps(lm, rows) - before[0]
        baseline = max(0.0, (logps(lm, strange) - before[1]).mean())
        up = np.where([each.good for each in THUMBS], 1, -1)
        wanted = (worth / (1 + np.exp(0.1 * up * (gained - baseline)))).mean()
        loss, measured = channel.loss(channel.batch_at(1))
        assert np.abs(gained).min() > 0.01
        assert loss.item() == pytest.approx(wanted, rel=1e-4)
        assert measured["baseline"].item() == pytest.approx(baseline, abs=1e-3)
        assert measured["accuracy"].item() == pytest.approx(((gained > baseline) == (up > 0)).mean())
        baselines.append(baseline)
    assert max(baselines) > 0.01


def test_liked_replies_get_likelier_and_others_less_likely(registry, dataset, tiny):
    lm = tiny()
    rows = [row_of(lm, each.prompt, each.response) for each in THUMBS]
    before, fingerprint = logps(lm, rows), lm.fingerprint()
    made = train(registry, dataset(), lm, "dual.epochs=12")
    assert lm.fingerprint() == fingerprint
    gained = logps(backbone.load(str(lm.folder), adapter=made.folder), rows) - before
    good = np.array([each.good for each in THUMBS])
    assert gained[good].min() > 1 and gained[~good].max() < -1
    counts = made.metadata["metrics"]
    assert counts["thumbs"] == {"given": 5, "refused_by_gate": 0} and counts["training"]["steps"] == 12


def test_thumbs_are_a_part_of_the_preference_channel(registry, dataset, tiny):
    for blend in ("sum", "normalised", "alternate"):
        training = train(registry, dataset(pairs=PAIRS, memories=MEMORIES), tiny(), f"dual.blend={blend}").metadata[
            "metrics"
        ]["training"]
        steps = {name: each["steps"] for name, each in training["channels"].items()}
        assert steps["thumb"] == steps["preference"] > 0 and training["channels"]["thumb"]["share_of_update"] > 0
    built = material(tiny(), "dual.thumb_weight=0.5")
    assert [(each.name, each.weight, each.follows) for each in built.channels(PAIRS, MEMORIES, thumbs=THUMBS)] == [
        ("memory", 0.4, ""),
        ("preference", 0.6, ""),
        ("thumb", 0.3, "preference"),
    ]
    few = built.channels(PAIRS, MEMORIES, thumbs=THUMBS[:1])  # one thumb counts like one of three pairs
    assert few[-1].weight == pytest.approx(0.6 * 0.5 / 3)
    alone = built.channels([], MEMORIES, thumbs=THUMBS)
    assert [(each.name, each.weight, each.follows) for each in alone][1:] == [("preference", 0.3, "")]


def test_without_thumbs_or_at_weight_zero_every_bit_is_as_before(registry, dataset, tiny):
    plain = weights(train(registry, dataset(None, PAIRS, MEMORIES), tiny()))
    for judged, weight in (([], 1.0), (THUMBS, 0.0)):
        same = train(registry, dataset(judged, PAIRS, MEMORIES), tiny(), f"dual.thumb_weight={weight}")
        assert all(np.array_equal(plain[name], value) for name, value in weights(same).items())
    other = weights(train(registry, dataset(THUMBS, PAIRS, MEMORIES), tiny()))
    assert any(not np.array_equal(plain[name], value) for name, value in other.items())


def test_the_gate_is_for_replies_that_are_to_become_likelier(registry, dataset, tiny):
    unsafe = [Thumb(id=f"u{good}", prompt="x?", response="y", good=good, safety_score=-0.9) for good in (True, False)]
    kept, worth = thumbs.learnable_thumbs([*unsafe, THUMBS[1]], safety_low=-0.2, safety_high=0.2)
    assert kept == [unsafe[1], THUMBS[1]] and worth.tolist() == pytest.approx([1, 0.9])
    with pytest.raises(TrainingError, match="no thumb is left"):
        train(registry, dataset(unsafe[:1]), tiny())


def test_thumbs_may_move_what_preferences_may(registry, dataset, tiny):
    made = weights(train(registry, dataset(), tiny(), "dual.preference_targets=head", "dual.head_rank=1"))
    assert made and all(lora.is_head(name) for name in made)


def test_a_loss_of_tokens_has_no_beta_for_thumbs(registry, dataset, tiny):
    with pytest.raises(TrainingError, match="simpo has a beta of tokens, and the 5 single thumbs"):
        train(registry, dataset(pairs=PAIRS), tiny(), "dual.loss=simpo")


def test_thumbs_about_one_prompt_have_no_baseline(tiny):
    _, channel = material(tiny()).channels([], [], thumbs=[THUMBS[0], THUMBS[3]])
    loss, measured = channel.loss(channel.batch_at(0))
    assert channel.batch_at(0).strange is None and measured["baseline"].item() == 0
    assert loss.item() == pytest.approx((1 + 0.7) / 2 / 2, rel=1e-5)
