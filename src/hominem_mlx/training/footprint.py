"""What training every weight takes of memory and of disk, told beforehand, and what this machine has.

Everything is float32: in bfloat16 a weight of 0.02 changes by 1e-4 or not at all, and a step of 5e-6 would be lost.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from hominem_mlx.files import read_json
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.training.loop import CHECKPOINT
from hominem_mlx.training.rows import Row

FLOAT = 4  # bytes
GB = 1e9
AROUND = 1.5  # norms, rotations and sums between the matrix products, as a share of what those read and make
PER_SCORE = 2  # attention scores and the shares made of them
PER_LOGIT = 4  # logits, their gradient, and what log-sum-exp keeps


@dataclass(frozen=True)
class Need:
    """Bytes, by what they are for."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.weights + self.gradients + self.moments + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "moments", "activations")
        shown = ", ".join(f"{name} {getattr(self, name) / GB:.1f}" for name in parts)
        return f"{self.total / GB:.1f} GB ({shown})"


def need(lm: LanguageModel, rows: Sequence[Row], *, batch: int) -> Need:
    """What AdamW on every weight takes at most, from shapes alone.

    Gradients count twice: the mean over micro-batches and the one that is being added, later the clipped one.
    Activations are those of `batch` of the longest rows; nothing of them is computed twice to save memory.
    """
    weights = FLOAT * num_weights(lm)
    return Need(weights, 2 * weights, 2 * weights, _activations(lm, rows, batch))


def num_weights(lm: LanguageModel) -> int:
    """Weights of the model, each once."""
    return sum(value.size for _, value in tree_flatten(lm.model.parameters()))


def _activations(lm: LanguageModel, rows: Sequence[Row], batch: int) -> int:
    config = read_json(lm.folder / "config.json")
    config = {**config, **config.get("text_config", {})}
    tokens = max(row.num_tokens for row in rows)
    predicted = max(len(row.response) for row in rows)
    through = 0  # numbers a token that matrix products read and make
    for block in lm.model.layers:
        matrices = (value for _, value in tree_flatten(block.parameters()) if value.ndim >= 2)
        through += sum(matrix.shape[-1] + matrix.shape[-2] for matrix in matrices)
    scores = lm.num_layers * config.get("num_attention_heads", 32) * tokens * PER_SCORE
    logits = config.get("vocab_size", 0) * predicted * PER_LOGIT
    return int(FLOAT * batch * (tokens * (AROUND * through + scores) + logits))


def disk(lm: LanguageModel, run: Path) -> int:
    """Bytes of disk still wanted: a checkpoint (weights and moments), the next one beside it, and the result."""
    checkpoint = 3 * FLOAT * num_weights(lm)
    result = sum(value.nbytes for _, value in tree_flatten(lm.model.parameters()))
    return checkpoint * (1 if (run / CHECKPOINT).exists() else 2) + result


def free_disk(folder: Path) -> int:
    """Free bytes of disk where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def there_is() -> int:
    """Bytes that training may take: on a Mac what Metal recommends as its most, elsewhere what is free just now."""
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"])
    ours = mx.get_active_memory() + mx.get_cache_memory()
    if "free_memory" in info:
        return int(info["free_memory"]) + ours
    return _free_memory() + ours


def _free_memory() -> int:
    """Free memory of a machine without an accelerator: Linux says it, elsewhere all that is installed counts."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
