"""What is measured: random models of a few shapes, pairs of replies, and the naive formula that every loss must meet.

Nothing here imports hominem_mlx, so that neighbours run in a process that is just as their users' is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen3
from mlx_lm.tuner.utils import linear_to_lora_layers

BETA = 0.1  # of DPO, on every side
RATE = 1e-7  # of Adam: small enough that every step of a run has the loss of the first
RANK, SCALE = 8, 2.0


@dataclass(frozen=True)
class Shape:
    """A Qwen3 with random weights and a tied output layer."""

    hidden: int
    layers: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int = 64

    @property
    def body(self) -> int:
        """Weights of the linear layers inside the blocks."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """All weights of the base."""
        return self.body + self.head + self.hidden + 2 * self.layers * (self.hidden + self.head_dim)

    @property
    def adapter(self) -> int:
        """Weights of the adapter."""
        attention = 2 * self.hidden * 2 + 2 * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * RANK * (attention + 3 * (self.hidden + self.ffn))


SHAPES = {
    "A": Shape(256, 8, 768, 151_936, heads=4, kv_heads=2),  # nearly all work is in the logits
    "B": Shape(512, 10, 1536, 22_016, heads=8, kv_heads=4),  # body to head as in Qwen3-0.6B
    "T": Shape(128, 3, 256, 2_048, heads=4, kv_heads=4, head_dim=32),  # for tests
    "Q": Shape(1024, 28, 3072, 151_936, heads=16, kv_heads=8, head_dim=128),  # Qwen3-0.6B itself, for a GPU
}


@dataclass(frozen=True)
class Pair:
    """One prompt and two replies, in tokens."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def sides(self) -> tuple[tuple[list[int], list[int]], ...]:
        """`(prompt, reply)` of both replies."""
        return (self.prompt, self.chosen), (self.prompt, self.rejected)


def make_pairs(vocab: int, prompt: int, reply: int, count: int, *, prompt_sigma: float = 0.3) -> list[Pair]:
    """Pairs of random tokens; lengths are log-normal around `prompt` and `reply`, with a sigma of 0.3 for replies."""
    rng = np.random.default_rng([prompt, reply, count])

    def text(median: int, first: int, sigma: float = 0.3) -> list[int]:
        length = max(2, round(median * np.exp(sigma * rng.standard_normal())))
        return [first, *rng.integers(4, vocab, length - 1).tolist()]

    return [Pair(text(prompt, 3, prompt_sigma), text(reply, 1), text(reply, 2)) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """A shape, the median lengths of prompts and replies, and how many pairs."""

    shape: str
    prompt: int
    reply: int
    pairs: int
    prompt_sigma: float = 0.3

    @property
    def texts(self) -> list[Pair]:
        """The pairs, in tokens: the same in every process."""
        vocab = SHAPES[self.shape].vocab
        return make_pairs(vocab, self.prompt, self.reply, self.pairs, prompt_sigma=self.prompt_sigma)

    def __str__(self) -> str:
        return (
            f"{self.shape} {self.prompt}/{self.reply}, {self.pairs} pairs{'' if self.prompt_sigma else ', one prompt'}"
        )


def real_tokens(pairs: Sequence[Pair]) -> int:
    """Tokens of both texts of every pair, without padding: what tokens/s are counted in, on every side."""
    return sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)


def make_model(shape: Shape, *, bits: int | None = None, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """The frozen model, quantised where `bits` are given; the same weights in every process."""
    mx.random.seed(0)
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=1e-6,
            vocab_size=shape.vocab,
            max_position_embeddings=4096,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
        )
    )
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.freeze()
    mx.eval(model.parameters())
    return model


