"""Episodes to learn from: what a user says, turn by turn, and what the policy answers. Most have one turn.

In a conversation the user's turns are those somebody really said; the assistant's are made anew, each after what the
policy itself has said before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hominem_mlx.errors import InputError
from hominem_mlx.files import read_jsonl, sha256_json
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.models.sampling import answers
from hominem_mlx.records import Label, SftPair
from hominem_mlx.storage.registry import Artifact
from hominem_mlx.training.rows import Row

Talk = tuple[str, ...]  # the user's turns
PROBED = 5  # one conversation in so many is not learnt from but looked at


@dataclass(frozen=True)
class Played:
    """`n` episodes of `T` turns.

    pairs: what a judge reads of each: all that the user said, all that was answered, turns apart by an empty line.
    rows: `T` of each, one an answer. tokens: of all its answers, without those that end them. finished: bool `[n]`,
    whether all of them came to an end.
    """

    pairs: list[tuple[str, str]]
    rows: list[list[Row]]
    tokens: list[list[int]]
    finished: np.ndarray

    @property
    def every_row(self) -> list[Row]:
        """All answers, episode by episode."""
        return [row for rows in self.rows for row in rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of all answers of each episode, what ends them included, float `[n]`."""
        return np.array([sum(len(row.response) for row in rows) for rows in self.rows], float)


def play(
    lm: LanguageModel, talks: Sequence[Talk], *, each: int, max_tokens: int, seed: int, system: str | None
) -> Played:
    """`each` episodes a talk, neighbours, drawn from the model as it is, with whatever adapter is attached.

    Args:
        talks: all of as many turns.
        max_tokens: longest answer.
        seed: of all answers.
        system: system prompt.
    """
    asked = [talk for talk in talks for _ in range(each)]
    histories: list[list[dict[str, str]]] = [[] for _ in asked]
    rows: list[list[Row]] = [[] for _ in asked]
    tokens: list[list[int]] = [[] for _ in asked]
    finished = np.ones(len(asked), bool)
    for turn in range(len(talks[0])):
        first = not turn  # what was said first is read once for all its answers
        said = answers(
            lm,
            [talk[turn] for talk in (talks if first else asked)],
            max_tokens=max_tokens,
            temperature=1.0,  # any other would draw from something that is not the policy
            seed=seed if first else int(np.random.SeedSequence([seed, turn]).generate_state(1)[0]),
            each=each if first else 1,
            system=system,
            histories=None if first else histories,
        )
        for place, (talk, answer) in enumerate(zip(asked, said, strict=True)):
            prompt = lm.prompt_tokens(talk[turn], system=system, history=histories[place])
            rows[place].append(Row(prompt, lm.answer_tokens(answer)))
            tokens[place] += answer.tokens
            finished[place] &= answer.finished
            histories[place] += [
                {"role": "user", "content": talk[turn]},
                {"role": "assistant", "content": answer.text},
            ]
    pairs = [
        ("\n\n".join(talk), "\n\n".join(message["content"] for message in history[1::2]))
        for talk, history in zip(asked, histories)
    ]
    return Played(pairs, rows, tokens, finished)


def to_play(labels: Artifact, turns: int) -> tuple[list[Talk], list[Talk]]:
    """What is answered to learn, and what is answered to look; the same where there is too little for both.

    Args:
        labels: the "labels" dataset. With one turn these are the prompts of its training and its validation part; with
            more the conversations among its memories that are so long, cut after `turns`.
        turns: of the user, >= 1.

    Raises: InputError where there is nothing to answer.
    """
    if turns > 1:
        return _conversations(labels, turns)
    parts = [
        sorted({label.prompt for label in read_jsonl(labels.file(f"labels.{part}.jsonl"), Label, may_be_empty=True)})
        for part in ("train", "valid")
    ]
    if not parts[0]:
        raise InputError(
            f"{labels.ref} has no training prompt to answer; label some replies, then `hominem data split`"
        )
    learnt, looked_at = ([Talk([prompt]) for prompt in part] for part in parts)
    return learnt, looked_at or learnt


def _conversations(labels: Artifact, turns: int) -> tuple[list[Talk], list[Talk]]:
    memories = read_jsonl(labels.file("memory.jsonl"), SftPair, unique=None, may_be_empty=True)
    said = [
        (*(turn.content for turn in (memory.history or [])[::2]), memory.instruction) for memory in memories
    ]  # every reply of a conversation is a memory: its beginning is there more than once
    talks = sorted({talk[:turns] for talk in said if len(talk) >= turns})
    if not talks:
        longest = max(map(len, said), default=0)
        raise InputError(
            f"rl.turns = {turns}: {labels.ref} has {len(memories)} memories, and the longest conversation among them "
            f"has {longest} turns; bring in longer ones (`hominem data import`, then `hominem data split`), or lower "
            "rl.turns"
        )
    probes = [talk for talk in talks if not int(sha256_json(talk)[:8], 16) % PROBED]
    rest = sorted(set(talks) - set(probes))
    return (rest, probes) if probes and rest else (talks, talks)
