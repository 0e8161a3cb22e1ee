"""Rows as people and neighbouring tools write them, read as our records. One row at a time, by its keys.

Known: our own rows; {prompt, completion} and {messages} of mlx-lm; {prompt, chosen, rejected} of TRL and mlx-lm-lora,
as strings or as single messages.
"""

from typing import Any

from hominem_mlx.data import home as homes
from hominem_mlx.records import Fixture, Label, Preference, Prompt, RecallQuestion, Record, SftPair, Trajectory

KINDS: dict[str, type[Record]] = {
    "prompts": Prompt,
    "trajectories": Trajectory,
    "labels": Label,
    "preferences": Preference,
    "memory": SftPair,
    "recall": RecallQuestion,
    "fixtures": Fixture,
}
FIXTURE_KEYS = {"must_contain", "must_not_contain", "better", "worse"}


def kind_of(row: dict[str, Any]) -> str | None:
    """What a row is, or None where its keys do not say."""
    keys = set(row)
    if "reward" in keys:
        return "labels"
    if {"chosen", "rejected"} & keys:
        return "preferences"
    if "messages" in keys or {"prompt", "completion"} <= keys or {"instruction", "response"} <= keys:
        return "memory"
    if "fact_id" in keys and "question" in keys:
        return "recall"
    if "prompt" in keys and FIXTURE_KEYS & keys:
        return "fixtures"
    if {"prompt", "response", "candidate_index"} <= keys or {"prompt", "response", "persona"} <= keys:
        return "trajectories"
    if "prompt" in keys and "response" not in keys:
        return "prompts"
    return None


def to_record(row: dict[str, Any], kind: str, *, labeller: str | None = None) -> Record:
    """One row as a record with an id.

    Args:
        row: the JSON object. Keys whose value is null count as not there.
        kind: one of `KINDS`.
        labeller: who rated the rows that do not say it.

    Raises: ValueError or pydantic's ValidationError saying what is wrong.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if kind == "memory":
        row = _memory(row)
    elif kind == "preferences":
        row = _preference(row)
    elif kind in ("labels", "trajectories") and isinstance(row.get("prompt"), str):
        row.setdefault("prompt_id", homes.prompt_id(row["prompt"]))
        row.setdefault("id", _derived(kind, row))
    elif kind in ("prompts", "fixtures") and isinstance(row.get("prompt"), str):
        row.setdefault("id", homes.prompt_id(row["prompt"]))
    elif kind == "recall" and isinstance(row.get("question"), str):
        row.setdefault("id", f"q-{homes.prompt_id(row['question'])}")
    if kind == "labels" and labeller:
        row.setdefault("labeller", labeller)
    return homes.identified(KINDS[kind].model_validate(row))


def _derived(kind: str, row: dict[str, Any]) -> str:
    return f"{kind[:-1]}-{homes.prompt_id(row['prompt'] + chr(31) + str(row.get('response')))}"


def _memory(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        instruction, response = _exchange(row["messages"])
        return {**row, "instruction": instruction, "response": response}
    if "completion" in row and "instruction" not in row:
        return {**row, "instruction": row.get("prompt"), "response": row["completion"]}
    return row


def _exchange(messages: object) -> tuple[str, str]:
    """The two sides of a conversation of one exchange."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of {role, content}")
    turns = [message for message in messages if message.get("role") != "system"]
    if [message.get("role") for message in turns] != ["user", "assistant"]:
        roles = ", ".join(str(message.get("role")) for message in messages) or "none"
        raise ValueError(
            f"messages holds the roles {roles}; memory pairs are one user message and one assistant message: split "
            "longer conversations into such pairs"
        )
    return turns[0].get("content"), turns[1].get("content")


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    """Strings for prompt, chosen and rejected; a prompt may stand inside the message lists of both sides."""
    sides: dict[str, Any] = {name: row[name] for name in ("chosen", "rejected") if name in row}
    prompts = {}
    for name, value in sides.items():
        if isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") != "system"]
            if "prompt" in row and [turn.get("role") for turn in turns] == ["assistant"]:
                sides[name] = turns[0].get("content")
            else:
                prompts[name], sides[name] = _exchange(value)
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict) and turn.get("role") != "system"]
        if [turn.get("role") for turn in turns] != ["user"]:
            raise ValueError("prompt must be a text or one user message; longer conversations are not learnt from yet")
        prompt = turns[0].get("content")
    if prompt is None and prompts:
        if len(set(map(str, prompts.values()))) > 1:
            raise ValueError("chosen and rejected answer different messages; a pair needs one prompt")
        prompt = next(iter(prompts.values()))
    if sides.get("chosen") is not None and sides.get("chosen") == sides.get("rejected"):
        raise ValueError("chosen and rejected are the same text; there is nothing to prefer")
    return {**row, **sides, "prompt": prompt} if prompt is not None else {**row, **sides}
