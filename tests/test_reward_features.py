"""What the head reads: pooling, the frozen backbone without its adapter, the cache, and the n-gram baseline."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hominem_mlx.errors import ModelError
from hominem_mlx.models import lora
from hominem_mlx.reward.features import SHARD, Backbone, LmReader, layer_numbers, pool
from hominem_mlx.reward.model import prompt_columns
from hominem_mlx.reward.ngram import NgramFeatures, pieces

PAIRS = [
    ("I feel tired today.", "That sounds heavy; what would help you most right now?"),
    ("Is the earth flat?", "No."),
    ("Tell me what to do. " * 6, "You could ask her, or wait a day; which feels right to you? " * 3),
    ("日本語で 🙂", "Ünïcödé 🙂 works too"),
]
POOLINGS = ("mean", "max", "std", "gap", "last", "prompt", "near")


@pytest.fixture
def backbone(tiny) -> Backbone:
    """The random model, all poolings, embeddings and both blocks."""
    return Backbone(LmReader(tiny()), [0, 1, 2], POOLINGS)


def test_pooling_by_hand():
    hidden = mx.array([[[1.0, 0.0], [3.0, 2.0], [2.0, 8.0], [6.0, 4.0], [9.0, 9.0]]])
    made = pool(hidden, mx.array([[0, 2]]), mx.array([[2, 4]]), POOLINGS)
    assert made.tolist()[0] == [
        *(4.0, 6.0),  # mean of (2, 8) and (6, 4)
        *(6.0, 8.0),  # maximum
        *(2.0, 2.0),  # standard deviation
        *(2.0, 5.0),  # |reply (4, 6) - prompt (2, 1)|
        *(6.0, 4.0),  # last
        *(2.0, 1.0),  # mean of the prompt (1, 0) and (3, 2)
        *(2.0, 4.0),  # both are nearest to (3, 2): |(2, 8) - (3, 2)| and |(6, 4) - (3, 2)|, (1, 6) and (3, 2)
    ]


def test_pooling_never_looks_at_padding_and_bears_a_prompt_of_nothing():
    hidden = mx.array([[[1.0], [-5.0], [99.0]]])
    assert pool(hidden, mx.array([[0, 1]]), mx.array([[1, 2]]), ("mean", "max", "std")).tolist() == [[-5.0, -5.0, 0.0]]
    assert pool(hidden, mx.array([[0, 0]]), mx.array([[1, 2]]), ("gap", "near", "prompt")).tolist() == [[5.0, 5.0, 0.0]]


def test_other_states_can_say_which_token_is_nearest():
    hidden = mx.array([[[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 3.0]]])
    spans = mx.array([[0, 2]] * 2), mx.array([[2, 3]] * 2)
    assert pool(hidden, *spans, ("near",)).tolist() == [[2.0, 1.0], [1.0, 2.0]]
    assert pool(hidden, *spans, ("near",), hidden[:1]).tolist() == [[2.0, 1.0], [0.0, 3.0]]
    assert pool(hidden, *spans, ("near",), hidden[::-1]).tolist() == [[3.0, 0.0], [0.0, 3.0]]


def test_a_reply_that_repeats_its_prompt_is_near_in_any_order():
    words = mx.random.normal((4, 6), key=mx.random.key(0))
    hidden = mx.concatenate([words, words[::-1], 100 * mx.ones((2, 6))])[None]
    near = pool(hidden, mx.array([[0, 4]]), mx.array([[4, 8]]), ("near",))
    assert mx.abs(near).max().item() < 1e-5
    assert mx.abs(pool(hidden, mx.array([[0, 2]]), mx.array([[4, 8]]), ("near",))).max().item() > 0.1


def test_layers_are_shares_of_the_depth():
    assert layer_numbers((0.0, 0.33, 0.67, 1.0), 6) == [0, 2, 4, 6]
    assert layer_numbers((0.0, 0.1, 1.0), 2) == [0, 2]  # each once
    assert layer_numbers((0.5, 0.67), 28) == [14, 19]


def test_a_batch_gives_what_each_pair_gives_alone(backbone):
    together, flags = backbone.read(PAIRS)
    alone = np.concatenate([backbone.read([pair])[0] for pair in PAIRS])
    np.testing.assert_allclose(together, alone, atol=2e-5)
    assert together.shape == (4, 3 * len(POOLINGS) * 32) and flags == [()] * 4


def test_layer_zero_is_the_embedding_of_the_tokens(tiny):
    lm = tiny()
    features, _ = Backbone(LmReader(lm), [0], ("last",)).read([("hi", "you")])
    expected = lm.model.model.embed_tokens(mx.array([lm.tokenizer.eos_token_id]))
    np.testing.assert_array_equal(features, np.array(expected))


def test_layers_that_are_not_there_are_refused(tiny):
    with pytest.raises(ModelError, match="has 2 layers"):
        Backbone(LmReader(tiny()), [3], ("mean",))


def test_an_adapter_is_never_read_through_and_comes_back_whole(tiny):
    lm = tiny()
    backbone = Backbone(LmReader(lm), [1, 2], ("mean",))
    bare, _ = backbone.read(PAIRS)
    lora.attach(lm, lora.Shape(rank=4, scale=2.0, num_layers=1), seed=0)
    rng = np.random.default_rng(0)
    values = {n: mx.array(rng.normal(size=v.shape), mx.float32) for n, v in lora.adapter_parameters(lm.model).items()}
    lora.set_parameters(lm.model, values)
    prompt = mx.array([lm.prompt_tokens("hi")])
    adapted = lm.model(prompt)
    trainable = dict(tree_flatten(lm.model.trainable_parameters())).keys()

    read, _ = backbone.read(PAIRS)

    assert np.array_equal(read, bare)
    assert mx.array_equal(lm.model(prompt), adapted).item()
    with lora.without_adapter(lm):
        assert not mx.array_equal(lm.model(prompt), adapted).item()
    after = lora.adapter_parameters(lm.model)
    assert after.keys() == values.keys() and all(mx.array_equal(after[n], values[n]).item() for n in values)
    assert dict(tree_flatten(lm.model.trainable_parameters())).keys() == trainable


def test_the_adapter_comes_back_even_when_reading_fails(tiny):
    lm = tiny()
    lora.attach(lm, lora.Shape(rank=4), seed=0)
    with pytest.raises(RuntimeError, match="in between"), lora.without_adapter(lm):
        assert not lora.adapter_parameters(lm.model)
        raise RuntimeError("in between")
    assert lora.adapter_parameters(lm.model)


def test_what_exceeds_the_context_is_cut_and_said(tiny):
    backbone = Backbone(LmReader(tiny()), [2], ("mean",))  # 512 places
    features, flags = backbone.read([("hello " * 900, "fine"), ("hello", "fine " * 900), ("hello", "fine")])
    assert flags == [("truncated",), ("truncated",), ()]
    assert np.isfinite(features).all()


# --- cache ----------------------------------------------------------------------------------------------------------


def count_reads(backbone, monkeypatch) -> list[int]:
    seen: list[int] = []
    pooled = backbone.features
    monkeypatch.setattr(backbone, "features", lambda passages: seen.append(len(passages)) or pooled(passages))
    return seen


def test_what_was_read_once_is_not_read_again(backbone, home, monkeypatch):
    seen = count_reads(backbone, monkeypatch)
    first = backbone.read_cached([*PAIRS, PAIRS[0]], home)
    assert seen == [1] * 4  # alone, and a repeated pair once
    again = backbone.read_cached(PAIRS[::-1], home)
    assert len(seen) == 4
    np.testing.assert_array_equal(again, first[:4][::-1])


def test_cached_features_hang_on_the_pair_alone(backbone, home, tmp_path):
    few = backbone.read_cached(PAIRS[:1], home)
    many = backbone.read_cached(PAIRS, tmp_path / "other")
    np.testing.assert_array_equal(few[0], many[0])
    np.testing.assert_array_equal(backbone.read_cached(PAIRS, home), many)


def test_prompt_and_reply_are_not_confused_by_their_border(backbone, home):
    one, other = backbone.read_cached([("a b", "c"), ("a", "b c")], home)
    assert not np.array_equal(one, other)


def test_other_layers_and_poolings_have_a_cache_of_their_own(tiny, home):
    reader = LmReader(tiny())
    for layers, poolings in (([1], ("mean",)), ([2], ("mean",)), ([1], ("max",))):
        Backbone(reader, layers, poolings).read_cached(PAIRS[:1], home)
    assert len(list((home / "cache" / "features").iterdir())) == 3


class Killed(Exception):
    """Stands for kill -9 between two shards."""


def test_a_killed_run_goes_on_where_it_was(backbone, home, tmp_path, monkeypatch):
    pairs = [(f"question {number}", "yes") for number in range(SHARD + 9)]

    def die(step):
        if step["done"] > SHARD:
            raise Killed

    with pytest.raises(Killed):
        backbone.read_cached(pairs, home, die)
    assert len(list(home.glob("cache/features/*/*"))) == 1
    seen = count_reads(backbone, monkeypatch)
    steps = []
    finished = backbone.read_cached(pairs, home, steps.append)
    assert len(seen) == 9 and steps[-1] == {"stage": "features", "done": 9, "total": 9}
    np.testing.assert_array_equal(finished, backbone.read_cached(pairs, tmp_path / "undisturbed"))


@pytest.mark.parametrize("damage", [b"", b"\x10", b"\xff" * 64])
def test_a_damaged_shard_is_computed_again(backbone, home, damage):
    first = backbone.read_cached(PAIRS, home)
    shard = next(home.glob("cache/features/*/*.safetensors"))
    shard.write_bytes(damage)
    np.testing.assert_array_equal(backbone.read_cached(PAIRS, home), first)
    assert shard.stat().st_size > 64  # mended


# --- n-grams --------------------------------------------------------------------------------------------------------


def test_pieces_by_hand():
    assert sorted(pieces("Oh, no")) == sorted(
        ["w:oh", "w:,", "w:no", "w:oh ,", "w:, no"]
        + ["c: oh", "c:oh,", "c:h, ", "c:, n", "c: no", "c:no "]
        + ["c: oh,", "c:oh, ", "c:h, n", "c:, no", "c: no "]
        + ["c: oh, ", "c:oh, n", "c:h, no", "c:, no "]
    )
    assert "w:don't" in set(pieces("DON'T")) and not list(pieces("")) and list(pieces("你好"))


def test_ngram_vocabulary_is_that_of_the_fitted_replies_only():
    fitted = NgramFeatures.fit([("secret prompt", "good day"), ("secret prompt", "good night")])
    assert "w:good" in fitted.vocabulary
    assert not any("secret" in piece or "day" in piece for piece in fitted.vocabulary)
    assert fitted.vocabulary == sorted(fitted.vocabulary)
    features, _ = fitted.read([("p", "good"), ("p", "wholly unseen xyz")])
    assert np.linalg.norm(features[0]) == pytest.approx(1.0, abs=1e-6)
    assert not features[1].any()


def test_ngram_weight_by_hand():
    fitted = NgramFeatures(["w:good", "w:day"], np.array([1.0, 2.0]))
    features, _ = fitted.read([("p", "good good day")])
    row = np.array([1 + math.log(2), 2.0])
    np.testing.assert_allclose(features[0], row / np.linalg.norm(row), rtol=1e-6)


def test_idf_by_hand():
    fitted = NgramFeatures.fit([("p", "aa bb"), ("p", "aa bb"), ("p", "aa")])
    weight = dict(zip(fitted.vocabulary, fitted.idf, strict=True))
    assert weight["w:aa"] == pytest.approx(1.0)  # in all three: log(4 / 4) + 1
    assert weight["w:bb"] == pytest.approx(math.log(4 / 3) + 1)


# --- questions asked after the reply --------------------------------------------------------------------------------

QUESTIONS = ("Is it kind?", "Does the reply stay with what the person said?")


def test_a_question_is_the_next_turn_of_the_chat_template(tiny):
    lm = tiny()
    talk = [
        {"role": "user", "content": "hi there"},
        {"role": "assistant", "content": "good day"},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    parts = lm.prompt_tokens("hi there") + lm.response_tokens("good day") + lm.question_tokens(QUESTIONS[0])
    assert lm.tokenizer.decode(parts) == lm.tokenizer.decode(lm.chat_tokens(talk))


def by_reading_the_whole(lm, pair, layers):
    """A second implementation: each question at the end of a text of its own."""
    start = lm.prompt_tokens(pair[0]) + lm.response_tokens(pair[1])
    blocks = []
    for question in QUESTIONS:
        tokens = mx.array([start + lm.question_tokens(question)])
        blocks += [np.array(h[0, -1]) for h in lm.hidden_states(tokens, layers)]
    return np.concatenate(blocks)


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_would_be_answered_is_what_reading_the_whole_text_gives(tiny, goes_on, monkeypatch):
    lm = tiny()
    backbone = Backbone(LmReader(lm), [0, 1, 2], ("mean", "judge", "max"), QUESTIONS)
    assert backbone.reader._can_go_on
    monkeypatch.setattr(backbone.reader, "_can_go_on", goes_on)
    features, _ = backbone.read(PAIRS)
    pooled, _ = Backbone(LmReader(lm), [0, 1, 2], ("mean", "max")).read(PAIRS)
    np.testing.assert_allclose(features[:, : pooled.shape[1]], pooled, atol=1e-4)
    expected = np.stack([by_reading_the_whole(lm, pair, [0, 1, 2]) for pair in PAIRS])
    np.testing.assert_allclose(features[:, pooled.shape[1] :], expected, atol=1e-4)
    owner = backbone.owner(features.shape[1])
    assert (owner[: pooled.shape[1]] == -1).all() and owner[pooled.shape[1] :].tolist() == [0] * 96 + [1] * 96
    one, other = np.split(expected, 2, axis=1)
    assert np.abs(one - other).max() > 1e-2  # each question has an answer of its own


def test_given_vectors_are_read_in_place_of_the_tokens_before_a_question_too(tiny):
    backbone = Backbone(LmReader(tiny()), [1, 2], ("mean", "judge"), QUESTIONS)
    passages = [backbone.reader.passage(*pair) for pair in PAIRS[:2]]
    longest = max(len(passage.tokens) for passage in passages)
    tokens = mx.array([passage.tokens + [0] * (longest - len(passage.tokens)) for passage in passages])
    own = backbone.reader.embed(tokens)
    plain = backbone.features(passages)
    np.testing.assert_allclose(backbone.features(passages, own), plain, atol=1e-4)
    slope = mx.grad(lambda x: backbone.features(passages, x)[:, -32:].sum())(own)
    assert mx.abs(slope[:, 0]).max().item() > 0  # the answer hangs on the first token


def test_questions_are_part_of_what_features_depend_on(tiny):
    reader = LmReader(tiny())
    specs = [Backbone(reader, [2], ("mean", "judge"), asked).spec for asked in (QUESTIONS, QUESTIONS[::-1])]
    plain = Backbone(reader, [2], ("mean",), QUESTIONS).spec
    assert len({spec.hash for spec in (*specs, plain)}) == 3 and plain.questions == ()


def test_a_text_as_long_as_the_context_leaves_room_for_the_question(tiny):
    lm = tiny()
    backbone = Backbone(LmReader(lm), [2], ("judge",), QUESTIONS)
    longest = max(len(lm.question_tokens(question)) for question in QUESTIONS)
    passage = backbone.reader.passage("hello", "fine " * 900)
    assert passage.flags == ("truncated",) and len(passage.tokens) + longest == 512


def test_the_prompts_own_features_are_found_beside_answers(tiny):
    lm = tiny()
    backbone = Backbone(LmReader(lm), [1, 2], ("mean", "judge", "prompt"), QUESTIONS)
    features, _ = backbone.read(PAIRS)
    alone, _ = Backbone(LmReader(lm), [1, 2], ("prompt",)).read(PAIRS)
    columns = prompt_columns(backbone.spec, features.shape[1])
    np.testing.assert_allclose(features[:, columns], alone, atol=1e-4)


def test_an_encoder_cannot_be_asked():
    class Reader:
        kind, name, hash, num_layers = "encoder", "all-MiniLM-L6-v2", "", 6

    with pytest.raises(ModelError, match="all-MiniLM-L6-v2 cannot be asked"):
        Backbone(Reader(), [1], ("judge",), QUESTIONS)
