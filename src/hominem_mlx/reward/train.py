"""Training the reward model: features once, a head, and an honest account of it beside the n-gram baseline."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from hominem_mlx.config import Config, ManifoldConfig, RewardConfig, home_folder
from hominem_mlx.errors import InputError
from hominem_mlx.files import read_jsonl, write_json
from hominem_mlx.metrics import pair_accuracy
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.encoder import find_encoder
from hominem_mlx.records import Label
from hominem_mlx.reward import attention, tuning
from hominem_mlx.reward import distribution as distributions
from hominem_mlx.reward import head as heads
from hominem_mlx.reward import layers as reading
from hominem_mlx.reward import quantiles as scatter
from hominem_mlx.reward.attention import AttentionHead
from hominem_mlx.reward.examine import (
    CLEAR,
    LEVELS,
    Edit,
    calibration,
    compare,
    hidden_norm,
    in_json,
    scalars,
    widths,
)
from hominem_mlx.reward.features import Backbone, layer_numbers
from hominem_mlx.reward.head import EXTRA, RidgeHead
from hominem_mlx.reward.model import GET_ENCODER, WIDTH, Card, RewardModel, beside, open_reader, prompt_columns
from hominem_mlx.reward.ngram import NgramFeatures
from hominem_mlx.reward.own import felt, learnable, not_learnt_yet, of_the_seven, own_lines
from hominem_mlx.reward.scalar import (
    Gate,
    ScalarCard,
    fit_gate,
    length_slopes,
    log_length,
    ordered_pairs,
    pair_temperature,
)
from hominem_mlx.reward.words import WordCounts
from hominem_mlx.schema import COMMON, MANIFOLD, Manifold
from hominem_mlx.storage.registry import Artifact, Registry

METRICS = "metrics.json"
Progress = Callable[[dict], None]


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

    Returns: a `reward_model` whose metrics hold the grouped-fold account of `cross_validate` on train and valid rows.
    Raises: InputError when the labels cannot teach.
    """
    known = {"manifold": config.manifold.in_use}
    rows = read_jsonl(dataset.file("labels.train.jsonl"), Label, context=known)
    valid = read_jsonl(dataset.file("labels.valid.jsonl"), Label, may_be_empty=True, context=known)
    in_use = config.manifold.in_use
    _refuse_constants(rows, (*learnable(rows, in_use).names, *felt(rows, in_use)))
    kind, why = choose_backbone(config, registry.home)
    settings = config.reward.reading(kind).model_dump(mode="json") | {"backbone": kind}
    backbone = open_backbone(kind, config, registry.home, lm)
    features = _read([*rows, *valid], backbone, config, registry.home, progress)
    metrics = _account([*rows, *valid], features, backbone, config, progress, learnt=rows)

    if progress:
        progress({"stage": "head", "done": 0, "total": 1})
    ours = features if features is None else features[: len(rows)]
    model = _fit(rows, ours, backbone, config, members=config.reward.members)
    if valid:
        theirs = None if features is None else _as_read(features[len(rows) :], backbone, model)
        metrics["valid_pair_accuracy"] = _pair_accuracy(
            model, valid, _columns(model.head, model.features, valid, theirs, model.words)
        )
    if config.reward.choose_layers and features is not None and isinstance(model.features, Backbone):
        model.features.keep(_pairs([*rows, *valid]), _as_read(features, backbone, model), registry.home)
    if progress:
        progress({"stage": "head", "done": 1, "total": 1})

    inputs = {"backbone": model.card.backbone_hash} if model.card.backbone_hash else {}
    with registry.draft(
        "reward_model",
        parents=[dataset],
        config=settings,
        seed=config.reward.seed,
        inputs=inputs,
        manifold=config.manifold.in_use,
    ) as draft:
        model.save(draft.folder)
        write_json(draft.folder / METRICS, metrics)
        draft.metrics = metrics
        draft.notes = {**describe(model), "why": why, "data_hash": dataset.hash, "rows": len(rows)}
        if waiting := not_learnt_yet(rows, config.manifold.in_use):
            draft.notes["not_learnt_yet"] = waiting
    return draft.published


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
    backbone = open_backbone(kind, config, home, lm)
    features = _read(labels, backbone, config, home, progress)
    return _account(labels, features, backbone, config, progress)


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
    found, names = np.zeros((len(labels), len(MANIFOLD.names) + len(EXTRA))), np.unique(parts)
    config = config.model_copy(update={"manifold": ManifoldConfig()})
    for done, part in enumerate(names, 1):
        inside, outside = np.flatnonzero(parts != part).tolist(), np.flatnonzero(parts == part).tolist()
        ours = None if features is None else features[inside]
        try:
            model = _fit([labels[index] for index in inside], ours, backbone, config, members=0)
        except InputError:  # an output is labelled in this part only, so that nothing can be said of it
            found[outside] = np.nan
            continue
        theirs = None if features is None else _as_read(features[outside], backbone, model)
        columns = _columns(model.head, model.features, [labels[i] for i in outside], theirs, model.words)
        found[outside] = model.predict(columns)[0][:, : found.shape[1]]  # emotions come last
        if progress:
            progress({"stage": stage, "done": done, "total": len(names)})
    return found


