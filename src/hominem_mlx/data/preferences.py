"""Preference pairs: which of two replies is better, how surely, how much it should count, and whether it is safe."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from hominem_mlx.abuse import is_adversarial
from hominem_mlx.config import Config, PairConfig
from hominem_mlx.data import dataset
from hominem_mlx.data import home as homes
from hominem_mlx.data.answers import Progress
from hominem_mlx.data.home import prompt_id
from hominem_mlx.errors import ConfigError, InputError
from hominem_mlx.files import sha256_json, write_jsonl
from hominem_mlx.records import Label, Preference, SftPair
from hominem_mlx.schema import ADVERSARIAL, MANIFOLD, STRANGE, Generator, Manifold, RewardOutput, Scorer
from hominem_mlx.storage.registry import Artifact, Registry

CHUNK = 32  # prompts answered and scored together


def soft_target(margin: float, *, temperature: float, better: float = 0.0, worse: float = 0.0) -> float:
    """Probability that the better-looking reply is better.

    Args:
        margin: difference of the two rewards, >= 0.
        temperature: T > 0, the margin at which one side is preferred with probability 0.73 when both are certain.
        better, worse: standard deviations of the two rewards, >= 0.

    Returns: sigmoid(margin / sqrt(T^2 + u+^2 + u-^2)), in [0.5, 1]. Source: `science.md` 3.2.
    """
    scaled = margin / math.sqrt(temperature**2 + better**2 + worse**2)
    return 1 / (1 + math.exp(-scaled))


def intensity_of(label: Label, siblings: Sequence[Label]) -> float:
    """The label's intensity, or where there is none how far it stands out: `I = clip01(|R|/2 + max_i|r_i - mean_i|/2)`.

    Args:
        label: the reply.
        siblings: all labelled replies to the same prompt, itself included, over which `mean_i` is taken.

    Source: `science.md` 2.5.
    """
    if label.reward.reward_intensity is not None:
        return label.reward.reward_intensity
    spreads = [0.0]
    every = zip(*(row.reward.vector() for row in siblings), strict=True)
    for value, column in zip(label.reward.vector(), every, strict=False):  # without siblings there is no column
        others = [v for v in column if v is not None]
        if value is not None and others:
            spreads.append(abs(value - sum(others) / len(others)))
    return min(1.0, abs(label.reward.overall() or 0.0) / 2 + max(spreads) / 2)


def from_labels(labels: Sequence[Label], config: PairConfig, manifold: Manifold = MANIFOLD) -> list[Preference]:
    """All pairs of replies to one prompt that differ enough, at most `max_per_prompt` of them, sorted by id.

    Which pairs stay under the cap is drawn by seed and id: neither wide nor narrow margins are preferred, and one more
    reply does not reshuffle the rest. Replies without an overall value make no pair, and one that holds an injection is
    never the better side: its label is that of the text without it.
    """
    by_prompt: dict[tuple[str, str], list[Label]] = {}
    for label in labels:
        if label.reward.overall(manifold) is not None:
            by_prompt.setdefault((label.prompt_id, label.prompt), []).append(label)
    injected = {label.id for label in labels if is_adversarial(label.response)}
    pairs = []
    for group in by_prompt.values():
        made = [
            pair
            for one, other in itertools.combinations(sorted(group, key=lambda row: row.id), 2)
            if (pair := _label_pair(one, other, group, config, manifold)) is not None and pair.chosen_id not in injected
        ]
        pairs += _capped(made, config)
    return sorted(pairs, key=lambda pair: pair.id)


def _label_pair(
    one: Label, other: Label, group: Sequence[Label], config: PairConfig, manifold: Manifold
) -> Preference | None:
    rewards = {row.id: row.reward.overall(manifold) or 0.0 for row in (one, other)}
    better, worse = (one, other) if rewards[one.id] >= rewards[other.id] else (other, one)
    margin = rewards[better.id] - rewards[worse.id]
    if margin < config.min_margin or margin == 0 or better.response == worse.response:
        return None
    return Preference(
        id=pair_id(better.id, worse.id),
        prompt=better.prompt,
        chosen=better.response,
        rejected=worse.response,
        prompt_id=better.prompt_id,
        chosen_id=better.id,
        rejected_id=worse.id,
        category=better.category,
        chosen_score=rewards[better.id],
        rejected_score=rewards[worse.id],
        score_margin=margin,
        target=soft_target(margin, temperature=config.temperature),
        **_safety_and_intensity(better, worse, group),
    )


def _or_safe(value: float | None) -> float:
    """A reply nobody marked as unsafe counts as safe, as in a peer's file that has no such column."""
    return 1.0 if value is None else value


