"""Plots as inline SVG: stable bytes, no outside address, ink in the page's own text colour (so dark pages work)."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # becomes the page's text colour
BEFORE, AFTER, WRONG = "#8b95a3", "#2f86d1", "#d1495b"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, readable aloud, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


def margins(values: Sequence[float]) -> str:
    """Histogram of implicit reward margins `[M]` in nats: right of zero the adapter agrees with the label."""
    edge = max(float(np.quantile(np.abs(values), 0.99)), 1e-6)
    inside = np.clip(values, -edge, edge)
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(3.0)
        bins = np.linspace(-edge, edge, 41).tolist()  # zero is an edge
        axes.hist(inside[inside > 0], bins, color=AFTER)
        axes.hist(inside[inside <= 0], bins, color=WRONG)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("implicit reward, better minus worse reply (nats)")
        axes.set_ylabel("pairs")
        return _svg(figure, "margins")


def dimensions(judge: dict[str, Any], name: str) -> str:
    """Every number of one judge on free answers: before (ring), after (dot), interval of the change."""
    rows = list(judge["dimensions"].items())[::-1]
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(0.36 * len(rows) + 0.9)
        for place, (_, row) in enumerate(rows):
            _, low, high = row["difference"]
            sure = low > 0 or high < 0
            axes.plot([row["before"] + low, row["before"] + high], [place, place], color=AFTER, alpha=0.35, linewidth=7)
            axes.plot([row["before"], row["after"]], [place, place], color=AFTER, linewidth=1.2)
            axes.plot(row["before"], place, "o", color=BEFORE, markerfacecolor="none", markersize=7)
            axes.plot(row["after"], place, "o", color=AFTER, markersize=7, alpha=1 if sure else 0.5)
        axes.axvline(0, color=INK, linewidth=0.5, alpha=0.4)
        axes.set_yticks(range(len(rows)), [axis.replace("_", " ") for axis, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("mean over free answers")
        _legend(axes, "after; band: 95 % interval of the change")
        return _svg(figure, name)


def recall(questions: Sequence[dict[str, Any]]) -> str:
    """One square a question, before and after: filled when the fact came back."""
    across = 20
    down = -(-len(questions) // across)
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(0.27 * (2 * down + 2.4))
        for top, when, colour in ((down + 1.2, "before", BEFORE), (0.0, "after", AFTER)):
            hits = sum(question[when] for question in questions)
            axes.text(0, top + down + 0.15, f"{when}: {hits} of {len(questions)}", va="bottom")
            for index, question in enumerate(questions):
                row, column = divmod(index, across)
                face = colour if question[when] else "none"
                place = (column + 0.08, top + down - 1 - row + 0.08)
                axes.add_patch(matplotlib.patches.Rectangle(place, 0.84, 0.84, facecolor=face, edgecolor=colour))
        axes.set_xlim(0, across)
        axes.set_ylim(0, 2 * down + 2.2)
        axes.set_aspect("equal")
        axes.axis("off")
        return _svg(figure, "recall")


def overlaid(before: Sequence[float], after: Sequence[float], label: str, name: str) -> str:
    """Two histograms of answers, before (filled) and after (outline), their means dashed; `name` is the plot's id."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(3.0)
        bins = np.linspace(min([*before, *after]), max([*before, *after]) + 1e-9, 26).tolist()
        axes.hist(before, bins, color=BEFORE, alpha=0.45)
        axes.hist(after, bins, color=AFTER, histtype="step", linewidth=1.8)
        for values, colour in ((before, BEFORE), (after, AFTER)):
            axes.axvline(float(np.mean(values)), color=colour, linestyle="--", linewidth=1.2)
        axes.set_xlabel(label)
        axes.set_ylabel("answers")
        _legend(axes, "after")
        return _svg(figure, name)


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    return figure, axes


def _legend(axes: Axes, after: str) -> None:
    line = matplotlib.lines.Line2D
    handles = [
        line([], [], marker="o", linestyle="", color=BEFORE, markerfacecolor="none"),
        line([], [], marker="o", linestyle="", color=AFTER),
    ]
    axes.figure.legend(handles, ["before", after], loc="outside upper left", ncols=2)


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element whose ids cannot clash with those of another plot in the page."""
    raw = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = raw.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", text)  # names of groups nobody refers to
    text = re.sub(r'id="(\w+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#(\w+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#(\w+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit", text)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1).strip()