def fit_baseline(labels: Sequence[Label], config: Config) -> RewardModel:
    """The n-gram baseline as a scorer of its own, without uncertainty."""
    return _fit(labels, None, None, config, members=0)


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
    backbone = open_backbone(kind, config, home, lm)
    assert backbone is not None
    return _fit(labels, _read(labels, backbone, config, home), backbone, config, members=0)


def preview(model: RewardModel, labels: Sequence[Label], n: int, seed: int = 0) -> list[dict]:
    """Predicted beside labelled for `n` rows drawn at random.

    Returns: `{"id", "prompt", "response", "labelled", "predicted"}` a row, the last two by output and `scalar`.
    """
    drawn = np.random.default_rng(seed).permutation(len(labels))[:n]
    rows = [labels[index] for index in sorted(drawn)]
    table = []
    for row, output in zip(rows, model.score_many(_pairs(rows)), strict=True):
        predicted = {name: round(output.unclipped[name], 4) for name in model.card.outputs} | {"scalar": output.scalar}
        labelled = {name: row.reward.number(name) for name in model.card.outputs}
        labelled |= {"scalar": row.reward.overall(model.manifold)}
        table.append(
            {"id": row.id, "prompt": row.prompt, "response": row.response, "labelled": labelled, "predicted": predicted}
        )
    return table


# --- pieces ---------------------------------------------------------------------------------------------------------


def choose_backbone(config: Config, home: Path) -> tuple[str, str]:
    """The backbone that will be used, and why in words."""
    if config.reward.backbone != "auto":
        return config.reward.backbone, "asked for in the configuration"
    if config.reward.model is None and find_encoder(home) is None:
        return "lm", f"no sentence encoder is here, so the student's hidden states are read; {GET_ENCODER}"
    return "encoder", "the sentence encoder is here"


def open_backbone(kind: str, config: Config, home: Path, lm: LanguageModel | None) -> Backbone | None:
    """The frozen backbone of this configuration; None for n-grams, whose vocabulary is fitted with the head."""
    if kind == "ngram":
        return None
    reader = open_reader(kind, config.reward.model, home=home, lm=lm, base=config.student.base)
    questions = [dimension.question for dimension in MANIFOLD.dimensions]
    reads, chosen_later = config.reward.reading(reader.kind), config.reward.choose_layers
    depths = reading.DEPTHS if chosen_later else reads.layers
    poolings = reading.POOLINGS if chosen_later else reads.poolings
    return Backbone(reader, layer_numbers(depths, reader.num_layers), poolings, questions)


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


def _refuse_constants(labels: Sequence[Label], names: Sequence[str]) -> None:
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


