"""Answers from a model: many at once, or one as it comes. Batching, caches and samplers are mlx-lm's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from hominem_mlx.models.seeding import seeded

if TYPE_CHECKING:
    from hominem_mlx.models.backbone import LanguageModel

BATCH = 32  # rows decoded together; more gains little and costs memory


@dataclass(frozen=True)
class Answer:
    """What the model said: its text, its tokens without the one that ends a turn, and whether it came to an end."""

    text: str
    tokens: list[int]
    finished: bool


def generate(
    lm: "LanguageModel",
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    system: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer to each prompt, in order.

    Args:
        lm: the model, with whatever adapter is attached.
        prompts: user messages; each is wrapped in the model's own chat template.
        max_tokens: longest answer.
        temperature: 0 is greedy; otherwise plain sampling from softmax(logits / temperature).
        seed: of the sampling; MLX's global random state is left as it was found.
        system: system prompt.
        progress: called with the number of answers that are done.
    """
    found = answers(
        lm, prompts, max_tokens=max_tokens, temperature=temperature, seed=seed, system=system, progress=progress
    )
    return [answer.text for answer in found]


def answers(
    lm: "LanguageModel",
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    each: int = 1,
    system: str | None = None,
    histories: Sequence[Sequence[dict[str, str]]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """`generate` for those who need to know how an answer ended, or want several, or go on with conversations.

    With `each` above 1 that many answers to a prompt come one after the other, and the prompt is read once for all.
    `histories` has what was said before each prompt.
    """
    before = histories or [()] * len(prompts)
    token_rows = [
        lm.prompt_tokens(prompt, system=system, history=history)
        for prompt, history in zip(prompts, before, strict=True)
    ]
    found: list[Answer] = []
    together = max(1, BATCH // each)
    with seeded(seed):
        for start in range(0, len(token_rows), together):
            rows = token_rows[start : start + together]
            sampler = make_sampler(temp=temperature)
            shared: dict = {}
            if each > 1:
                caches = [_read(lm, row[:-1]) for row in rows]
                shared = {"prompt_caches": [cache for cache in caches for _ in range(each)]}
                rows = [row[-1:] for row in rows for _ in range(each)]
            response = batch_generate(
                lm.model, lm.tokenizer, rows, max_tokens=max_tokens, sampler=sampler, return_token_ids=True, **shared
            )
            found += [
                Answer(text.strip(), tokens, finished=len(tokens) < max_tokens)
                for text, tokens in zip(response.texts, response.token_ids, strict=True)
            ]
            if progress:
                progress(len(found))
    return found


def _read(lm: "LanguageModel", tokens: Sequence[int]) -> list:
    """The model's caches after it has read these tokens; mlx-lm copies them for every answer that goes on from here."""
    caches = make_prompt_cache(lm.model)
    if tokens:
        lm.model(mx.array([tokens]), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def stream(
    lm: "LanguageModel", messages: Sequence[dict[str, str]], *, max_tokens: int = 512, temperature: float = 0.7
) -> Iterator[str]:
    """The answer to a conversation, piece by piece as it is decoded.

    Args:
        messages: `[{"role": "user", "content": ...}, ...]`, ending with the user's turn.
    """
    tokens = lm.chat_tokens(messages)
    for piece in stream_generate(
        lm.model, lm.tokenizer, tokens, max_tokens=max_tokens, sampler=make_sampler(temp=temperature)
    ):
        yield piece.text
