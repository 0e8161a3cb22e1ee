"""Rows as people and neighbouring tools write them, read as our records. One row at a time, by its keys.

Known: our own rows; {prompt, completion} and {messages} of mlx-lm, a pair for each of its replies; {prompt, chosen,
rejected} of TRL and mlx-lm-lora, {input, chosen, rejected} of Axolotl and {prompt, completion, label} of TRL, as
strings or as single messages; {prompt, response, helpfulness, correctness, ...} of HelpSteer2.
"""

from typing import Any

from hominem_mlx.data import home as homes
from hominem_mlx.records import Fixture, Label, Preference, Prompt, RecallQuestion, Record, SftPair, Thumb, Trajectory
from hominem_mlx.schema import MANIFOLD, Manifold

KINDS: dict[str, type[Record]] = {
    "prompts": Prompt,
    "trajectories": Trajectory,
    "labels": Label,
    "preferences": Preference,
    "thumbs": Thumb,
    "memory": SftPair,
    "recall": RecallQuestion,
    "fixtures": Fixture,
}
FIXTURE_KEYS = {"must_contain", "must_not_contain", "better", "worse"}
ONE_EXCHANGE = (
    "preferences and thumbs are judged and learnt as one user message and replies to it: keep the last user message "
    "alone, if it can be understood so, or leave the row out"
)


HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HELPSTEER_TURN = "<extra_id_1>"  # what parts the turns of a conversation there


class LeftOut(Exception):
    """A row that is right as it is and cannot be used here; the message says why, in the plural."""


def kind_of(row: dict[str, Any]) -> str | None:
    """What a row is, or None where its keys do not say."""
    keys = {name for name, value in row.items() if value is not None}
    if "reward" in keys or {"prompt", "response", *HELPSTEER[:2]} <= keys:
        return "labels"
    if {"chosen", "rejected"} & keys:
        return "preferences"
    if {"prompt", "response", "good"} <= keys or ({"prompt", "completion"} <= keys and _is_verdict(row.get("label"))):
        return "thumbs"
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