def with_safety_of_labels(given: Sequence[Preference], labels: Sequence[Label]) -> list[Preference]:
    """Given pairs, with safety and intensity of the two labels where a teacher only said which reply is better.

    Such a comparison (`comparing`) knows nothing of safety: without a label of both replies it is left out, because an
    unsafe reply must not be learnt as a safe one. A person's own pairs stay as they are.
    """
    by_place = {homes.place(label): label for label in labels}
    siblings: dict[str, list[Label]] = {}
    for label in labels:
        siblings.setdefault(label.prompt, []).append(label)
    found = []
    for row in given:
        if not row.id.startswith(homes.COMPARED):
            found.append(row)
            continue
        better, worse = (by_place.get((row.prompt, reply)) for reply in (row.chosen, row.rejected))
        if better is not None and worse is not None:
            update = _safety_and_intensity(better, worse, siblings[row.prompt])
            found.append(row.model_copy(update=update))
    return found


def _safety_and_intensity(better: Label, worse: Label, group: Sequence[Label]) -> dict[str, float]:
    return {
        "reward_intensity": max(intensity_of(row, group) for row in (better, worse)),
        "safety_score": _or_safe(better.reward.safety_score),
        "rejected_safety_score": _or_safe(worse.reward.safety_score),
    }


def _capped(pairs: list[Preference], config: PairConfig) -> list[Preference]:
    return sorted(pairs, key=lambda pair: sha256_json([config.seed, pair.id]))[: config.max_per_prompt]


def pair_id(chosen_id: str, rejected_id: str) -> str:
    """The id of a pair, from its sides in order."""
    return f"pair-{sha256_json([chosen_id, rejected_id])[:12]}"


def from_scores(candidates: Mapping[str, Iterable[tuple[str, RewardOutput]]], config: PairConfig) -> list[Preference]:
    """One pair a prompt from scored candidates: the best by lower bound `R - u` against the worst by `R`.

    Args:
        candidates: `(reply, score)` by prompt; equal replies count once, empty and untrusted ones not at all.
        config: `on_policy_min_margin` is what the bound of the best must have over the worst, `on_policy_strange`
            whether a reply counts of which the judge says that it knows nothing like it. An injection never counts.

    Returns: pairs sorted by id, with soft targets from rewards and uncertainties.
    """
    pairs = []
    for prompt, scored in candidates.items():
        trusted = {reply: output for reply, output in scored if reply.strip() and is_trusted(output, config)}
        unique = sorted(trusted.items())
        if len(unique) < 2:
            continue
        best_reply, best = max(unique, key=lambda item: item[1].scalar - spread(item[1]))
        worst_reply, worst = min(unique, key=lambda item: item[1].scalar)
        margin = best.scalar - worst.scalar
        if best_reply == worst_reply or margin - spread(best) < config.on_policy_min_margin or margin <= 0:
            continue
        ids = [f"sampled-{sha256_json([prompt, reply])[:12]}" for reply in (best_reply, worst_reply)]
        pairs.append(
            Preference(
                id=pair_id(*ids),
                prompt=prompt,
                chosen=best_reply,
                rejected=worst_reply,
                prompt_id=prompt_id(prompt),
                chosen_id=ids[0],
                rejected_id=ids[1],
                chosen_score=best.scalar,
                rejected_score=worst.scalar,
                score_margin=margin,
                target=soft_target(margin, temperature=config.temperature, better=spread(best), worse=spread(worst)),
                reward_intensity=max(best.reward_intensity, worst.reward_intensity),
                safety_score=best.safety_score,
                rejected_safety_score=worst.safety_score,
            )
        )
    return sorted(pairs, key=lambda pair: pair.id)


def is_trusted(output: RewardOutput, config: PairConfig) -> bool:
    """Whether something may be learnt from this score."""
    return ADVERSARIAL not in output.flags and (config.on_policy_strange or STRANGE not in output.flags)


def spread(output: RewardOutput) -> float:
    """Standard deviation of the scalar; where the model gives none, that of fully correlated dimensions (the most)."""
    if "scalar" in output.uncertainty:
        return output.uncertainty["scalar"]
    values = [output.uncertainty.get(name, 0.0) for name in output.reward_vector]
    return MANIFOLD.scalar(values) if len(values) == len(MANIFOLD.names) else max(values, default=0.0)