def _pairs(labels: Sequence[Label]) -> list[tuple[str, str]]:
    return [(row.prompt, row.response) for row in labels]


def _fit_head(
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    config: Config,
    *,
    members: int,
    standardise: bool,
    edited: Sequence[Edit] = (),
    backbone: Backbone | None = None,
    counts: int = 0,
) -> heads.Fitted:
    """The last `counts` features are those of words; the others are the backbone's, or n-grams without one."""
    reward, owner = config.reward, None
    if backbone is not None and (asked := backbone.owner(features.shape[1] - counts)) is not None:
        owner = np.concatenate([asked, np.full(counts, -1)])
    return heads.fit(
        features,
        labels,
        groups,
        penalties=reward.penalties,
        folds=reward.folds,
        members=members,
        seed=reward.seed,
        standardise=standardise,
        edits=[(edit, origin) for edit, origin, _ in edited],
        edit_weight=reward.edit_weight,
        shares=[dimension.weight for dimension in MANIFOLD.dimensions],
        owner=owner,
        counts=counts,
    )


def _read(
    labels: Sequence[Label],
    backbone: Backbone | None,
    config: Config,
    home: Path,
    progress: Progress | None = None,
) -> np.ndarray | None:
    """Features of rows, and for an attention head the states of their tokens, which the backbone keeps in memory."""
    if backbone is None:
        return None
    features = backbone.read_cached(_pairs(labels), home, progress)
    if config.reward.head == "attention":
        backbone.states(_pairs(labels), _attention_layer(backbone, config), progress)
    return features


def _attention_layer(backbone: Backbone, config: Config) -> int:
    return layer_numbers([config.reward.attention_layer], backbone.reader.num_layers)[0]


def _columns(
    head: RidgeHead | AttentionHead,
    reads: Backbone | NgramFeatures,
    labels: Sequence[Label],
    features: np.ndarray | None,
    words: WordCounts | None,
) -> np.ndarray:
    """What a head reads of rows whose features `[N, F]` are known; n-grams, which are not kept, are counted."""
    if features is None or isinstance(reads, NgramFeatures):
        return reads.read(_pairs(labels))[0]
    if isinstance(head, RidgeHead):
        return beside(features, words, _pairs(labels))
    return np.concatenate([features, head.attend_all(reads.states(_pairs(labels), head.layer))], axis=1)


def _fit_read(
    labels: Sequence[Label],
    values: np.ndarray,
    features: np.ndarray,
    backbone: Backbone,
    config: Config,
    *,
    members: int,
) -> tuple[heads.Fitted | attention.Fitted, Backbone, WordCounts | None]:
    """The head that the configuration asks for, on what a backbone reads of rows; and that backbone, and words."""
    groups, reward, backbone = [row.prompt_id for row in labels], config.reward, backbone.plain
    if reward.head == "attention":
        layer, pairs = _attention_layer(backbone, config), _pairs(labels)
        settings: dict = {"layer": layer, "folds": reward.folds, "members": members, "seed": reward.seed}
        if reward.lora_rank:
            looking, parts = tuning.fit(backbone, pairs, values, groups, rank=reward.lora_rank, **settings)
            return looking, backbone.looked_at_by(looking.head, parts), None
        looking = attention.fit(backbone.states(pairs, layer), features, values, groups, **settings)
        return looking, backbone.looked_at_by(looking.head), None
    words = _words(labels, backbone, config)
    read = beside(features, words, _pairs(labels))
    fitted = _fit_head(
        read,
        values,
        groups,
        config,
        members=members,
        standardise=True,
        edited=edits(labels, same_rater=True),
        backbone=backbone,
        counts=read.shape[1] - features.shape[1],
    )
    return fitted, backbone, words


def _words(labels: Sequence[Label], backbone: Backbone, config: Config) -> WordCounts | None:
    """What is counted beside the backbone's states, learnt from these rows."""
    strength = config.reward.reading(backbone.reader.kind).words
    words = WordCounts.fit(_pairs(labels), [row.prompt_id for row in labels], strength) if strength else None
    return words if words is not None and words.vocabulary else None