def to_records(
    row: dict[str, Any], kind: str, *, labeller: str | None = None, manifold: Manifold = MANIFOLD
) -> list[Record]:
    """One row as records with ids: one, or of a conversation one for each reply.

    Args:
        row: the JSON object. Keys whose value is null count as not there.
        kind: one of `KINDS`.
        labeller: who rated the rows that do not say it.
        manifold: the dimensions that a label may have.

    Raises: ValueError or pydantic's ValidationError saying what is wrong, LeftOut where nothing is.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if kind == "labels" and "reward" not in row and "helpfulness" in row:
        row = _helpsteer(row)
    if kind == "memory":
        return [homes.identified(SftPair.model_validate(pair)) for pair in _memories(row)]
    if kind == "preferences":
        row = _preference(row)
    elif kind == "thumbs":
        row = _thumb(row)
    elif kind in ("labels", "trajectories") and isinstance(row.get("prompt"), str):
        row.setdefault("prompt_id", homes.prompt_id(row["prompt"]))
        row.setdefault("id", _derived(kind, row))
    elif kind in ("prompts", "fixtures") and isinstance(row.get("prompt"), str):
        row.setdefault("id", homes.prompt_id(row["prompt"]))
    elif kind == "recall" and isinstance(row.get("question"), str):
        row.setdefault("id", f"q-{homes.prompt_id(row['question'])}")
    if kind == "labels" and labeller:
        row.setdefault("labeller", labeller)
    return [homes.identified(KINDS[kind].model_validate(row, context={"manifold": manifold}))]


def _derived(kind: str, row: dict[str, Any]) -> str:
    return f"{kind[:-1]}-{homes.prompt_id(row['prompt'] + chr(31) + str(row.get('response')))}"


def _helpsteer(row: dict[str, Any]) -> dict[str, Any]:
    """A label from attributes of 0 to 4: those that mean what numbers of ours mean; the others stay in the metadata."""
    given = {name: row[name] for name in HELPSTEER if name in row}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 4:
            raise ValueError(f"{name} = {value!r}: HelpSteer2's attributes are numbers from 0 to 4")
    if HELPSTEER_TURN in str(row.get("prompt")):
        raise LeftOut("rows whose prompt is a conversation: labels are about one message and the reply to it")
    reward = {"scalar": given["helpfulness"] / 2 - 1}
    if "correctness" in given:
        reward["epistemic_integrity"] = given["correctness"] / 2 - 1
    named = {"labeller": "helpsteer2", "metadata": {"helpsteer2": given}}
    return {**named, **{name: value for name, value in row.items() if name not in HELPSTEER}, "reward": reward}


def _memories(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of a row. Every reply of a conversation is one, with all that was said before it as its history."""
    label = row.get("label")
    if label in DISLIKED or (isinstance(label, int | float) and label < 0):
        raise ValueError(
            f"label = {label!r}: a reply that was not liked is nothing to remember; import "
            '{"prompt", "completion", "label"} with label true or false as thumbs, or leave the row out'
        )
    if "messages" in row:
        turns = _turns(row["messages"], "messages")
        if not turns or [turn.get("role") for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(
                f"messages holds the roles {_roles(turns)}; a conversation begins with user, goes on in turns and ends "
                "with assistant: join messages of one speaker, leave out other roles and what was not answered"
            )
        pairs = []
        for end in range(1, len(turns), 2):
            pair = {**row, "instruction": turns[end - 1].get("content"), "response": turns[end].get("content")}
            if end > 1:
                pair["history"] = turns[: end - 1]
            if "id" in row and len(turns) > 2:
                pair["id"] = f"{row['id']}-{(end + 1) // 2}"
            pairs.append(pair)
        return pairs
    if "completion" in row and "instruction" not in row:
        return [{**row, "instruction": row.get("prompt"), "response": row["completion"]}]
    return [row]


DISLIKED = (False, "false", "False", "FALSE", "0", "-1", "no", "bad")  # as other tools write it; 0 is False, too


def _is_verdict(label: object) -> bool:
    """Whether a `label` says liked or not (some write 1 and 0), and is not the name of some class."""
    return isinstance(label, bool | int | float) and label in (0, 1)


def _thumb(row: dict[str, Any]) -> dict[str, Any]:
    """Response and good in place of TRL's completion and label, and strings in place of single messages."""
    row = dict(row)
    for name, theirs in (("response", "completion"), ("good", "label")):
        if theirs in row:
            row.setdefault(name, row[theirs])
    if _is_verdict(row.get("good")):
        row["good"] = bool(row["good"])
    for name, role in (("prompt", "user"), ("response", "assistant")):
        if isinstance(row.get(name), list):
            turns = _turns(row[name], name)
            if [turn.get("role") for turn in turns] != [role]:
                raise ValueError(f"{name} holds the roles {_roles(turns)}; {ONE_EXCHANGE}")
            row[name] = turns[0].get("content")
    return row


def _turns(messages: object, name: str) -> list[dict[str, Any]]:
    """The messages but the system's, which is that of the settings here."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{name} must be a list of {{role, content}}")
    return [message for message in messages if message.get("role") != "system"]


def _roles(turns: list[dict[str, Any]]) -> str:
    return ", ".join(str(turn.get("role")) for turn in turns) or "none"


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    """Strings for prompt, chosen and rejected; a prompt may stand inside the message lists of both sides."""
    sides: dict[str, Any] = {name: row[name] for name in ("chosen", "rejected") if name in row}
    prompts = {}
    for name, value in sides.items():
        if isinstance(value, list):
            turns = _turns(value, name)
            said = [turn.get("content") for turn in turns]
            roles = [turn.get("role") for turn in turns]
            if roles == ["user", "assistant"]:
                prompts[name], sides[name] = said
            elif roles == ["assistant"] and "prompt" in row:
                sides[name] = said[0]
            else:
                raise ValueError(f"{name} holds the roles {_roles(turns)}; {ONE_EXCHANGE}")
    prompt = row.get("prompt", row.get("input"))
    if isinstance(prompt, list):
        turns = _turns(prompt, "prompt")
        if [turn.get("role") for turn in turns] != ["user"]:
            raise ValueError(f"prompt holds the roles {_roles(turns)}; {ONE_EXCHANGE}")
        prompt = turns[0].get("content")
    if prompt is None and prompts:
        if len(set(map(str, prompts.values()))) > 1:
            raise ValueError("chosen and rejected answer different messages; a pair needs one prompt")
        prompt = next(iter(prompts.values()))
    if sides.get("chosen") is not None and sides.get("chosen") == sides.get("rejected"):
        raise ValueError("chosen and rejected are the same text; there is nothing to prefer")
    return {**row, **sides, "prompt": prompt} if prompt is not None else {**row, **sides}
