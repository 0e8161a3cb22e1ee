"""Neighbours' own steps. Losses, batching and caches are theirs, called as their trainers call them.

Their trainers keep the step itself as a closure inside a loop that loads data, prints and saves, so those few lines
are repeated here, each naming the place it stands for. Learning rate, optimiser and adapter are the same on all sides.
"""

import os
import tempfile
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from bench_models import BETA, RANK, RATE, SCALE, Pair, Shape, add_adapter, make_model
from mlx.utils import tree_flatten


def _adam(model: nn.Module) -> optim.Optimizer:
    """With its state there from the start, so that a compiled step is traced only once."""
    optimizer = optim.Adam(RATE)
    optimizer.init(model.trainable_parameters())
    return optimizer


class MlxLmSft:
    """mlx-lm: `tuner.trainer.train` with its `default_loss` and `iterate_batches`, compiled as there."""

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        from mlx_lm.tuner.trainer import default_loss, iterate_batches

        self.model = add_adapter(make_model(shape))
        self.optimizer = _adam(self.model)
        self.state = [self.model.state, self.optimizer.state, mx.random.state]
        data = [(pair.prompt + pair.chosen, len(pair.prompt)) for pair in pairs]
        self.batches = lambda: iterate_batches(data, len(data), 4096)
        value_and_grad = nn.value_and_grad(self.model, default_loss)

        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(batch):
            (loss, _), gradients = value_and_grad(self.model, *batch)
            self.optimizer.update(self.model, gradients)
            return loss

        self.step = step

    def __call__(self) -> float:
        loss = self.step(next(self.batches()))
        mx.eval(self.state, loss)
        return loss.item()


class MlxLmLoraDpo:
    """mlx-lm-lora: `trainer.dpo_trainer.train_dpo` with its scores, loss and batches, compiled as there.

    Its command line always loads a second model as the reference, so here is one too.
    """

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        from mlx_lm_lora.trainer.dpo_trainer import compute_score, dpo_loss, get_token_scores, iterate_dpo_batches

        self.model, reference = add_adapter(make_model(shape)), make_model(shape)
        self.optimizer = _adam(self.model)
        self.state = [self.model.state, self.optimizer.state, mx.random.state]
        data = [
            {
                "chosen": pair.prompt + pair.chosen,
                "rejected": pair.prompt + pair.rejected,
                "chosen_prompt_length": len(pair.prompt),
                "rejected_prompt_length": len(pair.prompt),
            }
            for pair in pairs
        ]
        self.batches = lambda: iterate_dpo_batches(data, len(data), 4096, train=True)

        def loss(chosen, rejected, chosen_masks, rejected_masks):
            sides = ((chosen, chosen_masks), (rejected, rejected_masks))
            policy = [compute_score(get_token_scores(self.model, *side), side[1], "sigmoid") for side in sides]
            held = [mx.stop_gradient(get_token_scores(reference, *side)) for side in sides]
            held = [compute_score(scores, side[1], "sigmoid") for scores, side in zip(held, sides, strict=True)]
            return dpo_loss(*policy, *held, chosen_masks, rejected_masks, beta=BETA, delta=50.0)

        value_and_grad = nn.value_and_grad(self.model, loss)

        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(batch):
            (loss, *rest), gradients = value_and_grad(*batch)
            self.optimizer.update(self.model, gradients)
            return loss, rest

        self.step = step

    def __call__(self) -> float:
        loss, rest = self.step(next(self.batches()))
        mx.eval(self.state, loss, rest)
        return loss.item()


