"""Training the reward model: rows are read, the account is made out of fold, a head is fitted, and all is published."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hominem_mlx.config import Config, RewardConfig, home_folder
from hominem_mlx.files import read_jsonl, write_json
from hominem_mlx.metrics import pair_accuracy
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.encoder import find_encoder
from hominem_mlx.records import Label
from hominem_mlx.reward.account import account
from hominem_mlx.reward.examine import CLEAR
from hominem_mlx.reward.features import Backbone, Progress
from hominem_mlx.reward.fit import fit_model
from hominem_mlx.reward.model import Card, RewardModel
from hominem_mlx.reward.own import felt, learnable, not_learnt_yet
from hominem_mlx.reward.reading import ReadRows, choose_backbone, read_rows
from hominem_mlx.reward.targets import overall, refuse_constants, refuse_few, targets
from hominem_mlx.storage.registry import Artifact, Registry

METRICS = "metrics.json"


def train(
    registry: Registry,
    dataset: Artifact,
    config: Config,
    *,
    lm: LanguageModel | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Fit the reward model on `labels.train.jsonl` and publish it; no pointer moves.

    Args:
        registry: where the artifact goes; features are kept in its home.
        dataset: the labels dataset; its valid part is used for the account only.
        config: its `reward` table; `student.base` where the backbone is the student and `lm` is None.
        lm: the student, when it is loaded; an adapter on it is never read through.
        progress: called with `{"stage", "done", "total"}`.

    Returns: a `reward_model` whose metrics hold the out-of-fold `account` of train and valid rows.
    Raises: InputError when the labels cannot teach.
    """
    in_use, reward = config.manifold.in_use, config.reward
    known = {"manifold": in_use}
    rows = read_jsonl(dataset.file("labels.train.jsonl"), Label, context=known)
    valid = read_jsonl(dataset.file("labels.valid.jsonl"), Label, may_be_empty=True, context=known)
    manifold, emotions = learnable(rows, in_use), felt(rows, in_use)
    refuse_constants(rows, (*manifold.names, *emotions))  # what labels lack is said before anything is read of them
    targets(rows, manifold, emotions)
    refuse_few([*rows, *valid])

    kind, why = choose_backbone(config, registry.home)
    read = read_rows([*rows, *valid], kind, config, registry.home, lm, progress)
    metrics = account(read, config, progress, learnt=rows)
    if progress:
        progress({"stage": "head", "done": 0, "total": 1})
    model = fit_model(read[: len(rows)], config, members=reward.members, progress=progress)
    if valid:
        metrics["valid_pair_accuracy"] = _pair_accuracy(model, read[len(rows) :])
    if reward.choose_layers and isinstance(model.features, Backbone):
        chosen = read.narrowed(model.features.spec)
        assert chosen.features is not None
        model.features.keep(chosen.pairs, chosen.features, registry.home)
    if progress:
        progress({"stage": "head", "done": 1, "total": 1})

    with registry.draft(
        "reward_model",
        parents=[dataset],
        config=reward.reading(kind).model_dump(mode="json") | {"backbone": kind},
        seed=reward.seed,
        inputs={"backbone": model.card.backbone_hash} if model.card.backbone_hash else {},
        manifold=in_use,
    ) as draft:
        model.save(draft.folder)
        write_json(draft.folder / METRICS, metrics)
        draft.metrics = metrics
        draft.notes = {**describe(model), "why": why, "data_hash": dataset.hash, "rows": len(rows)}
        if waiting := not_learnt_yet(rows, in_use):
            draft.notes["not_learnt_yet"] = waiting
    return draft.published


def _pair_accuracy(model: RewardModel, rows: ReadRows) -> float | None:
    """Clear pairs that the model has in order."""
    values, _ = model.predict(rows.columns(model.head, model.features, model.words))
    scalar = [model.manifold.scalar(row[: len(model.manifold.names)]) for row in values.tolist()]
    accuracy = pair_accuracy(np.array(scalar), overall(rows.labels, model.manifold), rows.groups, low=CLEAR)
    return None if np.isnan(accuracy) else round(accuracy, 6)


def fit_baseline(labels: Sequence[Label], config: Config) -> RewardModel:
    """The n-gram baseline as a scorer of its own, without uncertainty."""
    return fit_model(ReadRows(labels), config, members=0)


