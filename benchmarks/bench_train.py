"""Our training steps beside those of neighbouring trainers, in one run: figures B1 to B8.

    python benchmarks/bench_train.py --json out.json [--rounds 3] [--only B2,B3] [--no-install]

Neighbours come from requirements-bench.lock into .venv-bench, an environment of their own. `benchmarks/README.md` says
what is measured and how.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_worker import installed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV, LOCK = ROOT / ".venv-bench", ROOT / "requirements-bench.lock"
TRL_VENV = ROOT / ".venv-bench-trl"
VERSIONS = ("mlx", "mlx-lm", "mlx-lm-lora", "mlx-tune", "trl", "torch")
LAST_START = 37  # minutes after which no case is begun, so that the run ends within 45


def main() -> int:
    """Parse, change into the environment of the neighbours, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures; rewritten after each case")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the warm-up (default 3)")
    parser.add_argument("--only", default="", help="figures, for example B2,B3; all of B1 to B8 by default")
    parser.add_argument("--no-install", action="store_true", help="install nothing; what is missing is written as such")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not arguments.no_install:
        install()
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(python, [str(python), __file__, *sys.argv[1:]])
    sys.path[:0] = [str(ROOT / "src")]
    import hominem_mlx  # noqa: F401, I001  before mlx, so that it can take OpenBLAS
    from bench_figures import MAKE

    only = [name for name in arguments.only.split(",") if name] or list(MAKE)
    if unknown := set(only) - set(MAKE):
        parser.error(f"--only: {', '.join(sorted(unknown))} is unknown; known are {', '.join(MAKE)}")
    report = measure(only, arguments.rounds, arguments.json)
    print(markdown(report))
    return 0


def install() -> None:
    """Make .venv-bench what the lock says, unless it is that already."""
    stamp, wanted = VENV / ".lock", hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {LOCK.name} into {VENV.name}", file=sys.stderr)
    python, options = str(VENV / "bin" / "python"), ["--quiet", "--require-hashes", "-r", str(LOCK)]
    if shutil.which("uv"):
        make = ["uv", "venv", "--quiet", "--clear", "--python", sys._base_executable, str(VENV)]
        fill = ["uv", "pip", "install", "--python", python, *options]
    else:
        make = [sys._base_executable, "-m", "venv", "--clear", str(VENV)]
        fill = [python, "-m", "pip", "install", *options]
    for command in (make, fill):
        if subprocess.run(command).returncode:
            raise SystemExit(f"{' '.join(command)} failed; mend it, or give --no-install to do without neighbours")
    stamp.write_text(wanted)


def measure(only: list[str], rounds: int, path: Path) -> dict[str, Any]:
    """Run every case the figures need; after each, write all figures that can be given by then.

    Returns: the report as written: machine, versions, figures by id, every single measurement.
    """
    import mlx.core as mx
    from bench_figures import GPU, MAKE, Results, needs

    from hominem_mlx.files import write_json

    began, results = time.perf_counter(), Results()
    apart = [str(folder) for folder in TRL_VENV.glob("lib/python*/site-packages")]
    versions = {name: installed(name) or installed(name, apart) for name in VERSIONS}
    report: dict[str, Any] = {"machine": machine(), "versions": versions}
    for case, paths in needs(only).items():
        minutes = (time.perf_counter() - began) / 60
        if case == GPU and mx.default_device() != mx.gpu:
            results.skip(case, paths, f"there is no GPU here: MLX computes on {mx.default_device()}")
        elif minutes > LAST_START:
            results.skip(case, paths, f"not measured: {minutes:.0f} minutes of the run were up")
        else:
            print(f"{minutes:.1f} min: {case}: {', '.join(paths)}", file=sys.stderr)
            results.run(case, paths, rounds)
        report["minutes"] = (time.perf_counter() - began) / 60
        report["figures"] = {name: entry for group in only for name, entry in MAKE[group](results).items()}
        report["measurements"] = results.table()
        report["did_not_run"] = sorted(set(results.reasons.values()))
        write_json(path, report)
    return report


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import mlx.core as mx

    import hominem_mlx

    words = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in words.splitlines() if line.startswith("model name")]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "device": str(mx.default_device()),
        "blas": hominem_mlx.openblas or "of MLX",
        "load": os.getloadavg()[0],
    }


def markdown(report: dict[str, Any]) -> str:
    """The table of `benchmarks/README.md`."""
    from hominem_mlx.evaluation.goals import goals, say, say_goal

    lines = ["| figure | what | measured | goal | holds | spread |", "|---|---|---|---|---|---|"]
    for name, entry in report["figures"].items():
        small = isinstance(entry["value"], float) and 0 < entry["value"] < 1e-3
        value = f"{entry['value']:.1e}" if small else say(entry["value"])
        spread = f"{entry['spread'][0]:.2g} to {entry['spread'][1]:.2g}" if entry["spread"] else ""
        mark = "yes" if entry["holds"] else "no"
        lines.append(f"| {name} | {goals()[name]['what']} | {value} | {say_goal(entry['goal'])} | {mark} | {spread} |")
    lines += [
        "",
        "| case | path | s a step | spread | tokens/s | GEMM share | peak MiB | resident MiB | loss - naive |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in report["measurements"]:
        rate = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else ""
        off = f"{row['loss_difference']:.1e}" if "loss_difference" in row else ""
        share = f"{row['gemm_share']:.2f}" if "gemm_share" in row else ""
        peak, resident = (f"{row[name]:.0f}" if name in row else "" for name in ("peak_mib", "resident_mib"))
        low, high = row["spread"]
        lines.append(
            f"| {row['case']} | {row['path']} | {row['seconds']:.3f} | {low:.3f} to {high:.3f} | {rate} | {share} "
            f"| {peak} | {resident} | {off} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