class MlxTuneDpo:
    """mlx-tune: `rl_trainers.DPOTrainer._train_native` with precomputed reference, in one batch or one pair at a time.

    One pair at a time it keeps the prompt in a cache, does not compile, and takes an optimiser step a pair.
    """

    def __init__(self, shape: Shape, pairs: Sequence[Pair], *, together: bool):
        from mlx_tune._perf import bucket_length, compiled_step, make_step_state
        from mlx_tune.losses import common_prefix_length, compute_reference_logprobs, dpo_loss

        self.model, self.batch = make_model(shape), len(pairs) if together else 1
        self.bucket_length = bucket_length
        self.samples = []
        for pair in pairs:
            chosen, rejected = pair.prompt + pair.chosen, pair.prompt + pair.rejected
            ids = self._padded((chosen, rejected), max(len(chosen), len(rejected)))
            lengths = [mx.array([len(chosen)]), mx.array([len(rejected)])]
            reference = [value.item() for value in compute_reference_logprobs(self.model, *ids, *lengths)]
            self.samples.append((chosen, rejected, common_prefix_length(chosen, rejected), reference))
        add_adapter(self.model)
        self.optimizer = _adam(self.model)
        self.state = make_step_state(self.model, self.optimizer)

        def loss(model, ids, lengths, reference, **shared):
            return dpo_loss(
                model,
                *ids,
                *lengths,
                beta=BETA,
                reference_chosen_logprobs=reference[0],
                reference_rejected_logprobs=reference[1],
                **shared,
            )[0]

        value_and_grad = nn.value_and_grad(self.model, loss)

        def step(ids, lengths, reference, **shared):
            loss, gradients = value_and_grad(self.model, ids, lengths, reference, **shared)
            self.optimizer.update(self.model, gradients)
            return loss

        self.step = step if self.batch == 1 else compiled_step(step, self.state)

    @staticmethod
    def _padded(texts: Sequence[list[int]], length: int) -> list[mx.array]:
        return [mx.array([text + [0] * (length - len(text))]) for text in texts]

    def __call__(self) -> float:
        """One pass over all pairs: the mean loss."""
        total, starts = 0.0, range(0, len(self.samples), self.batch)
        for start in starts:
            samples = self.samples[start : start + self.batch]
            length = self.bucket_length(max(len(text) for sample in samples for text in sample[:2]))
            ids = [mx.concatenate(self._padded([sample[side] for sample in samples], length)) for side in (0, 1)]
            lengths = [mx.array([len(sample[side]) for sample in samples]) for side in (0, 1)]
            reference = [mx.array([sample[3][side] for sample in samples]) for side in (0, 1)]
            shared = {}
            if self.batch == 1:
                chosen, rejected, prompt, _ = samples[0]
                shared = {
                    "prompt_length": prompt,
                    "chosen_length_py": len(chosen),
                    "rejected_length_py": len(rejected),
                }
            loss = self.step(ids, lengths, reference, **shared)
            mx.eval(self.state, loss)
            total += loss.item()
        return total / len(starts)


class TrlDpo:
    """TRL on torch: `DPOTrainer.training_step` in float32 on a thread a core, reference precomputed, no checkpointing.

    It is given tokens, so its tokenising is left out; the rest is its own. Padding-free batches it has switched off.
    """

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
        from trl import DPOConfig, DPOTrainer

        class OfTokens(DPOTrainer):
            def _prepare_dataset(self, dataset, *rest):
                return dataset

        torch.set_num_threads(os.cpu_count() or 1)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=shape.hidden,
                num_hidden_layers=shape.layers,
                intermediate_size=shape.ffn,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                rms_norm_eps=1e-6,
                vocab_size=shape.vocab,
                max_position_embeddings=4096,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                tie_word_embeddings=True,
            )
        )
        ours = make_model(shape)
        model.load_state_dict(_as_torch(ours.parameters()), strict=False)  # all but the output layer, which is tied
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = OfTokens(
                model,
                args=DPOConfig(
                    folder,
                    beta=BETA,
                    learning_rate=RATE,
                    per_device_train_batch_size=len(pairs),
                    max_length=None,
                    precompute_ref_log_probs=True,
                    gradient_checkpointing=False,
                    bf16=False,
                    use_cpu=mx.default_device() == mx.cpu,
                    report_to="none",
                ),
                train_dataset=Dataset.from_list(
                    [dict(zip(columns, (pair.prompt, pair.chosen, pair.rejected))) for pair in pairs]
                ),
                processing_class=PreTrainedTokenizerFast(
                    tokenizer_object=Tokenizer(WordLevel({"padding": 0})), pad_token="padding"
                ),
                peft_config=LoraConfig(
                    r=RANK, lora_alpha=RANK * SCALE, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
            )
        theirs = dict(self.trainer.model.named_parameters())
        for name, value in _as_torch(add_adapter(ours).trainable_parameters()).items():
            layer, _, factor = name.rpartition(".lora_")
            theirs[f"base_model.model.{layer}.lora_{factor.upper()}.default.weight"].data.copy_(value.T)
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1  # `_inner_training_loop` sets it for every step

    def __call__(self) -> float:
        loss = self.trainer.training_step(self.trainer.model, next(iter(self.trainer.get_train_dataloader())))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def _as_torch(parameters: dict) -> dict:
    """By name, copied."""
    import torch

    return {name: torch.from_numpy(np.array(value)) for name, value in tree_flatten(parameters)}
