"""Adapters on a frozen base, in mlx-lm's file format, so that `mlx_lm.load(..., adapter_path=)` reads ours.

LoRA and DoRA, on bases of any precision mlx-lm loads (LoRA over a quantised base is QLoRA). Adapters stack: a layer of
an adapter holds the layer below it, the base's own or that of an earlier adapter. The topmost adapter is the one that
learns and is saved, and its arrays have the names they would have alone; everything below it is frozen.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from hominem_mlx.errors import HominemError, InputError, ModelError
from hominem_mlx.files import read_json, sha256_file, write_json
from hominem_mlx.models.seeding import seeded

if TYPE_CHECKING:
    from hominem_mlx.models.backbone import LanguageModel

LEAVES = ("lora_a", "lora_b", "m")  # the parameter names that belong to an adapter
EMBEDDING = "model.embed_tokens"  # the output layer too, where the two share their weights
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Shape:
    """What an adapter looks like. `scale` multiplies `x A B` as it is (PEFT's alpha / rank).

    kind: `lora` adds `scale A B` to a layer (Hu et al. 2021, arXiv 2106.09685); `dora` also learns the length of each
    row of the sum, `m` (Liu et al. 2024, arXiv 2402.09353).
    """

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    num_layers: int = -1
    kind: Literal["lora", "dora"] = "lora"


@dataclass(frozen=True)
class Saved:
    """An adapter's folder, read: its shape, the layers it names, its base (`name`, `hash`), its arrays.

    over: `name` and `hash` of the adapter it was trained on top of, or None.
    """

    folder: Path
    shape: Shape
    keys: list[str] | None
    base: dict[str, str]
    over: dict[str, str] | None
    values: dict[str, mx.array]


def attach(
    lm: "LanguageModel", shape: Shape, *, seed: int, keys: list[str] | None = None, on_top: bool = False
) -> None:
    """Put a fresh adapter on linear layers of the last `num_layers` blocks; it changes nothing yet (B = 0).

    Args:
        lm: a model without an adapter, or with `on_top` one with adapters, which are frozen now as the base is.
        shape: kind, rank, scale, dropout, blocks.
        seed: of the random A matrices.
        keys: layer names as `targets` gives them; None is every linear layer of those blocks.

    Raises: ModelError, with the model as it was, where mlx-lm has no such adapter for a layer.
    """
    if lm.adapters and not on_top:
        raise ModelError(f"{lm.name} already has an adapter; detach it first")
    _check_dora(lm, shape, keys or [])
    settings: dict = {"rank": shape.rank, "scale": shape.scale, "dropout": shape.dropout}
    if keys is not None:
        settings["keys"] = set(keys)
    under = dict(_layers(lm.model))
    _put(lm.model, {name: _unwrap(layer) for name, layer in under.items()})
    try:
        with seeded(seed):
            linear_to_lora_layers(lm.model, num_blocks(lm, shape), settings, use_dora=shape.kind == "dora")
            mx.eval(lm.model.parameters())
        for name, layer in _layers(lm.model) if shape.kind == "dora" else ():
            if not layer.m.all().item():  # the length is divided by, and nothing would be left but NaN
                raise ValueError(f"{name} has a row of nothing but zeros, which has no direction; use dual.kind = lora")
    except (ValueError, TypeError, AttributeError) as error:
        _put(lm.model, {name: _unwrap(layer) for name, layer in _layers(lm.model)} | under)
        raise ModelError(f"{lm.name}: mlx-lm cannot put a {shape.kind} adapter on these layers ({error})") from None
    made = dict(_layers(lm.model))
    for name, layer in made.items():
        layer.height = len(lm.adapters)
        if name in under:
            layer.update_modules({_inner(layer): under[name]})
    _put(lm.model, {name: layer for name, layer in under.items() if name not in made})
    lm.adapters.append(None)
    lm.model.eval()  # dropout is for lessons alone, and the loop switches it on for them
    _let_top_learn(lm.model)


def _check_dora(lm: "LanguageModel", shape: Shape, keys: list[str]) -> None:
    if shape.kind != "dora":
        return
    if lm.adapters:
        raise ModelError("a DoRA adapter measures the base's own rows and cannot go on top of another; use lora")
    packed = [name for name, layer in lm.model.named_modules() if isinstance(layer, nn.QuantizedEmbedding)]
    if set(packed) & set(keys):
        raise ModelError(
            f"{lm.name}: mlx-lm has no DoRA for a quantised embedding, and here it is the output layer too; use "
            "dual.kind = lora, or keep both channels off the output layer"
        )


def aim_head(lm: "LanguageModel", directions: mx.array) -> None:
    """Let the output layer's fresh adapter read nothing but these directions of the final hidden state.

    Args:
        directions: float `[r, D]`, r at most the rank; what is left of the rank stays 0 for ever, since an entry whose
            factors are both 0 never gets a gradient.
    """
    for name, layer in _top(lm.model):
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
    with without_adapter(lm):  # on it, a linear layer is no longer where the base has it
        blocks = [block.named_modules() for block in lm.model.layers]
        inside = {name for block in blocks for name, layer in block if isinstance(layer, kinds)}
    output = "lm_head" if "lm_head" in lm.model else EMBEDDING
    return sorted(inside) * linear + [output] * head


def size(lm: "LanguageModel", shape: Shape, keys: Sequence[str]) -> int:
    """Weights that a fresh adapter of this shape would have on these layers (names as `targets` gives them)."""
    with without_adapter(lm):
        inside = [block.named_modules() for block in lm.model.layers[-num_blocks(lm, shape) :]]
        found = [layer for modules in (*inside, lm.model.named_modules()) for name, layer in modules if name in keys]
        sides = [dimensions(layer) for layer in found]
    return sum(shape.rank * (made + read) + made * (shape.kind == "dora") for made, read in sides)


def dimensions(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of a layer's matrix, quantised or not: what it makes, and what it reads."""
    *_, rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.bits if "scales" in layer else columns


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the output layer rather than to a block."""
    return ".layers." not in name


def detach(lm: "LanguageModel", *, keep: int = 0) -> None:
    """Take adapters off, all but the first `keep`; what is left is bit for bit what it was before."""
    _put(lm.model, {name: _unwrap(layer, keep) for name, layer in _layers(lm.model)})
    del lm.adapters[keep:]
    _let_top_learn(lm.model)


@contextlib.contextmanager
def loaded(lm: "LanguageModel", folder: Path | None) -> Iterator[None]:
    """A saved adapter on the model inside the block (None: none); afterwards the model is as it was before."""
    height = len(lm.adapters)
    try:
        if folder is not None:
            load_adapter(lm, folder)
        yield
    finally:
        detach(lm, keep=height)


@contextlib.contextmanager
def without_adapter(lm: "LanguageModel", *, keep: int = 0) -> Iterator[None]:
    """The bare base, or the base with its first `keep` adapters; afterwards the very same layers are back."""
    layers = dict(_layers(lm.model))
    _put(lm.model, {name: _unwrap(layer, keep) for name, layer in layers.items()})
    try:
        yield
    finally:
        _put(lm.model, layers)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Adapted layers; where several adapters lie on one, the topmost."""
    found = {name: layer for name, layer in model.named_modules() if "lora_a" in layer}
    return [(name, layer) for name, layer in found.items() if name.rpartition(".")[0] not in found]


def _top(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of the topmost adapter."""
    layers = _layers(model)
    highest = max((layer.height for _, layer in layers), default=0)
    return [(name, layer) for name, layer in layers if layer.height == highest]


def _inner(layer: nn.Module) -> str:
    """The name under which a layer of an adapter holds what is below it."""
    return "linear" if "linear" in layer else "embedding"


def _unwrap(layer: nn.Module, keep: int = 0) -> nn.Module:
    """What a layer is with the first `keep` adapters only."""
    while "lora_a" in layer and (not keep or layer.height >= keep):
        layer = layer[_inner(layer)]
    return layer


def _put(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    model.update_modules(tree_unflatten(list(layers.items())))


def _let_top_learn(model: nn.Module) -> None:
    model.freeze()
    for _, layer in _top(model):
        layer.unfreeze(recurse=False, keys=[leaf for leaf in LEAVES if leaf in layer])


def adapter_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The topmost adapter's arrays by name; empty without one."""
    names = {f"{name}.{leaf}" for name, layer in _top(model) for leaf in LEAVES if leaf in layer}
    return {name: value for name, value in tree_flatten(model.parameters()) if name in names}


def set_parameters(model: nn.Module, values: dict[str, mx.array]) -> None:
    """Rebind the topmost adapter's arrays: the hot swap. Shapes must be those already attached."""
    model.update(tree_unflatten(list(values.items())))
    mx.eval(model.parameters())


def save_adapter(lm: "LanguageModel", folder: Path, shape: Shape, values: dict[str, mx.array] | None = None) -> None:
    """Write the topmost adapter into `folder`, which should be a draft.

    Args:
        values: arrays to save in place of those attached (the best checkpoint, for instance).

    Raises: ModelError when it lies on top of an adapter that was never saved itself.
    """
    over = None
    if len(lm.adapters) > 1:
        below = lm.adapters[-2]
        if below is None:
            raise ModelError("the adapter below was never saved; save it and load it before training on top of it")
        over = {"name": _name(Path(below)), "hash": sha256_file(Path(below) / WEIGHTS)}
    values, base = values or adapter_parameters(lm.model), {"name": lm.name, "hash": lm.hash}
    write(folder, shape, num_blocks(lm, shape), values, base=base, over=over)


def num_blocks(lm: "LanguageModel", shape: Shape) -> int:
    """How many blocks, counted from the last, an adapter of this shape reaches."""
    return lm.num_layers if shape.num_layers < 1 else min(shape.num_layers, lm.num_layers)


def write(
    folder: Path,
    shape: Shape,
    blocks: int,
    values: dict[str, mx.array],
    *,
    base: dict[str, str],
    over: dict[str, str] | None = None,
) -> None:
    """Write an adapter's two files.

    Args:
        blocks: how many blocks, counted from the last, it reaches.
        base: `name` and `hash` of the model it belongs to.
        over: `name` and `hash` of the adapter it was trained on top of.
    """
    mx.save_safetensors(str(folder / WEIGHTS), values)
    parameters = {**asdict(shape), "keys": _keys({name.rpartition(".")[0] for name in values}, blocks)}
    del parameters["num_layers"], parameters["kind"]
    config = {"fine_tune_type": shape.kind, "num_layers": blocks, "lora_parameters": parameters, "base": base}
    write_json(folder / CONFIG, config | ({"over": over} if over else {}))


def _keys(layers: set[str], blocks: int) -> list[str]:
    """Names from which mlx-lm finds these layers and no others: places in a block, full names where blocks differ."""
    places: dict[str, set[str]] = {}
    for name in layers:
        if not is_head(name):
            block, _, place = name.split(".layers.")[1].partition(".")
            places.setdefault(block, set()).add(place)
    inside: set[str] = set().union(*places.values())
    if len(places) not in (0, blocks) or any(each != inside for each in places.values()):
        return sorted(layers)
    return sorted(inside | {name for name in layers if is_head(name)})


def _name(folder: Path) -> str:
    """What an adapter is called whatever its ordinal: of `0003-3fa2c1d0` the hash, of other folders the name."""
    ordinal, _, rest = folder.name.partition("-")
    return rest if ordinal.isdigit() and rest else folder.name


def read(folder: Path) -> Saved:
    """An adapter's files, checked as far as that goes without its base."""
    config = read_json(folder / CONFIG)
    try:
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise InputError(f"{folder / CONFIG}: fine_tune_type = {kind!r}: an adapter is lora or dora")
        parameters = config["lora_parameters"]
        shape = Shape(
            rank=int(parameters["rank"]),
            scale=float(parameters["scale"]),
            dropout=float(parameters.get("dropout", 0.0)),
            num_layers=int(config["num_layers"]),
            kind=kind,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG}: lora_parameters need rank and scale, and num_layers ({error})") from None
    try:
        values = dict(mx.load(str(folder / WEIGHTS)))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read ({error})") from None
    return Saved(folder, shape, parameters.get("keys"), config.get("base", {}), config.get("over"), values)


def load_adapter(lm: "LanguageModel", folder: Path) -> None:
    """Attach a saved adapter, or list everything that does not fit and leave the model as it was.

    One that was trained on top of another goes on top of it: that one is on already, or lies beside it.
    """
    saved, height = read(folder), len(lm.adapters)
    try:
        if saved.over:
            _stand_on(lm, saved.folder, saved.over)
        still = replace(saved.shape, dropout=0.0)  # what was learnt speaks, or lies below what learns
        attach(lm, still, seed=0, keys=saved.keys, on_top=saved.over is not None)
        if problems := list(_misfits(lm, saved)):
            raise InputError(problems)
    except HominemError:
        detach(lm, keep=height)
        raise
    set_parameters(lm.model, saved.values)
    lm.adapters[-1] = str(folder)


def _stand_on(lm: "LanguageModel", folder: Path, over: dict[str, Any]) -> None:
    """See to it that the adapter which this one was trained on top of is the topmost."""

    def is_it(place: Path) -> bool:
        return (place / WEIGHTS).is_file() and sha256_file(place / WEIGHTS) == over["hash"]

    trained = f"{folder / CONFIG}: was trained on top of the adapter {over['name']}"
    if lm.adapters:
        if not is_it(Path(lm.adapter or "")):
            raise InputError(f"{trained}, and {lm.name} has {lm.adapter or 'one that was never saved'} on; detach it")
        return
    for place in sorted(folder.parent.iterdir()):
        if place.name.endswith(over["name"]) and is_it(place):
            return load_adapter(lm, place)
    raise InputError(f"{trained}, which is not beside it in {folder.parent}; put it there")


def _misfits(lm: "LanguageModel", saved: Saved) -> Iterator[str]:
    """All reasons why a saved adapter is not the one just attached for it."""
    where, base = saved.folder / WEIGHTS, saved.base
    if base.get("hash", lm.hash) != lm.hash:
        yield f"{saved.folder / CONFIG}: was trained on {base.get('name')} ({base['hash'][:12]}), not on {lm.name}"
    expected = adapter_parameters(lm.model)
    yield from (f"{where}: {name} is missing" for name in expected if name not in saved.values)
    for name, value in saved.values.items():
        if name not in expected:
            yield f"{where}: {name} is not a layer of {lm.name}"
        elif value.shape != expected[name].shape:
            yield (
                f"{where}: {name} has shape {tuple(value.shape)}, the model wants {tuple(expected[name].shape)} "
                f"at rank {saved.shape.rank}"
            )
        if not mx.isfinite(value).all().item():
            yield f"{where}: {name} holds NaN or infinity"
