"""What the output layer reads of replies, most of all: an adapter that is held to it weighs words."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from hominem_mlx.training.logprobs import READ_AT_ONCE, LogProbs
from hominem_mlx.training.rows import Row

HEAD_GAIN = 16.0  # found on the bundled student: words are then weighed as fast as the other layers learn facts


def strongest_directions(logprobs: LogProbs, rows: Sequence[Row], rank: int, *, batch: int = READ_AT_ONCE) -> mx.array:
    """Principal directions (not centred) of what the output layer reads in replies, `[rank, D]` float32.

    The first is near the mean: an adapter that reads it weighs words, whatever was said before, and can be learnt
    from few pairs. Scaled so that a reading is `HEAD_GAIN` in the root mean square. After Paischer et al. 2024, EVA
    (arXiv 2410.07170), who start every LoRA from its inputs' principal directions.
    """
    rows = sorted(rows, key=lambda row: row.num_tokens)[:: max(1, len(rows) // 128)]
    parts = [logprobs.hidden(logprobs.collate(rows[i : i + batch])) for i in range(0, len(rows), batch)]
    hidden = np.concatenate([np.array(part.astype(mx.float32)) for part in parts])
    _, strength, axes = np.linalg.svd(hidden, full_matrices=False)
    return mx.array(HEAD_GAIN * len(hidden) ** 0.5 * axes[:rank] / strength[:rank, None])
