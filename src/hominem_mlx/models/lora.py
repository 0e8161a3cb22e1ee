"""LoRA adapters on a frozen base, in mlx-lm's file format, so that `mlx_lm.load(..., adapter_path=)` reads ours."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.files import read_json, write_json
from hominem_mlx.models.seeding import seeded

if TYPE_CHECKING:
    from hominem_mlx.models.backbone import LanguageModel

LEAVES = ("lora_a", "lora_b", "m")  # the parameter names that belong to an adapter
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Shape:
    """What an adapter looks like. `scale` multiplies `x A B` as it is (PEFT's alpha / rank)."""

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    num_layers: int = -1


def attach(lm: "LanguageModel", shape: Shape, *, seed: int, keys: list[str] | None = None) -> None:
    """Put a fresh adapter on every linear layer of the last `num_layers` blocks; it changes nothing yet (B = 0).

    Args:
        lm: a model without an adapter.
        shape: rank, scale, dropout, blocks.
        seed: of the random A matrices.
        keys: layer names as `targets` gives them; None is every linear layer of those blocks.
    """
    if adapter_parameters(lm.model):
        raise ModelError(f"{lm.name} already has an adapter; detach it first")
    blocks = lm.num_layers if shape.num_layers < 1 else min(shape.num_layers, lm.num_layers)
    settings: dict = {"rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout}
    if keys is not None:
        settings["keys"] = set(keys)
    with seeded(seed):
        linear_to_lora_layers(lm.model, blocks, settings)
        mx.eval(lm.model.parameters())
    lm.model.freeze()
    lm.model.unfreeze(keys=list(LEAVES), strict=False)


def aim_head(lm: "LanguageModel", directions: mx.array) -> None:
    """Let the output layer's fresh adapter read nothing but these directions of the final hidden state.

    Args:
        directions: float `[r, D]`, r at most the rank; what is left of the rank stays 0 for ever, since an entry whose
            factors are both 0 never gets a gradient.
    """
    for name, layer in _layers(lm):
        if is_head(name):
            spare = layer.lora_a.shape[1] - len(directions)
            reads = mx.concatenate([directions, mx.zeros((spare, directions.shape[1]))])
            if "embedding" in layer:  # a tied embedding: mlx-lm's A looks words up, its B reads hidden states
                layer.lora_a, layer.lora_b = mx.zeros_like(layer.lora_a), reads
            else:
                layer.lora_a, layer.lora_b = reads.T, mx.zeros_like(layer.lora_b)
            mx.eval(layer.parameters())


def targets(lm: "LanguageModel", *, linear: bool, head: bool) -> list[str]:
    """Names of layers to adapt: linear layers by their place in a block, the output layer by its full name.

    The output layer is `lm_head`, or the embedding where the two share their weights.
    """
    kinds = (nn.Linear, nn.QuantizedLinear)
    inside = {name for block in lm.model.layers for name, layer in block.named_modules() if isinstance(layer, kinds)}
    output = "lm_head" if "lm_head" in lm.model else "model.embed_tokens"
    return sorted(inside) * linear + [output] * head


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the output layer rather than to a block."""
    return ".layers." not in name


def detach(lm: "LanguageModel") -> None:
    """Take the adapter off; the base is bit for bit what it was."""
    lm.model.update_modules(tree_unflatten([(name, _base(layer)) for name, layer in _layers(lm)]))
    lm.model.freeze()
    lm.adapter = None


@contextlib.contextmanager
def without_adapter(lm: "LanguageModel") -> Iterator[None]:
    """The bare base inside the block; afterwards the very same adapter layers are back in their places."""
    layers = _layers(lm)
    lm.model.update_modules(tree_unflatten([(name, _base(layer)) for name, layer in layers]))
    try:
        yield
    finally:
        lm.model.update_modules(tree_unflatten(layers))


def _layers(lm: "LanguageModel") -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in lm.model.named_modules() if "lora_a" in layer]


def _base(layer: nn.Module) -> nn.Module:
    return layer.linear if "linear" in layer else layer.embedding


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays by name; empty without one."""
    return {name: value for name, value in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in LEAVES}


def set_parameters(model: nn.Module, values: dict[str, mx.array]) -> None:
    """Rebind adapter arrays: the hot swap. Shapes must be those already attached."""
    model.update(tree_unflatten(list(values.items())))
    mx.eval(model.parameters())


def save_adapter(lm: "LanguageModel", folder: Path, shape: Shape, values: dict[str, mx.array] | None = None) -> None:
    """Write the adapter into `folder`, which should be a draft.

    Args:
        values: arrays to save in place of those attached (the best checkpoint, for instance).
    """
    values = values or adapter_parameters(lm.model)
    layers = {name.rsplit(".", 1)[0] for name in values}
    keys = sorted({name if is_head(name) else name.split(".layers.")[1].split(".", 1)[1] for name in layers})
    mx.save_safetensors(str(folder / WEIGHTS), values)
    parameters = {**asdict(shape), "keys": keys}
    num_layers = parameters.pop("num_layers")
    blocks = lm.num_layers if num_layers < 1 else num_layers
    config = {"fine_tune_type": "lora", "num_layers": blocks, "lora_parameters": parameters}
    write_json(folder / CONFIG, {**config, "base": {"name": lm.name, "hash": lm.hash}})


def load_adapter(lm: "LanguageModel", folder: Path) -> None:
    """Attach a saved adapter, or list everything that does not fit."""
    config = read_json(folder / CONFIG)
    problems = []
    try:
        parameters = config["lora_parameters"]
        shape = Shape(
            rank=int(parameters["rank"]),
            scale=float(parameters["scale"]),
            dropout=float(parameters.get("dropout", 0.0)),
            num_layers=int(config["num_layers"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: lora_parameters need rank and scale, and num_layers ({error})") from None
    base = config.get("base", {})
    if base.get("hash", lm.hash) != lm.hash:
        problems.append(f"{folder / CONFIG}: was trained on {base.get('name')} ({base['hash'][:12]}), not on {lm.name}")
    try:
        values = dict(mx.load(str(folder / WEIGHTS)))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read ({error})") from None
    attach(lm, shape, seed=0, keys=parameters.get("keys"))
    expected = adapter_parameters(lm.model)
    where = folder / WEIGHTS
    problems += [f"{where}: {name} is missing" for name in expected if name not in values]
    problems += [f"{where}: {name} is not a layer of {lm.name}" for name in values if name not in expected]
    problems += [
        f"{where}: {name} has shape {tuple(value.shape)}, the model wants {tuple(expected[name].shape)}"
        for name, value in values.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems += [
        f"{where}: {name} holds NaN or infinity" for name, v in values.items() if not mx.isfinite(v).all().item()
    ]
    if problems:
        detach(lm)
        raise InputError(problems)
    set_parameters(lm.model, values)
    lm.adapter = str(folder)
