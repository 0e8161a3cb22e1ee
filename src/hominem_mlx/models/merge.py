"""Adapters added up in weight space: one adapter that does what several do together, cut down to a rank.

A LoRA adapter adds `scale A B` to a layer, so the sum of several is exactly the product of their factors side by side.
Averaging A and B apart is another thing altogether. The model itself is not needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from hominem_mlx.errors import InputError
from hominem_mlx.files import sha256_file
from hominem_mlx.models import lora


def truncate(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product `a b` as nearly as `rank` allows: its largest singular values (Eckart and Young 1936).

    By QR of both factors and the SVD of the small core between them, so the product is never formed.

    Args:
        a: float `[in, R]`.
        b: float `[R, out]`.
        rank: at least 1; may be larger than R, and what is left of it is 0.

    Returns: factors float64 `[in, rank]` and `[rank, out]` of equal norm, and the energies `[min(in, R, out)]` of the
        whole product, largest first: squared singular values, of which the first `rank` are kept.
    """
    qa, ra = np.linalg.qr(a.astype(np.float64))
    qb, rb = np.linalg.qr(b.T.astype(np.float64))
    left, strength, right = np.linalg.svd(ra @ rb.T, full_matrices=False)
    root = np.sqrt(strength[:rank])
    spare = rank - len(root)
    short_a, short_b = qa @ (left[:, :rank] * root), (root[:, None] * right[:rank]) @ qb.T
    return np.pad(short_a, ((0, 0), (0, spare))), np.pad(short_b, ((0, spare), (0, 0))), strength**2


def merge(folders: Sequence[Path], into: Path, *, rank: int | None = None) -> dict[str, Any]:
    """Write the sum of saved LoRA adapters into `into`, as an adapter that stands alone.

    Args:
        folders: adapters of one base, of any ranks, scales and layers. One that was trained on top of another comes
            after it. A single one is only cut down.
        into: an empty folder, which should be a draft.
        rank: of the result; the first one's when None. Its scale is the first one's too.

    Returns: rank, layers, energy_lost (share of the squared Frobenius norm of the sum over all layers that the rank cut
        off, 0 to 1), worst_layer and its share.
    Raises: InputError with every reason why these cannot be added up.
    """
    saved = [lora.read(folder) for folder in folders]
    if problems := [problem for place in range(len(saved)) for problem in _misfits(saved, place)]:
        raise InputError(problems)
    first = saved[0].shape
    rank, scale = rank or first.rank, first.scale or 1.0
    values: dict[str, mx.array] = {}
    total, lost = {}, {}
    for layer in dict.fromkeys(_layer(name) for each in saved for name in each.values):
        parts = [each for each in saved if f"{layer}.lora_a" in each.values]
        a = np.concatenate([_numpy(each, f"{layer}.lora_a") for each in parts], axis=1)
        b = np.concatenate([each.shape.scale / scale * _numpy(each, f"{layer}.lora_b") for each in parts])
        a, b, energy = truncate(a, b, rank)
        values[f"{layer}.lora_a"], values[f"{layer}.lora_b"] = mx.array(a, mx.float32), mx.array(b, mx.float32)
        total[layer], lost[layer] = energy.sum(), energy[rank:].sum()
    blocks = [each.shape.num_layers for each in saved]
    reach = -1 if min(blocks) < 1 else max(blocks)
    lora.write(into, replace(first, rank=rank, scale=scale), reach, values, base=saved[0].base)
    shares = {layer: float(lost[layer] / (total[layer] or 1.0)) for layer in total}
    worst = max(shares, key=shares.__getitem__)
    energy_lost = float(sum(lost.values()) / (sum(total.values()) or 1.0))
    return {
        "rank": rank,
        "layers": len(shares),
        "energy_lost": energy_lost,
        "worst_layer": worst,
        "worst_layer_lost": shares[worst],
    }


def _misfits(saved: Sequence[lora.Saved], place: int) -> Iterator[str]:
    """Why the adapter at this place cannot be added to those before it."""
    one, before = saved[place], saved[:place]
    config, weights = one.folder / lora.CONFIG, one.folder / lora.WEIGHTS
    if one.shape.kind != "lora":
        yield f"{config}: a DoRA adapter rescales the base's rows, so it is no sum to add to; use lora"
        return
    base, wanted = one.base, saved[0].base
    if base.get("hash") != wanted.get("hash"):
        yield (
            f"{config}: belongs to {base.get('name')} ({str(base.get('hash'))[:12]}), "
            f"{saved[0].folder.name} to {wanted.get('name')} ({str(wanted.get('hash'))[:12]})"
        )
    if one.over and not any(sha256_file(each.folder / lora.WEIGHTS) == one.over["hash"] for each in before):
        yield f"{config}: was trained on top of the adapter {one.over['name']}; name that one before it"
    if not one.values:
        yield f"{weights}: is empty"
    for layer in dict.fromkeys(_layer(name) for name in one.values):
        a, b = (one.values.get(f"{layer}.{leaf}") for leaf in ("lora_a", "lora_b"))
        if a is None or b is None:
            yield f"{weights}: {layer} lacks lora_{'a' if a is None else 'b'}"
            continue
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            yield f"{weights}: {layer} has factors {tuple(a.shape)} and {tuple(b.shape)}, not (in, r) and (r, out)"
            continue
        if not (mx.isfinite(a).all() & mx.isfinite(b).all()).item():
            yield f"{weights}: {layer} holds NaN or infinity"
        both = {f"{layer}.lora_a", f"{layer}.lora_b"}
        theirs = next((each for each in before if both <= each.values.keys()), None)
        if theirs and (mine := _size(one, layer)) != (other := _size(theirs, layer)):
            yield f"{weights}: {layer} maps {mine[0]} to {mine[1]}, in {theirs.folder.name} {other[0]} to {other[1]}"


def _size(saved: lora.Saved, layer: str) -> tuple[int, int]:
    return saved.values[f"{layer}.lora_a"].shape[0], saved.values[f"{layer}.lora_b"].shape[-1]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _numpy(saved: lora.Saved, name: str) -> np.ndarray:
    return np.array(saved.values[name].astype(mx.float32))
