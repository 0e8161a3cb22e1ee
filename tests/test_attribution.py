"""Attributions add up, agree with hand-worked numbers and a second implementation, and know when they do not hold."""

import math

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx.cli import highlight
from hominem_mlx.errors import InputError
from hominem_mlx.models import lora
from hominem_mlx.reward import attribution
from hominem_mlx.reward.attribution import Attribution, explain, integrated_gradients, leave_out, places
from hominem_mlx.reward.features import Backbone, LmReader
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.reward.model import Card, RewardModel
from hominem_mlx.schema import MANIFOLD
from test_reward_model import ngram_model, random_head, worded_model

OUTPUTS = (*MANIFOLD.names, *EXTRA)
POOLINGS = ("mean", "max", "std", "last", "gap")
QUESTIONS = ("Is it kind?", "Does it ask?")
PROMPT, REPLY = "I feel tired.", "That sounds heavy. What would help most? You could rest."
X, BASE = mx.array([[1.0, 2.0], [3.0, -1.0]]), mx.array([[0.0, 1.0], [1.0, 1.0]])


def model_of(lm, poolings=POOLINGS) -> RewardModel:
    """A reward model with random numbers on embeddings and last block."""
    reader = LmReader(lm)
    card = Card(
        manifold=MANIFOLD,
        outputs=OUTPUTS,
        backbone="lm",
        backbone_name=lm.name,
        backbone_hash=lm.hash,
        layers=(0, 2),
        poolings=poolings,
    )
    blocks = sum(len(QUESTIONS) if name == "judge" else 1 for name in poolings)
    return RewardModel(card, random_head(2 * blocks * 32), Backbone(reader, (0, 2), poolings, QUESTIONS))


def test_of_a_linear_function_it_is_weight_times_difference():
    w = mx.array([[2.0, 0.5], [-1.0, 3.0]])
    values, high, low, steps, complete = integrated_gradients(lambda p: (p * w).sum((1, 2)), X, BASE, steps=1)
    assert values.tolist() == pytest.approx([2.0 * 1 + 0.5 * 1, -1.0 * 2 + 3.0 * -2])
    assert (high, low, steps, complete) == (pytest.approx(-3.0), pytest.approx(2.5), 1, True)


def test_of_a_square_it_is_the_difference_of_squares():
    values, high, low, _, complete = integrated_gradients(lambda p: mx.square(p).sum((1, 2)), X, BASE)
    assert values.tolist() == pytest.approx([(1 + 4) - (0 + 1), (9 + 1) - (1 + 1)], rel=1e-5) and complete
    assert values.sum() == pytest.approx(high - low, rel=1e-5)


def test_it_is_the_midpoint_sum_of_gradients():
    def f(points):
        return mx.exp(points[:, 0, 0] * points[:, 1, 1]) + mx.sin(points[:, 1, 0])

    x, base = np.array(X, np.float64), np.array(BASE, np.float64)
    total = np.zeros((2, 2))
    for step in range(64):
        at = base + (step + 0.5) / 64 * (x - base)
        inner = math.exp(at[0, 0] * at[1, 1])
        total += [[inner * at[1, 1], 0.0], [math.cos(at[1, 0]), inner * at[0, 0]]]
    values, *_ = integrated_gradients(f, X, BASE, steps=64, most=64)
    np.testing.assert_allclose(values, ((x - base) * total / 64).sum(1), rtol=1e-5)


def test_steps_are_doubled_until_it_adds_up_and_doubt_is_told_when_it_never_does():
    def steep(points):
        return mx.sigmoid(20 * (points.sum((1, 2)) - 2.6))  # nearly a step, halfway between two midpoints

    x, base = mx.array([[4.0], [1.0]]), mx.zeros((2, 1))
    values, high, low, steps, complete = integrated_gradients(steep, x, base, steps=4)
    assert complete and steps > 4 and values.sum() == pytest.approx(high - low, rel=0.051)
    *_, steps, complete = integrated_gradients(steep, x, base, steps=4, most=7)
    assert (steps, complete) == (4, False)


