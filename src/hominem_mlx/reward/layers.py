"""Layers and poolings chosen by how well labels of prompts left out are predicted, where the settings leave it open.

All candidates are read at once; each is then a part of the same features.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hominem_mlx.reward.features import Backbone, layer_numbers

SETS: tuple[tuple[tuple[float, ...], tuple[str, ...]], ...] = (  # depths (shares of all layers), poolings
    ((0.0, 0.33, 0.67), ("mean", "max", "std", "gap")),  # the default with the student
    ((0.0, 0.17, 0.33, 0.5, 0.67), ("mean", "std", "gap", "near")),  # the default with the encoder
    ((0.0, 0.33, 0.67, 1.0), ("mean", "max", "std", "prompt", "gap", "near")),
    ((0.33, 0.67, 1.0), ("mean", "max", "std", "gap")),
    ((0.67,), ("mean", "last")),  # `science.md` 2.1
    ((0.67, 1.0), ("mean", "last")),  # where a language model knows what it will say
)
DEPTHS = tuple(sorted({depth for depths, _ in SETS for depth in depths}))
POOLINGS = tuple(dict.fromkeys(pooling for _, poolings in SETS for pooling in poolings))


class Choice(NamedTuple):
    """What a head reads: block numbers and poolings, as in `features.FeatureSpec`."""

    layers: tuple[int, ...]
    poolings: tuple[str, ...]


def candidates(backbone: Backbone) -> list[Choice]:
    """What may be chosen from what the backbone reads; nothing where it does not read all of it.

    In a small model several depths may be one layer: what then is the same is there once.
    """
    found = [Choice(tuple(layer_numbers(depths, backbone.reader.num_layers)), poolings) for depths, poolings in SETS]
    read = backbone.spec
    covered = all(set(each.layers) <= {*read.layers} and {*each.poolings} <= {*read.poolings} for each in found)
    return list(dict.fromkeys(found)) if covered else []


def part(features: np.ndarray, backbone: Backbone, choice: Choice) -> np.ndarray:
    """Of features `[N, ...]` that the backbone read those of a choice, as if it had been read alone."""
    read = backbone.spec
    size = features.shape[1] // (len(read.layers) * len(read.poolings))
    blocks = [
        read.layers.index(layer) * len(read.poolings) + read.poolings.index(pooling)
        for layer in choice.layers
        for pooling in choice.poolings
    ]
    places = np.concatenate([np.arange(block * size, (block + 1) * size) for block in blocks])
    return np.take(features, places, axis=1)  # rows in one piece: in another order sums would have other bits


def best(choices: Sequence[Choice], left_out: Callable[[Choice], np.ndarray], labels: np.ndarray) -> Choice:
    """The choice of the least mean squared error, each output in standard deviations; of equals the first.

    Args:
        left_out: a choice's errors `[N, O]` on rows whose fold was left out, NaN where a label is missing.
        labels: `[N, O]`.
    """
    scale = np.nanstd(labels, axis=0)
    scale[scale < 1e-9] = 1.0  # what never moves tells nothing

    def error(choice: Choice) -> float:
        off = np.square(left_out(choice) / scale)
        told = off[~np.isnan(off)]
        return float(told.mean()) if len(told) else math.inf

    return min(choices, key=error)