def _fit(
    labels: Sequence[Label], features: np.ndarray | None, backbone: Backbone | None, config: Config, *, members: int
) -> RewardModel:
    manifold, emotions = learnable(labels, config.manifold.in_use), felt(labels, config.manifold.in_use)
    values = targets(labels, manifold, emotions)
    groups = [row.prompt_id for row in labels]
    outputs = (*manifold.names, *EXTRA, *emotions)
    card: dict = {"manifold": config.manifold.in_use, "outputs": outputs}
    distribution, parts, words = None, None, None
    fitted: heads.Fitted | attention.Fitted
    made: Backbone | NgramFeatures
    if backbone is None or features is None:
        ngram = NgramFeatures.fit(_pairs(labels))
        fitted = _fit_head(ngram.read(_pairs(labels))[0], values, groups, config, members=members, standardise=False)
        card |= {"backbone": "ngram", "backbone_name": ngram.name}
        made = ngram
    else:
        choice = _chosen(labels, values, features, backbone, config)
        if choice is not None:
            features = reading.part(features, backbone, choice)
            backbone = Backbone(backbone.untuned, *choice)
        fitted, made, words = _fit_read(labels, values, features, backbone, config, members=members)
        spec, reader, parts = made.plain.spec, made.untuned, made.reader.tuning
        card |= {"backbone": reader.kind, "backbone_name": reader.name, "backbone_hash": reader.hash}
        card |= {"layers": spec.layers, "poolings": spec.poolings, "questions": spec.questions}
        card["words"] = len(words.vocabulary) if words is not None else 0
        if parts is not None:  # beside them the backbone makes other features
            features = made.read(_pairs(labels))[0][:, : features.shape[1]]
        if members:  # who says how unsure it is also says what it does not know
            size = features.shape[1]
            z = (features - np.array(fitted.head.feature_mean)[:size]) / np.array(fitted.head.feature_scale)[:size]
            distribution = distributions.fit(z, groups, folds=config.reward.folds, seed=config.reward.seed)
    made_of, gate = _scalar(labels, values - fitted.left_out, features, backbone, config, manifold)
    if isinstance(fitted, heads.Fitted):
        card["penalties"] = dict(zip(outputs, fitted.penalties, strict=True))
    else:
        card |= {"attention_layer": fitted.head.layer, "lora_rank": config.reward.lora_rank}
        card["epochs"] = dict(zip(outputs, fitted.epochs, strict=True))
    promised = zip(outputs, widths(fitted.left_out, [WIDTH])[0].tolist(), strict=True)
    width = {name: value for name, value in promised if np.isfinite(value)}  # of few labels nothing can be promised
    card |= {"width": width, "scalar": made_of}
    quantiles = None
    if members and config.reward.quantiles:
        read = _columns(fitted.head, made, labels, features, words)
        quantiles = _scatter(fitted, read, values, overall(labels, manifold), manifold)
    return RewardModel(
        Card(**card),
        fitted.head,
        made,
        gate=gate,
        distribution=distribution,
        quantiles=quantiles,
        tuning=parts,
        words=words,
    )


def _chosen(
    labels: Sequence[Label],
    values: np.ndarray,
    features: np.ndarray | None,
    backbone: Backbone | None,
    config: Config,
) -> reading.Choice | None:
    """What a head of these rows reads, chosen on them alone; None where the settings say it, or the backbone does."""
    if not config.reward.choose_layers or backbone is None or features is None:
        return None
    choices = reading.candidates(backbone)
    groups, known = [row.prompt_id for row in labels], edits(labels, same_rater=True)
    words = _words(labels, backbone, config)

    def left_out(choice: reading.Choice) -> np.ndarray:
        states = reading.part(features, backbone, choice)
        read = beside(states, words, _pairs(labels))
        settings: dict = {"members": 0, "standardise": True, "edited": known}
        return _fit_head(read, values, groups, config, counts=read.shape[1] - states.shape[1], **settings).left_out

    return reading.best(choices, left_out, values) if choices else None


