"""Dimensions that a person added, in the labels of a home: what their numbers mean, and how they join a label.

A number means what rubric, anchors and range meant when it was given. So these are written down with the first label;
a dimension that was worded anew since is refused instead of mixed with its old numbers.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hominem_mlx.data import home as homes
from hominem_mlx.errors import InputError
from hominem_mlx.files import read_json, sha256_json, write_json
from hominem_mlx.records import Label, Reward
from hominem_mlx.schema import COMMON, Manifold

FILE = "data/labeled/dimensions.json"
OWN = "own"  # in a label's metadata: who gave its numbers in these dimensions
MIXED = "mixed"  # in a label's metadata: fingerprint of its numbers when several teachers' were mixed


def hold_to_meanings(home: Path, labels: Sequence[Label], manifold: Manifold) -> None:
    """Write down what the person's dimensions in these labels mean.

    Raises: InputError where one of them meant something else when the home's first label in it came in.
    """
    known, now = _meanings(home, manifold, {name for label in labels for name in label.reward.own})
    if now.keys() - known.keys():
        write_json(Path(home) / FILE, known | now)


def refuse_other_meanings(home: Path, manifold: Manifold) -> None:
    """Before a teacher is asked: raises InputError where a dimension meant something else in the home's labels."""
    _meanings(home, manifold, manifold.names)


def _meanings(home: Path, manifold: Manifold, names: Collection[str]) -> tuple[dict, dict]:
    """What the home has written down, and what the person's dimensions among these names mean now; they agree."""
    path = Path(home) / FILE
    known = read_json(path) if path.exists() else {}
    now = {
        dimension.name: {"rubric": dimension.question, "bad": dimension.low, "good": dimension.high}
        | {"range": list(dimension.range)}
        for dimension in (*manifold.own, *manifold.emotions)
        if dimension.name in names
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
    return known, now


def with_numbers(label: Label, numbers: Mapping[str, float], by: str, manifold: Manifold) -> Label:
    """The label with numbers in the person's own dimensions, and its scalar with these counted in by their weights.

    The scalar is taken for the weighted mean of the seven and of the own dimensions that had a number; one that is not
    in use has no weight. A label that several teachers' ratings were mixed to stays one.
    """
    weights = {dimension.name: dimension.weight for dimension in manifold.dimensions}
    before, scalar = label.reward.own, label.reward.scalar
    if scalar is not None:
        counted = COMMON | before.keys() | numbers.keys()
        total = sum(weight for name, weight in weights.items() if name in counted)
        moved = sum(weights.get(name, 0.0) * (value - before.get(name, scalar)) for name, value in numbers.items())
        scalar = round(min(1.0, max(-1.0, scalar + moved / total)), 6)
    reward = type(label.reward)(**label.reward.model_dump() | {"scalar": scalar} | dict(numbers))
    told = {name: teller(label, name) for name in before} | dict.fromkeys(numbers, by)
    metadata = {**label.metadata, OWN: told}
    if label.metadata.get(MIXED) == fingerprint(label.reward):
        metadata[MIXED] = fingerprint(reward)
    return label.model_copy(update={"reward": reward, "metadata": metadata})


def with_numbers_of(label: Label, other: Label, names: Collection[str], manifold: Manifold) -> Label:
    """The label with another's numbers in these dimensions of the person's, each by whoever gave it."""
    for name in sorted(names):
        label = with_numbers(label, {name: other.reward.own[name]}, teller(other, name), manifold)
    return label


def teller(label: Label, name: str) -> str:
    """Who gave the label's number in a dimension."""
    told = label.metadata.get(OWN)
    return told.get(name, label.labeller) if isinstance(told, dict) else label.labeller


def fingerprint(reward: Reward) -> str:
    """Digest of all numbers of a label."""
    return sha256_json(reward.model_dump(exclude_none=True))[:12]


def is_own_alone(label: Label) -> bool:
    """Whether a row says nothing but numbers in the person's dimensions."""
    return label.reward.model_dump(exclude_none=True).keys() == label.reward.own.keys()


def completed(new: Sequence[Label], old: Sequence[Label], manifold: Manifold) -> list[Label]:
    """New labels as they go into a home: no number in a dimension of the person's is lost, no row stands without label.

    A row with such numbers alone becomes the label of its reply with these; without a label it is left out. Any other
    row takes over such numbers that the old label of its reply has and that it lacks itself or may not say anew. Whole
    rows come first, so that the order within a file does not matter.
    """
    standing = {homes.place(row): row for row in old}
    found = []
    for row in sorted(new, key=is_own_alone):
        label = standing.get(homes.place(row))
        if is_own_alone(row):
            if label is None:
                continue
            given = [name for name in row.reward.own if _may_say(row, name, label)]
            row = with_numbers_of(label, row, given, manifold)
        elif label is not None:
            given = [n for n in label.reward.own if row.reward.number(n) is None or not _may_say(row, n, label)]
            row = with_numbers_of(row, label, given, manifold)
        if label is None or homes.newer_wins(row, label):
            standing[homes.place(row)] = row
        found.append(row)
    return found


def _may_say(row: Label, name: str, label: Label) -> bool:
    """Whether a row's number may go into the label: a teacher's never takes the place of a person's."""
    persons = label.reward.number(name) is not None and teller(label, name) == homes.HUMAN
    return teller(row, name) == homes.HUMAN or not persons
