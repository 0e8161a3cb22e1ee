"""Are these labels fit to learn from? Rows that contradict or repeat one another, halo, edits that break their promise.

Ranges and types are the records' business; here are the things no single row shows.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from hominem_mlx.abuse import is_adversarial
from hominem_mlx.data import home as homes
from hominem_mlx.data.questions import EDITED_WORDS
from hominem_mlx.data.split import NEAR, near_duplicates, split_of, words, words_changed
from hominem_mlx.files import write_jsonl
from hominem_mlx.metrics import participation_ratio, pearson
from hominem_mlx.records import Label, RecallQuestion, SftPair
from hominem_mlx.schema import MANIFOLD, Manifold

MIN_PARTICIPATION, MAX_CORRELATION = 2.5, 0.7  # `science.md` 2.8: below, or above, relabel before training anything
HALO_ROWS = 30  # fewer rows cannot show a halo
MAX_REPEATED = 0.05  # share of rows whose whole label vector another row has too
MAX_LENGTH_CORRELATION = 0.15
MAX_GROSS, GROSS = 0.10, -0.5  # share of rows whose mean is below
EDIT_FALL, EDIT_DRIFT = 0.4, 0.15
ROUNDING = 1e-9


class Problem(BaseModel):
    """Something wrong with rows. `drop` are those to leave out to mend it; empty where only people can."""

    rule: str
    text: str
    rows: list[str] = []
    drop: list[str] = []


class Verdict(BaseModel):
    """All problems, and what was measured on the way."""

    problems: list[Problem]
    measures: dict[str, float]
    rows: int

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify(
    labels: Sequence[Label],
    *,
    memory: Sequence[SftPair] = (),
    recall: Sequence[RecallQuestion] = (),
    manifold: Manifold = MANIFOLD,
) -> Verdict:
    """Look at all labels together.

    Args:
        labels: rated replies.
        memory, recall: what is taught and what is asked about it, for the leak check.
        manifold: the dimensions in use.
    """
    measures: dict[str, float] = {}
    problems = [
        *_duplicates(labels),
        *_injections(labels, measures),
        *_leaks(labels, memory, recall),
        *_edits(labels, manifold),
        *_repeated_vectors(labels, measures, manifold),
        *_halo(labels, measures, manifold),
        *_surface(labels, measures, manifold),
    ]
    return Verdict(problems=problems, measures=measures, rows=len(labels))


def kept(labels: Sequence[Label], verdict: Verdict) -> list[Label]:
    """The labels without the rows the verdict would drop."""
    gone = {name for problem in verdict.problems for name in problem.drop}
    return [label for label in labels if label.id not in gone]


def verify_home(home: Path, *, drop: bool = False, manifold: Manifold = MANIFOLD) -> Verdict:
    """Verify the labels of a home; with `drop` also take out the rows that are named to be dropped.

    What was taken out lies in `dropped.jsonl`, and those replies are not rated again; a person's label of one of them
    is taken as ever. The verdict is that of the rows before.
    """
    with homes.holding(home, "verifying labels"):
        labels = homes.read(home, Label, manifold)
        taught, asked = homes.read(home, SftPair), homes.read(home, RecallQuestion)
        verdict = verify(labels, memory=taught, recall=asked, manifold=manifold)
        if drop and len(remaining := kept(labels, verdict)) < len(labels):
            staying = {label.id for label in remaining}
            gone = [*homes.read_aside(home, homes.DROPPED), *(row for row in labels if row.id not in staying)]
            write_jsonl(Path(home) / homes.DROPPED, {row.id: row for row in gone}.values())
            homes.write(home, Label, remaining)
        return verdict


def attacks(labels: Sequence[Label]) -> dict[str, int]:
    """How many replies speak to their judge, and how many prompts attack a model: see `abuse.is_adversarial`."""
    replies, prompts = {row.response for row in labels}, {row.prompt for row in labels}
    return {
        "injected_replies": sum(bool(is_adversarial(text)) for text in replies),
        "adversarial_prompts": sum(bool(is_adversarial(text)) for text in prompts),
    }


# --- rows against rows ----------------------------------------------------------------------------------------------


def _duplicates(labels: Sequence[Label]) -> Iterator[Problem]:
    """Equal and nearly equal replies to one prompt, edits apart; the person's row stays, else the first."""
    groups: dict[str, list[Label]] = {}
    for label in labels:
        groups.setdefault(label.prompt, []).append(label)
    for group in groups.values():
        first: dict[str, Label] = {}
        for label in sorted(group, key=lambda row: row.labeller != homes.HUMAN):
            if label.response in first:
                text = f"{label.id} is the same reply as {first[label.response].id}"
                yield Problem(rule="duplicate", text=text, rows=[first[label.response].id, label.id], drop=[label.id])
            first.setdefault(label.response, label)
        rows = [row for row in first.values() if row.edit_of is None]
        for i, j, overlap in near_duplicates([row.response for row in rows]):
            text = f"{rows[j].id} is nearly the reply {rows[i].id} ({overlap:.0%} of word triples)"
            drop = [] if rows[j].labeller == homes.HUMAN else [rows[j].id]
            yield Problem(rule="near-duplicate", text=text, rows=[rows[i].id, rows[j].id], drop=drop)