def _as_read(features: np.ndarray, backbone: Backbone | None, model: RewardModel) -> np.ndarray:
    """Of features `[N, ...]` that the backbone read those that the model reads."""
    card = model.card
    if backbone is None or (card.layers, card.poolings) == (backbone.spec.layers, backbone.spec.poolings):
        return features
    return reading.part(features, backbone, reading.Choice(card.layers, card.poolings))


def _scatter(
    fitted: heads.Fitted | attention.Fitted,
    features: np.ndarray,
    values: np.ndarray,
    scalar: np.ndarray,
    manifold: Manifold,
) -> scatter.QuantileHead:
    """How far labels `[N, O]` and `[N]` scatter about what is said of rows `[N, F]` whose fold was left out."""
    unknown = np.isnan(fitted.left_out)
    said = np.where(unknown, np.array(fitted.head(mx.array(features))[0]), values - fitted.left_out)
    weights = [dimension.weight for dimension in manifold.dimensions]
    nothing = unknown[:, : len(weights)].all(axis=1)
    return scatter.fit(said, np.where(unknown, np.nan, values), np.where(nothing, np.nan, scalar), weights)


def _scalar(
    labels: Sequence[Label],
    predicted: np.ndarray,
    features: np.ndarray | None,
    backbone: Backbone | None,
    config: Config,
    manifold: Manifold,
) -> tuple[ScalarCard, Gate | None]:
    """How dimensions, predicted with their fold left out `[N, K + 2]`, become one number."""
    dimensions, wanted = predicted[:, : len(manifold.names)], overall(labels, manifold)
    groups = [row.prompt_id for row in labels]
    weights = np.array([dimension.weight for dimension in manifold.dimensions])
    lengths = np.array([log_length(row.response) for row in labels])
    card, gate = ScalarCard(log_length=float(lengths.mean())), None
    if config.reward.length == "removed":
        slopes = length_slopes(dimensions, lengths)
        dimensions = dimensions - np.outer(lengths - lengths.mean(), slopes)
        card = card.model_copy(update={"slopes": dict(zip(manifold.names, slopes.tolist(), strict=True))})
    seven = np.array([name in COMMON for name in manifold.names])
    of_them = dimensions[:, seven] @ weights[seven] / weights[seven].sum()
    # A row without a label in the person's own dimension: left out of the mean, it changes nothing.
    dimensions = np.where(np.isnan(dimensions) & ~seven, of_them[:, None], dimensions)
    if config.reward.scalar == "gated" and features is not None and backbone is not None:
        asked = prompt_columns(backbone.spec, features.shape[1])
        read, seed = features[:, asked], config.reward.seed
        gate, decided = fit_gate(read, dimensions, wanted, groups, weights.tolist(), seed=seed)
        card = card.model_copy(update={"gate": decided})
    shares = weights / weights.sum() if gate is None else np.array(gate(mx.array(read)))
    scalar = (dimensions * shares).sum(axis=1)
    pairs = ordered_pairs(np.where(np.isnan(scalar), np.nan, wanted), groups)
    if len(pairs):
        temperature = pair_temperature(scalar[pairs[:, 0]] - scalar[pairs[:, 1]])
        card = card.model_copy(update={"temperature": temperature})
    return card, gate


