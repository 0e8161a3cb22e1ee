"""One prompt, several replies: the prompt is computed once, gradients included, and every reply goes on from there.

mlx-lm's models are not touched. They hand each layer's keys and values to a cache; the caches here keep what prompts
made of them and put it before what replies make. A row's positions start where its own prompt ended.

Exact for families whose layers look back over everything and keep nothing else; `can_share` finds out which do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

Body = Callable[..., mx.array]


@dataclass(frozen=True)
class Prompts:
    """`P` prompts that `B` rows go on from.

    tokens: int32 `[P, S]`, each prompt without its last token, padded on the right. lengths: int32 `[P]`, tokens that
    are real. of: int32 `[B]`, the prompt of each row.
    """

    tokens: mx.array
    lengths: mx.array
    of: mx.array


class Recorder:
    """Looks like the cache of one layer; keeps the keys and values of prompts, `[P, heads, S, head size]`.

    Args:
        before: what an earlier piece of the same prompts left; None where they begin.
    """

    keys: mx.array
    values: mx.array

    def __init__(self, before: "Recorder | None" = None):
        self.before, self.offset = before, before.keys.shape[2] if before else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.before:
            keys = mx.concatenate([self.before.keys, keys], axis=2)
            values = mx.concatenate([self.before.values, values], axis=2)
        self.keys, self.values = keys, values
        return keys, values

    def forget(self) -> None:
        """Let keys and values go; whoever reads on needs them no more."""
        del self.keys, self.values

    def make_mask(self, length: int, *, return_array: bool = False, window_size: int | None = None):
        _refuse(window_size)
        return create_causal_mask(length, self.offset) if return_array else "causal"


class Continued:
    """Looks like the cache of one layer in which every row has its own prompt already."""

    def __init__(self, record: Recorder, of: mx.array, offset: mx.array, mask: mx.array):
        self.record, self.of, self.offset, self.mask = record, of, offset, mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        before = self.record
        return (
            mx.concatenate([before.keys[self.of], keys], axis=2),
            mx.concatenate([before.values[self.of], values], axis=2),
        )

    def make_mask(self, length: int, *, return_array: bool = False, window_size: int | None = None) -> mx.array:
        _refuse(window_size)
        return self.mask


def _refuse(window_size: int | None) -> None:
    if window_size is not None:
        raise ValueError(f"this model looks back {window_size} tokens only; its prompts cannot be shared")


def read_prompts(
    body: Body, prompts: Prompts, num_layers: int, streams: Sequence[mx.Stream | mx.ThreadLocalStream] = ()
) -> list[Recorder]:
    """What every layer keeps of the prompts.

    Args:
        streams: where to compute; the prompts are cut into as many pieces, which run side by side, since a piece wants
            no more of the one before it than the keys and values of the same layer. By default in one piece, here.
    """
    records: list = [None] * num_layers
    streams = streams or [mx.default_stream(mx.default_device())]
    for stream, piece in zip(streams, np.array_split(np.arange(prompts.tokens.shape[1]), len(streams))):
        if len(piece):
            with mx.stream(stream):
                records = [Recorder(before) for before in records]
                body(prompts.tokens[:, piece[0] : piece[-1] + 1], cache=records)
    return records  # only what the caches kept is used, so the last layer's rest is never computed


def read_after(
    body: Body, prompts: Prompts, tokens: mx.array, num_layers: int, records: Sequence[Recorder] | None = None
) -> mx.array:
    """What `body` makes of each row as if its prompt stood before it.

    Args:
        body: a mlx-lm model, or the part below its output layer; takes `(tokens, cache=)`.
        prompts: what the rows go on from.
        tokens: int32 `[B, T]`, the prompt's last token and then the row's own, padded on the right.
        num_layers: number of caches the body wants.
        records: of these prompts by `read_prompts`, where they have been read already.

    Returns: `[B, T, ...]`.
    """
    records = records or read_prompts(body, prompts, num_layers)
    (rows, length), before = tokens.shape, prompts.tokens.shape[1]
    offset = prompts.lengths[prompts.of]
    from_prompt = mx.arange(before) < offset[:, None]
    from_row = mx.arange(length)[:, None] >= mx.arange(length)
    mask = mx.concatenate(
        [
            mx.broadcast_to(from_prompt[:, None, None], (rows, 1, length, before)),
            mx.broadcast_to(from_row, (rows, 1, length, length)),
        ],
        axis=-1,
    )
    return body(tokens, cache=[Continued(record, prompts.of, offset, mask) for record in records])


def can_share(model: nn.Module) -> bool:
    """Whether sharing a prompt gives this model's own logits.

    No for models whose layers keep anything but plain keys and values (windows, recurrences), and for those that turn
    out to say something else when asked: a short prompt shared by two rows, and a longer one beside it.
    """
    if not all(type(cache) is KVCache for cache in make_prompt_cache(model)):
        return False
    first, second = [3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5]
    texts = [(first, [8, 9, 7, 9, 3]), (first, [2, 3]), (second, [8, 4])]
    prompts = Prompts(
        mx.array([first[:-1] + [0] * 5, second[:-1]]), mx.array([len(first) - 1, len(second) - 1]), mx.array([0, 0, 1])
    )
    rows = mx.array([(prompt[-1:] + reply + [0] * 5)[:6] for prompt, reply in texts])
    try:
        shared = read_after(model, prompts, rows, len(model.layers))
        near = 1e-4 if shared.dtype == mx.float32 else 3e-2  # halves of a unit in the last place add up over layers
        for row, (prompt, reply) in zip(shared.astype(mx.float32), texts, strict=True):
            whole = model(mx.array([prompt + reply]))[0, len(prompt) - 1 :].astype(mx.float32)
            if not mx.abs(row[: len(reply) + 1] - whole).max().item() <= near * mx.abs(whole).max().item():
                return False
    except (TypeError, ValueError, AttributeError, IndexError):
        return False
    return True