def pair(
    registry: Registry,
    labels: Artifact,
    config: Config,
    *,
    scorer: Scorer | None = None,
    generator: Generator | None = None,
    reward_model: Artifact | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """The dataset of preference pairs, single thumbs and memory pairs, made current under the pointer "pairs".

    Args:
        registry: where it goes.
        labels: the "labels" dataset it is made from.
        config: `pairs`; with `pairs.on_policy` the student's own replies to training prompts are paired as well.
        scorer, generator: judge and student for that; both or neither.
        reward_model: the artifact behind the scorer, a parent then.
        progress: called per chunk of prompts.

    Raises: InputError when there is neither a training pair nor a thumb, ConfigError when on-policy pairs lack judge or
        student.
    """
    settings = config.pairs
    pairs: dict[str, list[Preference]] = {}
    unlabelled = 0
    for part in ("train", "valid"):
        labelled, given = dataset.read_labels(labels, part), dataset.read_given(labels, part)
        usable = with_safety_of_labels(given, labelled)
        unlabelled += len(given) - len(usable)
        pairs[part] = [*from_labels(labelled, settings, config.manifold.in_use), *usable]
    parents = [labels]
    inputs: dict[str, str] = {}
    anchors: list[SftPair] = []
    untrusted = 0
    if settings.on_policy:
        if generator is None or scorer is None:
            raise ConfigError(
                f"pairs.on_policy = {settings.on_policy} needs a student that answers and a reward model that judges: "
                "train one first (`hominem train reward`), or set it to 0"
            )
        rows = dataset.read_labels(labels, "train")
        made, anchors, untrusted = _on_policy(rows, config, generator, scorer, progress)
        pairs["train"] += made
        parents += [reward_model] if reward_model is not None else []
        inputs["generator"] = str(getattr(generator, "hash", None) or getattr(generator, "name", "unnamed"))
    thumbs = dataset.read_thumbs(labels)
    if not pairs["train"] and not thumbs:
        raise InputError(
            f"no two training replies to one prompt differ by pairs.min_margin = {settings.min_margin:g} or more: "
            "label more replies a prompt, or lower it"
            + (f"; {unlabelled} compared pairs have a reply without a label: rate them" if unlabelled else "")
        )
    memory = dataset.read_memory(labels)
    with registry.draft(
        "dataset",
        parents=parents,
        config={"holds": "pairs", **settings.model_dump(mode="json")},
        seed=settings.seed,
        inputs=inputs,
        manifold=config.manifold.in_use,
    ) as draft:
        for part, rows_of_part in pairs.items():
            write_jsonl(draft.folder / f"preferences.{part}.jsonl", rows_of_part)
            draft.metrics[part] = len(rows_of_part)
        write_jsonl(draft.folder / "memory.jsonl", memory)
        write_jsonl(draft.folder / "anchors.jsonl", anchors)
        draft.metrics |= {"memory": len(memory), "anchors": len(anchors)}
        if thumbs:
            write_jsonl(draft.folder / dataset.THUMBS, thumbs)
            draft.metrics["thumbs"] = len(thumbs)
        if unlabelled:
            draft.metrics["compared_without_label"] = unlabelled
        if untrusted:
            draft.metrics["untrusted_answers"] = untrusted
    registry.use(draft.published, pointer="pairs")
    return draft.published


def _on_policy(
    rows: Sequence[Label], config: Config, generator: Generator, scorer: Scorer, progress: Progress | None
) -> tuple[list[Preference], list[SftPair], int]:
    """Pairs of the student's own replies to the prompts of `rows`, one a prompt as it came (an anchor; the first that
    attacks no judge), and how many replies are in no pair because their score is flagged.
    """
    known = {row.prompt: row for row in rows}
    prompts = sorted(known)
    samples = config.pairs.on_policy
    candidates: dict[str, list[tuple[str, RewardOutput]]] = {}
    for start in range(0, len(prompts), CHUNK):
        asked = [prompt for prompt in prompts[start : start + CHUNK] for _ in range(samples)]
        replies = generator.complete(
            asked,
            max_tokens=config.pairs.on_policy_max_tokens,
            temperature=1.0,
            seed=config.pairs.seed + start,
            system=config.student.system,
        )
        spoken = [(prompt, reply) for prompt, reply in zip(asked, replies, strict=True) if reply.strip()]
        for (prompt, reply), output in zip(spoken, scorer.score_many(spoken), strict=True):
            candidates.setdefault(prompt, []).append((reply, output))
        if progress:
            progress({"stage": "on-policy pairs", "done": min(start + CHUNK, len(prompts)), "total": len(prompts)})
    anchors = [
        SftPair(id=f"anchor-{known[prompt].prompt_id}", instruction=prompt, response=honest[0], source="student")
        for prompt, said in candidates.items()
        if (honest := [reply for reply, output in said if ADVERSARIAL not in output.flags])
    ]
    made = [
        pair.model_copy(update={"prompt_id": known[pair.prompt].prompt_id, "category": known[pair.prompt].category})
        for pair in from_scores(candidates, config.pairs)
    ]
    outputs = [output for scored in candidates.values() for _, output in scored]
    return made, anchors, sum(not is_trusted(output, config.pairs) for output in outputs)
