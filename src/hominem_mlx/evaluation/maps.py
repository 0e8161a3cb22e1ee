"""Pictures of the whole manifold: its directions in labels and predictions, and rewards and features laid flat.

Shapes: `N` labelled replies, `O` outputs (dimensions, intensity, safety), `K` dimensions, `F` features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hominem_mlx import metrics
from hominem_mlx.errors import InputError
from hominem_mlx.evaluation import projection
from hominem_mlx.evaluation.pictures import COLOURS, QUIET, SHAPES, legend, numbered, save, signed
from hominem_mlx.evaluation.plots import INK, STYLE
from hominem_mlx.evaluation.projection import Pca

Progress = Callable[[dict[str, Any]], None]
LEAST = 10  # replies that a picture is made of


@dataclass(frozen=True)
class Material:
    """Labelled replies and what a reward model makes of them.

    `names` of the O outputs, the first `dimensions` of which are the manifold's; `categories`, `prompts` of each row;
    `labels` `[N, O]`, NaN where there is none; `features` `[N, F]`; `held_out` bool `[N]`: rows that the model was not
    fitted on; `predicted` `[N, O]`, unclipped, NaN in all other rows; `again` `[N, K]` a second rating, NaN where
    there is none.
    """

    names: tuple[str, ...]
    dimensions: int
    categories: Sequence[str]
    prompts: Sequence[str]
    labels: np.ndarray
    features: np.ndarray
    held_out: np.ndarray
    predicted: np.ndarray
    again: np.ndarray


def draw(
    material: Material, folder: Path, *, umap: bool = False, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Make every picture.

    Args:
        material: what is drawn; replies without a whole vector take no part in pictures of rewards.
        folder: where `directions.png`, `loadings.png` and, of `rewards` and `features`, `-pca.png` (by category) and
            `-pca-dimensions.png` (by value) go; with `umap` the same two of each as `-umap`.
        seed: of the bootstrap and of UMAP.

    Returns: `files`, `directions` (see `directions`) and `features`: share of the variance of its first ten directions,
        and the correlation of each output with the first two.
    """
    if umap:
        projection.need_umap()
    size, names = material.dimensions, material.names
    whole = ~np.isnan(material.labels[:, :size]).any(axis=1)
    examined = whole & material.held_out
    if examined.sum() < LEAST:
        raise InputError(
            f"{int(examined.sum())} held-out replies have all {size} dimensions, and a picture wants {LEAST}: "
            "label more prompts, then `hominem data split`"
        )
    files: list[str] = []

    def keep(figure: Figure, name: str) -> None:
        save(figure, folder / f"{name}.png")
        files.append(str(folder / f"{name}.png"))
        if progress:
            progress({"stage": "pictures", "done": len(files), "total": 10 if umap else 6})

    labels, predicted = material.labels[examined, :size], material.predicted[examined, :size]
    prompts = [prompt for prompt, is_in in zip(material.prompts, examined, strict=True) if is_in]
    ours, theirs = projection.pca(labels), projection.pca(predicted)
    told = directions(ours, theirs, labels, predicted, prompts, names[:size], seed=seed)
    twice = whole & ~np.isnan(material.again).any(axis=1)
    if twice.sum() >= LEAST:
        most = projection.ceilings(ours, material.labels[twice, :size], material.again[twice])
        told |= {"rated_twice": int(twice.sum()), "ceilings": most}
    keep(scree(told), "directions")
    keep(loadings(ours, theirs, names[:size]), "loadings")

    categories = np.array(material.categories)
    panels = [("labels", ours.places(labels)), ("predictions", ours.places(predicted))]
    keep(by_category(panels, categories[examined], _along(ours, "labels' ")), "rewards-pca")
    rewards, features = material.labels[whole, :size], material.features
    spaces = {"rewards": (rewards, whole), "features": (features, np.ones(len(features), bool))}
    found: dict[str, Any] = {"rows": int(examined.sum()), "directions": told}
    for space, (values, rows) in spaces.items():
        flat = projection.pca(values)
        places = flat.places(values)
        if space == "features":
            beside = _correlations(places[:, :2], material.labels)
            found["features"] = {
                "rows": len(values),
                "columns": values.shape[1],
                "shares": flat.shares[:10].tolist(),
                "correlations": {
                    name: [None if np.isnan(r) else r for r in row]
                    for name, row in zip(names, beside.tolist(), strict=True)
                },
            }
            keep(by_category([("", places)], categories[rows], _along(flat)), f"{space}-pca")
        keep(by_value(places, material.labels[rows], names, _along(flat)), f"{space}-pca-dimensions")
        if umap:
            places = projection.umap(values, seed=seed)
            axes = ("UMAP 1 (no unit)", "UMAP 2 (no unit)")
            keep(by_category([("", places)], categories[rows], axes), f"{space}-umap")
            keep(by_value(places, material.labels[rows], names, axes, correlated=False), f"{space}-umap-dimensions")
    return {"files": files, **found}


