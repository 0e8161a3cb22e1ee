"""Fitting: a head to rows that were read, and the reward model of it.

Shapes: `N` rows, `O` outputs, `K` dimensions.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hominem_mlx.config import Config
from hominem_mlx.reward import attention, distribution, layers, quantiles, scalar, tuning
from hominem_mlx.reward import head as heads
from hominem_mlx.reward.examine import widths
from hominem_mlx.reward.features import Backbone, Progress
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.reward.model import WIDTH, Card, RewardModel, beside, prompt_columns
from hominem_mlx.reward.ngram import NgramFeatures
from hominem_mlx.reward.own import felt, learnable
from hominem_mlx.reward.reading import ReadRows, attention_layer
from hominem_mlx.reward.targets import edits, overall, targets
from hominem_mlx.reward.words import WordCounts
from hominem_mlx.schema import MANIFOLD, Manifold


@dataclass(frozen=True)
class FittedHead:
    """A head, and what reads for it: a backbone, with words beside it or without, or n-grams."""

    fitted: heads.Fitted | attention.Fitted
    reads: Backbone | NgramFeatures
    words: WordCounts | None = None

    def predict(self, rows: ReadRows) -> np.ndarray:
        """Outputs `[N, O]`, unclipped."""
        head = self.fitted.head
        return np.array(head(mx.array(rows.columns(head, self.reads, self.words)))[0])


def fit_model(rows: ReadRows, config: Config, *, members: int, progress: Progress | None = None) -> RewardModel:
    """The reward model that rows teach; with `members` it says how unsure it is, and what it does not know.

    Raises: InputError when the labels cannot teach.
    """
    manifold, emotions = learnable(rows.labels, config.manifold.in_use), felt(rows.labels, config.manifold.in_use)
    values, outputs = targets(rows.labels, manifold, emotions), (*manifold.names, *EXTRA, *emotions)
    head = fit_head(rows, values, config, members=members, progress=progress)
    left_out, features = head.fitted.left_out, _own_features(head.reads, rows)
    made_of, gate = scalar.fit(
        (values - left_out)[:, : len(manifold.names)],
        overall(rows.labels, manifold),
        rows.groups,
        [row.response for row in rows.labels],
        manifold,
        keep_length=config.reward.length == "kept",
        prompts=_of_prompts(head.reads, features) if config.reward.scalar == "gated" else None,
        seed=config.reward.seed,
    )
    promised = zip(outputs, widths(left_out, [WIDTH])[0].tolist(), strict=True)
    card = Card(
        manifold=config.manifold.in_use,
        outputs=outputs,
        width={name: value for name, value in promised if np.isfinite(value)},  # of few labels nothing can be promised
        scalar=made_of,
        **_told_of(head, outputs, config),
    )
    return RewardModel(
        card,
        head.fitted.head,
        head.reads,
        gate=gate,
        distribution=_known(head, features, rows.groups, config) if members else None,
        quantiles=fit_quantiles(head, rows, values, manifold) if members and config.reward.quantiles else None,
        tuning=head.reads.reader.tuning if isinstance(head.reads, Backbone) else None,
        words=head.words,
    )


def fit_head(
    rows: ReadRows, values: np.ndarray, config: Config, *, members: int, progress: Progress | None = None
) -> FittedHead:
    """The head that the configuration asks for, fitted to labels `[N, O]`, NaN where there is none."""
    if rows.backbone is None:
        return fit_ngrams(rows, values, config, members=members)
    if config.reward.head == "attention":
        return _fit_attention(rows, rows.backbone, values, config, members, progress)
    strength = config.reward.reading(rows.backbone.reader.kind).words
    words = WordCounts.fit(rows.pairs, rows.groups, strength) if strength else None
    words = words if words is not None and words.vocabulary else None
    if config.reward.choose_layers:
        rows = _chosen(rows, values, words, config)
    assert rows.backbone is not None
    return FittedHead(_fit_ridge(rows, values, words, config, members), rows.backbone, words)


def fit_ngrams(rows: ReadRows, values: np.ndarray, config: Config, *, members: int = 0) -> FittedHead:
    """The ridge on counts of n-grams, whatever the backbone: the baseline."""
    ngrams, reward = NgramFeatures.fit(rows.pairs), config.reward
    fitted = heads.fit(
        ngrams.read(rows.pairs)[0],
        values,
        rows.groups,
        penalties=reward.penalties,
        folds=reward.folds,
        members=members,
        seed=reward.seed,
        standardise=False,
    )
    return FittedHead(fitted, ngrams)


def fit_quantiles(head: FittedHead, rows: ReadRows, values: np.ndarray, manifold: Manifold) -> quantiles.QuantileHead:
    """How far labels `[N, O]`, and the overall ones, scatter about what is said of rows whose fold was left out."""
    unknown = np.isnan(head.fitted.left_out)
    said = np.where(unknown, head.predict(rows), values - head.fitted.left_out)
    weights = [dimension.weight for dimension in manifold.dimensions]
    nothing = unknown[:, : len(weights)].all(axis=1)
    wanted = np.where(nothing, np.nan, overall(rows.labels, manifold))
    return quantiles.fit(said, np.where(unknown, np.nan, values), wanted, weights)


def _fit_ridge(
    rows: ReadRows, values: np.ndarray, words: WordCounts | None, config: Config, members: int
) -> heads.Fitted:
    """On a backbone's features and the words beside them."""
    assert rows.backbone is not None and rows.features is not None
    size, reward = rows.features.shape[1], config.reward
    counts = 0 if words is None else len(words.vocabulary)
    owner = rows.backbone.owner(size)
    return heads.fit(
        beside(rows.features, words, rows.pairs),
        values,
        rows.groups,
        penalties=reward.penalties,
        folds=reward.folds,
        members=members,
        seed=reward.seed,
        edits=[(edit, origin) for edit, origin, _ in edits(rows.labels, same_rater=True)],
        edit_weight=reward.edit_weight,
        shares=[dimension.weight for dimension in MANIFOLD.dimensions],
        owner=None if owner is None else np.concatenate([owner, np.full(counts, -1)]),
        counts=counts,
    )


