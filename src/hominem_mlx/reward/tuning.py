"""LoRA on the reward model's own backbone, learnt together with its attention head.

The backbone itself stays as it is, bit for bit: the low-rank parts are put beside its layers while a text is read for
this reward model, and belong to it. Adapters of the student are other things, and are never read through.

Shapes: as in `attention.py`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.files import sha256_bytes, sha256_json
from hominem_mlx.reward.attention import (
    DECAY,
    PROMPTS,
    RATE,
    READ_ROWS,
    AttentionHead,
    Fitted,
    Pairs,
    look,
    loss,
    means,
    moments,
)
from hominem_mlx.reward.head import bootstrap_rows, grouped_folds, label_moments, standardised

if TYPE_CHECKING:
    from hominem_mlx.reward.features import Backbone, Pair

EPOCHS, PATIENCE = 30, 2  # each costs as much as reading all rows three times
SCALE = 2.0  # alpha / rank


class Beside(nn.Module):
    """A linear layer and a low-rank part beside it: `layer(x) + scale x A B` (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, layer: nn.Module, a: mx.array, b: mx.array):
        super().__init__()
        self.layer, self.a, self.b = layer, a, b

    def __call__(self, x: mx.array) -> mx.array:
        made = self.layer(x)
        return made + (SCALE * (x @ self.a) @ self.b).astype(made.dtype)


