"""What one model does with the held-out material: log-probabilities, greedy answers, sampled answers, drift.

Everything is asked in batches, once of the base and once of the adapter; judging the answers is `measures.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from hominem_mlx.config import Config
from hominem_mlx.errors import InputError
from hominem_mlx.files import read_jsonl
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.sampling import Answer, answers
from hominem_mlx.records import Fixture, Label, RecallQuestion
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.rows import Row, collate, fit

Progress = Callable[[dict[str, Any]], None]
NUMBERS_AT_ONCE = 1 << 24  # logits held at once when whole distributions are compared: 64 MiB in float32


@dataclass(frozen=True)
class Suite:
    """Held-out material; any part may be empty, and is then not measured."""

    labels: list[Label]
    recall: list[RecallQuestion]
    fixtures: list[Fixture]

    @classmethod
    def read(cls, folder: Path) -> "Suite":
        """From `labels.jsonl`, `recall.jsonl` and `fixtures.jsonl`, as far as they are there."""

        def rows(name, model):
            return read_jsonl(folder / name, model, may_be_empty=True) if (folder / name).exists() else []

        suite = cls(rows("labels.jsonl", Label), rows("recall.jsonl", RecallQuestion), rows("fixtures.jsonl", Fixture))
        if not (suite.labels or suite.recall or suite.fixtures):
            raise InputError(f"{folder}: a suite needs rows in labels.jsonl, recall.jsonl or fixtures.jsonl")
        return suite

    @property
    def prompts(self) -> dict[str, str]:
        """Held-out prompts by id, in the order of the labels."""
        return {label.prompt_id: label.prompt for label in self.labels}

    @property
    def ordered(self) -> list[Fixture]:
        """Fixtures that say which of two replies is the better one."""
        return [fixture for fixture in self.fixtures if fixture.better and fixture.worse]


@dataclass(frozen=True)
class Observed:
    """One model's behaviour: log-probabilities of given replies, and its own answers.

    labels: log p of each label's reply, `[N]`; better, worse: the same for the fixtures of `Suite.ordered`, `[F]`;
    recall, fixtures: a greedy answer each; samples: `config.evaluation.samples` answers a prompt, prompt by prompt.
    """

    labels: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    recall: list[Answer]
    fixtures: list[Answer]
    samples: list[Answer]


@dataclass(frozen=True)
class Replies:
    """The suite's given replies as token rows, and how many tokens each reply has."""

    rows: list[Row]
    cuts: tuple[int, int]  # where the fixtures' better and worse replies begin

    @classmethod
    def of(cls, lm: LanguageModel, suite: Suite, config: Config) -> "Replies":
        """Tokenise labels, then better, then worse replies."""
        texts = [(label.prompt, label.response) for label in suite.labels]
        texts += [(fixture.prompt, fixture.better or "") for fixture in suite.ordered]
        texts += [(fixture.prompt, fixture.worse or "") for fixture in suite.ordered]
        rows = [
            Row(lm.prompt_tokens(prompt, system=config.student.system), lm.response_tokens(reply))
            for prompt, reply in texts
        ]
        first = len(suite.labels)
        return cls([fit(row, config.dual.max_tokens)[0] for row in rows], (first, first + len(suite.ordered)))

    def split(self, values: Sequence[float]) -> list[np.ndarray]:
        """One value a row as `[labels, better, worse]`."""
        return np.split(np.asarray(values, float), self.cuts)

    @property
    def lengths(self) -> list[np.ndarray]:
        """Reply tokens as `[labels, better, worse]`."""
        return self.split([len(row.response) for row in self.rows])


def observe(
    lm: LanguageModel, suite: Suite, replies: Replies, config: Config, *, who: str, progress: Progress | None
) -> Observed:
    """Ask the model as it is now. `who` is its name in progress reports."""
    settings, system = config.evaluation, config.student.system

    def tell(what: str, total: int) -> Callable[[int], None] | None:
        return (lambda done: progress({"stage": f"{who}: {what}", "done": done, "total": total})) if progress else None

    def ask(what: str, prompts: list[str], max_tokens: int, temperature: float = 0.0) -> list[Answer]:
        return answers(
            lm,
            prompts,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=settings.seed,
            system=system,
            progress=tell(what, len(prompts)),
        )

    logp = reference_logprobs(LogProbs(lm), replies.rows, progress=tell("reading replies", len(replies.rows)))
    sampled = [prompt for prompt in suite.prompts.values() for _ in range(settings.samples)]
    labels, better, worse = replies.split(logp)
    return Observed(
        labels,
        better,
        worse,
        recall=ask("recalling facts", [row.question for row in suite.recall], settings.recall_tokens),
        fixtures=ask("prompts that matter", [row.prompt for row in suite.fixtures], settings.max_tokens),
        samples=ask("answering freely", sampled, settings.max_tokens, settings.temperature),
    )


def drift(
    lm: LanguageModel, prompts: Sequence[str], said: Sequence[Answer], config: Config, *, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray]:
    """How far the attached adapter has moved the model on what the base itself says.

    Args:
        lm: the model with its adapter.
        prompts: the prompt of each answer.
        said: the base's own sampled answers, fed to both (teacher forcing), the end of turn included.

    Returns: `KL(policy || base)` in nats, exact over the whole vocabulary, summed over each answer's tokens `[N]`, and
        the number of these tokens `[N]`.
    """
    rows = [
        Row(lm.prompt_tokens(prompt, system=config.student.system), lm.answer_tokens(answer))
        for prompt, answer in zip(prompts, said, strict=True)
    ]
    logprobs = LogProbs(lm)
    nats, done = np.zeros(len(rows)), 0
    for chunk in _chunks(rows, NUMBERS_AT_ONCE // _vocabulary(lm)):
        batch = logprobs.collate([rows[index] for index in chunk])
        policy = logprobs.logits(batch)
        mx.eval(policy)
        with lora.without_adapter(lm):
            base = logprobs.logits(batch)
            mx.eval(base)
        nats[chunk] = np.array(mx.zeros(len(chunk)).at[batch.owner].add(kl(policy, base)))
        done += len(chunk)
        if progress:
            progress({"stage": "drift from the base", "done": done, "total": len(rows)})
    return nats, np.array([len(row.response) for row in rows])


def kl(policy: mx.array, base: mx.array) -> mx.array:
    """KL(policy || base) of each row of logits `[N, V]`, float32 `[N]` in nats, >= 0 up to rounding."""
    policy = policy - mx.logsumexp(policy, axis=-1, keepdims=True)
    base = base - mx.logsumexp(base, axis=-1, keepdims=True)
    return mx.sum(mx.exp(policy) * (policy - base), axis=-1)


def _chunks(rows: Sequence[Row], tokens: int) -> Iterator[list[int]]:
    """Row numbers, short rows first, in groups of at most `tokens` reply tokens (but at least one row) and 32 rows."""
    chunk: list[int] = []
    count = 0
    for index in sorted(range(len(rows)), key=lambda index: rows[index].num_tokens):
        size = len(rows[index].response)
        if chunk and (count + size > tokens or len(chunk) == 32):
            yield chunk
            chunk, count = [], 0
        chunk.append(index)
        count += size
    if chunk:
        yield chunk


def _vocabulary(lm: LanguageModel) -> int:
    probe = LogProbs(lm).logits(collate([Row(lm.prompt_tokens("hello"), [lm.end_of_turn])]))
    return probe.shape[-1]