def add_adapter(model: nn.Module, *, fresh: bool = False) -> nn.Module:
    """LoRA on every linear layer of every block, no dropout; B is not 0 unless it shall be fresh."""
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)
    rng, values = np.random.default_rng(5), []
    for name, value in sorted(tree_flatten(model.trainable_parameters())):
        drawn = rng.standard_normal(value.shape) * 0.05 * (not fresh or name.endswith("lora_a"))
        values.append((name, mx.array(drawn).astype(model.model.norm.weight.dtype)))
    model.update(tree_unflatten(values))
    model.train()
    mx.eval(model.parameters())
    return model


# --- the naive formula -----------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    logits = logits.astype(np.float64)
    most = logits.max(-1, keepdims=True)
    return logits - most - np.log(np.exp(logits - most).sum(-1, keepdims=True))


def reply_logits(model: nn.Module, prompt: Sequence[int], reply: Sequence[int]) -> mx.array:
    """What one unpadded text says before each token of its reply, `[len(reply), V]`."""
    hidden = model.model(mx.array([[*prompt, *reply[:-1]]]))[0, len(prompt) - 1 :]
    return model.model.embed_tokens.as_linear(hidden)


def naive_logprobs(model: nn.Module, pairs: Sequence[Pair]) -> np.ndarray:
    """`log p(reply | prompt)`, float64 `[pairs, 2]`: one text at a time, log-softmax and sums in float64."""
    return np.array(
        [
            [
                log_softmax(np.array(reply_logits(model, prompt, reply)))[np.arange(len(reply)), reply].sum()
                for prompt, reply in pair.sides
            ]
            for pair in pairs
        ]
    )


def naive_losses(logp: np.ndarray, reference: np.ndarray, pairs: Sequence[Pair]) -> dict[str, float]:
    """`dpo`: mean over pairs; `sft`: mean over pairs of the chosen reply's loss a token, as our blended step adds it;
    `sft_tokens`: loss a token over all chosen replies, as SFT trainers define it."""
    delta = (logp - reference) @ [1.0, -1.0]
    lengths = np.array([len(pair.chosen) for pair in pairs])
    return {
        "dpo": float(np.logaddexp(0, -BETA * delta).mean()),
        "sft": float((-logp[:, 0] / lengths).mean()),
        "sft_tokens": float(-logp[:, 0].sum() / lengths.sum()),
    }


def naive_gradients(
    model: nn.Module, reference: np.ndarray, pairs: Sequence[Pair]
) -> tuple[float, dict[str, mx.array]]:
    """Loss of the blended step (DPO + SFT) and its gradients, with everything after the logits in float64."""
    logp = naive_logprobs(model, pairs)
    losses = naive_losses(logp, reference, pairs)
    delta = (logp - reference) @ [1.0, -1.0]
    pull = BETA / (1 + np.exp(BETA * delta)) / len(pairs)  # -d dpo / d delta
    total: dict[str, mx.array] = {}
    for pair, strength in zip(pairs, pull, strict=True):
        for (prompt, reply), weight in zip(
            pair.sides, (-strength - 1 / len(pair.chosen) / len(pairs), strength), strict=True
        ):
            shares = np.exp(log_softmax(np.array(reply_logits(model, prompt, reply))))
            slope = -shares
            slope[np.arange(len(reply)), reply] += 1
            cotangent = mx.array((weight * slope).astype(np.float32))

            def along(prompt=prompt, reply=reply, cotangent=cotangent):
                return (reply_logits(model, prompt, reply) * cotangent).sum()

            for name, value in tree_flatten(nn.value_and_grad(model, along)()[1]):
                total[name] = total[name] + value if name in total else value
        mx.eval(total)
    return losses["dpo"] + losses["sft"], total


class Naive:
    """Losses by the naive formula: what the first step of every path must give."""

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        self.shape, self.pairs = shape, pairs

    def __call__(self) -> dict[str, float]:
        reference = naive_logprobs(make_model(self.shape), self.pairs)
        return naive_losses(naive_logprobs(add_adapter(make_model(self.shape)), self.pairs), reference, self.pairs)
