"""The report: `report.json` for programs, and `report.html`, one file that needs nothing else, for people."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hominem_mlx.evaluation import plots
from hominem_mlx.evaluation.goals import goals, say, say_goal, verdict
from hominem_mlx.evaluation.text import word_diff
from hominem_mlx.files import write_atomic, write_json
from hominem_mlx.storage.registry import Artifact, Registry

JSON, HTML = "report.json", "report.html"
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
SHOWN = 6  # answers shown side by side


def publish(registry: Registry, found: dict[str, Any], *, parents: Sequence[Artifact]) -> Artifact:
    """Keep an evaluation as a `report` artifact.

    Args:
        found: what `evaluate` returned; `figures` may have been added to.
        parents: the adapter, the judges, the suite.
    """
    with registry.draft("report", parents=parents) as draft:
        write(draft.folder, found)
        draft.metrics = {
            "accepted": found["verdict"]["accepted"],
            "figures": {name: entry["value"] for name, entry in found["figures"].items()},
        }
        draft.notes = {"seconds": found.get("seconds")}
    return draft.published


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write both files into `folder`. Measured seconds stay out, so that equal evaluations make equal bytes."""
    lasting = {name: entry for name, entry in found["figures"].items() if goals()[name]["unit"] != "seconds"}
    content = plain({**found, "figures": lasting, "verdict": verdict(lasting)})
    content.pop("seconds", None)
    write_json(folder / JSON, content)
    write_atomic(folder / HTML, page(content))