@pytest.mark.parametrize("reply", [REPLY, "No.", "x", "Ünïcödé 🙂 works too"])
def test_what_words_add_is_the_whole_difference_from_a_reply_of_mean_tokens(tiny, reply):
    model = model_of(tiny())
    for found in explain(model, PROMPT, reply, ["empathy"]):
        assert found.is_complete and np.isfinite(found.values).all()
        gap = found.value - found.baseline
        assert abs(sum(found.values) - gap) <= 0.05 * abs(gap) + 1e-3
        assert "".join(found.pieces) == reply and "".join(word for word, _ in found.words) == reply
        assert sum(value for _, value in found.words) == pytest.approx(sum(found.values))
    unclipped = model.score(PROMPT, reply).unclipped
    first, scalar = explain(model, PROMPT, reply, ["empathy", "scalar"], most=32)
    assert first.value == pytest.approx(unclipped["empathy"], abs=1e-5)
    assert scalar.value == pytest.approx(MANIFOLD.scalar([unclipped[name] for name in MANIFOLD.names]), abs=1e-5)


def test_near_has_no_jumps_on_the_way_and_is_itself_at_its_end(tiny):
    model = model_of(tiny(), ("mean", "near"))
    unclipped = model.score(PROMPT, REPLY).unclipped
    for found in explain(model, PROMPT, REPLY, ["empathy", "curiosity"]):
        assert found.is_complete and found.value == pytest.approx(unclipped[found.output], abs=1e-5)
        gap = found.value - found.baseline
        assert abs(sum(found.values) - gap) <= 0.05 * abs(gap) + 1e-3


@pytest.mark.parametrize("reply", ["What, you? No; what.", "x", "no"])
def test_counts_of_words_are_given_to_their_words_exactly(tiny, reply):
    model = worded_model(tiny())
    without = model.beside(model.features.read([(PROMPT, reply)])[0], [(PROMPT, "")])
    unclipped = dict(zip(OUTPUTS, model.predict(without)[0][0].tolist(), strict=True))
    whole = model.score(PROMPT, reply).unclipped
    (found,) = explain(model, PROMPT, reply, ["empathy"])
    assert found.is_complete and found.value == pytest.approx(whole["empathy"], abs=1e-5)
    gap = found.value - found.baseline
    assert abs(sum(found.values) - gap) <= 0.05 * abs(gap) + 1e-3
    where = places(model, PROMPT, reply, OUTPUTS)
    for output in OUTPUTS:
        told = where[output]
        assert sum(told["values"]) + told["elsewhere"] + told["start"] == pytest.approx(whole[output], abs=2e-5)
    model.words.weights[:] = 0.0  # what is left is what states say
    (states,) = explain(model, PROMPT, reply, ["empathy"])
    added = whole["empathy"] - unclipped["empathy"]
    assert sum(found.values) - sum(states.values) == pytest.approx(added, abs=1e-4)
    assert (added == 0.0) == (reply == "x")
    assert states.baseline == pytest.approx(found.baseline, abs=1e-4)


def test_what_is_added_exactly_counts_in_how_far_the_rest_may_be_off():
    w = mx.array([[1.0], [1.0]])

    def bent(points):
        return mx.square(points[:, :, 0] @ w[:, 0])

    x, base = mx.array([[2.0], [1.0]]), mx.zeros((2, 1))
    options = {"steps": 1, "most": 64}
    *_, alone, _ = integrated_gradients(lambda p: bent(p) * p[:, 0, 0], x, base, **options)
    *_, beside, _ = integrated_gradients(lambda p: bent(p) * p[:, 0, 0], x, base, beside=-18.0, **options)
    *_, helped, _ = integrated_gradients(lambda p: bent(p) * p[:, 0, 0], x, base, beside=1000.0, **options)
    assert helped < alone < beside  # a cube: more points where the whole difference is nothing


def test_given_vectors_are_read_in_place_of_the_tokens_own_and_the_model_is_as_before(tiny):
    lm = tiny()
    backbone = model_of(lm).features
    passage, before = backbone.reader.passage(PROMPT, REPLY), lm.fingerprint()
    own = backbone.reader.embed(mx.array(passage.tokens))
    np.testing.assert_array_equal(backbone.features([passage]), backbone.features([passage], own[None]))
    assert not np.allclose(backbone.features([passage]), backbone.features([passage], own[None] * 2))
    assert lm.fingerprint() == before


