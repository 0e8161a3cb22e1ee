"""Files that are not one row a line: plain lists of prompts, JSON arrays, and chats exported from Open WebUI.

Of a chat only what a person has rated is taken: a thumb for each rated reply, or a pair where two replies to the same
message were rated differently. As everywhere, a thumb is about one message and one reply to it: a rated reply that came
later in its conversation is left out, and counted.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hominem_mlx.files import read_json, read_objects, read_text

RATINGS: dict[object, bool] = {1: True, -1: False, "1": True, "-1": False}
# A thought, as Open WebUI keeps it.
REASONING = re.compile(r"<details[^>]*type=\"reasoning\".*?</details>\s*", re.DOTALL)
LATER = "rated replies that came later in their conversation: only first messages can be understood by themselves"
UNREADABLE = "rated replies whose message or text is not there as plain text"


def read_rows(path: Path, left_out: Counter[str]) -> tuple[list[tuple[str, object]], list[str]]:
    """The rows of any file we take, each with its place, and what is wrong with it.

    Args:
        path: JSONL; a `.txt` file with a prompt a line, or JSONL when it begins with `{`; or JSON, an array of rows or
            of Open WebUI's chats or feedback.
        left_out: gets how many rated replies are not taken, by reason.
    """
    if path.suffix.lower() == ".txt" and not (text := read_text(path)).lstrip().startswith("{"):
        lines = enumerate(text.split("\n"), 1)
        return [(f"{path}:{number}", {"prompt": line.strip()}) for number, line in lines if line.strip()], []
    problems: list[str] = []
    if path.suffix.lower() == ".json":
        whole = read_json(path)
        items = whole if isinstance(whole, list) else [whole]
        values: list[tuple[str, object]] = [(f"{path}:item {number}", item) for number, item in enumerate(items, 1)]
    else:
        values, problems = read_objects(path)
    rows: list[tuple[str, object]] = []
    for where, value in values:
        chat = _open_webui(value)
        rows += [(where, value)] if chat is None else [(where, row) for row in _rated(*chat, left_out)]
    return rows, problems


Messages = dict[str, dict[str, Any]]
Verdict = dict[str, Any]  # rating, reason, comment


def _open_webui(value: object) -> tuple[Messages, dict[str, Verdict]] | None:
    """Messages and verdicts by message id of a chat or a feedback of Open WebUI; None for anything else."""
    if not isinstance(value, dict):
        return None
    snapshot, meta = value.get("snapshot"), value.get("meta")
    if isinstance(snapshot, dict) and isinstance(meta, dict) and isinstance(value.get("data"), dict):
        messages = _messages(snapshot.get("chat"))
        return None if messages is None else (messages, {str(meta.get("message_id")): value["data"]})
    messages = _messages(value)
    if messages is None:
        return None
    verdicts = {name: message.get("annotation") for name, message in messages.items()}
    return messages, {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, dict)}


def _messages(value: object) -> Messages | None:
    """The messages of a chat by id: its tree, or in old exports the list in which each answers the one before."""
    chat = value.get("chat", value) if isinstance(value, dict) else None
    if not isinstance(chat, dict):
        return None
    history = chat.get("history")
    if isinstance(history, dict) and isinstance(history.get("messages"), dict):
        found = history["messages"]
    elif isinstance(chat.get("messages"), list) and isinstance(value, dict) and "chat" in value:
        found, before = {}, None
        for number, message in enumerate(chat["messages"]):
            if isinstance(message, dict):
                name = str(message.get("id", number))
                found[name] = {"parentId": before, **message}
                before = name
    else:
        return None
    return {str(name): message for name, message in found.items() if isinstance(message, dict)}


def _rated(messages: Messages, verdicts: dict[str, Verdict], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows for what was rated: pairs of replies to one message, and single thumbs for the others."""
    thumbs: dict[str, list[dict[str, Any]]] = {}
    for name, verdict in verdicts.items():
        rating = verdict.get("rating")
        good = RATINGS.get(rating) if isinstance(rating, int | float | str) else None
        if good is None:
            continue
        reply = messages.get(name, {})
        asked = messages.get(str(reply.get("parentId")), {})
        if asked.get("role") != "user" or not _text(asked) or not _text(reply):
            left_out[UNREADABLE] += 1
        elif asked.get("parentId") is not None:
            left_out[LATER] += 1
        else:
            said = [str(verdict[key]) for key in ("reason", "comment") if verdict.get(key)]
            row = {"prompt": _text(asked), "response": _text(reply), "good": good, "reason": ": ".join(said)}
            thumbs.setdefault(str(reply["parentId"]), []).append(row)
    for rows in thumbs.values():
        liked, disliked = [row for row in rows if row["good"]], [row for row in rows if not row["good"]]
        yield from (rows if not liked or not disliked else ())
        for better, worse in itertools.product(liked, disliked):
            if better["response"] != worse["response"]:
                yield {"prompt": better["prompt"], "chosen": better["response"], "rejected": worse["response"]}


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return REASONING.sub("", content).strip() if isinstance(content, str) else ""
