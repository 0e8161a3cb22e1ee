"""A model is loaded, adapted and put back without a trace."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.models import backbone, lora, sampling

SHAPE = lora.Shape(rank=4, scale=2.0)


def logits(lm):
    return np.array(lm.model(mx.array([lm.prompt_tokens("Tell me what to do.")])))


def shake(lm, seed):
    """Give an attached adapter values that matter."""
    mx.random.seed(seed)
    values = lora.adapter_parameters(lm.model)
    lora.set_parameters(lm.model, {name: 0.3 * mx.random.normal(value.shape) for name, value in values.items()})


def test_a_fresh_adapter_changes_nothing_and_detaching_restores_every_bit(tiny):
    lm = tiny()
    before, digest = logits(lm), lm.fingerprint()
    lora.attach(lm, SHAPE, seed=1)
    assert np.array_equal(logits(lm), before)
    shake(lm, 2)
    assert not np.allclose(logits(lm), before)
    assert lm.fingerprint() == digest
    lora.detach(lm)
    assert np.array_equal(logits(lm), before)
    assert lm.fingerprint() == digest


def test_swapping_a_b_a_restores_logits_exactly(tiny):
    lm = tiny()
    lora.attach(lm, SHAPE, seed=1)
    shake(lm, 1)
    a, first = lora.adapter_parameters(lm.model), logits(lm)
    shake(lm, 2)
    b = lora.adapter_parameters(lm.model)
    lora.set_parameters(lm.model, a)
    lora.set_parameters(lm.model, b)
    assert not np.allclose(logits(lm), first)
    lora.set_parameters(lm.model, a)
    assert np.array_equal(logits(lm), first)


def test_a_saved_adapter_loads_here_and_in_mlx_lm_with_the_same_effect(tiny, tmp_path):
    lm = tiny()
    lora.attach(lm, lora.Shape(rank=4, scale=2.0, num_layers=1), seed=1)
    shake(lm, 3)
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora.save_adapter(lm, folder, lora.Shape(rank=4, scale=2.0, num_layers=1))
    wanted = logits(lm)
    ours = backbone.load(str(lm.folder), adapter=folder)
    assert np.array_equal(logits(ours), wanted)
    theirs, _ = mlx_lm.load(str(lm.folder), adapter_path=str(folder))
    assert np.allclose(np.array(theirs(mx.array([lm.prompt_tokens("Tell me what to do.")]))), wanted, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused_with_every_reason_and_leaves_no_trace(tiny, tmp_path):
    lm = tiny()
    lora.attach(lm, SHAPE, seed=1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    values = lora.adapter_parameters(lm.model)
    names = list(values)
    wrong = {**values, "model.layers.9.lora_a": mx.zeros((2, 2)), names[0]: mx.zeros((1, 1))}
    wrong[names[1]] = mx.full(values[names[1]].shape, float("nan"))
    wrong.pop(names[2])
    lora.save_adapter(lm, folder, SHAPE, values)
    mx.save_safetensors(str(folder / lora.WEIGHTS), wrong)
    fresh = tiny()
    with pytest.raises(InputError) as error:
        lora.load_adapter(fresh, folder)
    text = str(error.value)
    assert "is missing" in text and "not a layer" in text and "has shape" in text and "NaN" in text
    assert not lora.adapter_parameters(fresh.model)


def test_an_adapter_of_another_base_is_refused_by_name(tiny, tmp_path):
    lm = tiny()
    lora.attach(lm, SHAPE, seed=1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora.save_adapter(lm, folder, SHAPE)
    other = tiny()
    other.hash = "0" * 64
    with pytest.raises(InputError, match="was trained on"):
        lora.load_adapter(other, folder)


def test_hidden_states_end_in_the_states_the_head_reads(tiny):
    lm = tiny()
    tokens = mx.array([lm.prompt_tokens("I feel tired today.")])
    first, last = lm.hidden_states(tokens, [1, 2])
    assert first.shape == last.shape == (1, tokens.shape[1], 32)
    assert np.allclose(np.array(lm.model.model.norm(last)), np.array(lm.model.model(tokens)), atol=1e-5)
    assert not np.allclose(np.array(first), np.array(last))


def test_the_head_split_is_the_whole_model(tiny):
    lm = tiny()
    body, head = lm.body_and_head()
    tokens = mx.array([lm.prompt_tokens("Is the earth flat?")])
    assert np.allclose(np.array(head(body(tokens))), np.array(lm.model(tokens)), atol=1e-5)


def test_sampling_repeats_with_its_seed_and_leaves_the_global_state_alone(tiny):
    lm = tiny()
    mx.random.seed(7)
    expected = mx.random.uniform().item()
    mx.random.seed(7)
    first = lm.complete(["hello", "who are you"], max_tokens=12, temperature=1.0, seed=3)
    assert mx.random.uniform().item() == expected
    assert first == lm.complete(["hello", "who are you"], max_tokens=12, temperature=1.0, seed=3)
    assert first != lm.complete(["hello", "who are you"], max_tokens=12, temperature=1.0, seed=4)


def test_replies_of_a_batch_are_those_of_each_prompt_alone(tiny):
    lm = tiny()
    prompts = ["hello", "what is my sister called?", "is it?"]
    together = lm.complete(prompts, max_tokens=10, temperature=0.0, seed=0)
    assert together == [lm.complete([prompt], max_tokens=10, temperature=0.0, seed=0)[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["no/such-model-here", "nowhere", "a/b/c"])
def test_a_model_that_is_not_there_says_what_to_do(name):
    with pytest.raises(ModelError, match=r"folder|download"):
        backbone.load(name)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        backbone.load(str(tmp_path))


def test_several_answers_to_a_prompt_stand_together_and_read_it_once(tiny, monkeypatch):
    lm, prompts = tiny(), ["Tell me what to do.", "Is the earth flat?", "I feel tired today."]
    alone = sampling.answers(lm, prompts, max_tokens=6, temperature=0.0, seed=0)
    body, read = type(lm.model).__call__, []

    def count(self, tokens, *args, **kwargs):
        read.append(tokens.size)
        return body(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(lm.model), "__call__", count)
    together = sampling.answers(lm, prompts, each=3, max_tokens=6, temperature=0.0, seed=0)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone for _ in range(3)]
    assert sum(read[:3]) == sum(len(lm.prompt_tokens(prompt)) - 1 for prompt in prompts) and set(read[3:]) <= {1, 8, 9}
    first, second = (sampling.answers(lm, prompts, each=2, max_tokens=6, temperature=1.0, seed=s) for s in (1, 2))
    assert first[0].tokens != first[1].tokens and first != second
