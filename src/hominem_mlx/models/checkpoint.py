"""Gradient checkpointing, over shared prompts too: a block keeps what goes in and computes the rest again when asked.

mlx-lm's own wraps a block's call. Over shared prompts (`prefix.py`) that is silently wrong: the prompt's keys and
values leave the call through a cache, so nothing of the replies' gradient comes back to them. Here a block reads
prompts and rows in one call, and both go in and come out of it.
"""

import contextlib
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from hominem_mlx.models.platform import with_gradient
from hominem_mlx.models.prefix import Continued, Prompts, Recorder, read_after


def can_checkpoint(model: nn.Module, *, shares: bool) -> bool:
    """Whether the blocks of this model can be computed again one by one.

    No where they do not lie in `model.model.layers`, where they are given more than hidden states, mask and cache, and
    where the model turns out to say something else.

    Args:
        shares: whether its prompts are shared, so that this is looked at too.
    """
    body = getattr(model, "model", None)
    if not isinstance(body, nn.Module) or "layers" not in body:
        return False
    prompts = Prompts(mx.array([[3, 1, 4]]), mx.array([3]), mx.array([0, 0]))

    def said() -> mx.array:
        alone = model(mx.array([[3, 1, 4, 1, 5]]))
        if not shares:
            return alone
        rows = read_after(model, prompts, mx.array([[1, 5, 9], [1, 2, 6]]), len(body.layers))
        return mx.concatenate([alone.reshape(-1, alone.shape[-1]), rows.reshape(-1, alone.shape[-1])])

    try:
        wanted = said()
        with checkpointed(body) as blocks:
            again = said()
    except (TypeError, ValueError, AttributeError, IndexError):
        return False
    each_once = all(block.calls == 1 + shares for block in blocks)
    return each_once and mx.allclose(wanted, again, rtol=1e-3, atol=1e-4).item()


@contextlib.contextmanager
def checkpointed(body: nn.Module, number: int | None = None) -> Iterator[list["_Block"]]:
    """What is read inside the `with` keeps one hidden state a block for its gradient, not all that blocks compute.

    Args:
        number: of blocks to treat so, from below, since what the upper ones keep is gone when the lower ones compute
            again; by default all.
    """
    layers = body.layers
    number = len(layers) if number is None else number
    stream = _PromptStream()
    body.layers = [
        _Block(block, stream, again=place < number, is_last=place == len(layers) - 1)
        for place, block in enumerate(layers)
    ]
    try:
        yield body.layers
    finally:
        body.layers = layers


class _PromptStream:
    """The prompts' hidden states on their way up, `[P, S, D]`; None where no prompt is shared."""

    hidden: mx.array | None = None


class _Block:
    """Stands in for a block: notes how it reads the prompts, and reads them when it reads the rows.

    Args:
        again: keep only what goes in, and compute the rest again for the gradient.
    """

    def __init__(self, block: nn.Module, prompts: _PromptStream, *, again: bool, is_last: bool):
        self.block, self.prompts, self.again, self.is_last = block, prompts, again, is_last
        self.calls = 0

    def __getattr__(self, name):  # some families ask their blocks for attributes
        return getattr(self.block, name)

    def __call__(self, x: mx.array, *args, **kwargs) -> mx.array:
        given = [*args, *kwargs.values()]
        for value in given:
            is_mask = isinstance(value, mx.array) and value.dtype == mx.bool_
            if not (is_mask or value is None or isinstance(value, bool | int | str | Recorder | Continued)):
                raise ValueError(f"a block is given {type(value).__name__}, whose gradient checkpoints would lose")
        record = next((value for value in given if isinstance(value, Recorder)), None)
        if record is not None:  # the prompts' turn comes with the rows'; until then the first block's input is kept
            self.record, self.of_prompts = record, (args, kwargs)
            if self.prompts.hidden is None:
                self.prompts.hidden = x
            return x
        self.calls += 1
        streams = [x] if self.prompts.hidden is None else [x, self.prompts.hidden]
        names, arrays = zip(*tree_flatten({"streams": streams, "weights": self.block.trainable_parameters()}))

        def forward(arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
            tree = tree_unflatten(list(zip(names, arrays)))
            weights = self.block.trainable_parameters()
            self.block.update(tree.get("weights", {}))
            rows, *prompts = tree["streams"]
            read = [self.block(stream, *self.of_prompts[0], **self.of_prompts[1]) for stream in prompts]
            read.insert(0, self.block(rows, *args, **kwargs))
            self.block.update(weights)
            if prompts:
                self.record.forget()
            return tuple(read[:1] if self.is_last else read)  # the last block's prompts are never asked for

        def backward(arrays, cotangents, _):
            # First the blocks above, then all of this one, then those below: MLX's own order would compute blocks again
            # before their turn, and put off the gradients of all weights, with what these are made of, to the end.
            arrays = mx.depends(arrays, list(cotangents))
            _, gradients = mx.vjp(lambda *arrays: forward(arrays), arrays, list(cotangents))
            of_streams, of_weights = gradients[: len(streams)], gradients[len(streams) :]
            return [*(mx.depends(of_streams, of_weights) if of_weights else of_streams), *of_weights]

        out = (with_gradient(forward, backward) if self.again else forward)(list(arrays))
        self.prompts.hidden = out[1] if len(out) > 1 else None
        return out[0]