def _injections(labels: Sequence[Label], measures: dict[str, float]) -> Iterator[Problem]:
    """Replies that speak to their judge. What this library rated, it rated without that; people are not swayed."""
    measures |= attacks(labels)
    for label in labels:
        if label.labeller == homes.HUMAN or label.metadata.get(homes.INJECTED):
            continue
        if reasons := is_adversarial(label.response):
            text = f"{label.id}: its reply {' and '.join(reasons)}, which may have moved its label"
            yield Problem(rule="injection", text=text, rows=[label.id], drop=[label.id])


def _leaks(labels: Sequence[Label], memory: Sequence[SftPair], recall: Sequence[RecallQuestion]) -> Iterator[Problem]:
    """Prompts that are learnt from and examined with under two ids, and questions that are taught word for word."""
    prompts = sorted({(label.prompt_id, label.prompt) for label in labels})
    for i, j, overlap in near_duplicates([text for _, text in prompts], threshold=NEAR):
        (one, _), (other, _) = prompts[i], prompts[j]
        held = sorted(name for name in (one, other) if split_of(name) == "test")
        if one != other and len(held) == 1:
            text = (
                f"prompts {one} and {other} say the same ({overlap:.0%}) but only {held[0]} is held out: "
                "give both one prompt_id; until then the held-out one is not examined with"
            )
            yield Problem(rule="leak", text=text, rows=[one, other])
    taught = {" ".join(words(pair.instruction)): pair.id for pair in memory}
    for question in recall:
        if (pair_id := taught.get(" ".join(words(question.question)))) is not None:
            text = f"recall question {question.id} is the instruction of memory pair {pair_id}: word it differently"
            yield Problem(rule="leak", text=text, rows=[question.id, pair_id])


def _edits(labels: Sequence[Label], manifold: Manifold) -> Iterator[Problem]:
    """Single-axis edits must lower their dimension, leave the others, and be an edit rather than a new text."""
    by_id = {label.id: label for label in labels}
    for label in labels:
        origin = by_id.get(label.edit_of or "")
        if origin is None or label.lowered is None or origin.labeller != label.labeller:
            continue  # numbers of two raters may differ for other reasons
        faults = list(_edit_faults(origin, label, manifold))
        if faults:
            text = f"{label.id}, an edit of {origin.id} meant to lower {label.lowered}: {'; '.join(faults)}"
            yield Problem(rule="edit", text=text, rows=[origin.id, label.id], drop=[label.id])


def _edit_faults(origin: Label, edit: Label, manifold: Manifold) -> Iterator[str]:
    if edit.lowered not in manifold.names:
        yield f"{edit.lowered} is no dimension; they are {', '.join(manifold.names)}"
        return
    for name, before, after in zip(manifold.names, origin.reward.vector(manifold), edit.reward.vector(manifold)):
        if before is None or after is None:
            continue
        if name == edit.lowered and before - after < EDIT_FALL - ROUNDING:
            yield f"{name} falls by {before - after:.2f}, less than {EDIT_FALL}"
        if name != edit.lowered and abs(before - after) > EDIT_DRIFT + ROUNDING:
            yield f"{name} moves by {after - before:+.2f}, more than {EDIT_DRIFT}"
    share = words_changed(origin.response, edit.response)
    if not EDITED_WORDS[0] <= share <= EDITED_WORDS[1]:
        yield f"{share:.0%} of the words differ, not {EDITED_WORDS[0]:.0%} to {EDITED_WORDS[1]:.0%}"