def directions(
    ours: Pca,
    theirs: Pca,
    labels: np.ndarray,
    predicted: np.ndarray,
    prompts: Sequence[str],
    names: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Are there K directions, and are they seen? All as plain values.

    Returns: of `labels` and `predictions` the `shares` of the variance by direction, `participation_ratio` and
        `loadings` by dimension; `agreement` `{"r", "low", "high"}` of predictions with labels along each direction of
        the labels. `draw` adds `ceilings` of these where ten replies or more were `rated_twice`.
    """
    found: dict[str, Any] = {"rows": len(labels), "prompts": len(set(prompts))}
    for key, pca in (("labels", ours), ("predictions", theirs)):
        found[key] = {
            "shares": pca.shares.tolist(),
            "participation_ratio": metrics.participation_ratio(np.diag(pca.shares)),
            "loadings": {name: pca.loadings[:, index].tolist() for index, name in enumerate(names)},
        }
    agreement = projection.agreement(ours, labels, predicted, prompts, seed=seed)
    found["agreement"] = [
        {key: None if np.isnan(value) else value for key, value in zip(("r", "low", "high"), one, strict=True)}
        for one in agreement
    ]
    return found


def scree(told: dict[str, Any]) -> Figure:
    """Left: share of the variance along each direction. Right: how well each direction of the labels is predicted."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        even = 100 / len(told["labels"]["loadings"])
        left.axhline(even, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        most = max(len(told[key]["shares"]) for key in ("labels", "predictions"))
        left.text(most + 0.3, even + 0.6, "all alike", ha="right", va="bottom", size=8, alpha=0.8)
        for index, key in enumerate(("labels", "predictions")):
            shares = 100 * np.array(told[key]["shares"])
            name = f"{key} (participation ratio {told[key]['participation_ratio']:.1f} of {round(100 / even)})"
            left.plot(range(1, len(shares) + 1), shares, f"{SHAPES[index]}-", color=COLOURS[index], label=name)
        left.set_ylim(0)
        left.set_xticks(range(1, most + 1))
        left.set_xlabel("direction, in the order of each one's variance")
        left.set_ylabel("share of the variance (%)")
        for place, one in enumerate(told["agreement"], 1):
            if one["low"] is not None:
                right.plot([place, place], [one["low"], one["high"]], color=INK, linewidth=1)
            if one["r"] is not None:
                right.plot(place, one["r"], "o", color=INK, markersize=5)
        for place, most in enumerate(told.get("ceilings", []), 1):
            name = f"ceiling: how far {told['rated_twice']} second ratings agree" if place == 1 else ""
            right.plot([place - 0.3, place + 0.3], [most, most], color=COLOURS[2], linewidth=2, label=name)
        right.axhline(0, color=INK, linewidth=0.5, alpha=0.4)
        right.set_ylim(min(-0.1, *(one["low"] or 0 for one in told["agreement"])), 1)
        right.set_xticks(range(1, len(told["agreement"]) + 1))
        right.set_xlabel("direction of the labels")
        right.set_ylabel("correlation, label with prediction\n(95 % interval, by prompt)")
        for axes in (left, right) if told.get("ceilings") else (left,):
            axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1), fontsize=9)
        _note(figure, f"{told['rows']} held-out replies to {told['prompts']} prompts")
    return figure


