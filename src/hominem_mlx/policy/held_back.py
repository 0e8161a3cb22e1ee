"""What held-back pairs say of an adapter: how good it is, which one to keep, when to stop, what moves it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from hominem_mlx.models import lora
from hominem_mlx.policy.material import Material
from hominem_mlx.policy.pairs import unlearnt
from hominem_mlx.records import Preference
from hominem_mlx.training.kept import keep
from hominem_mlx.training.loop import Look
from hominem_mlx.training.parallel import ALONE
from hominem_mlx.training.rows import spoken
from hominem_mlx.training.sketch import Sketches, sketch


def validation(material: Material, preferences: Sequence[Preference]) -> Callable[[int], dict[str, float]] | None:
    """A function of the step that measures held-back pairs: accuracy of the implicit reward, displacement.

    To be called before the adapter is attached: the model as it is then is the reference. None without any pairs.
    """
    unsafe = unlearnt(preferences, material.settings)
    preferences = [pair for pair in preferences if pair not in unsafe]
    if not preferences:
        return None
    rows, (chosen, rejected) = material.replies(preferences)
    lengths = np.array([len(rows[place].response) for place in chosen])
    before = material.read(rows, "validation reference")

    def evaluate(step: int) -> dict[str, float]:
        gained = material.read(rows).astype(float) - before
        delta = gained[chosen] - gained[rejected]
        displacement = (gained[chosen] / lengths).mean()
        return {"valid_accuracy": float((delta > 0).mean()), "valid_displacement": float(displacement)}

    return evaluate


def watch(material: Material, run: Path) -> Callable[[Sequence[Look]], str | None]:
    """A function of the looks so far that tells why to stop now, or None; it keeps the best adapter if asked to.

    Chosen replies that became much less likely than they were (likelihood displacement) are always a reason, and
    such an adapter is never kept as the best; where there is no other, it is what the run ends with. Where no
    preferences are learnt, or none are held back, no look is better than another: `dual.keep` and `dual.patience`
    then change nothing.

    Args:
        run: the folder where the best adapter is kept.
    """
    settings = material.settings

    def should_stop(looks: Sequence[Look]) -> str | None:
        newest, limit = looks[-1], settings.max_displacement
        if "valid_accuracy" not in newest:
            return None
        if limit and newest["valid_displacement"] < -limit:
            return f"chosen replies lost {-newest['valid_displacement']:.2f} nats a token (limit {limit})"
        if not (material.num_pairs or material.num_thumbs):
            return None
        best = best_look(looks)
        if best is newest and settings.keep == "best":
            keep(material.lm.model, run, newest["step"])
        since = sum(each["step"] > best["step"] for each in looks)
        if settings.patience and since >= settings.patience:
            return f"{since} looks without a better one than that of step {best['step']}"
        return None

    return should_stop


def best_look(looks: Sequence[Look]) -> Look:
    """The look with most held-out pairs in order; of equals, the one whose chosen replies gained most; then the first.

    Order is what is learnt, but of few pairs it moves in jumps, so ties are common. They are not broken by the loss on
    those pairs: that also falls when both replies become less likely and only the rejected one does so faster, which
    is how preference learning goes wrong (Razin et al. 2024, arXiv 2410.08847). What chosen replies gained tells the
    two apart.
    """
    return max(looks, key=lambda look: (look["valid_accuracy"], look["valid_displacement"]))


def sketches(material: Material, preferences: Sequence[Preference]) -> Sketches | None:
    """Sketched gradients of the margins of `dual.sketch_pairs` held-back pairs, from all over the file, or None.

    Args:
        material: with the trained adapter on its model; no other rank is asked.
        preferences: the whole file, since a sketch names its pair by the line.
    """
    lm, logprobs, progress = material.lm, material.logprobs, material.progress
    kept = {id(pair) for pair in spoken(lm, preferences)}
    lines = np.array([line for line, pair in enumerate(preferences) if id(pair) in kept], int)
    count = min(material.settings.sketch_pairs, len(lines))
    if not count:
        return None
    picked = lines[np.arange(count) * len(lines) // count]
    rows, sides = material.replies([preferences[place] for place in picked.tolist()])
    with lora.without_adapter(lm, keep=material.adapters_below):
        reference = material.read(rows, "sketch reference", ranks=ALONE)

    def margin(pair: int) -> mx.array:
        both = logprobs.collate([rows[place] for place in sides[:, pair]])
        gained = logprobs(both) - mx.array(reference[sides[:, pair]])
        return material.settings.beta * (gained[0] - gained[1])

    margins, gradients = np.zeros(count, np.float32), []
    for pair in range(count):
        value, tree = nn.value_and_grad(lm.model, margin)(pair)
        margins[pair] = value.item()
        gradients.append(sketch(dict(tree_flatten(tree))))
        if progress:
            progress({"stage": "sketching", "done": pair + 1, "total": count})
    return Sketches(np.stack(gradients), margins, picked)
