"""Log-probabilities of replies. Logits are computed on response positions only and summed in float32."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from hominem_mlx.errors import ModelError
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.checkpoint import can_checkpoint, checkpointed
from hominem_mlx.models.platform import a_pass, lanes, logsumexp, with_gradient
from hominem_mlx.models.prefix import Recorder, can_share, read_after, read_prompts
from hominem_mlx.training.rows import Block, Row, Rows, by_prompt, collate

# Logits of more bytes than this, all lanes together, are never there at once. With them come their exponentials and
# gradients, some four times as much. 64 MiB are 110 tokens of the largest vocabularies (150 000): chunks of fewer rows
# would keep the matrix products from their speed, more would be most of a step's memory.
LOGITS_BYTES = 64 * 2**20
READ_AT_ONCE = 16  # rows, where no gradient is wanted

Read = dict[int, list[Recorder]]  # by identity of their tokens: prompts that several blocks go on from


class LogProbs:
    """Computes `log p(reply | prompt)` with a model, gradients included.

    Where a family does something after its output layer the whole model is called, which is exact and slower.

    Args:
        checkpoint: share of the blocks, in [0, 1], of which only what goes in is kept, and the rest computed again for
            the gradient: less memory, more time. Where a family does not allow it this changes nothing; `checkpoints`
            tells how many blocks it is.

    Attributes, for whoever has less memory than that takes:
        logits_bytes: logits of more come in chunks; `LOGITS_BYTES` unless set.
        checkpoints: number of blocks that are computed again; to be raised only where `can_checkpoint`.
    """

    def __init__(self, lm: LanguageModel, *, checkpoint: float = 0.0):
        self.lm = lm
        self._split = lm.body_and_head()
        self._shares = can_share(lm.model)
        self.logits_bytes = LOGITS_BYTES
        self.checkpoints = math.ceil(checkpoint * lm.num_layers)
        if self.checkpoints and not self.can_checkpoint:
            self.checkpoints = 0
        self._a_pass = a_pass(sum(get_total_parameters(block) for block in lm.model.layers))

    @functools.cached_property
    def can_checkpoint(self) -> bool:
        """Whether this family's blocks can be computed again."""
        return can_checkpoint(self.lm.model, shares=self._shares)

    @property
    def comes_apart(self) -> bool:
        """Whether logits are computed where a reply is predicted alone; else they are for every position."""
        return self._split is not None

    def collate(self, rows: Sequence[Row], *, share: bool = True, spread: bool | None = None) -> Rows:
        """The rows as a batch; those of one prompt share it where this model can, and where they may.

        Args:
            spread: whether a prompt may be read in all lanes; by default where nothing is checkpointed.
        """
        spread = not self.checkpoints if spread is None else spread
        return collate(rows, share=share and self._shares, spread=spread, a_pass=self._a_pass)

    def logits(self, rows: Rows) -> mx.array:
        """Logits that predict the response tokens, float32 `[N, V]`, in the order of `rows.owner`."""
        return _in_lanes(self._logits, rows)

    def hidden(self, rows: Rows) -> mx.array:
        """What the output layer reads where a response token is predicted, `[N, D]`, in the order of `rows.owner`.

        Raises: ModelError where body and output layer cannot be told apart.
        """
        if not self._split:
            raise ModelError(
                f"{self.lm.name} does something after its output layer, so what that layer reads is unknown"
            )
        return _in_lanes(self._hidden, rows)

    def per_token(self, rows: Rows, *, gradient: bool = True) -> mx.array:
        """Log-probability of every response token, float32 `[N]`, in the order of `rows.owner`.

        Args:
            gradient: False where none will be asked for, which saves its making where logits come in chunks.
        """
        return _in_lanes(functools.partial(self._per_token, gradient=gradient), rows)

    def _hidden(self, block: Block, read: Read) -> mx.array:
        assert self._split is not None  # whoever calls this has looked
        return self._read(self._split[0], block, read)

    def _logits(self, block: Block, read: Read) -> mx.array:
        if self._split:
            return self._head(self._hidden(block, read))
        return self._read(self.lm.model, block, read).astype(mx.float32)

    def _head(self, hidden: mx.array) -> mx.array:
        assert self._split is not None
        return self._split[1](hidden).astype(mx.float32)

    def _head_is_frozen(self) -> bool:
        model = self.lm.model
        head = model.lm_head if "lm_head" in model else model.model.embed_tokens
        return not tree_flatten(head.trainable_parameters())

    def _read(self, network: Callable, block: Block, read: Read) -> mx.array:
        """What the model, or its part below the output layer, makes of the positions that predict: `[N, ...]`."""
        prompts, depth = block.prompts, self.lm.num_layers
        again = self.checkpoints
        with checkpointed(self.lm.model.model, again) if again else contextlib.nullcontext():
            if prompts is None:
                made = network(block.tokens)
            else:
                if block.spread and not again and id(prompts.tokens) not in read:
                    read[id(prompts.tokens)] = read_prompts(network, prompts, depth, lanes())
                made = read_after(network, prompts, block.tokens, depth, read.get(id(prompts.tokens)))
        return made.reshape(-1, made.shape[-1])[block.where]

    def _per_token(self, block: Block, read: Read, *, gradient: bool) -> mx.array:
        if not self._split:
            return _of(block.targets, self._logits(block, read))
        hidden = self._hidden(block, read)
        logits = self._head(hidden)  # nothing is computed before it is asked for
        at_once = chunk(self.logits_bytes, logits.shape[-1])
        if at_once >= len(hidden) or (gradient and not self._head_is_frozen()):
            return _of(block.targets, logits)
        return self._in_chunks(hidden, block.targets, -(-len(hidden) // -(-len(hidden) // at_once)), gradient)

    def _in_chunks(self, hidden: mx.array, targets: mx.array, size: int, gradient: bool) -> mx.array:
        """The same from logits of `size` tokens at a time, `[N, D]` to `[N]`; the output layer must be frozen.

        A token's log-probability is a scalar of its own hidden state, so its slope there is made beside it, from the
        same logits, and multiplied later by what the loss made of it: no logits are kept, none are computed twice.
        """

        def forward(hidden: mx.array) -> tuple[mx.array, ...]:
            done: list[list[mx.array]] = []
            for start in range(0, len(hidden), size):
                part, wanted = hidden[start : start + size], targets[start : start + size]
                if done:
                    part = mx.depends(part, done[-1])  # else all chunks would be there at once after all

                def value(part: mx.array, wanted: mx.array = wanted) -> mx.array:
                    return _of(wanted, self._head(part))

                if gradient:
                    [values], [slopes] = mx.vjp(value, [part], [mx.ones(len(part))])
                    done.append([values, slopes])
                else:
                    done.append([value(part)])
            return tuple(mx.concatenate(parts) for parts in zip(*done))

        def backward(_, cotangents, outputs):
            return cotangents[0][:, None].astype(outputs[1].dtype) * outputs[1]

        return (with_gradient(forward, backward) if gradient else forward)(hidden)[0]

    def __call__(self, rows: Rows, *, gradient: bool = True) -> mx.array:
        """Sum over each reply's tokens, float32 `[B]`; `gradient` as in `per_token`."""
        return mx.zeros(rows.lengths.shape).at[rows.owner].add(self.per_token(rows, gradient=gradient))


def chunk(logits_bytes: int, vocabulary: int) -> int:
    """Tokens of one block whose logits are there at once, of so many bytes for all lanes."""
    return max(1, logits_bytes // (len(lanes()) * vocabulary * mx.float32.size))


def _of(targets: mx.array, logits: mx.array) -> mx.array:
    """Log-probabilities of `targets` int `[N]`, of logits float32 `[N, V]`."""
    return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - logsumexp(logits)


def _in_lanes(compute: Callable[[Block, Read], mx.array], rows: Rows) -> mx.array:
    parts, read = [], Read()
    for block in rows.blocks:
        with mx.stream(lanes()[block.lane]):
            parts.append(compute(block, read))
    return mx.concatenate(parts)


def reference_logprobs(
    logprobs: LogProbs, rows: Sequence[Row], *, batch: int = READ_AT_ONCE, progress=None
) -> list[float]:
    """`log p(reply | prompt)` of every row under the model as it is now, sorted by length inside to pad little."""
    order = by_prompt(rows)
    values = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        batch_of = logprobs.collate([rows[i] for i in chunk])
        for index, value in zip(chunk, logprobs(batch_of, gradient=False).tolist(), strict=True):
            values[index] = value
        if progress:
            progress(start + len(chunk))
    return values