# --- all rows together ----------------------------------------------------------------------------------------------


def _repeated_vectors(labels: Sequence[Label], measures: dict[str, float], manifold: Manifold) -> Iterator[Problem]:
    names = (*manifold.names, "reward_intensity", "safety_score")
    vectors = [tuple(label.reward.number(name) for name in names) for label in labels]
    counts = Counter(vectors)
    again = [label.id for label, vector in zip(labels, vectors) if counts[vector] > 1]
    repeated = sum(count - 1 for count in counts.values())
    measures["repeated_vectors"] = repeated / max(1, len(labels))
    if measures["repeated_vectors"] > MAX_REPEATED:
        text = (
            f"{repeated} of {len(labels)} label vectors repeat another, more than {MAX_REPEATED:.0%}: rated by habit?"
        )
        yield Problem(rule="repeated", text=text, rows=again)


def matrix(labels: Sequence[Label], manifold: Manifold = MANIFOLD) -> np.ndarray:
    """Dimension values `[N, K]`, NaN where there is no label."""
    rows = [[math.nan if value is None else value for value in label.reward.vector(manifold)] for label in labels]
    return np.array(rows, float).reshape(-1, len(manifold.names))


class Halo(BaseModel):
    """Do the labels hold several dimensions, or one impression under several names? The gate before any training.

    `faults` shut the gate. `notes` say what could not be looked at, and why.
    """

    dimensions: list[str] = []
    participation_ratio: float | None = None
    wanted: float = MIN_PARTICIPATION
    mean_abs_correlation: float | None = None
    faults: list[str] = []
    notes: list[str] = []

    @property
    def is_good(self) -> bool:
        """Whether nothing speaks against training on these labels."""
        return not self.faults


def halo(labels: Sequence[Label], manifold: Manifold = MANIFOLD) -> Halo:
    """Measure the halo over the dimensions that have labels.

    Each correlation is taken over the rows that have both numbers. With K dimensions the participation ratio must lie a
    quarter of the way from 1 to K: 2.5 of 7 (`science.md` 2.8). With fewer than `HALO_ROWS` rows nothing is said; a
    dimension with fewer, alone or together with another one, is left out, and a note says so.
    """
    values = matrix(labels, manifold)
    counts = (~np.isnan(values)).sum(axis=0)
    found = Halo()
    if len(labels) < HALO_ROWS:
        found.notes.append(f"{len(labels)} labels are too few to show a halo: {HALO_ROWS} are needed")
        return found
    kept = []
    for k, (name, count) in enumerate(zip(manifold.names, counts)):
        if not count:
            found.notes.append(f"{name}: no reply has a label in it, so nothing can be learnt of it")
        elif count < HALO_ROWS:
            found.notes.append(
                f"{name}: {count} labels in it are too few to show a halo ({HALO_ROWS} are needed): not looked at"
            )
        elif np.nanmax(values[:, k]) == np.nanmin(values[:, k]):
            found.faults.append(
                f"{name} is {np.nanmin(values[:, k]):g} in all {count} rows that have it: nothing can be learnt from "
                "it; rate it again, one dimension a call (teacher.rate_mode=single), or take the number out of the rows"
            )
        else:
            kept.append(k)
    correlations = np.eye(len(kept))
    for i, j in itertools.combinations(range(len(kept)), 2):
        both = values[:, [kept[i], kept[j]]]
        both = both[~np.isnan(both).any(axis=1)]
        correlations[i, j] = correlations[j, i] = pearson(*both.T) if len(both) >= HALO_ROWS else math.nan
    while np.isnan(correlations).any():  # one sparse dimension must not hide a halo of the others
        unknown = np.isnan(correlations).sum(axis=1)
        worst = min(range(len(kept)), key=lambda i: (-unknown[i], counts[kept[i]], -i))
        others = ", ".join(manifold.names[kept[j]] for j in np.flatnonzero(np.isnan(correlations[worst])))
        found.notes.append(
            f"too few rows have both {manifold.names[kept[worst]]} and {others} to show a halo: {HALO_ROWS} that "
            f"differ are needed; {manifold.names[kept.pop(worst)]} is not looked at"
        )
        correlations = np.delete(np.delete(correlations, worst, axis=0), worst, axis=1)
    found.dimensions = [manifold.names[k] for k in kept]
    if len(kept) < 2:
        found.notes.append("with fewer than two dimensions that differ there is no halo to measure")
        return found
    off = correlations[~np.eye(len(kept), dtype=bool)]
    found.participation_ratio = participation_ratio(correlations)
    found.mean_abs_correlation = float(np.abs(off).mean())
    found.wanted = 1 + (len(kept) - 1) * (MIN_PARTICIPATION - 1) / (len(MANIFOLD.names) - 1)
    if found.participation_ratio < found.wanted:
        found.faults.append(
            f"the labels have {found.participation_ratio:.2f} independent directions, want {found.wanted:g}: one "
            "impression colours all dimensions; rate them one at a time (teacher.rate_mode=single)"
        )
    if found.mean_abs_correlation > MAX_CORRELATION:
        found.faults.append(
            f"dimensions correlate by {found.mean_abs_correlation:.2f} on average, want {MAX_CORRELATION} at most: add "
            "single-axis edits (`hominem data sample --edits`) or rate them one at a time"
        )
    return found


