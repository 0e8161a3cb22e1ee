"""hominem_mlx: one person's Mac learns from that person.

The public names load on first use, so `import hominem_mlx` is cheap. On Linux the import does one thing: it takes
OpenBLAS when it is there, because the wheel of MLX carries a BLAS some thirty times slower (`docs/ARCHITECTURE.md`).
"""

import ctypes
import importlib
import importlib.util
import os
import pathlib
import sys
import warnings

__version__ = "0.1.0"

_PUBLIC = {
    "Manifold": "schema",
    "RewardOutput": "schema",
    "Teacher": "schema",
    "HominemError": "errors",
    "Config": "config",
    "Registry": "storage.registry",
    "RewardModel": "reward.model",
    "load": "models.backbone",
    "generate": "models.sampling",
    "score": "reward.model",
    "train": "policy.dual",
    "evaluate": "evaluation.suite",
    "compare": "evaluation.compare",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hominem_mlx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hominem_mlx.{_PUBLIC[name]}"), name)


def __dir__():
    return [*_PUBLIC, "__version__", "openblas"]


def _take_openblas() -> str | None:
    """Load OpenBLAS before MLX does its own BLAS; the first symbols found win."""
    for name in ("libopenblas.so.0", "libopenblas.so"):
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if "mlx.core" in sys.modules:
            warnings.warn(
                "mlx was imported before hominem_mlx, so it keeps its own slow BLAS: import hominem_mlx first",
                stacklevel=3,
            )
        if "OPENBLAS_NUM_THREADS" not in os.environ and hasattr(library, "openblas_set_num_threads"):
            library.openblas_set_num_threads(1)  # cores are shared out in `models/platform.py`
        return name
    return None


def _has_backend() -> bool:
    """Whether the library behind `mlx.core` is there, without importing anything."""
    spec = importlib.util.find_spec("mlx")
    folders = (spec and spec.submodule_search_locations) or []
    return any(pathlib.Path(folder, "lib", "libmlx.so").exists() for folder in folders)


openblas: str | None = None
if sys.platform == "linux":
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "200")  # by default MLX finishes one lane before it begins the next
    openblas = _take_openblas()
    if not _has_backend():
        raise ImportError(
            "MLX has no backend here: install hominem_mlx[cpu] (or hominem_mlx[cuda12], hominem_mlx[cuda13] with a GPU)"
        )
