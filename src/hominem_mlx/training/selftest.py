"""Small checks of what learning rests on, on the machine and the MLX backend that are really there."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Row, collate

SHAPE = lora.Shape(rank=4, scale=2.0)
SIZE, STEPS = 512, 8
SAID = ("What is my sister called?", "Your sister is called Nora.")


@dataclass(frozen=True)
class Check:
    """One check: whether it holds, what was measured, and how long it took."""

    what: str
    holds: bool
    measured: str
    seconds: float


def device() -> dict[str, str | int]:
    """What MLX computes on: its kind (cpu or gpu), its name, and on Metal how much memory it may use."""
    info = mx.device_info()
    found = {"kind": str(mx.default_device().type).rpartition(".")[2], "name": str(info.get("device_name", "unknown"))}
    wanted = "max_recommended_working_set_size"
    return found | ({wanted.removeprefix("max_") + "_bytes": int(info[wanted])} if wanted in info else {})


def checks(lm: LanguageModel) -> Iterator[Check]:
    """Run every check, one at a time; the model is handed back without an adapter, bit for bit as it came.

    Args:
        lm: any model without an adapter; the bundled student takes seconds.
    """
    for what, run in (
        ("float32 matrix product against numpy", _matmul),
        ("4-bit matrix product against its float32 twin", _quantised),
    ):
        yield _timed(what, run)
    yield _timed("greedy answers repeat", lambda: _repeats(lm))
    yield _timed("LoRA steps lower the loss and leave the base alone", lambda: _learns(lm))
    yield _timed("a saved adapter loads with the same logits", lambda: _saves(lm))
    yield _timed("hot swap A, B, A restores the logits exactly", lambda: _swaps(lm))


def _timed(what: str, run: Callable[[], tuple[bool, str]]) -> Check:
    began = time.perf_counter()
    try:
        holds, measured = run()
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:  # what MLX raises: a finding, not an accident
        holds, measured = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Check(what, holds, measured, time.perf_counter() - began)


def _matmul() -> tuple[bool, str]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, SIZE, SIZE), dtype=np.float32)
    began = time.perf_counter()
    ours = np.array(mx.array(a) @ mx.array(b))
    spent = time.perf_counter() - began
    error = _error(ours, a.astype(np.float64) @ b)
    return error < 1e-3, f"relative error {error:.1e}, {2 * SIZE**3 / spent / 1e9:.1f} GFLOP/s"


def _quantised() -> tuple[bool, str]:
    rng = np.random.default_rng(0)
    x, w = mx.array(rng.standard_normal((2, 64, SIZE), dtype=np.float32))
    packed = mx.quantize(w, group_size=64, bits=4)
    ours = mx.quantized_matmul(x, *packed, group_size=64, bits=4)
    error = _error(np.array(ours), np.array(x @ mx.dequantize(*packed, group_size=64, bits=4).T))
    return error < 1e-3, f"relative error {error:.1e}"


def _repeats(lm: LanguageModel) -> tuple[bool, str]:
    first, second = (lm.complete([SAID[0]], max_tokens=16, temperature=0.0, seed=0) for _ in range(2))
    return first == second, f"{len(first[0].split())} words"


def _learns(lm: LanguageModel) -> tuple[bool, str]:
    before = lm.fingerprint()
    lora.attach(lm, SHAPE, seed=0)
    try:
        rows = collate([Row(lm.prompt_tokens(SAID[0]), lm.response_tokens(SAID[1]))])
        logprobs = LogProbs(lm)
        step = nn.value_and_grad(lm.model, lambda: -logprobs.per_token(rows).mean())
        optimizer = optim.AdamW(1e-2)
        losses = []
        for _ in range(STEPS):
            loss, gradient = step()
            optimizer.update(lm.model, gradient)
            mx.eval(loss, lm.model.parameters(), optimizer.state)
            losses.append(loss.item())
        unchanged = lm.fingerprint() == before
    finally:
        lora.detach(lm)
    kept = "base unchanged" if unchanged else "BASE CHANGED"
    return losses[-1] < losses[0] and unchanged, f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps, {kept}"


def _saves(lm: LanguageModel) -> tuple[bool, str]:
    lora.attach(lm, SHAPE, seed=0)
    try:
        lora.set_parameters(lm.model, _noise(lm, 1))
        before = _logits(lm)
        with tempfile.TemporaryDirectory() as folder:
            lora.save_adapter(lm, Path(folder), SHAPE)
            lora.detach(lm)
            lora.load_adapter(lm, Path(folder))
        error = float(np.abs(before - _logits(lm)).max())
    finally:
        lora.detach(lm)
    return error == 0, f"largest difference {error:.1e}"


def _swaps(lm: LanguageModel) -> tuple[bool, str]:
    lora.attach(lm, SHAPE, seed=0)
    try:
        first, second = _noise(lm, 1), _noise(lm, 2)
        seen = []
        for values in (first, second, first):
            lora.set_parameters(lm.model, values)
            seen.append(_logits(lm))
    finally:
        lora.detach(lm)
    back, moved = float(np.abs(seen[0] - seen[2]).max()), float(np.abs(seen[0] - seen[1]).max())
    return back == 0 and moved > 0, f"B moves logits by {moved:.2g}, A again by {back:.1e}"


def _noise(lm: LanguageModel, seed: int) -> dict[str, mx.array]:
    """Adapter arrays that matter, all different, without touching MLX's random state."""
    rng = np.random.default_rng(seed)
    return {
        name: mx.array(0.1 * rng.standard_normal(value.shape, dtype=np.float32)).astype(value.dtype)
        for name, value in lora.adapter_parameters(lm.model).items()
    }


def _logits(lm: LanguageModel) -> np.ndarray:
    return np.array(lm.model(mx.array([lm.prompt_tokens(SAID[0])])).astype(mx.float32))


def _error(ours: np.ndarray, true: np.ndarray) -> float:
    """Largest difference, as a share of the largest true value."""
    return float(np.abs(ours - true).max() / np.abs(true).max())
