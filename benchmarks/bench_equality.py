"""B1: loss and gradients of every path against the naive formula, on the small shape."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from bench_models import BETA, Pair, Shape, add_adapter, make_model, naive_gradients, naive_logprobs
from bench_ours import Blended, RandomModel, as_mlx_lm_has_it, rows_of
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from hominem_mlx import losses
from hominem_mlx.training import logprobs as training_logprobs
from hominem_mlx.training.logprobs import LOGITS_BYTES, LogProbs, reference_logprobs

PATHS = {
    "flat": {"share": False},
    "shared": {},
    "chunked": {"logits_bytes": 2**16},
    "checkpointed": {"checkpoint": 1.0},
}
BASES = {"float32": None, "8 bits": 8, "4 bits": 4}


class Equality:
    """Calling it measures every path over every base.

    Differences are relative to the largest magnitude of what is compared: the loss, the reference log-probabilities,
    each gradient tensor (of which the worst counts).
    """

    def __init__(self, shape: Shape, pairs: Sequence[Pair]):
        self.shape, self.pairs = shape, pairs

    def __call__(self) -> dict:
        found = {}
        for base, bits in BASES.items():
            reference, loss, gradients = self._naive(bits)
            for path, arguments in PATHS.items():
                training_logprobs.LOGITS_BYTES = arguments.get("logits_bytes", LOGITS_BYTES)
                options = {name: value for name, value in arguments.items() if name != "logits_bytes"}
                step = Blended(self.shape, self.pairs, bits=bits, **options)
                ours, tree = step.value_and_grad(step.collate())
                found[f"{path}, {base}"] = {
                    "loss": abs(ours.item() - loss) / abs(loss),
                    "reference": _difference(np.array(step.reference).reshape(2, -1).T, reference),
                    "gradient": max(_difference(value, gradients[name]) for name, value in tree_flatten(tree)),
                }
        return {"paths": found, "first_step_bf16": self._first_step()}

    def _naive(self, bits: int | None) -> tuple[np.ndarray, float, dict[str, mx.array]]:
        """Reference log-probabilities, loss and gradients, from the same weights (dequantised)."""
        model = make_model(self.shape, bits=bits)
        if bits:
            dequantize_model(model)
            model.freeze()
        as_mlx_lm_has_it()
        reference = naive_logprobs(model, self.pairs)
        return reference, *naive_gradients(add_adapter(model), reference, self.pairs)

    def _first_step(self) -> float:
        """|DPO loss - ln 2| of a fresh adapter in bfloat16, where policy and reference are the same model."""
        model = make_model(self.shape, dtype=mx.bfloat16)
        logprobs, rows, n = LogProbs(RandomModel(model)), rows_of(self.pairs), len(self.pairs)
        reference = mx.array(reference_logprobs(logprobs, rows))
        add_adapter(model, fresh=True)
        gained = logprobs(logprobs.collate(rows)) - reference
        return abs(losses.dpo(gained[:n] - gained[n:], beta=BETA).mean().item() - math.log(2))


def _difference(ours, naive) -> float:
    ours, naive = np.array(ours), np.array(naive)
    return float(np.abs(ours - naive).max() / np.abs(naive).max())
