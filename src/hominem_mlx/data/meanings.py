"""Dimensions that a person added, in the labels of a home: what their numbers mean, and how they join a label.

A number means what rubric, anchors and range meant when it was given. So these are written down with the first label;
a dimension that was worded anew since is refused instead of mixed with its old numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hominem_mlx.data import home as homes
from hominem_mlx.errors import InputError
from hominem_mlx.files import read_json, write_json
from hominem_mlx.records import Label
from hominem_mlx.schema import COMMON, Manifold

FILE = "data/labeled/dimensions.json"
OWN = "own"  # in a label's metadata: who gave its numbers in these dimensions


def hold_to_meanings(home: Path, labels: Sequence[Label], manifold: Manifold) -> None:
    """Write down what the person's dimensions in these labels mean.

    Raises: InputError where one of them meant something else when the home's first label in it came in.
    """
    path = Path(home) / FILE
    known = read_json(path) if path.exists() else {}
    labelled = {name for label in labels for name in label.reward.own}
    now = {
        dimension.name: {"rubric": dimension.question, "bad": dimension.low, "good": dimension.high}
        | {"range": list(dimension.range)}
        for dimension in manifold.own
        if dimension.name in labelled
    }
    problems = [
        f"{name} is labelled with {field} = {known[name].get(field)!r}, hominem.toml says {value!r} now; their numbers "
        f"do not mix: put the old words back, or give the new dimension another name. If the old numbers still hold, "
        f"take {name} out of {path}"
        for name, meaning in now.items()
        for field, value in meaning.items()
        if name in known and known[name].get(field) != value
    ]
    if problems:
        raise InputError(problems)
    if now.keys() - known.keys():
        write_json(path, known | now)


def with_numbers(label: Label, numbers: Mapping[str, float], by: str, manifold: Manifold) -> Label:
    """The label with numbers in the person's own dimensions, and its scalar with these counted in by their weights.

    The scalar is taken for the weighted mean of the seven and of the own dimensions that had a number.
    """
    weights = {dimension.name: dimension.weight for dimension in manifold.dimensions}
    before, scalar = label.reward.own, label.reward.scalar
    if scalar is not None:
        counted = COMMON | before.keys() | numbers.keys()
        total = sum(weight for name, weight in weights.items() if name in counted)
        moved = sum(weights[name] * (value - before.get(name, scalar)) for name, value in numbers.items())
        scalar = round(min(1.0, max(-1.0, scalar + moved / total)), 6)
    reward = type(label.reward)(**label.reward.model_dump() | {"scalar": scalar} | dict(numbers))
    told = label.metadata.get(OWN, {}) | dict.fromkeys(numbers, by)
    return label.model_copy(update={"reward": reward, "metadata": {**label.metadata, OWN: told}})


def completed(new: Sequence[Label], old: Sequence[Label], manifold: Manifold) -> list[Label]:
    """New labels; one with numbers in the person's dimensions alone becomes the old label of its reply with these."""
    standing = {homes.place(row): row for row in old}
    found = []
    for row in new:
        label = standing.get(homes.place(row))
        if label is not None and row.reward.model_dump(exclude_none=True).keys() == row.reward.own.keys():
            given = {name: value for name, value in row.reward.own.items() if _may_say(row.labeller, name, label)}
            row = with_numbers(label, given, row.labeller, manifold)
        standing[homes.place(row)] = row
        found.append(row)
    return found


def _may_say(labeller: str, name: str, label: Label) -> bool:
    """Whether a number may go into the label: a teacher's never takes the place of a person's."""
    is_persons = label.metadata.get(OWN, {}).get(name, label.labeller) == homes.HUMAN
    return labeller == homes.HUMAN or label.reward.number(name) is None or not is_persons