def _halo(labels: Sequence[Label], measures: dict[str, float], manifold: Manifold) -> Iterator[Problem]:
    found = halo(labels, manifold)
    if found.participation_ratio is not None and found.mean_abs_correlation is not None:
        measures["participation_ratio"] = found.participation_ratio
        measures["mean_abs_correlation"] = found.mean_abs_correlation
    for fault in found.faults:
        yield Problem(rule="halo", text=fault)


def _surface(labels: Sequence[Label], measures: dict[str, float], manifold: Manifold) -> Iterator[Problem]:
    """Length must not tell quality, and grossly bad replies teach little."""
    scored = [(label, value) for label in labels if (value := label.reward.overall(manifold)) is not None]
    if len(scored) < HALO_ROWS:
        return
    lengths = np.log([max(1, len(words(label.response))) for label, _ in scored])
    rewards = np.array([value for _, value in scored])
    length = pearson(lengths, rewards)
    if not math.isnan(length):
        measures["length_correlation"] = length
        if abs(length) > MAX_LENGTH_CORRELATION:
            text = f"log length correlates by {length:+.2f} with the reward, want within {MAX_LENGTH_CORRELATION}"
            yield Problem(rule="length", text=f"{text}: add short good and long poor replies")
    measures["gross"] = float((rewards < GROSS).mean())
    if measures["gross"] > MAX_GROSS:
        text = f"{measures['gross']:.0%} of the replies are grossly bad (below {GROSS}), want {MAX_GROSS:.0%} at most"
        yield Problem(rule="gross", text=text, rows=[label.id for label, value in scored if value < GROSS])


# --- views ----------------------------------------------------------------------------------------------------------


def sample_rows(labels: Sequence[Label], n: int, *, seed: int = 0) -> list[Label]:
    """`n` random rows, or all there are, in the order of the labels. Equal seeds show equal rows."""
    chosen = sorted(random.Random(seed).sample(range(len(labels)), min(n, len(labels))))
    return [labels[index] for index in chosen]


class Stat(BaseModel):
    """One number's distribution over the rows of one category (`all` for all of them)."""

    category: str
    number: str
    n: int
    mean: float
    sd: float
    low: float
    high: float


def stats(labels: Iterable[Label], manifold: Manifold = MANIFOLD) -> list[Stat]:
    """Distribution of every number, over all rows and by category."""
    rows = list(labels)
    groups = {"all": rows}
    for label in sorted(rows, key=lambda row: row.category):
        groups.setdefault(label.category, []).append(label)
    found = []
    for category, members in groups.items():
        for name in (*manifold.names, "scalar", "reward_intensity", "safety_score"):
            overall = name == "scalar"
            values = [row.reward.overall(manifold) if overall else row.reward.number(name) for row in members]
            numbers = np.array([value for value in values if value is not None])
            if len(numbers):
                found.append(
                    Stat(
                        category=category,
                        number=name,
                        n=len(numbers),
                        mean=float(numbers.mean()),
                        sd=float(numbers.std()),
                        low=float(numbers.min()),
                        high=float(numbers.max()),
                    )
                )
    return found