def _account(
    labels: Sequence[Label],
    features: np.ndarray | None,
    backbone: Backbone | None,
    config: Config,
    progress,
    *,
    learnt: Sequence[Label] = (),
) -> dict:
    """Out-of-fold predictions of the model and of n-grams on the same folds, measured.

    A person's own dimension is in it when the model has it: where the rows `learnt` from can teach it. So are emotions.
    """
    manifold = learnable(learnt or labels, config.manifold.in_use)
    emotions = felt(learnt or labels, config.manifold.in_use)
    values, groups = targets(labels, manifold, emotions), np.array([row.prompt_id for row in labels])
    if len(set(groups)) < 3:
        raise InputError("labels of at least 3 prompts are needed to train a reward model; rate more of them")
    fold = heads.grouped_folds(groups, config.reward.folds, seed=config.reward.seed)
    predicted, baseline = np.zeros_like(values), np.zeros_like(values)
    promised, scalar = np.zeros((len(LEVELS), *values.shape)), overall(labels, manifold)
    quantiles = np.zeros((len(labels), len(manifold.names) + 1, len(scatter.LEVELS)))
    choices: Counter[reading.Choice] = Counter()
    number_of_folds = int(fold.max()) + 1
    fitted: heads.Fitted | attention.Fitted
    for number in range(number_of_folds):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        pairs = _pairs(labels)
        ngram = NgramFeatures.fit([pairs[index] for index in inside])
        counted, _ = ngram.read(pairs)
        fitted = _fit_head(counted[inside], values[inside], groups[inside], config, members=0, standardise=False)
        baseline[outside] = np.array(fitted.head(mx.array(counted[outside]))[0])
        learnt_from = counted[inside]
        if features is not None and backbone is not None:
            ours, theirs = ([labels[index] for index in rows.tolist()] for rows in (inside, outside))
            choice, own, read = _chosen(ours, values[inside], features[inside], backbone, config), backbone, features
            if choice is not None:
                own, read = Backbone(backbone.untuned, *choice), reading.part(features, backbone, choice)
                choices[choice] += 1
            fitted, reads, words = _fit_read(ours, values[inside], read[inside], own, config, members=0)
            columns = _columns(fitted.head, reads, theirs, read[outside], words)
            predicted[outside] = np.array(fitted.head(mx.array(columns))[0])
            if config.reward.quantiles:
                learnt_from = _columns(fitted.head, reads, ours, read[inside], words)
        else:
            predicted[outside] = baseline[outside]
        promised[:, outside] = widths(fitted.left_out)[:, None]
        if config.reward.quantiles:
            told = _scatter(fitted, learnt_from, values[inside], scalar[inside], manifold)
            quantiles[outside] = np.array(told(mx.array(predicted[outside])))
        if progress:
            progress({"stage": "folds", "done": number + 1, "total": number_of_folds})
    lines = own_lines(predicted, baseline, values, groups, manifold, emotions)
    predicted, baseline, values, promised = of_the_seven(manifold, predicted, baseline, values, promised)
    account = lines | compare(
        predicted,
        baseline,
        values,
        overall(labels, manifold.common),
        groups,
        edits=edits(labels),
        seed=config.reward.seed,
    )
    if choices:
        account["layers"] = [
            {"layers": [*choice.layers], "poolings": [*choice.poolings], "folds": folds}
            for choice, folds in choices.most_common()
        ]
    account["calibration"] = calibration(predicted, values, promised)
    if config.reward.quantiles:
        seven = [place for place, name in enumerate(manifold.names) if name in COMMON]
        off = (values - predicted)[:, : len(seven)]
        account["quantiles"] = scatter.examined(quantiles[:, seven], off, promised[..., : len(seven)], LEVELS)
    if features is not None:
        account["hidden_norm"] = in_json(hidden_norm(features, scalars(predicted, MANIFOLD)))
    kind = "ngram" if backbone is None else backbone.reader.kind
    return {"backbone": kind, "rows": len(labels), "prompts": len(set(groups)), "folds": number_of_folds, **account}


def _pair_accuracy(model: RewardModel, labels: Sequence[Label], features: np.ndarray) -> float | None:
    values, _ = model.predict(features)
    scalar = [model.manifold.scalar(row[: len(model.manifold.names)]) for row in values.tolist()]
    groups = np.array([row.prompt_id for row in labels])
    accuracy = pair_accuracy(np.array(scalar), overall(labels, model.manifold), groups, low=CLEAR)
    return None if np.isnan(accuracy) else round(accuracy, 6)
