"""Static pictures of probes, as PNG or SVG files: candidates side by side, shifts, what goes with a change."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from hominem_mlx.errors import InputError
from hominem_mlx.evaluation.plots import INK, STYLE
from hominem_mlx.evaluation.probes import OVERALL, SURE, value_of
from hominem_mlx.files import write_atomic

# Okabe and Ito 2008, told apart by colour-blind people too; each with a shape of its own, for those who print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3c3c3c")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
QUIET = "#8b95a3"
DOTS = 6  # candidates that can be told apart as dots; more become a heat map
LONGEST = 78  # signs of a reply in a legend
DPI = 105
FORMATS = (".png", ".svg")


def check(path: Path) -> Path:
    """The path, if a picture can be written there. Raises: InputError."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a picture is written as .png or .svg; end the name so")
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the same figure gives the same bytes.

    A PNG has 256 colours, a third of its size otherwise. They are chosen to cover all there are, not by how often each
    is seen, or a legend's few dots would take their neighbours' colours.
    """
    raw = io.BytesIO()
    if check(path).suffix.lower() == ".svg":
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.name}):
            figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(raw, format="png", dpi=DPI)
        picture = Image.open(raw).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        raw = io.BytesIO()
        picture.save(raw, format="png", optimize=True, dpi=(DPI, DPI))
    write_atomic(path, raw.getvalue())


def candidates(probed: dict[str, Any]) -> Figure:
    """Every number of every candidate of a probe; rows on which they really differ have a grey band."""
    if len(probed["candidates"]) > DOTS:
        return _heat(probed)
    told = [
        {
            name: (value_of(candidate, name), candidate["uncertainty"].get(name, 0.0), True)
            for name in probed["differences"]
        }
        for candidate in probed["candidates"]
    ]
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows(told, bands=probed["changed"])
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -1.08), max(high, 1.08))
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        really = "; grey: they differ beyond doubt" if probed["changed"] else ""
        axes.set_xlabel(f"value (± {SURE:.0f} standard deviations{really})")
        legend(figure, [f"[{n}] {one['reply']}" for n, one in enumerate(probed["candidates"], 1)])
    return figure


def shifts(found: dict[str, Any]) -> Figure:
    """How far each counterfactual shifts every number; hollow where the shift is inside its doubt."""
    worlds = found["counterfactuals"]
    told = [
        {name: (row["shift"], row["noise"], row["is_sure"]) for name, row in world["shifts"].items()}
        for world in worlds
    ]
    with matplotlib.rc_context(STYLE):
        figure, axes = _rows(told)
        axes.set_xlabel(f"shift (whiskers: ± {SURE:.0f} standard deviations; hollow: inside them)")
        legend(figure, [f"[{n}] {world['change']}" for n, world in enumerate(worlds, 1)])
    return figure


def relations(found: dict[str, Any]) -> Figure:
    """How often each dimension changes between replies, and what goes with that; whiskers are 95 % intervals."""
    rows = list(found["dimensions"].items())[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.42 * len(rows) + 1.5), layout="constrained")
        share, size, together = figure.subplots(1, 3, sharey=True)
        for place, (_, row) in enumerate(rows):
            share.barh(place, 100 * row["changed"], height=0.55, color=QUIET)
            for axes, suffix in ((size, ""), (together, "_change")):
                for index, key in enumerate(("intensity", "safety")):
                    _whisker(
                        axes, row[key + suffix], place + (0.13 if index == 0 else -0.13), COLOURS[index], SHAPES[index]
                    )
        share.set_xlim(0, 100)
        share.set_xlabel("pairs of replies that\ndiffer beyond doubt (%)")
        size.set_xlabel("correlation of |change| with\nthe mean of both replies")
        together.set_xlabel("correlation of the change\nwith the change of these")
        for axes in (size, together):
            axes.set_xlim(-1, 1)
            axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "", "0", "", "1"])
            axes.axvline(0, color=INK, linewidth=0.5, alpha=0.4)
        share.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in rows])
        for axes in (share, size, together):
            axes.tick_params(axis="y", length=0)
        legend(figure, ["intensity", "safety"], across=2)
    return figure


def _rows(
    told: Sequence[dict[str, tuple[float, float, bool]]], bands: Sequence[str] | dict = ()
) -> tuple[Figure, Axes]:
    """One row a number, one dot each of `told`: value, standard deviation, whether filled."""
    names = list(told[0]) if told else []
    step = 0.26 + 0.09 * len(told)
    figure = Figure(figsize=(7.2, step * (len(names) + 0.6) + 0.7 + 0.22 * len(told)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        place = -row - (0.5 if name in OVERALL else 0)
        if name in bands:
            axes.axhspan(place - 0.45, place + 0.45, color=QUIET, alpha=0.16, linewidth=0)
        for index, one in enumerate(told):
            value, noise, is_filled = one[name]
            height = place + (0.5 - (index + 0.5) / len(told)) * 0.72
            colour = COLOURS[index % len(COLOURS)]
            axes.plot([value - SURE * noise, value + SURE * noise], [height, height], color=colour, linewidth=1.2)
            face = colour if is_filled else "white"
            axes.plot(value, height, SHAPES[index % len(SHAPES)], color=colour, markerfacecolor=face, markersize=5.5)
    axes.axvline(0, color=INK, linewidth=0.5, alpha=0.4)
    places = [-row - (0.5 if name in OVERALL else 0) for row, name in enumerate(names)]
    axes.set_yticks(places, [name.replace("_", " ") for name in names])
    axes.set_ylim((places[-1] if places else 0) - 0.6, 0.6)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _heat(probed: dict[str, Any]) -> Figure:
    told = probed["candidates"]
    names = list(probed["differences"])
    cells = np.array([[value_of(candidate, name) for candidate in told] for name in names])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 0.52 * len(told), 0.34 * len(names) + 1.1), layout="constrained")
        axes = figure.subplots()
        image = numbered(axes, cells, sign="+.1f")
        axes.set_xticks(range(len(told)), [f"[{n}]" for n in range(1, len(told) + 1)])
        marks = ["* " if name in probed["changed"] else "" for name in names]
        axes.set_yticks(range(len(names)), [mark + name.replace("_", " ") for mark, name in zip(marks, names)])
        axes.set_xlabel("candidate (*: they differ beyond doubt)")
        figure.colorbar(image, ax=axes, label="value", shrink=0.8, ticks=[-1, 0, 1]).outline.set_visible(False)
    return figure


def numbered(axes: Axes, cells: np.ndarray, *, sign: str = "+.2f"):
    """A heat map of values in [-1, 1], orange to purple through white, with each number in its cell; the image."""
    image = axes.imshow(cells, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        ink = "white" if abs(value) > 0.7 else INK
        axes.text(column, row, signed(value, sign), ha="center", va="center", color=ink, size=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def signed(value: float, how: str = "+.2f") -> str:
    """A number with its sign, the minus as long as the plus."""
    return format(round(value, 2) + 0.0, how).replace("-", "−")


def _whisker(axes: Axes, found: dict[str, float | None], height: float, colour: str, shape: str) -> None:
    r, low, high = found["r"], found["low"], found["high"]
    if low is not None and high is not None:
        axes.plot([low, high], [height, height], color=colour, linewidth=1.2)
    if r is not None:
        axes.plot(r, height, shape, color=colour, markersize=5)


def legend(
    figure: Figure, names: Sequence[str], *, across: int = 1, at_right: bool = False, in_order: bool = False
) -> None:
    """What each colour and shape stands for. Shapes go with the colours, or, `in_order`, change when these run out."""
    where: Literal["outside right upper", "outside upper left"] = (
        "outside right upper" if at_right else "outside upper left"
    )
    shapes = [SHAPES[(n // len(COLOURS) if in_order else n) % len(SHAPES)] for n in range(len(names))]
    handles = [
        Line2D([], [], marker=shape, color=COLOURS[n % len(COLOURS)], linestyle="", markersize=5.5)
        for n, shape in enumerate(shapes)
    ]
    short = [_shortened(name) for name in names]
    figure.legend(handles, short, loc=where, ncols=across, fontsize=9, handletextpad=0.2)


def _shortened(text: str) -> str:
    """One line of at most `LONGEST` signs, in which nothing is taken for mathematics."""
    line = " ".join(text.split()).replace("$", r"\$")
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rstrip() + "…"
