"""Pictures are written whole, the same bytes each time, and what they show is measured right."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hominem_mlx.errors import InputError
from hominem_mlx.evaluation import maps, pictures
from hominem_mlx.schema import MANIFOLD

NAMES = (*MANIFOLD.names, "reward_intensity", "safety_score")


def judged(value, noise=0.1):
    vector = dict.fromkeys(MANIFOLD.names, value)
    return {
        "reply": "x $y$ " * 40, "reward_vector": vector, "reward_intensity": 0.4, "safety_score": value,
        "scalar": value, "uncertainty": dict.fromkeys((*NAMES, "scalar"), noise), "width": {}, "flags": [],
    }  # fmt: skip


def probed(count):
    rows = {name: {"difference": 0.5, "noise": 0.1, "highest": 0, "lowest": 1} for name in (*NAMES, "scalar")}
    return {
        "prompt": "p", "candidates": [judged(n / 10) for n in range(count)], "differences": rows,
        "changed": {"empathy": rows["empathy"]},
    }  # fmt: skip


@pytest.mark.parametrize(("count", "ending"), [(1, "svg"), (6, "png"), (7, "svg")])
def test_a_probe_of_any_number_of_candidates_is_drawn_the_same_each_time(tmp_path, count, ending):
    made = []
    for name in ("a", "b"):
        path = tmp_path / name / f"probe.{ending}"
        pictures.save(pictures.candidates(probed(count)), path)
        made.append(path.read_bytes())
    assert made[0] == made[1] and len(made[0]) > 2000
    if ending == "svg":
        assert b"harm avoidance" in made[0] and b"<dc:date>" not in made[0]


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"probe\.pdf.*\.png or \.svg"):
        pictures.save(Figure(), tmp_path / "probe.pdf")


def test_few_colours_keep_those_that_are_rarely_seen(tmp_path):
    """A thousand shades of grey beside one small dot of each colour of the palette."""
    figure = Figure(figsize=(4, 4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.random.default_rng(0).random((200, 200)), cmap="managua")
    for place, colour in enumerate(pictures.COLOURS):
        axes.add_patch(matplotlib_square(20 + 20 * place, colour))
    pictures.save(figure, tmp_path / "x.png")
    seen = np.array(Image.open(tmp_path / "x.png").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in pictures.COLOURS:
        wanted = [int(colour[first : first + 2], 16) for first in (1, 3, 5)]
        assert np.abs(seen - wanted).max(axis=1).min() <= 20, colour


def matplotlib_square(x, colour):
    from matplotlib.patches import Rectangle

    return Rectangle((x, 100), 4, 4, color=colour)


def material(labelled=40, dimensions=7):
    """Replies whose features are their labels turned and in noise; half of them are held out, all are rated twice."""
    rng = np.random.default_rng(0)
    labels = np.clip(rng.normal(0, 0.4, (labelled, dimensions + 2)), -1, 1)
    labels[:, dimensions] = np.abs(labels[:, dimensions])
    held_out = np.arange(labelled) % 2 == 1
    return maps.Material(
        names=NAMES,
        dimensions=dimensions,
        categories=[f"kind_{n % 9}" for n in range(labelled)],
        prompts=[str(n // 4) for n in range(labelled)],
        labels=labels,
        features=labels @ rng.normal(size=(dimensions + 2, 8)),
        held_out=held_out,
        predicted=np.where(held_out[:, None], labels * 0.5, np.nan),
        again=labels[:, :dimensions],
    )


def test_the_whole_map(tmp_path):
    events = []
    some = material()
    some.labels[:4, 3] = np.nan
    found = maps.draw(some, tmp_path, progress=events.append)
    names = [
        "directions",
        "loadings",
        "rewards-pca",
        "rewards-pca-dimensions",
        "features-pca",
        "features-pca-dimensions",
    ]
    assert [path.removeprefix(f"{tmp_path}/") for path in found["files"]] == [f"{name}.png" for name in names]
    assert all(Image.open(path).size[0] > 400 for path in found["files"])
    assert (events[-1]["done"], events[-1]["total"]) == (6, 6)
    told = json.loads(json.dumps(found))["directions"]
    assert told["rows"] == 18 and told["rated_twice"] == 36, "some lack a label"
    assert told["ceilings"] == pytest.approx([1.0] * 7)
    assert [one["r"] for one in told["agreement"]] == pytest.approx([1.0] * 7), "predictions are half of each label"
    assert told["labels"]["shares"] == pytest.approx(told["predictions"]["shares"])
    ratio = 1 / sum(share**2 for share in told["labels"]["shares"])
    assert told["labels"]["participation_ratio"] == pytest.approx(ratio)
    assert np.sum(np.square(list(told["labels"]["loadings"].values())), axis=1) == pytest.approx(1.0)
    assert found["features"]["rows"] == 40 and sum(found["features"]["shares"]) == pytest.approx(1)


def test_too_few_whole_labels_are_refused(tmp_path):
    some = material()
    some.labels[:22, 3] = np.nan
    with pytest.raises(InputError, match=r"9 held-out replies have all 7 dimensions"):
        maps.draw(some, tmp_path)


def test_every_kind_of_reply_has_a_look_of_its_own():
    figure = maps.by_category([("", np.zeros((18, 2)))], np.array([f"k{n:02}" for n in range(18)]), ("a", "b"))
    handles = figure.legends[0].legend_handles
    looks = [(handle.get_marker(), handle.get_color()) for handle in handles]
    assert len(looks) == len(set(looks)) == 18
    drawn = {tuple(np.round(c, 3)) for dots in figure.axes[0].collections for c in dots.get_facecolors()}
    assert len(drawn) == len(pictures.COLOURS)
    assert all(a[0] == b[0] for a, b in itertools.pairwise(looks[:7])), "the shape changes when colours run out"
