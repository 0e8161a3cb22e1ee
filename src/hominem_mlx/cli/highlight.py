"""A judgement's reasons, shown: words coloured in the terminal, and as a page."""

import html
import sys
from collections.abc import Sequence
from typing import Any

from hominem_mlx.cli.console import Console

RAISES, LOWERS = (0, 120, 150), (200, 90, 0)  # blue-green and orange: told apart by people who do not see red or green
TOLD = 5  # words listed on each side
LOOKS, _LOOKED = "looked at (display only, not a cause)", "120,120,120"  # neither raises nor lowers, so no colour
STYLE = (
    "body{font:16px/1.7 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h2{font-size:1rem;margin:2rem 0 .3rem}.reply{white-space:pre-wrap}.reply span{border-radius:.2em}"
    "td,th{text-align:left;padding:.1rem .8rem .1rem 0;font-weight:normal}th{color:#666}"
    ".note{color:#666;font-size:.85rem}"
)


def show(console: Console, found: dict[str, Any]) -> None:
    """The reply coloured for each output, and the words that moved it most."""
    for one in found["outputs"]:
        words = one["words"]
        console.say()
        console.say(_headline(one))
        _colour(console, words)
        ranked = sorted(words, key=lambda word: -word[1])
        raised = [(word.strip(), value) for word, value in ranked[:TOLD] if value > 0]
        lowered = [(word.strip(), value) for word, value in ranked[::-1][:TOLD] if value < 0]
        for name, side in (("raise it", raised), ("lower it", lowered)):
            told = ", ".join(f"{word or '(end)'} {value:+.3f}" for word, value in side)
            console.say(f"{name}: {told or 'nothing'}")
        if "attention" in one:
            most = sorted(one["attention"]["words"], key=lambda word: -word[1])[:TOLD]
            told = ", ".join(f"{word.strip() or '(end)'} {share:.0%}" for word, share in most)
            console.say(f"{LOOKS}: {told}")
    if found["left_out"]:
        names = list(found["left_out"][0]["lost"])
        console.say()
        rows = [[unit["text"], *(unit["lost"][name] for name in names)] for unit in found["left_out"]]
        console.table(["left out", *(f"{name} lost" for name in names)], rows)


def page(found: dict[str, Any]) -> str:
    """The same as one HTML page that needs nothing else."""
    parts = [f"<p><b>{html.escape(found['prompt'])}</b></p>"]
    for one in found["outputs"]:
        words = one["words"]
        most = _most(words)
        spans = "".join(
            f'<span title="{value:+.4f}" style="background:rgba({_rgb(value)},{abs(value) / most:.2f})">'
            f"{html.escape(word)}</span>"
            for word, value in words
        )
        parts.append(f'<h2>{html.escape(_headline(one))}</h2><p class="reply">{spans}</p>')
        if "attention" in one:
            looks = one["attention"]["words"]
            spans = "".join(
                f'<span title="{share:.1%}" style="background:rgba({_LOOKED},{share / _most(looks):.2f})">'
                f"{html.escape(word)}</span>"
                for word, share in looks
            )
            parts.append(f'<p class="note">{LOOKS}:</p><p class="reply">{spans}</p>')
    if found["left_out"]:
        names = list(found["left_out"][0]["lost"])
        head = "".join(f"<th>{html.escape(name)} lost" for name in names)
        rows = "".join(
            f"<tr><td>{html.escape(unit['text'])}" + "".join(f"<td>{unit['lost'][name]:+.3f}" for name in names)
            for unit in found["left_out"]
        )
        parts.append(f"<h2>What is lost without it</h2><table><tr><th>left out{head}{rows}</table>")
    note = "Blue words raise the value, orange ones lower it; point at a word for its number."
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Why this score</title><style>{STYLE}</style>'
        f'{"".join(parts)}<p class="note">{note}</p></html>\n'
    )


def _headline(one: dict[str, Any]) -> str:
    doubt = "" if one["is_complete"] else "; does not add up to the difference, so read it with doubt"
    return f"{one['output']} {one['value']:+.3f}, without these words {one['baseline']:+.3f}{doubt}"


def _colour(console: Console, words: Sequence[tuple[str, float]]) -> None:
    """On a terminal as colours; elsewhere each telling word with its number."""
    most, stream = _most(words), sys.stderr if console.to_stderr else sys.stdout
    if not stream.isatty():
        console.say("".join(f"{word}[{value:+.2f}]" if abs(value) >= most / 4 else word for word, value in words))
        return
    from rich.console import Console as Rich
    from rich.text import Text

    text = Text()
    for word, value in words:
        share = abs(value) / most
        text.append(
            word, style=f"on rgb({_rgb(value)})" if share > 0.5 else f"rgb({_rgb(value)})" if share > 0.2 else ""
        )
    Rich(file=stream).print(text)


def _most(words: Sequence[tuple[str, float]]) -> float:
    return max((abs(value) for _, value in words), default=0.0) or 1.0


def _rgb(value: float) -> str:
    return ",".join(map(str, RAISES if value > 0 else LOWERS))