def _chosen(rows: ReadRows, values: np.ndarray, words: WordCounts | None, config: Config) -> ReadRows:
    """Rows with only those layers and poolings by which they are best predicted, their folds left out."""
    assert rows.backbone is not None
    choices = layers.candidates(rows.backbone)
    if not choices:
        return rows

    def left_out(choice: layers.Choice) -> np.ndarray:
        return _fit_ridge(rows.narrowed(choice), values, words, config, 0).left_out

    return rows.narrowed(layers.best(choices, left_out, values))


def _fit_attention(
    rows: ReadRows, backbone: Backbone, values: np.ndarray, config: Config, members: int, progress: Progress | None
) -> FittedHead:
    """On the states of each reply's tokens, with low-rank parts below it where they are asked for."""
    reward, layer = config.reward, attention_layer(backbone, config)
    settings: dict = {"layer": layer, "folds": reward.folds, "members": members, "seed": reward.seed}
    if progress:
        settings["tell"] = lambda done, most: progress({"stage": "epochs, at most", "done": done, "total": most})
    if reward.lora_rank:
        fitted, parts = tuning.fit(backbone, rows.pairs, values, rows.groups, rank=reward.lora_rank, **settings)
        return FittedHead(fitted, backbone.looked_at_by(fitted.head, parts))
    assert rows.features is not None
    fitted = attention.fit(backbone.states(rows.pairs, layer), rows.features, values, rows.groups, **settings)
    return FittedHead(fitted, backbone.looked_at_by(fitted.head))


def _own_features(reads: Backbone | NgramFeatures, rows: ReadRows) -> np.ndarray | None:
    """Features as a fitted backbone itself makes them; those of n-grams tell nothing beside the head."""
    if isinstance(reads, NgramFeatures):
        return None
    features = rows.narrowed(reads.spec).features
    if features is None or reads.reader.tuning is None:
        return features
    return reads.read(rows.pairs)[0][:, : features.shape[1]]  # beside low-rank parts it makes others


def _of_prompts(reads: Backbone | NgramFeatures, features: np.ndarray | None) -> np.ndarray | None:
    """Those of the features that are the prompt's own, by which a gate weighs; n-grams have none."""
    if features is None or not isinstance(reads, Backbone):
        return None
    return features[:, prompt_columns(reads.spec, features.shape[1])]


def _known(
    head: FittedHead, features: np.ndarray | None, groups: np.ndarray, config: Config
) -> distribution.Distribution | None:
    """Where the features of these rows lie, standardised as the head does it."""
    if features is None:
        return None
    size, own = features.shape[1], head.fitted.head
    z = (features - np.array(own.feature_mean)[:size]) / np.array(own.feature_scale)[:size]
    return distribution.fit(z, groups, folds=config.reward.folds, seed=config.reward.seed)


def _told_of(head: FittedHead, outputs: tuple[str, ...], config: Config) -> dict:
    """What the card says of a head and of what it reads."""
    fitted, reads = head.fitted, head.reads
    if isinstance(fitted, heads.Fitted):
        told: dict = {"penalties": dict(zip(outputs, fitted.penalties, strict=True))}
    else:
        told = {"attention_layer": fitted.head.layer, "lora_rank": config.reward.lora_rank}
        told["epochs"] = dict(zip(outputs, fitted.epochs, strict=True))
    if isinstance(reads, NgramFeatures):
        return told | {"backbone": "ngram", "backbone_name": reads.name}
    spec, reader = reads.spec, reads.untuned
    told |= {"backbone": reader.kind, "backbone_name": reader.name, "backbone_hash": reader.hash}
    told |= {"layers": spec.layers, "poolings": spec.poolings, "questions": spec.questions}
    return told | {"words": len(head.words.vocabulary) if head.words is not None else 0}
