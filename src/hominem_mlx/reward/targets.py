"""Labels as the numbers a head learns: outputs, overall judgements, and the contrast edits among them."""

from collections.abc import Sequence

import numpy as np

from hominem_mlx.errors import InputError
from hominem_mlx.records import Label
from hominem_mlx.reward.examine import Edit
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.schema import COMMON, MANIFOLD, Manifold


def targets(labels: Sequence[Label], manifold: Manifold = MANIFOLD, emotions: Sequence[str] = ()) -> np.ndarray:
    """Labels `[N, K + 2 + E]`, NaN where there is none: dimensions, intensity, safety, the named axes of emotion.

    A missing intensity is derived from a whole vector: `clip01(|R| / 2 + max_i |r_i - prompt mean of r_i| / 2)`
    (`science.md` 2.5), of the seven alone, so that it stays when a person adds a dimension.
    Raises: InputError when an output has labels of fewer than two prompts.
    """
    if not labels:
        raise InputError("there is not one labelled reply; rate some and run `hominem data split`")
    vectors = np.array([row.reward.vector(manifold) for row in labels], float)
    scalars = overall(labels, manifold.common)
    prompts = np.array([row.prompt_id for row in labels])
    extra = np.array([[row.reward.number(name) for name in EXTRA] for row in labels], float)
    seven = vectors[:, [name in COMMON for name in manifold.names]]
    for index in np.flatnonzero(np.isnan(extra[:, 0]) & ~np.isnan(seven).any(axis=1)):
        centre = np.nanmean(seven[prompts == prompts[index]], axis=0)
        extra[index, 0] = min(1.0, (abs(scalars[index]) + np.abs(seven[index] - centre).max()) / 2)
    feelings = np.array([[row.reward.number(name) for name in emotions] for row in labels], float)
    values = np.concatenate([vectors, extra, feelings], axis=1)
    problems = []
    for name, column in zip((*manifold.names, *EXTRA, *emotions), values.T, strict=True):
        prompts_labelled = len(set(prompts[~np.isnan(column)]))
        if prompts_labelled < 2:
            problems.append(f"{name} is labelled on {prompts_labelled} prompts; rate it on two or more")
    if problems:
        raise InputError(problems)
    return values


def overall(labels: Sequence[Label], manifold: Manifold = MANIFOLD) -> np.ndarray:
    """The scalar label of each row `[N]`, NaN where it has none."""
    return np.array([row.reward.overall(manifold) for row in labels], float)


def edits(labels: Sequence[Label], manifold: Manifold = MANIFOLD, *, same_rater: bool = False) -> list[Edit]:
    """The contrast edits among rows whose originals are there too.

    With `same_rater` only those that one rater has rated: numbers of two also differ because the two do.
    """
    place = {row.id: index for index, row in enumerate(labels)}
    found = [
        (index, place[row.edit_of], manifold.names.index(row.lowered))
        for index, row in enumerate(labels)
        if row.edit_of in place and row.lowered in manifold.names
    ]
    return [one for one in found if not same_rater or labels[one[0]].labeller == labels[one[1]].labeller]


def refuse_few(labels: Sequence[Label]) -> None:
    """Folds are of whole prompts, and one is held out while another is left out."""
    if len({row.prompt_id for row in labels}) < 3:
        raise InputError("labels of at least 3 prompts are needed to train a reward model; rate more of them")


def refuse_constants(labels: Sequence[Label], names: Sequence[str]) -> None:
    """A dimension that is the same everywhere would be predicted everywhere, with no doubt at all."""
    given = {name: [v for row in labels if (v := row.reward.number(name)) is not None] for name in names}
    problems = [
        f"{name} is {values[0]:g} in all {len(values)} training rows that have it: nothing can be learnt from it; rate "
        "it again, or take the number out of the rows"
        for name, values in given.items()
        if len(values) > 1 and len(set(values)) == 1
    ]
    if problems:
        raise InputError(problems)