def test_no_adapter_is_explained(tiny):
    lm = tiny()
    plain = explain(model_of(lm), PROMPT, REPLY, ["curiosity"])
    lora.attach(lm, lora.Shape(rank=2), seed=0)
    for _, layer in lm.model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = mx.ones_like(layer.lora_b)
    assert explain(model_of(lm), PROMPT, REPLY, ["curiosity"]) == plain


def test_places_add_up_exactly_with_what_no_place_makes(tiny):
    model = model_of(tiny())
    unclipped = model.score(PROMPT, REPLY).unclipped
    for output, found in places(model, PROMPT, REPLY, OUTPUTS).items():
        whole = sum(found["values"]) + found["elsewhere"] + found["start"]
        assert whole == pytest.approx(unclipped[output], abs=2e-5)
    asked = model_of(tiny(), (*POOLINGS, "judge"))
    unclipped = asked.score(PROMPT, REPLY).unclipped["empathy"]
    found = places(asked, PROMPT, REPLY, ["empathy"])["empathy"]
    assert sum(found["values"]) + found["elsewhere"] + found["start"] == pytest.approx(unclipped, abs=2e-5)
    (words,) = explain(asked, PROMPT, REPLY, ["empathy"])
    assert words.is_complete and words.value == pytest.approx(unclipped, abs=1e-4)
    exact = places(model_of(tiny(), ("mean", "max", "last")), PROMPT, REPLY, ["empathy"])["empathy"]
    assert exact["elsewhere"] == 0.0 and any(exact["values"])


def test_leaving_out_is_scoring_without(tiny):
    model = model_of(tiny())
    whole = model.score(PROMPT, REPLY).unclipped["empathy"]
    found = leave_out(model, PROMPT, REPLY, ["empathy"])
    assert [unit["text"] for unit in found] == ["That sounds heavy.", "What would help most?", "You could rest."]
    without = model.score(PROMPT, "That sounds heavy. You could rest.").unclipped["empathy"]
    assert found[1]["lost"]["empathy"] == pytest.approx(whole - without, abs=1e-6)
    assert [unit["text"] for unit in leave_out(model, PROMPT, "good day to me", ["scalar"])] == [
        "good",
        "day",
        "to",
        "me",
    ]
    assert leave_out(ngram_model(), "p", "good day to you", ["empathy"])  # needs no gradient


def test_agreement_is_a_rank_correlation_over_sentences():
    pieces = ("One. ", "Two", ". ", "Three.")
    found = Attribution("empathy", pieces, (0.3, 0.1, 0.1, -0.5), 0.0, 0.0, 32, True)
    units = [
        {"start": start, "stop": stop, "lost": {"empathy": lost}}
        for start, stop, lost in ((0, 5, 0.9), (5, 10, 0.5), (10, 16, 0.1))
    ]
    assert attribution.agreement(found, units) == pytest.approx(1.0)
    units[0]["lost"]["empathy"] = 0.0
    assert attribution.agreement(found, units) == pytest.approx(-0.5)
    assert attribution.agreement(found, units[:2]) is None


def test_what_cannot_be_explained_says_so(tiny):
    model = model_of(tiny())
    with pytest.raises(InputError, match="only encoder and lm"):
        explain(ngram_model(), "p", "good day", ["empathy"])
    with pytest.raises(InputError, match="says nothing"):
        explain(model, PROMPT, "  ", ["empathy"])
    with pytest.raises(InputError, match="humour is not an output"):
        explain(model, PROMPT, REPLY, ["humour"])
    with pytest.raises(InputError, match="says nothing"):
        attribution.report(model, PROMPT, "", ["empathy"])


def test_the_page_holds_every_word_and_escapes_it(tiny):
    told = []
    found = attribution.report(
        model_of(tiny()), "Is 1 < 2?", "<b>Yes</b> & sure.", ["scalar"], steps=4, progress=told.append
    )
    steps = found["outputs"][0]["steps"]
    assert told[-1] == {"stage": "words behind scalar", "done": steps, "total": steps}
    page = highlight.page(found)
    assert "&lt;b&gt;Yes" in page and "<b>Yes" not in page and "scalar" in page and "1 &lt; 2" in page
