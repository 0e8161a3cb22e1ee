"""Log-probabilities of replies. Logits are computed on response positions only and summed in float32."""

import itertools
from collections.abc import Callable, Sequence

import mlx.core as mx

from hominem_mlx.errors import ModelError
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.platform import lanes, logsumexp
from hominem_mlx.models.prefix import can_share, read_after
from hominem_mlx.training.rows import Block, Row, Rows, by_prompt, collate


class LogProbs:
    """Computes `log p(reply | prompt)` with a model, gradients included.

    Where a family does something after its output layer the whole model is called, which is exact and slower.
    """

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self._split = lm.body_and_head()
        self._shares = can_share(lm.model)

    def collate(self, rows: Sequence[Row]) -> Rows:
        """The rows as a batch; those of one prompt share it where this model can."""
        return collate(rows, share=self._shares)

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

    def per_token(self, rows: Rows) -> mx.array:
        """Log-probability of every response token, float32 `[N]`, in the order of `rows.owner`."""
        return _in_lanes(self._per_token, rows)

    def _hidden(self, block: Block) -> mx.array:
        assert self._split is not None  # whoever calls this has looked
        return self._read(self._split[0], block)

    def _logits(self, block: Block) -> mx.array:
        logits = self._split[1](self._hidden(block)) if self._split else self._read(self.lm.model, block)
        return logits.astype(mx.float32)

    def _read(self, network: Callable, block: Block) -> mx.array:
        """What the model, or its part below the output layer, makes of the positions that predict: `[N, ...]`."""
        if block.prompts is None:
            made = network(block.tokens)
        else:
            made = read_after(network, block.prompts, block.tokens, self.lm.num_layers)
        return made.reshape(-1, made.shape[-1])[block.where]

    def _per_token(self, block: Block) -> mx.array:
        logits = self._logits(block)
        chosen = mx.take_along_axis(logits, block.targets[:, None], axis=-1)[:, 0]
        return chosen - logsumexp(logits)

    def __call__(self, rows: Rows) -> mx.array:
        """Sum over each reply's tokens, float32 `[B]`."""
        return mx.zeros(rows.lengths.shape).at[rows.owner].add(self.per_token(rows))


def _in_lanes(compute: Callable[[Block], mx.array], rows: Rows) -> mx.array:
    parts = []
    for lane, block in zip(itertools.cycle(lanes()), rows.blocks):
        with mx.stream(lane):
            parts.append(compute(block))
    return mx.concatenate(parts)


def reference_logprobs(logprobs: LogProbs, rows: Sequence[Row], *, batch: int = 16, progress=None) -> list[float]:
    """`log p(reply | prompt)` of every row under the model as it is now, sorted by length inside to pad little."""
    order = by_prompt(rows)
    values = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        for index, value in zip(chunk, logprobs(logprobs.collate([rows[i] for i in chunk])).tolist(), strict=True):
            values[index] = value
        if progress:
            progress(start + len(chunk))
    return values
