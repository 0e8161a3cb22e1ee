"""The out-of-fold account: what a reward model says of prompts that it never saw, measured beside n-grams.

Shapes: `N` rows, `K` dimensions, `O` outputs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from hominem_mlx.config import Config
from hominem_mlx.errors import InputError
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.records import Label
from hominem_mlx.reward import quantiles
from hominem_mlx.reward.examine import LEVELS, calibration, compare, hidden_norm, in_json, scalars, widths
from hominem_mlx.reward.features import Backbone, Progress
from hominem_mlx.reward.fit import fit_head, fit_ngrams, fit_quantiles
from hominem_mlx.reward.head import EXTRA, grouped_folds
from hominem_mlx.reward.layers import Choice
from hominem_mlx.reward.own import felt, learnable, of_the_seven, own_lines
from hominem_mlx.reward.reading import ReadRows, choose_backbone, read_rows
from hominem_mlx.reward.targets import edits, overall, refuse_few, targets
from hominem_mlx.schema import COMMON, MANIFOLD, Manifold


def cross_validate(
    labels: Sequence[Label],
    config: Config,
    *,
    home: Path,
    lm: LanguageModel | None = None,
    progress: Progress | None = None,
) -> dict:
    """How well rewards of unseen prompts are predicted, beside the n-gram baseline on the very same folds.

    Everything is fitted on training folds only: standardisation, vocabulary, and the penalty (by inner folds). See
    `examine.compare` for what comes out; figures A5 and A9 are read from it.
    """
    kind, _ = choose_backbone(config, home)
    return account(read_rows(labels, kind, config, home, lm, progress), config, progress)


def account(rows: ReadRows, config: Config, progress: Progress | None = None, *, learnt: Sequence[Label] = ()) -> dict:
    """Out-of-fold predictions of the model and of n-grams on the same folds, measured.

    A person's own dimension is in it when the model has it: where the rows `learnt` from can teach it. So are emotions.
    """
    labels, groups = rows.labels, rows.groups
    manifold = learnable(learnt or labels, config.manifold.in_use)
    emotions = felt(learnt or labels, config.manifold.in_use)
    values = targets(labels, manifold, emotions)
    refuse_few(labels)
    fold = grouped_folds(groups, config.reward.folds, seed=config.reward.seed)
    said = _out_of_fold(rows, values, fold, manifold, config, progress)

    found = {
        "backbone": "ngram" if rows.backbone is None else rows.backbone.reader.kind,
        "rows": len(labels),
        "prompts": len(set(groups)),
        "folds": int(fold.max()) + 1,
        **own_lines(said.predicted, said.baseline, values, groups, manifold, emotions),
    }
    predicted, baseline, values, promised = of_the_seven(manifold, said.predicted, said.baseline, values, said.promised)
    scalar, seed = overall(labels, manifold.common), config.reward.seed
    found |= compare(predicted, baseline, values, scalar, groups, edits=edits(labels), seed=seed)
    if said.choices:
        found["layers"] = [
            {"layers": [*choice.layers], "poolings": [*choice.poolings], "folds": folds}
            for choice, folds in said.choices.most_common()
        ]
    found["calibration"] = calibration(predicted, values, promised)
    if config.reward.quantiles:
        seven = [place for place, name in enumerate(manifold.names) if name in COMMON]
        off = (values - predicted)[:, : len(seven)]
        found["quantiles"] = quantiles.examined(said.quantiles[:, seven], off, promised[..., : len(seven)], LEVELS)
    if rows.features is not None:
        found["hidden_norm"] = in_json(hidden_norm(rows.features, scalars(predicted, MANIFOLD)))
    return found


@dataclass
class _OutOfFold:
    """What was said of each row by a model that never saw its fold."""

    predicted: np.ndarray  # [N, O]
    baseline: np.ndarray  # [N, O], by n-grams
    promised: np.ndarray  # [levels, N, O], half-widths
    quantiles: np.ndarray  # [N, K + 1, levels]; zeros where none were asked for
    choices: Counter[Choice] = field(default_factory=Counter)  # in how many folds it was chosen


def _out_of_fold(
    rows: ReadRows,
    values: np.ndarray,
    fold: np.ndarray,
    manifold: Manifold,
    config: Config,
    progress: Progress | None,
) -> _OutOfFold:
    said = _OutOfFold(
        np.zeros_like(values),
        np.zeros_like(values),
        np.zeros((len(LEVELS), *values.shape)),
        np.zeros((len(values), len(manifold.names) + 1, len(quantiles.LEVELS))),
    )
    for number in range(int(fold.max()) + 1):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        ours, theirs = rows[inside], rows[outside]
        head = baseline = fit_ngrams(ours, values[inside], config)
        if rows.backbone is not None:
            head = fit_head(ours, values[inside], config, members=0, progress=progress)
        said.baseline[outside] = baseline.predict(theirs)
        said.predicted[outside] = head.predict(theirs)
        said.promised[:, outside] = widths(head.fitted.left_out)[:, None]
        if config.reward.quantiles:
            told = fit_quantiles(head, ours, values[inside], manifold)
            said.quantiles[outside] = np.array(told(mx.array(said.predicted[outside])))
        if config.reward.choose_layers and isinstance(head.reads, Backbone):
            said.choices[Choice(head.reads.spec.layers, head.reads.spec.poolings)] += 1
        if progress:
            progress({"stage": "folds", "done": number + 1, "total": int(fold.max()) + 1})
    return said


def left_out(
    labels: Sequence[Label],
    parts: np.ndarray,
    features: np.ndarray | None,
    backbone: Backbone | None,
    config: Config,
    *,
    stage: str = "folds",
    progress: Progress | None = None,
) -> np.ndarray:
    """What is said of each row by a model that never saw its part, `[N, K + 2]` of the seven dimensions, unclipped.

    NaN where what is left cannot teach every output.

    Args:
        labels: rows `[N]` that may be learnt from.
        parts: `[N]`, any names; each part is left out in turn.
        features, backbone: `[N, F]` and what made them; None for n-grams, whose vocabulary is fitted anew each time.
        config: its `reward` table.
        stage, progress: called with `{"stage", "done", "total"}`.
    """
    rows = ReadRows(labels, features, backbone if backbone is None else backbone.plain)
    found, names = np.zeros((len(labels), len(MANIFOLD.names) + len(EXTRA))), np.unique(parts)
    for done, part in enumerate(names, 1):
        inside, outside = rows[parts != part], parts == part
        try:
            values = targets(inside.labels, MANIFOLD, felt(inside.labels, MANIFOLD))
            head = fit_head(inside, values, config, members=0, progress=progress)
        except InputError:  # an output is labelled in this part only, so that nothing can be said of it
            found[outside] = np.nan
            continue
        found[outside] = head.predict(rows[outside])[:, : found.shape[1]]  # emotions come last
        if progress:
            progress({"stage": stage, "done": done, "total": len(names)})
    return found