class Tuning:
    """Low-rank parts by `block.layer.a` and `.b`, float32 `[in, rank]` and `[rank, out]`."""

    def __init__(self, values: dict[str, mx.array]):
        self.values = values

    @classmethod
    def fresh(cls, blocks: Sequence[nn.Module], rank: int, *, seed: int) -> "Tuning":
        """One on every linear layer of these blocks that changes nothing yet: A is random, B is 0."""
        rng, values = np.random.default_rng([seed, 5]), {}
        for name, layer in _linear(blocks).items():
            made, read = _sides(layer)
            values[f"{name}.a"] = mx.array(rng.normal(size=(read, rank)) / read**0.5, mx.float32)
            values[f"{name}.b"] = mx.zeros((rank, made))
        return cls(values)

    @property
    def digest(self) -> str:
        """Hash of all arrays."""
        return sha256_json({name: sha256_bytes(memoryview(value).tobytes()) for name, value in self.values.items()})

    @contextlib.contextmanager
    def beside(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Puts the parts beside their layers inside the block; afterwards the very same layers are back.

        Raises: ModelError unless every part has its layer and fits it.
        """
        layers = _linear(blocks)
        for name, value in sorted(self.values.items()):
            layer, _, side = name.rpartition(".")
            sides = dict(zip("ba", _sides(layers[layer]), strict=True)) if layer in layers else {}
            if value.ndim != 2 or value.shape[side == "b"] != sides.get(side):
                raise ModelError(
                    f"the reward model's low-rank part {name} {value.shape} fits no layer of its backbone; train it "
                    "again: `hominem train reward`"
                )
        under = {name: layer for name, layer in layers.items() if f"{name}.a" in self.values}
        made = {name: Beside(layer, *(self.values[f"{name}.{side}"] for side in "ab")) for name, layer in under.items()}
        _put(blocks, made)
        try:
            yield
        finally:
            _put(blocks, under)


def _linear(blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Linear layers by `block.layer`."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    return {
        f"{number}.{name}": layer
        for number, block in enumerate(blocks)
        for name, layer in block.named_modules()
        if isinstance(layer, kinds)
    }


def _sides(layer: nn.Module) -> tuple[int, int]:
    """How many numbers a linear layer makes, and how many it reads."""
    made, columns = layer.weight.shape
    return made, columns * 32 // layer.bits if "scales" in layer else columns


def _put(blocks: Sequence[nn.Module], layers: dict[str, nn.Module]) -> None:
    for number, block in enumerate(blocks):
        own = [(name.split(".", 1)[1], layer) for name, layer in layers.items() if name.split(".", 1)[0] == str(number)]
        if own:
            block.update_modules(tree_unflatten(own))


def fit(
    backbone: "Backbone",
    pairs: "Sequence[Pair]",
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    *,
    rank: int,
    layer: int,
    folds: int,
    members: int,
    seed: int,
    tell: Callable[[int, int], None] | None = None,
) -> tuple[Fitted, Tuning]:
    """Fit low-rank parts and attention head together on training rows.

    A fold of the prompts is never learnt from: it says when to stop, and what is said of it how far off the head is.
    The members have queries and lines of their own, learnt from prompts drawn with replacement, but read one backbone.

    Args:
        backbone: not tuned yet.
        pairs: prompt and reply of each row.
        labels: `[N, O]` in their own unit, NaN where there is none: masked, output by output.
        groups: the prompt of each row.
        rank: of the parts, on every linear layer of the blocks up to `layer`.
        layer: the block whose states are read.
        folds: of which one is left out.
        members, seed, tell: as in `attention.fit`.

    Returns: what `attention.fit` returns, with errors of the fold left out alone; and the parts.
    """
    reader, groups = backbone.reader, np.asarray(groups)
    if not layer:
        raise ModelError("no block lies below the embeddings; set reward.attention_layer above 0, or lora_rank=0")
    fold = grouped_folds(groups, folds, seed=seed)
    learnt, stopping = np.flatnonzero(fold != 0), np.flatnonzero(fold == 0)
    drawn = [learnt[rows] for rows in bootstrap_rows(groups[learnt], members, seed=seed)]
    counts = np.stack([np.bincount(rows, minlength=len(groups)) for rows in (learnt, *drawn)]).astype(np.float32)
    if np.isnan(labels[learnt]).all(axis=0).any():
        raise InputError(
            "a number is labelled only on the fifth of the prompts that says when to stop: nothing can be learnt "
            "of it; label more prompts, or set reward.lora_rank=0"
        )
    label_mean, label_scale = label_moments(labels[learnt])
    state_mean, state_scale = moments(backbone.states([pairs[row] for row in learnt.tolist()], layer))
    mean, scale = mx.array(state_mean, mx.float32), mx.array(state_scale, mx.float32)
    targets = ((labels - label_mean) / label_scale).astype(np.float32)
    passages = [reader.passage(*pair) for pair in pairs]
    heads, outputs, size = 1 + members, labels.shape[1], len(state_mean)
    values = {
        "head": {
            "query": mx.zeros((heads, outputs, size)),
            "weight": mx.zeros((heads, outputs, size)),
            "bias": mx.array(means(targets, counts)),
        },
        "parts": Tuning.fresh(reader.blocks[:layer], rank, seed=seed).values,
    }
    optimizer = optim.AdamW(learning_rate=RATE, weight_decay=DECAY, bias_correction=True)
    rng = np.random.default_rng([seed, 4])
    rows_of = [np.flatnonzero(groups == name) for name in np.unique(groups[learnt])]

    def said(values: dict, rows: np.ndarray) -> mx.array:
        batch = [passages[row] for row in rows]
        states = reader.tuned(Tuning(values["parts"])).hidden_states(batch, [layer])[0]
        return look((states - mean) / scale, mx.array([passage.said for passage in batch]), **values["head"])

    def step(values: dict, rows: np.ndarray) -> mx.array:
        times, wanted = mx.array(counts[:, rows]), mx.array(targets[rows])
        return loss(said(values, rows), wanted, times, Pairs.of(labels[rows], groups[rows])).sum()

    def left_out() -> tuple[np.ndarray, float]:
        blocks = np.split(stopping, range(READ_ROWS, len(stopping), READ_ROWS))
        found = np.concatenate([np.array(said(values, rows))[:, 0] for rows in blocks])
        judged = Pairs.of(labels[stopping], groups[stopping])
        lost = loss(mx.array(found)[:, None], mx.array(targets[stopping]), mx.ones((1, len(stopping))), judged)
        return found, lost.sum().item()

    slope, kept, best = mx.grad(step), values, 0
    kept_said, least = left_out()
    for epoch in range(1, EPOCHS + 1):
        order = rng.permutation(len(rows_of))
        for batch in np.split(order, range(PROMPTS, len(order), PROMPTS)):
            rows = np.concatenate([rows_of[index] for index in batch])
            values = optimizer.apply_gradients(slope(values, rows), values)
            mx.eval(values, optimizer.state)
        found, lost = left_out()
        if tell:
            tell(epoch, EPOCHS)
        if lost < least:
            kept, best, kept_said, least = values, epoch, found, lost
        if epoch - best >= PATIENCE:
            break

    tuning = Tuning(kept["parts"])
    _, feature_mean, feature_scale = standardised(backbone.looked_at_by(None, tuning).read(pairs)[0])
    head = AttentionHead(len(feature_mean), size, outputs, members, layer)
    arrays = {"feature_mean": feature_mean, "feature_scale": feature_scale}
    arrays |= {"label_mean": label_mean, "label_scale": label_scale}
    arrays |= {"state_mean": state_mean, "state_scale": state_scale}
    head.update({name: mx.array(np.asarray(value, np.float32)) for name, value in arrays.items()} | kept["head"])
    errors = np.full(labels.shape, np.nan)
    errors[stopping] = labels[stopping] - (kept_said * label_scale + label_mean)
    return Fitted(head, [best] * outputs, errors), tuning
