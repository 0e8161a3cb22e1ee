"""Kinds of tokens: how much of a reply each of a few thousand of them makes up, as one more thing read of a backbone.

Means over tokens keep little of which words a reply holds. States of tokens, each in its context, are near one of
`KINDS` centres found by k-means in the replies of the starter corpus, so that no judged text has part in them; a reply
is the root of how many of its tokens are of each kind, every token shared by the softmax of its cosines. Bags of such
words come from pictures (Sivic and Zisserman 2003; shared softly: van Gemert et al. 2008).
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hominem_mlx.data.home import STARTER
from hominem_mlx.files import read_jsonl, sha256_json, write_atomic
from hominem_mlx.models.encoder import Passage
from hominem_mlx.records import Label
from hominem_mlx.reward.features import Backbone, Pair, pool

KINDS, REPLIES, ROUNDS, SHARPNESS = 2048, 600, 6, 20.0
SEED = 0
BATCH = 16


class KindsBackbone(Backbone):
    """`Backbone` whose features end with the kinds of tokens in the reply, of the deepest layer that is read.

    Args:
        backbone: what is read besides.
        centres: `[K, D]` float32, each of length 1.
        name: what `centres` hang on, so that features of others are never taken for these.
    """

    def __init__(self, backbone: Backbone, centres: np.ndarray, name: str):
        self.__dict__.update(backbone.__dict__)
        self.centres, self.hash = centres, name

    def features(self, passages: Sequence[Passage], embedded: mx.array | None = None) -> mx.array:
        """`[N, F + K]`."""
        asked = mx.array([passage.asked for passage in passages])
        said = mx.array([passage.said for passage in passages])
        states = self.reader.hidden_states(passages, self.spec.layers, embedded)
        blocks = [pool(hidden, asked, said, self.pooled) for hidden in states]
        return mx.concatenate([*blocks, kinds(states[-1], said, mx.array(self.centres))], axis=1)


def kinds(hidden: mx.array, said: mx.array, centres: mx.array) -> mx.array:
    """Root of how many tokens of each reply are of each kind, `[N, K]`.

    Args:
        hidden: `[N, T, D]`.
        said: int `[N, 2]`, first and past-the-last place of the reply.
        centres: `[K, D]`, each of length 1.
    """
    places = mx.arange(hidden.shape[1])
    reply = (places >= said[:, :1]) & (places < said[:, 1:])
    length = mx.maximum(mx.linalg.norm(hidden, axis=-1, keepdims=True), 1e-9)
    share = mx.softmax(SHARPNESS * ((hidden / length) @ centres.T), axis=-1)
    return mx.sqrt((reply[:, None].astype(mx.float32) @ share)[:, 0])


def open_kinds(backbone: Backbone, folder: Path) -> KindsBackbone:
    """The backbone with kinds of tokens, their centres kept in `folder`."""
    replies = drawn_replies()
    name = sha256_json([backbone.spec.hash, KINDS, ROUNDS, SHARPNESS, SEED, replies])[:16]
    path = folder / f"kinds-{name}.safetensors"
    try:
        centres = load(path.read_bytes())["centres"]
    except (OSError, SafetensorError, KeyError):
        centres = find_centres(token_states(backbone, replies))
        write_atomic(path, save({"centres": centres}))
    return KindsBackbone(backbone, centres, name)


def drawn_replies() -> list[Pair]:
    """Replies of the starter corpus, no contrast edits among them: these say nearly the same again."""
    pairs = [
        (row.prompt, row.response) for row in read_jsonl(STARTER / "reward_samples.jsonl", Label) if not row.edit_of
    ]
    order = np.random.default_rng(SEED).permutation(len(pairs))
    return [pairs[index] for index in order[:REPLIES]]


def token_states(backbone: Backbone, pairs: Sequence[Pair]) -> np.ndarray:
    """States of all tokens of the replies in the deepest layer that is read, `[T, D]`, each of length 1."""
    passages = sorted((backbone.reader.passage(*pair) for pair in pairs), key=lambda passage: len(passage.tokens))
    found = []
    for first in range(0, len(passages), BATCH):
        part = passages[first : first + BATCH]
        hidden = np.array(backbone.reader.hidden_states(part, backbone.spec.layers[-1:])[0])
        found += [row[passage.said[0] : passage.said[1]] for row, passage in zip(hidden, part, strict=True)]
    states = np.concatenate(found)
    return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-9)


def find_centres(states: np.ndarray) -> np.ndarray:
    """Spherical k-means of `[T, D]`: `[K, D]`, each of length 1 (Dhillon and Modha 2001)."""
    order = np.random.default_rng(SEED).permutation(len(states))
    centres = states[order[:KINDS]]
    for _ in range(ROUNDS):
        nearest = np.concatenate([(part @ centres.T).argmax(axis=1) for part in np.array_split(states, 16)])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, states)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(length > 0, sums / np.maximum(length, 1e-9), centres)
    return centres.astype(np.float32)
