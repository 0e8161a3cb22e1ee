"""Neighbours' own steps. Losses, batching and caches are theirs, called as their trainers call them.

Their trainers keep the step itself as a closure inside a loop that loads data, prints and saves, so those few lines
are repeated here, each naming the place it stands for. Learning rate, optimiser and adapter are the same on all sides.
"""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from bench_models import BETA, RATE, Pair, Shape, add_adapter, make_model


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
