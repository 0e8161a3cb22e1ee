"""A language model as this library uses it: loaded by mlx-lm, with its chat template, hidden states and identity."""

import contextlib
import functools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hominem_mlx.config import home_folder
from hominem_mlx.errors import ModelError
from hominem_mlx.files import sha256_bytes, sha256_file, sha256_json
from hominem_mlx.models import lora, platform, prefix, sampling
from hominem_mlx.storage.registry import METADATA, Registry

STARTER = Path(__file__).parents[1] / "starter" / "student"
THOUGHT = ("<think>", "</think>")  # around thoughts, where the tokenizer has no tags of its own
OPENINGS = 1024  # prompts whose tokens are kept
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")  # configuration and tokenizer


@dataclass
class LanguageModel:
    """A model, its tokenizer and who it is. Speaks the `Generator` protocol.

    `hash` covers configuration, weights and tokenizer: equal hashes, equal answers. `adapters` names the folder of each
    adapter that is on, the lowest first; None for one that came from no file.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    name: str
    folder: Path
    hash: str
    adapters: list[str | None] = field(default_factory=list)
    _openings: dict[tuple, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def adapter(self) -> str | None:
        """The folder of the topmost adapter; None without one, and for one that came from no file."""
        return self.adapters[-1] if self.adapters else None

    @property
    def pointer(self) -> str:
        """The registry's pointer name for adapters of this base."""
        return f"{Path(self.name).name}@{self.hash[:12]}"

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.model.layers)

    # --- text to tokens --------------------------------------------------------------------------------------------

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation up to and including the header of the assistant's next turn.

        Its replies come without their thoughts, and the next one is to come without any.
        """
        return self._templated(messages, add_generation_prompt=True)

    def prompt_tokens(
        self, prompt: str, *, system: str | None = None, history: Sequence[dict[str, str]] = ()
    ) -> list[int]:
        """A user message after its history, ready to be answered. Training and generation both come through here."""
        if history:
            return self.chat_tokens(conversation(prompt, system=system, history=history))
        key = (prompt, system, self.tokenizer.chat_template)
        if key not in self._openings:  # templates are slow, and a run asks for the same prompts many times
            if len(self._openings) >= OPENINGS:
                self._openings.clear()
            self._openings[key] = self.chat_tokens(conversation(prompt, system=system))
        return list(self._openings[key])

    def response_tokens(self, response: str) -> list[int]:
        """What is said in a reply, without its thoughts, and the token that ends a turn.

        Encoded apart from the prompt: so it is when the model speaks, and so both sides of a pair share the very same
        prompt tokens.
        """
        return [*self.tokenizer.encode(self.spoken(response), add_special_tokens=False), self.end_of_turn]

    def question_tokens(self, question: str) -> list[int]:
        """What follows `response_tokens` where the person asks on, up to the header of the assistant's next turn."""
        said = [{"role": role, "content": "hello"} for role in ("user", "assistant")]
        asked = [*said, {"role": "user", "content": question}]
        before, _, after = self._templated(asked, add_generation_prompt=True, tokenize=False).rpartition(question)
        text = before.rpartition("hello")[2] + question + after
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        end = self.end_of_turn
        return tokens[tokens.index(end) + 1 :] if end in tokens else tokens

    @functools.cached_property
    def end_of_turn(self) -> int:
        """The token that the chat template puts after a reply.

        Several tokens may end an answer, and the tokenizer's `eos_token` may be the one that ends a document.
        """
        said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
        text = self._templated(said, add_generation_prompt=False, tokenize=False)
        after = self.tokenizer.encode(text.rpartition("hello")[2], add_special_tokens=False)
        ends = [token for token in after if token in self.tokenizer.eos_token_ids]
        return ends[0] if ends else self.tokenizer.eos_token_id

    def spoken(self, reply: str) -> str:
        """A reply without its thoughts, which may be all of it; one without any comes back as it is.

        The chat template is told that nothing is thought, so a thought would follow a prompt after which none ever
        comes. A thought that the prompt had opened lacks its first tag, one that was cut short its last.
        """
        start, end = (
            tag or usual
            for tag, usual in zip((self.tokenizer.think_start, self.tokenizer.think_end), THOUGHT, strict=True)
        )
        before, closed, rest = reply.partition(end)
        if not closed:
            return "" if reply.lstrip().startswith(start) else reply
        thought = rf"{re.escape(start)}.*?({re.escape(end)}|\Z)\s*"
        return re.sub(thought, "", reply if start in before else rest, flags=re.DOTALL).strip()

    def is_reply_after_prompt(self, messages: Sequence[dict[str, str]], reply: str) -> bool:
        """Whether the chat template writes an answered conversation as what `chat_tokens` reads and then the reply.

        If not, a reply learnt after that prompt is not one that the model was made to give there: some templates open a
        thought and cannot be told to leave it. Compared as texts, since replies are encoded apart from prompts, and
        white space around a reply is the template's own affair.
        """
        prompt = self._templated(messages, add_generation_prompt=True, tokenize=False)
        answered = [*messages, {"role": "assistant", "content": reply}]
        whole = self._templated(answered, add_generation_prompt=False, tokenize=False)
        return whole.startswith(prompt) and whole[len(prompt) :].lstrip().startswith(self.spoken(reply).strip())

    def _templated(self, messages: Sequence[dict[str, str]], **how: Any) -> Any:
        said = [
            {**message, "content": self.spoken(message["content"])} if message["role"] == "assistant" else message
            for message in messages
        ]
        return self.tokenizer.apply_chat_template(said, enable_thinking=False, **how)

    def answer_tokens(self, answer: sampling.Answer) -> list[int]:
        """An answer of its own as it was drawn, and the token that ended it where it came to an end."""
        return [*answer.tokens, *[self.end_of_turn] * answer.finished]

    # --- tokens to numbers -----------------------------------------------------------------------------------------

    def hidden_states(
        self, tokens: mx.array, layers: Sequence[int], embedded: mx.array | None = None
    ) -> list[mx.array]:
        """Outputs of blocks.

        Args:
            tokens: `[B, T]`, padded on the right (causal attention never looks there).
            layers: block numbers in 0..num_layers; 0 is what the first block reads.
            embedded: `[B, T, D]` in place of what the table holds for the tokens.

        Returns: one `[B, T, D]` float32 array a layer, unnormalised.
        """
        with self._watched(embedded) as (body, seen):
            body(tokens)
        return [seen[layer].astype(mx.float32) for layer in layers]

    def hidden_states_after(
        self, tokens: mx.array, lengths: mx.array, suffixes: mx.array, layers: Sequence[int]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Outputs of blocks for texts and for several suffixes of each; a text is read once.

        Args:
            tokens: int32 `[B, T]`, padded on the right; lengths: int32 `[B]`, tokens that are real.
            suffixes: int32 `[K, S]`, padded on the right; each goes on from every text.
            layers: as in `hidden_states`.

        Returns: one `[B, T, D]` and one `[B, K, S, D]` float32 array a layer. For models that `prefix.can_share`.
        """
        texts, kinds = len(tokens), len(suffixes)
        of = mx.repeat(mx.arange(texts), kinds)
        with self._watched() as (body, seen):
            prompts = prefix.Prompts(tokens, lengths, of)
            records = prefix.read_prompts(body, prompts, self.num_layers)
            first = [seen[layer].astype(mx.float32) for layer in layers]
            seen.clear()
            prefix.read_after(body, prompts, mx.tile(suffixes, (texts, 1)), self.num_layers, records)
            after = [seen[layer].astype(mx.float32) for layer in layers]
        return first, [state.reshape(texts, kinds, *state.shape[1:]) for state in after]

    @contextlib.contextmanager
    def _watched(self, embedded: mx.array | None = None) -> Iterator[tuple[nn.Module, list[mx.array]]]:
        """The model below its output layer, and a list in which its blocks leave what they make."""
        body = self.model.model
        own = {"layers": body.layers}
        seen: list[mx.array] = []
        body.layers = [_Recorder(block, seen) for block in body.layers]
        if embedded is not None:
            own["embed_tokens"] = self.table
            body.embed_tokens = _Given(embedded)
        try:
            yield body, seen
        finally:
            for name, value in own.items():
                setattr(body, name, value)

    @property
    def table(self) -> nn.Module:
        """Tokens `[...]` to their vectors `[..., D]`, before the model scales them. Raises: ModelError without one."""
        table = getattr(self.model.model, "embed_tokens", None)
        if table is None:
            raise ModelError(f"{self.name}: a {type(self.model).__module__} model keeps its token vectors elsewhere")
        return table

    def body_and_head(self) -> tuple[Callable, Callable] | None:
        """The model split before its output layer, or None where the two do not make the whole.

        Lets training compute logits on the few positions it needs. Checked numerically, since some families scale or
        cap their logits after the head.
        """
        body = getattr(self.model, "model", None)
        if body is None or not hasattr(body, "embed_tokens"):
            return None

        def head(hidden: mx.array) -> mx.array:  # looked up at each call: an adapter may sit on it by then
            return self.model.lm_head(hidden) if "lm_head" in self.model else body.embed_tokens.as_linear(hidden)

        probe = mx.array([self.prompt_tokens("hello")])
        try:
            same = mx.allclose(head(body(probe)), self.model(probe), rtol=1e-4, atol=1e-4).item()
        except (TypeError, ValueError, AttributeError):
            return None
        return (body, head) if same else None

    # --- answers ---------------------------------------------------------------------------------------------------

    def complete(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float, seed: int, system: str | None = None
    ) -> list[str]:
        """One answer a prompt; see `sampling.generate`."""
        return sampling.generate(
            self, prompts, max_tokens=max_tokens, temperature=temperature, seed=seed, system=system
        )

    def fingerprint(self) -> str:
        """Digest of the base weights as they are in memory, adapter left out: what training must not change."""
        with lora.without_adapter(self):
            weights = tree_flatten(self.model.parameters())
        digests = {}
        for name, value in weights:
            raw = value if value.dtype != mx.bfloat16 else value.view(mx.uint16)
            digests[name] = sha256_bytes(memoryview(raw).tobytes())
        return sha256_json(digests)


def conversation(
    prompt: str, *, system: str | None = None, history: Sequence[dict[str, str]] = ()
) -> list[dict[str, str]]:
    """A user message after its history as messages of a chat."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *history, {"role": "user", "content": prompt}]


class _Given(nn.Module):
    """Stands where a model looks its tokens up, and gives vectors that are there already."""

    def __init__(self, vectors: mx.array):
        super().__init__()
        self.vectors = vectors

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.vectors


class _Recorder:
    """Passes everything through to one block and keeps what comes out (of the first also what goes in)."""

    def __init__(self, block: nn.Module, seen: list[mx.array]):
        self.block, self.seen = block, seen

    def __call__(self, x, *args, **kwargs):
        if not self.seen:
            self.seen.append(x)
        out = self.block(x, *args, **kwargs)
        self.seen.append(out[0] if isinstance(out, tuple) else out)
        return out

    def __getattr__(self, name):  # some families ask their blocks for attributes
        return getattr(self.block, name)


def load(
    base: str = "starter",
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    home: str | Path | None = None,
) -> LanguageModel:
    """A model ready to answer and to learn.

    Args:
        base: `starter` (the bundled tiny student), a folder, a Hugging Face repository (downloaded on first use), or a
            model of one's own: `full/0001-3fa2c1d0`.
        adapter: a folder with `adapters.safetensors` and `adapter_config.json`, or None.
        revision: commit of the repository.
        home: where models of one's own are; else `$HOMINEM_HOME`, else `~/.hominem`.

    Raises: ModelError when the model cannot be found, downloaded or understood.
    """
    folder = find_model(base, revision=revision, home=home)
    try:
        model, tokenizer = mlx_lm.load(str(folder))
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise ModelError(f"{base}: mlx-lm cannot load this model: {error}") from error
    if tokenizer.chat_template is None and tokenizer._chat_template is None:
        raise ModelError(f"{base}: has no chat template; use an instruct or chat variant of the model")
    lm = LanguageModel(model, tokenizer, name=base, folder=folder, hash=model_hash(folder))
    lm.model.freeze()
    platform.quicken(model)
    if adapter is not None:
        lora.load_adapter(lm, Path(adapter))
    return lm


def reload(lm: LanguageModel) -> None:
    """Give a model whose weights were trained those of its folder back; they are read when they are next needed."""
    fresh, _ = mlx_lm_utils.load_model(lm.folder, lazy=True)
    lm.model.update(fresh.parameters())
    lm.model.freeze()


def save(lm: LanguageModel, folder: Path) -> None:
    """Write the model as it is in memory into `folder`, in the layout that `mlx_lm.load` reads.

    Raises: RuntimeError or OSError when the disk is full.
    """
    for path in sorted({path for pattern in BESIDE_WEIGHTS for path in lm.folder.glob(pattern)}):
        if not path.name.endswith(".safetensors.index.json") and path.name != METADATA:
            shutil.copyfile(path, folder / path.name)
    mlx_lm_utils.save_model(folder, lm.model)
    mlx_lm_utils.save_config(mlx_lm_utils.load_config(lm.folder), folder / "config.json")


def find_model(base: str, *, revision: str | None = None, home: str | Path | None = None) -> Path:
    """The folder of a model, downloading it when it is a repository that is not here yet."""
    if base == "starter":
        return STARTER
    if base.startswith("full/") and not Path(base).exists():
        found = Registry(home_folder(home)).find(base)
        if found.ref != base:  # its adapters are found by the base's name
            raise ModelError(f"{base}: write a base of your own in full: {found.ref}")
        return found.folder
    folder = Path(base).expanduser()
    if folder.exists():
        if not (folder / "config.json").exists() or not list(folder.glob("model*.safetensors")):
            raise ModelError(f"{base}: a model folder needs config.json and model*.safetensors")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise ModelError(f"{base}: no such folder, and not a repository name such as mlx-community/Qwen3-1.7B-4bit")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [*BESIDE_WEIGHTS, "*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(base, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{base}: could not be downloaded ({type(error).__name__}: {reason}). Check the name and the network, "
            f"or give the folder of a downloaded model; `student.base=starter` works offline"
        ) from error


def model_hash(folder: Path) -> str:
    """Identity of a model folder: configuration, tokenizer and weights."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model") and path.name != METADATA:
            blob = path.resolve().name  # the hub names large files by their sha256
            digests[path.name] = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else sha256_file(path)
    return sha256_json(digests)
