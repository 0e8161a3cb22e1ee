"""Log-probabilities of replies. Logits are computed on response positions only and summed in float32."""

from collections.abc import Sequence

import mlx.core as mx

from hominem_mlx.errors import ModelError
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.training.rows import Row, Rows, collate


class LogProbs:
    """Computes `log p(reply | prompt)` with a model, gradients included.

    Where a family does something after its output layer the whole model is called, which is exact and slower.
    """

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self._split = lm.body_and_head()

    def logits(self, rows: Rows) -> mx.array:
        """Logits that predict the response tokens, float32 `[N, V]`, in the order of `rows.targets`."""
        if self._split:
            logits = self._split[1](self.hidden(rows))
        else:
            logits = self.lm.model(rows.tokens)
            logits = logits.reshape(-1, logits.shape[-1])[rows.where]
        return logits.astype(mx.float32)

    def hidden(self, rows: Rows) -> mx.array:
        """What the output layer reads where a response token is predicted, `[N, D]`.

        Raises: ModelError where body and output layer cannot be told apart.
        """
        if not self._split:
            raise ModelError(
                f"{self.lm.name} does something after its output layer, so what that layer reads is unknown"
            )
        hidden = self._split[0](rows.tokens)
        return hidden.reshape(-1, hidden.shape[-1])[rows.where]

    def per_token(self, rows: Rows) -> mx.array:
        """Log-probability of every response token, float32 `[N]`, in the order of `rows.targets`."""
        logits = self.logits(rows)
        chosen = mx.take_along_axis(logits, rows.targets[:, None], axis=-1)[:, 0]
        return chosen - mx.logsumexp(logits, axis=-1)

    def __call__(self, rows: Rows) -> mx.array:
        """Sum over each reply's tokens, float32 `[B]`."""
        return mx.zeros(rows.lengths.shape).at[rows.owner].add(self.per_token(rows))


def reference_logprobs(logprobs: LogProbs, rows: Sequence[Row], *, batch: int = 16, progress=None) -> list[float]:
    """`log p(reply | prompt)` of every row under the model as it is now, sorted by length inside to pad little."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].num_tokens)
    values = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        for index, value in zip(chunk, logprobs(collate([rows[i] for i in chunk])).tolist(), strict=True):
            values[index] = value
        if progress:
            progress(start + len(chunk))
    return values
