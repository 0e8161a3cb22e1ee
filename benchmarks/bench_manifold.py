"""The reward model on the starter corpus: figures C2 to C6, of rows whose prompt was left out of the fit."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hominem_mlx.config import Config
from hominem_mlx.data.home import STARTER
from hominem_mlx.evaluation.goals import figure
from hominem_mlx.files import read_jsonl
from hominem_mlx.records import Label
from hominem_mlx.reward import attribution
from hominem_mlx.reward import train as reward
from hominem_mlx.reward.account import cross_validate

NAMES = ("C2", "C3", "C4", "C5", "C5_50", "C5_80", "C5_90", "C6")
EXPLAINED = 20  # rows of which three outputs each are explained for C6


def measure(kind: str, model: str | None, home: Path, reason: str = "") -> dict[str, Any]:
    """C2 to C6, with the product's own recipe: penalties chosen in inner folds, five outer folds grouped by prompt.

    Args:
        kind: `encoder`, `lm` or `ngram`.
        model: the backbone's folder, or None for the default.
        home: where what was read is kept.
        reason: why the backbone cannot be used; then nothing is measured.
    """
    if reason and kind != "ngram":
        return {"figures": {name: figure(name, None, n=0, how=reason) for name in NAMES}}
    began = time.perf_counter()
    config = Config.model_validate({"reward": {"backbone": kind, "model": model}})
    rows = read_jsonl(STARTER / "reward_samples.jsonl", Label)
    account = cross_validate(rows, config, home=home)
    figures = from_account(account)
    if kind == "ngram":
        figures["C6"] = figure("C6", None, n=0, how="counts of words have no gradient")
    else:
        figures["C6"] = completeness(rows, config, home)
    return {"figures": figures, "account": account, "minutes": (time.perf_counter() - began) / 60}


def from_account(account: dict[str, Any]) -> dict[str, Any]:
    """C2 to C5 from what `reward.account.cross_validate` says."""
    rows, calibrated, residual = account["rows"], account["calibration"], account["residual"]
    edits, plain, size = account["contrasts"], account["baseline_contrasts"], len(calibrated["outputs"]) - 2
    ours, labels = account["participation_ratio"], account["label_participation_ratio"]
    start = (
        f"{account['backbone']}, {rows} rows of {account['prompts']} prompts, out of fold (reward.edit_weight was "
        "chosen with these rows in view, what is read of the encoder on half of the prompts)"
    )
    c2 = f"{start}; the lowered dimension falls and moves farthest; ngram {plain['share']:.2f}, chance .07"
    c4 = f"{start}; mean {residual['mean']:.3f}, ngram {residual['baseline_mean']:.3f}"
    found = {
        "C2": figure("C2", edits["share"], n=edits["n"], spread=(edits["low"], edits["high"]), how=c2),
        "C4": figure("C4", residual["certain"], n=size, how=c4),
        "C5": figure("C5", calibrated["error"], n=rows, how=f"{start}; worst dimension {calibrated['worst']:.3f}"),
    }
    counts = found["C4"]["holds"]
    c3 = f"{start}; {ours:.2f} of {labels:.2f}" if counts else "C4 does not hold, so that this says nothing"
    found["C3"] = figure("C3", ours / labels if counts else None, n=rows, how=c3)
    for level, share in calibrated["coverage"].items():
        name = f"C5_{round(100 * float(level))}"
        found[name] = figure(name, share, n=rows * size, how=f"{start}; widths from inner folds")
    return {name: found[name] for name in NAMES if name in found}


def completeness(rows: Sequence[Label], config: Config, home: Path) -> dict[str, Any]:
    """C6: explained rows were not fitted on; outputs and rows are drawn at random."""
    rng = np.random.default_rng(0)
    prompts = sorted({row.prompt_id for row in rows})
    left_out = set(rng.choice(prompts, len(prompts) // 5, replace=False))
    inside = [row for row in rows if row.prompt_id not in left_out]
    outside = [row for row in rows if row.prompt_id in left_out]
    judge = reward.fit_judge(inside, config, kind=config.reward.backbone, home=home)
    found = []
    for index in rng.choice(len(outside), min(EXPLAINED, len(outside)), replace=False):
        outputs = rng.choice(judge.card.outputs, 3, replace=False).tolist()
        found += attribution.explain(judge, outside[index].prompt, outside[index].response, outputs)
    complete, steps = [one.is_complete for one in found], [one.steps for one in found]
    how = (
        f"{len(found) // 3} replies, three outputs each; {np.median(steps):.0f} points, at most {max(steps)}; within "
        "5 % of the difference and 0.001"
    )
    return figure("C6", float(np.mean(complete)), n=len(found), how=how)
