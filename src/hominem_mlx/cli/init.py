"""`hominem init`: choose a base model for this machine, write hominem.toml, bring in the starter corpus."""

import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hominem_mlx.cli import machine
from hominem_mlx.cli.session import TEMPLATE, Session, shares

if TYPE_CHECKING:
    from hominem_mlx.cli.console import Console

MODELS = TEMPLATE.with_name("models.toml")
ROOM_GB = 2.0  # disk left free beside a download
SLOW_MEMORY_GB = 16.0  # without Metal nothing above 4B answers at a bearable speed, whatever the memory


@click.command()
@click.option("--base", metavar="MODEL", help="Take this model: a repository, a folder, or `starter` (tiny, bundled).")
@click.option("--starter", is_flag=True, help="Also bring the bundled prompts and labels into the home.")
@click.option("--yes", is_flag=True, help="Download without asking.")
@shares(config=False)
def init(session: Session, base: str | None, starter: bool, yes: bool) -> None:
    """Choose a base model for this machine and write hominem.toml.

    Nothing is downloaded without --yes or your answer. Without either, the bundled tiny student stays the base: enough
    to try everything, too small to talk with. Call it again at any time; comments and settings of yours are kept.
    """
    from hominem_mlx.cli.settings import set_value
    from hominem_mlx.config import load_config

    console, path = session.console, session.home / "hominem.toml"
    memory, disk = machine.memory_gb(), machine.free_gb(machine.model_cache())
    models = tomllib.loads(MODELS.read_text(encoding="utf-8"))["model"]
    suggested = choose(models, memory if machine.has_metal() else min(memory, SLOW_MEMORY_GB), disk)
    console.say(f"This machine: {memory:.0f} GB of memory, {disk:.0f} GB of free disk for models.")
    had = load_config(session.home).student.base if path.exists() else None
    chosen, agreed = base or "starter", yes
    if base is None and had not in (None, "starter"):
        chosen = str(had)
        console.say(f"{path} names {chosen}; that stays (another: hominem init --base MODEL).")
    elif base is None:
        _show(console, models, suggested)
        if suggested and _agrees(console, suggested["repository"], f"{suggested['download_gb']:g} GB", yes):
            chosen, agreed = suggested["repository"], True
    _fetch(console, session.home, chosen, next((m for m in models if m["repository"] == chosen), None), agreed)
    set_value(session.home, "student.base", chosen)
    counts = _import_starter(session) if starter else None
    console.result(
        {
            "home": str(session.home),
            "config": str(path),
            "base": chosen,
            "suggested": suggested and suggested["repository"],
            "memory_gb": round(memory, 1),
            "free_disk_gb": round(disk, 1),
            "starter": counts,
        }
    )
    console.say(f"Wrote {path} with student.base = {chosen}.")
    if chosen == "starter" and suggested:
        console.say(f"For a real model later: hominem init --base {suggested['repository']} --yes")
    console.say(f"Next: hominem {'data split' if starter else 'chat; or hominem init --starter for sample data'}")


def choose(models: list[dict[str, Any]], memory_gb: float, disk_gb: float) -> dict[str, Any] | None:
    """The last model of the table that fits, or None."""
    fitting = [
        model for model in models if model["memory_gb"] <= memory_gb and model["download_gb"] + ROOM_GB <= disk_gb
    ]
    return fitting[-1] if fitting else None


def _show(console: "Console", models: list[dict[str, Any]], suggested: dict[str, Any] | None) -> None:
    rows = [
        [
            "->" if model is suggested else "",
            model["repository"],
            "is here" if machine.is_downloaded(model["repository"]) else f"{model['download_gb']:g} GB",
            f"{model['memory_gb']} GB",
            model["note"],
        ]
        for model in models
    ]
    console.table(["", "model", "download", "memory from", ""], rows)
    if suggested is None:
        console.say("None of these fits here; the bundled tiny student always does.")


def _agrees(console: "Console", base: str, size: str, yes: bool) -> bool:
    """Whether the model may be had: it is here already, or a person says so."""
    if yes or machine.is_downloaded(base):
        return True
    if not sys.stdin.isatty():
        console.say(f"Nobody to ask, so nothing is downloaded. To take {base} ({size}), add --yes.")
        return False
    return click.confirm(f"Download {base} now ({size})?", default=True, err=True)


def _fetch(console: "Console", home: Path, base: str, known: dict[str, Any] | None, agreed: bool) -> None:
    """See that the model is there. One that was named but not agreed to is left for its first use."""
    if base == "starter":
        return
    from hominem_mlx.models.backbone import find_model  # loads mlx

    is_repository = "/" in base and not base.startswith("full/") and not Path(base).expanduser().exists()
    if is_repository and not machine.is_downloaded(base):
        size = f"about {known['download_gb']:g} GB" if known else "its size is not known here"
        if not (agreed or _agrees(console, base, size, False)):
            console.say("It is downloaded at its first use.")
            return
        console.note(f"Downloading {base} ({size}) to {machine.model_cache()} ...")
    find_model(base, home=home)


def _import_starter(session: Session) -> dict[str, Any]:
    from hominem_mlx.data.dataset import import_starter

    counts = import_starter(session.home)
    session.console.say("The starter corpus is in the home; rows of your own were kept.")
    return counts