def plain(value: Any) -> Any:
    """The value in JSON's own types; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def page(found: dict[str, Any]) -> str:
    """The whole HTML page."""
    title = f"{found['adapter']} on {found['base']['name']}"
    parts = [
        _verdict(found),
        _tiles(found),
        _plots(found),
        _section("Figures", _figures(found["figures"])),
        _section("Side by side", _answers(found)),
        _section("What must not regress", _fixtures(found)),
        _section("Taught facts", _facts(found)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f'<header><p class="kicker">Report</p><h1>Is the adapter better than its base?</h1>'
        f"<p class=quiet>adapter <b>{_text(found['adapter'])}</b>, base <b>{_text(found['base']['name'])}</b> "
        f"({_text(found['base']['hash'])}), held-out material <b>{_text(found['suite'])}</b></p></header>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _verdict(found: dict[str, Any]) -> str:
    verdict = found["verdict"]
    if verdict["accepted"]:
        return '<p class="verdict good"><b>Accepted.</b> Every measured goal holds.</p>'
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in verdict["reasons"])
    return f'<div class="verdict bad"><b>Refused.</b> Goals that do not hold:<ul>{reasons}</ul></div>'


def _tiles(found: dict[str, Any]) -> str:
    tiles = []
    if pairs := found["preference"]:
        tiles.append((f"{pairs['accuracy_after']:.0%}", "of held-out pairs in the right order", "50% by chance"))
    if facts := found["memory"]:
        before = f"{facts['recalled_before']} before"
        tiles.append((f"{facts['recalled_after']}/{facts['total']}", "questions about taught facts answered", before))
    free = found["generation"]
    if free and "training" in free["judges"] and free["judges"]["training"]["difference_in_sd"][0] is not None:
        judge = free["judges"]["training"]
        note = f"{judge['before']:+.2f} to {judge['after']:+.2f}"
        tiles.append((f"{judge['difference_in_sd'][0]:+.2f} sd", "reward of free answers", note))
    if drift := found["drift"]:
        tiles.append((f"{drift['nats_per_token']:.2f}", "nats a token away from the base", "base drift, KL"))
    cells = "".join(f"<li><b>{_text(n)}</b> {_text(what)}<small>{_text(note)}</small></li>" for n, what, note in tiles)
    return f'<ul class="tiles">{cells}</ul>'


def _figures(figures: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, entry in figures.items():
        goal = goals()[name]
        mark = '<td class="mark good">✓ holds</td>' if entry["holds"] else '<td class="mark bad">✗ missed</td>'
        spread = entry["spread"]
        rows.append(
            f"<tr>{mark}<th scope=row>{_text(name)}</th><td class=number>{_text(say(entry['value']))}</td>"
            f"<td class=goal>{_text(say_goal(entry['goal']))}</td>"
            f"<td class=number>{f'{spread[0]:.3f} to {spread[1]:.3f}' if spread else ''}</td>"
            f"<td class=number>{entry['n']}</td>"
            f"<td class=what>{_text(goal['what'])} <span class=quiet>({_text(goal['unit'])})</span>"
            f"<br><small class=quiet>{_text(entry['how'])}</small></td></tr>"
        )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", "id", "value", "goal", "spread", "n", "what"))
    table = f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _plots(found: dict[str, Any]) -> str:
    figures = []
    if pairs := found["preference"]:
        judges = "".join(f", {name} judge {share:.2f}" for name, share in pairs["judges"].items())
        caption = (
            f"{pairs['accuracy_after']:.1%} of {pairs['n']} pairs lie right of zero. Beside it, on the same pairs: "
            f"log-probability a token {pairs['normalised_before']:.2f} before, {pairs['normalised_after']:.2f} after, "
            f"the longer reply {pairs['length_only']:.2f}{judges}."
        )
        figures.append(_plot("Preferences nobody showed it", plots.margins(pairs["margins"]), caption))
    if facts := found["memory"]:
        caption = f"{facts['total']} held-out questions about {facts['facts']} facts, one square each."
        figures.append(_plot("Taught facts that come back", plots.recall(facts["questions"]), caption))
    if free := found["generation"]:
        for name, judge in free["judges"].items():
            mean, low, high = judge["difference"]
            caption = (
                f"Free answers to {free['prompts']} held-out prompts: overall {judge['before']:+.3f} before, "
                f"{judge['after']:+.3f} after; change {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})."
            )
            figures.append(_plot(f"How the {name} judge sees it", plots.dimensions(judge, name), caption))
        if "training" in free["judges"]:
            before, after = zip(*(row["training"] for row in free["answers"]), strict=True)
            caption = f"Every one of {free['n']} answers by the training judge; dashed: mean."
            figures.append(_plot("Reward of free answers", plots.overlaid(before, after, "reward", "rewards"), caption))
        first, second = free["before"], free["after"]
        caption = (
            f"Mean {first['mean_words']:.1f} words before, {second['mean_words']:.1f} after; different word pairs "
            f"{first['distinct2']:.2f} and {second['distinct2']:.2f}; cut off at the limit "
            f"{first['unfinished']:.0%} and {second['unfinished']:.0%}."
        )
        figures.append(
            _plot(
                "Length of free answers",
                plots.overlaid(first["words"], second["words"], "words an answer", "lengths"),
                caption,
            )
        )
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _plot(title: str, svg: str, caption: str) -> str:
    return (
        f'<figure><h2>{_text(title)}</h2><div role="img" aria-label="{_text(f"{title}. {caption}")}">{svg}</div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _answers(found: dict[str, Any]) -> str:
    free = found["generation"]
    if not free:
        return ""
    firsts = free["answers"][:: free["samples"]]
    shown = firsts[:: max(1, len(firsts) // SHOWN)][:SHOWN]
    cards = []
    for row in shown:
        reward = ""
        if "training" in row:
            before, after = row["training"]
            reward = f"<p class=quiet>reward {before:+.2f} before, {after:+.2f} after</p>"
        cards.append(f"<article><h3>{_text(row['prompt'])}</h3>{_diff(row['before'], row['after'])}{reward}</article>")
    note = (
        "<p class=quiet>Evenly spaced through the held-out prompts, first sample each, not chosen. Where two answers "
        "are much alike, <del>gone</del> was the base's, <ins>new</ins> is the adapter's.</p>"
    )
    return f"{note}<div class=cards>{''.join(cards)}</div>"


def _diff(before: str, after: str, style: str = "pair") -> str:
    """Both answers; where they have much in common, words that only one of them has are marked in it."""
    pieces = word_diff(before, after)
    shared = sum(len(text.split()) for kind, text in pieces if kind == "same")
    alike = 3 * shared >= max(len(before.split()), len(after.split()))

    def side(kept: str, tag: str) -> str:
        if not alike:  # two different answers: marks would cover everything and show nothing
            return _text(before if kept == "gone" else after)
        return " ".join(
            f"<{tag}>{_text(text)}</{tag}>" if kind == kept else _text(text)
            for kind, text in pieces
            if kind in ("same", kept)
        )

    return (
        f'<dl class="{style}"><div><dt>before</dt><dd>{side("gone", "del")}</dd></div>'
        f"<div><dt>after</dt><dd>{side('new', 'ins')}</dd></div></dl>"
    )


def _fixtures(found: dict[str, Any]) -> str:
    kept = found["fixtures"]
    if not kept:
        return ""
    rows = []
    for row in sorted(kept["rows"], key=lambda row: not row["regressed"]):
        order = ["" if value is None else f"{value:+.2f}" for value in row["order"]]
        says = ["" if value is None else "keeps" if value else "breaks" for value in row["words"]]
        rows.append(
            f"<tr>{_fixture_mark(row)}"
            f"<td>{_text(row['prompt'])}<br><small class=quiet>{_text(row['why'])}"
            f"{_text(' Regressed: ' + '; '.join(row['regressed'])) if row['regressed'] else ''}</small>"
            f"{_diff(row['answers'][0], row['answers'][1], 'pair tight')}</td>"
            f"<td class=number>{order[0]}<br>{order[1]}</td><td>{says[0]}<br>{says[1]}</td></tr>"
        )
    names = ("", "prompt, why it matters, greedy answers", "better reply ahead by (nats a token)", "required words")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    summary = (
        f"{kept['n']} prompts: {kept['passed_before']} pass before, {kept['passed_after']} after, "
        f"{len(kept['words_regressed'])} lost their words, {len(kept['order_regressed'])} their order "
        "(two lines a cell: before, after)"
    )
    is_open = " open" if kept["words_regressed"] or kept["order_regressed"] else ""
    return (
        f"<details{is_open}><summary>{summary}</summary><div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _fixture_mark(row: dict[str, Any]) -> str:
    before, after = row["passed"]
    if row["regressed"]:
        return '<td class="mark bad">✗ worse</td>'
    if after:
        return f'<td class="mark good">✓ {"kept" if before else "gained"}</td>'
    return f'<td class="mark quiet">{"~ a toss-up" if before else "– not yet"}</td>'


def _facts(found: dict[str, Any]) -> str:
    facts = found["memory"]
    if not facts:
        return ""
    rows = "".join(
        f'<tr><td class="mark {"good" if row["after"] else "bad"}">{"✓" if row["after"] else "✗"}</td>'
        f"<td>{_text(row['question'])}</td><td>{_text(row['key'])}</td><td>{_text(row['answer_after'])}</td></tr>"
        for row in sorted(facts["questions"], key=lambda row: row["after"])
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", "question", "key", "answer after"))
    summary = f"{facts['recalled_after']} of {facts['total']} questions answered, {facts['recalled_before']} before"
    return (
        f"<details><summary>{summary}</summary><div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