def fit_audit(
    labels: Sequence[Label],
    config: Config,
    *,
    judge: RewardModel | None = None,
    home: Path | None = None,
    lm: LanguageModel | None = None,
) -> RewardModel:
    """A second judge that shares neither training rows nor features with a reward model.

    It counts n-grams; beside one that counts words it reads, without words, with the backbone that one does not read
    with. Where there is no other, n-grams have to do.

    Args:
        labels: rows the reward model never saw: the held-out suite's.
        config: its `reward` table, of which nothing is taken that is about reading.
        judge: the reward model; None: the one this configuration makes.
        home, lm: where the encoder is, and the student when it is loaded.
    """
    place = home or home_folder()
    kind = choose_backbone(config, place)[0] if judge is None else judge.backbone
    words = config.reward.reading(kind).words if judge is None else judge.card.words
    others = ["encoder"] if kind != "encoder" and find_encoder(place) else []
    others += ["lm"] if kind == "ngram" or (kind == "encoder" and lm is not None) else []
    if not others or not (words or kind == "ngram"):
        return fit_baseline(labels, config)
    plain = RewardConfig(**config.reward.model_dump(include={"penalties", "folds", "seed", "edit_weight"}), words=0.0)
    return fit_judge(labels, config.model_copy(update={"reward": plain}), kind=others[0], home=place, lm=lm)


def fit_judge(
    labels: Sequence[Label], config: Config, *, kind: str, home: Path, lm: LanguageModel | None = None
) -> RewardModel:
    """A reward model of these rows that reads with an `encoder` or `lm`, without uncertainty, kept nowhere."""
    return fit_model(read_rows(labels, kind, config, home, lm), config, members=0)


def preview(model: RewardModel, labels: Sequence[Label], n: int, seed: int = 0) -> list[dict]:
    """Predicted beside labelled for `n` rows drawn at random.

    Returns: `{"id", "prompt", "response", "labelled", "predicted"}` a row, the last two by output and `scalar`.
    """
    drawn = np.random.default_rng(seed).permutation(len(labels))[:n]
    rows = [labels[index] for index in sorted(drawn)]
    table = []
    for row, output in zip(rows, model.score_many(ReadRows(rows).pairs), strict=True):
        predicted = {name: round(output.unclipped[name], 4) for name in model.card.outputs} | {"scalar": output.scalar}
        labelled = {name: row.reward.number(name) for name in model.card.outputs}
        labelled |= {"scalar": row.reward.overall(model.manifold)}
        table.append(
            {"id": row.id, "prompt": row.prompt, "response": row.response, "labelled": labelled, "predicted": predicted}
        )
    return table


def describe(model: RewardModel) -> dict:
    """What METADATA says of the numbers: names, meaning, range, and how they were normalised."""
    ranges = {name: [-1.0, 1.0] for name in model.card.outputs} | {"reward_intensity": [0.0, 1.0]}
    described = (*model.manifold.dimensions, *model.card.emotions)
    ranges |= {dimension.name: list(dimension.range) for dimension in described}
    meaning = {dimension.name: dimension.question for dimension in described}
    meaning |= {
        "reward_intensity": "How much would learning this reply change future behaviour?",
        "safety_score": "How safe is it to learn from this text at all?",
    }
    mean, scale = np.array(model.head.label_mean).tolist(), np.array(model.head.label_scale).tolist()
    return {
        "outputs": [
            {
                "name": name,
                "meaning": meaning[name],
                "range": ranges[name],
                "label_mean": mean[index],
                "label_scale": scale[index],
                **({"penalty": model.card.penalties[name]} if model.card.penalties else {}),
                **({"epochs": model.card.epochs[name]} if model.card.epochs else {}),
            }
            for index, name in enumerate(model.card.outputs)
        ],
        "scalar": {**model.card.scalar.model_dump(), "gated": model.gate is not None},
        "normalisation": "features and labels standardised on the training rows, undone inside the head; then clipped",
        "backbone": {
            "kind": model.card.backbone,
            "name": model.card.backbone_name,
            "hash": model.card.backbone_hash,
            "layers": list(model.card.layers),
            "poolings": list(model.card.poolings),
        },
        "head": _head_of(model.card),
        "words": model.card.words,
    }


def _head_of(card: Card) -> str:
    """In words."""
    if card.attention_layer is None:
        return "ridge"
    tuned = f", with LoRA of rank {card.lora_rank} below it" if card.lora_rank else ""
    return f"attention on block {card.attention_layer}{tuned}"
