"""Arrays in a run's folder that a kill leaves whole: its checkpoint, and the adapter it may go back to."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from hominem_mlx import files
from hominem_mlx.errors import TrainingError
from hominem_mlx.models import lora

KEPT = "kept.safetensors"


def save(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Replace `path` with these arrays in one step.

    Raises: OSError when they cannot be written; the old file stays.
    """
    scratch = path.with_name(f".next-{path.name}")
    try:
        mx.save_safetensors(str(scratch), arrays, metadata=metadata)
        files.replace(scratch, path)
    except (RuntimeError, OSError) as error:  # MLX calls a full disk a RuntimeError
        scratch.unlink(missing_ok=True)
        raise OSError(str(error)) from error


def keep(model: nn.Module, run: Path, step: int) -> None:
    """Set the topmost adapter aside as it is after `step`, in the place of what was kept before.

    A run that goes on from an older checkpoint comes by this step again and keeps the same bits.
    """
    try:
        save(run / KEPT, lora.adapter_parameters(model), {"step": str(step)})
    except OSError as error:
        raise TrainingError(
            f"{run}: the adapter of step {step} could not be kept ({error}): stopped. Make room on the disk and give "
            "the same command again"
        ) from error


def take_back(model: nn.Module, run: Path) -> int | None:
    """Give the model the adapter that was kept last; returns its step, None where none was kept."""
    if not (run / KEPT).exists():
        return None
    values, metadata = mx.load(str(run / KEPT), return_metadata=True)
    lora.set_parameters(model, values)
    return int(metadata["step"])
