"""One path in a process of its own: it builds its models, then takes a step whenever it is told to.

Speaks JSON lines: a specification comes as the argument, `{"steps": n}` on standard input; out come
`{"ready": ..}` and then, for each request, seconds a step, memory in bytes and what the step gave (its loss). A path
that cannot run says `{"error": ..}`.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions

PATHS = {  # name: module, class, its arguments, the package it needs (None: our own)
    "ours": ("bench_ours", "Blended", {}, None),
    "ours-plain": ("bench_ours", "Blended", {"plain": True}, None),
    "ours-flat": ("bench_ours", "Blended", {"share": False}, None),
    "ours-checkpointed": ("bench_ours", "Blended", {"checkpoint": 0.5}, None),
    "ours-sft": ("bench_ours", "Sft", {}, None),
    "ours-sft-plain": ("bench_ours", "Sft", {"plain": True}, None),
    "one-by-one": ("bench_ours", "Candidates", {"one_by_one": True}, None),
    "together": ("bench_ours", "Candidates", {}, None),
    "equality": ("bench_equality", "Equality", {}, None),
    "profile": ("bench_profile", "Profile", {}, None),
    "gemm": ("bench_profile", "GemmRate", {}, None),
    "gemm-share": ("bench_profile", "GemmShare", {}, None),
    "naive": ("bench_models", "Naive", {}, "mlx"),
    "mlx-lm": ("bench_peers", "MlxLmSft", {}, "mlx-lm"),
    "mlx-lm-lora": ("bench_peers", "MlxLmLoraDpo", {}, "mlx-lm-lora"),
    "mlx-tune": ("bench_peers", "MlxTuneDpo", {"together": True}, "mlx-tune"),
    "mlx-tune-cache": ("bench_peers", "MlxTuneDpo", {"together": False}, "mlx-tune"),
    "trl": ("bench_peers", "TrlDpo", {}, "trl"),
}


def installed(package: str, folders: Sequence[str] = ()) -> str | None:
    """Its version, or None; looked for in these folders, by default where this Python looks."""
    return next((found.version for found in distributions(name=package, path=[*folders] or sys.path)), None)


def take_openblas() -> None:
    """What hominem_mlx does for itself, so that no side has the slow BLAS of the wheel: here with a thread a core."""
    for name in ("libopenblas.so.0", "libopenblas.so"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue


def build(spec: dict):
    """The path's step, ready to be called."""
    module, name, arguments, package = PATHS[spec["path"]]
    if package is None:
        import hominem_mlx  # noqa: F401  before mlx, so that it can take OpenBLAS and set up its lanes
    elif installed(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    elif sys.platform == "linux" and package != "trl":  # torch brings its own, and loses itself in two
        take_openblas()
    import bench_models

    case = bench_models.Case(**{key: value for key, value in spec.items() if key != "path"})
    return getattr(importlib.import_module(module), name)(bench_models.SHAPES[case.shape], case.texts, **arguments)


def serve(spec: dict, say) -> None:
    """Build, then step whenever a line comes in."""
    step = build(spec)
    import mlx.core as mx

    mx.clear_cache()
    say({"ready": spec["path"], "device": str(mx.default_device()), "mlx": mx.__version__})
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        cpu_began = time.process_time()
        given = [step() for _ in range(steps)]
        say(
            {
                "seconds": (time.perf_counter() - began) / steps,
                "cpu_seconds": (time.process_time() - cpu_began) / steps,
                "given": given[0],
                "peak": mx.get_peak_memory() - before,
                "resident": mx.get_active_memory(),
            }
        )


def main() -> None:
    """Answers go to the real standard output; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        serve(json.loads(sys.argv[1]), lambda answer: answers.write(json.dumps(answer) + "\n"))
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        raise


if __name__ == "__main__":
    main()
