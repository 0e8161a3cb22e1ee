"""A shared prompt says what each reply says with a prompt of its own: values and gradients, for every plain family."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from hominem_mlx.models import lora, prefix
from hominem_mlx.training import cutting
from hominem_mlx.training import logprobs as training_logprobs
from hominem_mlx.training import rows as training_rows
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.rows import Row, collate

SHAPE = dict(  # what the families ask for, under all the names they use
    **dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2),
    **dict(head_dim=8, vocab_size=64, max_position_embeddings=512, rope_theta=1e4, rms_norm_eps=1e-6, norm_eps=1e-6),
    **dict(layer_norm_eps=1e-5, norm_epsilon=1e-5, layer_norm_epsilon=1e-5, tie_word_embeddings=False, bias=False),
    **dict(attention_bias=False, mlp_bias=False, partial_rotary_factor=0.5, use_qkv_bias=False, use_bias=False),
    **dict(original_max_position_embeddings=512, logits_scaling=1.0, attention_multiplier=0.3, residual_multiplier=1.0),
    **dict(embedding_multiplier=1.0, logit_scale=1.0, n_embd=32, n_head=4, n_layer=2, n_positions=512, n_ctx=512),
    **dict(qk_layernorm=False, rope_scaling=None, hidden_act="silu", no_rope_layer_interval=2),
    **dict(query_pre_attn_scalar=8, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    **dict(state_size=4, conv_kernel=3, time_step_rank=4, use_conv_bias=True, intermediate=64),
    **dict(sliding_window=8, sliding_window_pattern=2),
)
PLAIN = [
    *["qwen3", "qwen2", "llama", "gemma", "phi3", "phi", "cohere", "granite"],
    *["olmo2", "starcoder2", "stablelm", "glm4", "smollm3", "gpt2", "internlm2"],
]
OTHER = ["gemma2", "gemma3_text", "mamba"]  # a mask of its own, a sliding window, a recurrence

NOT_CHECKPOINTED = ["gpt2"]  # its blocks go by another name

PROMPTS = [[5, 9, 2] * 16, [7, 3, 11, 8, 4, 6, 1, 9, 12] * 8]
ROWS = [Row(PROMPTS[owner], reply) for owner, reply in ((0, [3, 4]), (1, [5]), (0, [6, 7, 8, 9, 1]), (1, [2, 2, 3]))]


def random_model(family):
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict({**SHAPE, "model_type": family}))
    mx.random.seed(1)
    scale = {"gemma": 0.1, "gemma2": 0.1, "gemma3_text": 0.1}.get(family, 0.3)
    model.update(tree_map(lambda v: mx.random.normal(v.shape) * scale if v.ndim > 1 else v, model.parameters()))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def language_model(family, tiny):
    """A random model of the family in the place of the tiny one."""
    lm = tiny()
    lm.model = random_model(family)
    lm.model.freeze()
    return lm


@pytest.mark.parametrize("spread", [False, True], ids=["in one lane", "in all lanes"])
@pytest.mark.parametrize("family", PLAIN)
def test_shared_prompts_give_the_log_probabilities_and_gradients_of_single_rows(family, spread, tiny, monkeypatch):
    if spread:
        streams = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(3))
        for module in (training_rows, training_logprobs):
            monkeypatch.setattr(module, "lanes", lambda: streams)
    lm = language_model(family, tiny)
    lm.prompt_tokens = lambda text: [1, 2, 3]
    lora.attach(lm, lora.Shape(rank=2, scale=2.0), seed=0)
    mx.random.seed(2)
    lora.set_parameters(
        lm.model, {k: mx.random.normal(v.shape) * 0.1 for k, v in lora.adapter_parameters(lm.model).items()}
    )
    logprobs = LogProbs(lm)
    with monkeypatch.context() as patch:
        if spread:
            patch.setattr(cutting, "_in_one_lane_each", lambda *_: ([], np.inf))
        shared = logprobs.collate(ROWS)
    assert all(block.prompts is not None for block in shared.blocks), f"{family} shares no prompt"
    assert all(block.spread == spread for block in shared.blocks)
    alone = [collate([row]) for row in ROWS]
    weight = mx.array([1.0, -2.0, 0.5, 3.0])

    def loss(batches):
        return (mx.concatenate([logprobs(batch) for batch in batches]) * weight).sum()

    wanted, by_row = nn.value_and_grad(lm.model, loss)(alone)
    for checkpoint in (0.0, 0.5, 1.0):
        logprobs = LogProbs(lm, checkpoint=checkpoint)
        value, gradient = nn.value_and_grad(lm.model, loss)([shared])
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert logprobs.checkpoints == (0 if family in NOT_CHECKPOINTED else round(2 * checkpoint))
        for (name, ours), (_, theirs) in zip(tree_flatten(gradient), tree_flatten(by_row), strict=True):
            most = mx.abs(theirs).max().item()
            assert mx.abs(ours - theirs).max().item() <= 1e-5 * max(most, 1e-3), name


@pytest.mark.parametrize("family", OTHER)
def test_families_that_look_back_in_their_own_way_are_found_out(family):
    assert not prefix.can_share(random_model(family))


def test_a_model_that_cannot_share_reads_each_prompt_with_its_reply(tiny):
    lm = tiny()
    logprobs = LogProbs(lm)
    wanted = reference_logprobs(logprobs, ROWS)
    logprobs._shares = False
    batch = logprobs.collate(ROWS)
    assert all(block.prompts is None for block in batch.blocks)
    assert logprobs(batch).tolist() == pytest.approx(wanted, rel=1e-5)


def test_prompts_are_shared_only_where_that_is_less_work():
    long, short = list(range(3, 60)), list(range(3, 9))
    pair = [Row(long, [1, 2]), Row(long, [3, 4])]
    assert any(block.prompts for block in collate(pair * 4, share=True).blocks)
    different = [Row([*short, i], [1, 2]) for i in range(8)]
    assert not any(block.prompts for block in collate(different, share=True).blocks)


def test_a_prompt_stays_in_one_lane_when_there_are_enough():
    rows = [Row([9] * 200 + [i], [1] * n) for i in range(4) for n in (3, 9, 5)]
    blocks = collate(rows, share=True).blocks
    assert sum(block.prompts.tokens.shape[0] for block in blocks) == 4
    assert sorted(np.concatenate([np.array(block.targets) for block in blocks]).tolist()) == [1] * (4 * 17)


def test_a_prompt_of_one_token_can_be_shared(tiny):
    rows = [Row([5], [3, 4]), Row([5], [6])] + ROWS
    lm = tiny()
    logprobs = LogProbs(lm)
    wanted = [LogProbs(lm)(collate([row])).item() for row in rows]
    assert logprobs(logprobs.collate(rows)).tolist() == pytest.approx(wanted, rel=1e-5)