def loadings(ours: Pca, theirs: Pca, names: Sequence[str]) -> Figure:
    """Correlation of each dimension with each direction, of labels and of predictions."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 3.9), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        for axes, pca, title in zip(both, (ours, theirs), ("labels", "predictions"), strict=True):
            image = numbered(axes, pca.loadings.T)
            axes.set_title(title, size=10)
            axes.set_xticks(range(len(pca.shares)), [f"{n}\n{100 * s:.0f} %" for n, s in enumerate(pca.shares, 1)])
            axes.set_xlabel("direction, share of the variance")
        both[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        figure.colorbar(image, ax=both, label="correlation", shrink=0.85, ticks=[-1, 0, 1]).outline.set_visible(False)
    return figure


def by_category(panels: Sequence[tuple[str, np.ndarray]], categories: np.ndarray, along: tuple[str, str]) -> Figure:
    """Replies laid flat, coloured by category; panels share their axes.

    Args:
        panels: title and places `[N, 2]`.
        categories: of each reply.
        along: what the two axes are.
    """
    names = sorted(set(categories.tolist()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 3.8 * len(panels), 3.9), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        kinds = np.array([names.index(name) for name in categories.tolist()])
        order = np.random.default_rng(0).permutation(len(kinds))  # so that no category lies on top of the others
        colours = np.array(COLOURS)[kinds[order] % len(COLOURS)]
        shapes = kinds[order] // len(COLOURS) % len(SHAPES)
        for axes, (title, places) in zip(all_axes, panels, strict=True):
            for shape in np.unique(shapes):
                rows = places[order][shapes == shape, :2]
                axes.scatter(*rows.T, s=11, c=colours[shapes == shape], marker=SHAPES[shape], alpha=0.7, linewidth=0)
            axes.set_title(title, size=10)
            axes.set_xlabel(along[0])
            _ticks(axes, along)
        all_axes[0].set_ylabel(along[1])
        legend(figure, [name.replace("_", " ") for name in names], at_right=True, in_order=True)
        _note(figure, f"{len(categories)} replies")
    return figure


def by_value(
    places: np.ndarray, labels: np.ndarray, names: Sequence[str], along: tuple[str, str], *, correlated: bool = True
) -> Figure:
    """The same replies once for each output, coloured by its label.

    Args:
        places: `[N, 2]`.
        labels: `[N, O]`; a reply without a label is left out.
        names: of the outputs.
        along: what the two axes are.
        correlated: whether titles tell the correlation of the label with each axis.
    """
    across = 3
    down = -(-len(names) // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 2.2 * down + 0.7), layout="constrained")
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        beside = _correlations(places[:, :2], labels)
        images: dict[bool, Any] = {}  # by whether its values are shares, from 0 to 1
        for axes, name, column, both in zip(panels, names, labels.T, beside):
            there = ~np.isnan(column)
            order = np.random.default_rng(0).permutation(there.sum())  # so that no value lies on top of the others
            x, y, value = (part[there][order] for part in (places[:, 0], places[:, 1], column))
            is_share = name == "reward_intensity"
            colours, lowest = ("cividis", 0) if is_share else ("managua_r", -1)
            images[is_share] = axes.scatter(x, y, s=5, c=value, cmap=colours, linewidth=0, vmin=lowest, vmax=1)
            told = f"  ({signed(both[0])}, {signed(both[1])})" if correlated else ""
            axes.set_title(name.replace("_", " ") + told, size=8.5)
            _ticks(axes, along)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        for is_share, image in sorted(images.items(), reverse=True):
            label, ticks = ("reward intensity", [0, 0.5, 1]) if is_share else ("all others", [-1, 0, 1])
            bar = figure.colorbar(image, ax=panels, shrink=0.4, aspect=22, pad=0.02, ticks=ticks, label=label)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0, labelsize=8)
        figure.supylabel(along[1], size=10)
        note = "; in brackets the correlation with direction 1 and 2" if correlated else ""
        panels[(down - 1) * across + across // 2].set_xlabel(along[0])
        _note(figure, f"{len(places)} replies{note}")
    return figure


def _along(pca: Pca, whose: str = "") -> tuple[str, str]:
    shares = [*pca.shares, 0.0][:2]
    first, second = (
        f"direction {n}: {100 * share:.0f} % of the {whose}variance (sd)" for n, share in enumerate(shares, 1)
    )
    return first, second


def _correlations(places: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each output `[N, O]` with both axes `[N, 2]`, `[O, 2]`."""
    return np.array([[metrics.pearson(column, place) for place in places.T] for column in labels.T])


def _note(figure: Figure, text: str) -> None:
    """A small line below everything."""
    figure.supxlabel(text, x=0.995, ha="right", size=8, color=QUIET)


def _ticks(axes: Axes, along: tuple[str, str]) -> None:
    if "no unit" in along[0]:
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axes.locator_params(nbins=6, integer=True)
