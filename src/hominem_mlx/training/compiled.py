"""A gradient compiled once for every kind of batch (`mx.compile`)."""

import functools
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

KINDS = 64  # kinds of batch that stay compiled, the last used ones


def compiled(model: nn.Module, value_and_grad: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same, compiled when a kind of batch comes for the first time.

    Of a kind are batches with arrays of the same shapes and the same in all else that decides what is computed. The
    parameters of the model and the random state are read when it is called, as ever.

    Args:
        value_and_grad: of a batch (arrays in dataclasses, tuples, lists), with respect to the model's parameters.
    """
    state = [model.state, mx.random.state]

    @functools.lru_cache(maxsize=KINDS)
    def of(kind: Hashable) -> Callable:
        def gradient(arrays: list[mx.array]) -> Any:
            weights = model.trainable_parameters()
            found = value_and_grad(_put_together(kind, arrays))
            model.update(weights)  # else what stood for them while this was written down would stay in the model
            return found

        return mx.compile(gradient, inputs=state, outputs=[mx.random.state])

    def run(batch: Any) -> Any:
        arrays: list[mx.array] = []
        kind = _take_apart(batch, arrays, {})
        return of(kind)(arrays)

    return run


def _take_apart(value: Any, arrays: list[mx.array], places: dict[int, int]) -> Hashable:
    """What a value is besides its arrays, which are put into `arrays`, each once."""
    if isinstance(value, mx.array):
        if id(value) not in places:
            places[id(value)] = len(arrays)
            arrays.append(value)
        return mx.array, places[id(value)], value.shape, value.dtype
    if is_dataclass(value):
        parts = [getattr(value, field.name) if field.compare else None for field in fields(value)]
    elif isinstance(value, tuple | list):
        parts = list(value)
    else:
        return None, value
    return type(value), tuple(_take_apart(part, arrays, places) for part in parts)


def _put_together(kind: Any, arrays: list[mx.array]) -> Any:
    """The value again."""
    made, inside, *_ = kind
    if made is None:
        return inside
    if made is mx.array:
        return arrays[inside]
    parts = [_put_together(part, arrays) for part in inside]
    return made(parts) if made in (tuple, list) else made(*parts)
