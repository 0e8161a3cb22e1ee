"""What is read of labelled replies before anything is fitted to them: features, and of those what a head reads.

Shapes: `N` rows, `F` features of a backbone, `C` columns of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hominem_mlx.config import Config
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.encoder import find_encoder
from hominem_mlx.records import Label
from hominem_mlx.reward.attention import AttentionHead
from hominem_mlx.reward.features import Backbone, FeatureSpec, Pair, Progress, layer_numbers
from hominem_mlx.reward.head import RidgeHead
from hominem_mlx.reward.layers import DEPTHS, POOLINGS, Choice, part
from hominem_mlx.reward.model import GET_ENCODER, beside, open_reader
from hominem_mlx.reward.ngram import NgramFeatures
from hominem_mlx.reward.words import WordCounts
from hominem_mlx.schema import MANIFOLD


@dataclass(frozen=True)
class ReadRows:
    """Labelled replies `[N]` and the features `[N, F]` that a plain backbone makes of them.

    Without both they are for n-grams, which are counted when they are fitted.
    """

    labels: Sequence[Label]
    features: np.ndarray | None = None
    backbone: Backbone | None = None

    def __getitem__(self, places: slice | np.ndarray) -> "ReadRows":
        labels = [self.labels[place] for place in np.arange(len(self.labels))[places].tolist()]
        return ReadRows(labels, None if self.features is None else self.features[places], self.backbone)

    @property
    def pairs(self) -> list[Pair]:
        """Prompt and reply of each row."""
        return [(row.prompt, row.response) for row in self.labels]

    @property
    def groups(self) -> np.ndarray:
        """The prompt of each row."""
        return np.array([row.prompt_id for row in self.labels])

    def narrowed(self, to: Choice | FeatureSpec) -> "ReadRows":
        """The same read at these layers and with these poolings alone, which are among those that were read."""
        if self.features is None or self.backbone is None:
            return self
        spec = self.backbone.spec
        if (to.layers, to.poolings) == (spec.layers, spec.poolings):
            return self
        choice = Choice(to.layers, to.poolings)
        features = part(self.features, self.backbone, choice)
        return ReadRows(self.labels, features, Backbone(self.backbone.untuned, *choice))

    def columns(
        self, head: RidgeHead | AttentionHead, reads: Backbone | NgramFeatures, words: WordCounts | None
    ) -> np.ndarray:
        """What a fitted head reads of these rows, `[N, C]`, with the backbone or n-grams, and words, fitted with it."""
        if isinstance(reads, NgramFeatures):
            return reads.read(self.pairs)[0]
        features = self.narrowed(reads.spec).features
        assert features is not None
        if isinstance(head, RidgeHead):
            return beside(features, words, self.pairs)
        return np.concatenate([features, head.attend_all(reads.states(self.pairs, head.layer))], axis=1)


def read_rows(
    labels: Sequence[Label],
    kind: str,
    config: Config,
    home: Path,
    lm: LanguageModel | None = None,
    progress: Progress | None = None,
) -> ReadRows:
    """Rows as the backbone of this kind reads them; for an attention head the states of their tokens too, which the
    backbone keeps in memory.
    """
    backbone = open_backbone(kind, config, home, lm)
    if backbone is None:
        return ReadRows(labels)
    pairs = ReadRows(labels).pairs
    features = backbone.read_cached(pairs, home, progress)
    if config.reward.head == "attention":
        backbone.states(pairs, attention_layer(backbone, config), progress)
    return ReadRows(labels, features, backbone)


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
    depths = DEPTHS if chosen_later else reads.layers
    poolings = POOLINGS if chosen_later else reads.poolings
    return Backbone(reader, layer_numbers(depths, reader.num_layers), poolings, questions)


def attention_layer(backbone: Backbone, config: Config) -> int:
    """The block whose states an attention head looks at."""
    return layer_numbers([config.reward.attention_layer], backbone.reader.num_layers)[0]
