"""A short look at an adapter in training: what it recalls of what it is taught, and how judges see its answers.

Everything comes from material that may be learnt from or chosen by; the suite stays unseen until the end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from hominem_mlx.config import Config
from hominem_mlx.evaluation.text import is_recalled
from hominem_mlx.records import SftPair
from hominem_mlx.schema import Generator, Scorer

Item = TypeVar("Item")


def looker(
    prompts: Iterable[str], taught: Sequence[SftPair], judges: Mapping[str, Scorer], config: Config
) -> Callable[[Generator], dict[str, float]]:
    """A function that measures a model as it is, by greedy answers.

    Args:
        prompts: of the validation part; `dual.probes` different ones, from all over, are answered.
        taught: memories that are learnt. Facts are those with a `metadata.key` and no history; as many of them are
            asked for, each once, in words in which it is taught. (The report asks in other words, so it finds less.)
        judges: who scores the answers, by the name that goes before what they say.
        config: `dual.probes`; `evaluation.max_tokens`, `.recall_tokens`, `.seed`; `student.system`.

    Returns: a function that gives `recall`, the share of these facts whose key is in the answer, and no other fact's;
        of each judge `NAME`, its mean overall score, and `NAME_DIMENSION` the means by dimension, in [-1, 1]. What
        there is nothing to measure by is missing.
    """
    settings, system = config.evaluation, config.student.system
    asked = _spread(list(dict.fromkeys(prompts)), config.dual.probes) if judges else []
    facts = {_fact(memory): memory for memory in reversed(taught) if memory.metadata.get("key") and not memory.history}
    keys = {fact: str(memory.metadata["key"]) for fact, memory in facts.items()}
    questions = _spread(sorted(facts), config.dual.probes)

    def answered(lm: Generator, texts: list[str], max_tokens: int) -> list[str]:
        return lm.complete(texts, max_tokens=max_tokens, temperature=0.0, seed=settings.seed, system=system)

    def look(lm: Generator) -> dict[str, float]:
        found: dict[str, float] = {}
        if questions:
            said = answered(lm, [facts[fact].instruction for fact in questions], settings.recall_tokens)
            hits = [
                is_recalled(answer, keys[fact], [key for other, key in keys.items() if other != fact])
                for fact, answer in zip(questions, said, strict=True)
            ]
            found["recall"] = float(np.mean(hits))
        pairs = list(zip(asked, answered(lm, asked, settings.max_tokens), strict=True)) if asked else []
        for name, judge in judges.items() if pairs else ():
            verdicts = judge.score_many(pairs)
            found[name] = float(np.mean([verdict.scalar for verdict in verdicts]))
            for dimension in verdicts[0].reward_vector:
                found[f"{name}_{dimension}"] = float(
                    np.mean([verdict.reward_vector[dimension] for verdict in verdicts])
                )
        return found

    return look


def _fact(memory: SftPair) -> str:
    return str(memory.metadata.get("fact_id", memory.metadata["key"]))


def _spread(items: list[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly from all over."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]
