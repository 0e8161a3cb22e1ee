"""What this machine has: memory, disk, processors. Standard library only, so it answers before anything is loaded."""

import os
import platform
import shutil
from pathlib import Path

GB = 1e9


def memory_gb() -> float:
    """Installed memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB


def free_gb(folder: Path) -> float:
    """Free disk where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GB


def model_cache() -> Path:
    """Where huggingface_hub puts what it downloads (its own rule, without importing it)."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(cache or os.path.join(home, "hub")).expanduser()


def is_downloaded(repository: str) -> bool:
    """Whether some snapshot of a repository is in the cache."""
    return any((model_cache() / f"models--{repository.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def has_metal() -> bool:
    """Whether MLX has its fast backend here."""
    return platform.system() == "Darwin" and platform.machine() == "arm64"
