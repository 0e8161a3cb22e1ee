"""Our own steps, made of what the recipes use: `LogProbs`, `collate` and the losses.

`hominem_mlx` must have been imported before anything of mlx, so that it can take OpenBLAS; the worker sees to it.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from bench_models import BETA, RATE, Pair, Shape, add_adapter, make_model
from mlx_lm.models import qwen3

import hominem_mlx
from hominem_mlx import losses
from hominem_mlx.models import platform
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.training import logprobs as logprobs_module
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.rows import Row, Rows, collate


class RandomModel(LanguageModel):
    """A model without a tokenizer."""

    def __init__(self, model: nn.Module):
        super().__init__(model, None, name="random", folder=Path(), hash="")

    def prompt_tokens(self, prompt, **rest):
        """Some tokens: `LogProbs` asks the model a question to see whether it comes apart."""
        return [1, 2, 3]


def as_mlx_lm_has_it() -> None:
    """Put mlx-lm's own functions back where `platform.quicken` has exchanged them, for this process."""
    for name in ("scaled_dot_product_attention", "swiglu"):
        function = getattr(qwen3, name)
        if isinstance(function, functools.partial):
            setattr(qwen3, name, function.args[0])


def language_model(shape: Shape, *, plain: bool = False, **kind) -> RandomModel:
    """A frozen random model as `backbone.load` would hand it over.

    Args:
        plain: without the elementwise functions of `models/platform.py`.
        kind: what `make_model` takes.
    """
    lm = RandomModel(make_model(shape, **kind))
    platform.quicken(lm.model)
    if plain:
        as_mlx_lm_has_it()
        logprobs_module.logsumexp = lambda x: mx.logsumexp(x, axis=-1)
    return lm


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """Chosen replies first, then the rejected ones."""
    sides = list(zip(*(pair.sides for pair in pairs), strict=True))
    return [Row(list(prompt), list(reply)) for side in sides for prompt, reply in side]


class _Step:
    """Collate, loss, gradients, Adam: what one training step does."""

    def __init__(self, lm: RandomModel, rows: Sequence[Row], *, share: bool, checkpoint: float = 0.0):
        self.lm, self.rows, self.share = lm, rows, share
        self.logprobs = LogProbs(lm, checkpoint=checkpoint)
        self.prepare()
        add_adapter(lm.model)
        self.optimizer = optim.Adam(RATE)
        self.optimizer.init(lm.model.trainable_parameters())
        self.value_and_grad = nn.value_and_grad(lm.model, self.loss)

    def prepare(self) -> None:
        """What is computed once for a data set."""

    def collate(self) -> Rows:
        """The rows as a batch; without `share` every prompt is read with each of its replies."""
        return self.logprobs.collate(self.rows, share=self.share)

    def __call__(self) -> float:
        batch = self.collate()
        loss, gradients = self.value_and_grad(batch)
        self.optimizer.update(self.lm.model, gradients)
        mx.eval(loss, self.lm.model.trainable_parameters(), self.optimizer.state)
        return loss.item()


class Blended(_Step):
    """SFT on the chosen replies and DPO, from the same log-probabilities."""

    def __init__(self, shape: Shape, pairs: Sequence[Pair], *, share: bool = True, checkpoint: float = 0.0, **kind):
        self.lengths = mx.array([float(len(pair.chosen)) for pair in pairs])
        super().__init__(language_model(shape, **kind), rows_of(pairs), share=share, checkpoint=checkpoint)

    def prepare(self):
        """The reference is the base itself: its log-probabilities are computed once."""
        self.reference = mx.array(reference_logprobs(self.logprobs, self.rows))

    def loss(self, batch) -> mx.array:
        """Mean over pairs of both terms, as `policy/pairs.py` adds them up with every weight 1."""
        n = self.lengths.shape[0]
        logp = self.logprobs(batch)
        gained = logp - self.reference
        per_pair = losses.dpo(gained[:n] - gained[n:], beta=BETA) + losses.nll(logp[:n], self.lengths)
        return per_pair.mean()


class Sft(_Step):
    """SFT on the chosen replies alone."""

    def __init__(self, shape: Shape, pairs: Sequence[Pair], *, plain: bool = False):
        super().__init__(language_model(shape, plain=plain), rows_of(pairs)[: len(pairs)], share=True)

    def loss(self, batch) -> mx.array:
        """Token-mean cross-entropy."""
        return -self.logprobs(batch).sum() / batch.lengths.sum()


class Candidates:
    """Log-probabilities of many replies to one prompt; `one_by_one` reads the prompt anew for each."""

    def __init__(self, shape: Shape, pairs: Sequence[Pair], *, one_by_one: bool = False):
        self.logprobs = LogProbs(language_model(shape))
        self.rows = [Row(pairs[0].prompt, reply) for pair in pairs for _, reply in pair.sides]
        self.one_by_one = one_by_one
        if one_by_one:  # a single text has work for one lane only, so its matrix products may have every core
            use_blas_threads(os.cpu_count() or 1)

    def __call__(self) -> float:
        if not self.one_by_one:
            return self.logprobs(self.logprobs.collate(self.rows)).sum().item()
        return sum(self.logprobs(collate([row])).item() for row in self.rows)


def use_blas_threads(count: int) -> None:
    """How many threads OpenBLAS takes for one matrix product, where it is there."""
    if hominem_mlx.openblas:
        ctypes.CDLL(hominem_mlx.openblas, mode=ctypes.RTLD_GLOBAL).openblas_set_num_threads(count)
