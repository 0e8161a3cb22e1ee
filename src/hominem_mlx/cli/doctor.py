"""`hominem doctor`: what is here, what is missing or slow, and whether learning works on this machine."""

import importlib.metadata
import os
import platform
import sys
from typing import Any

import click

from hominem_mlx.cli import machine
from hominem_mlx.cli.session import Session, shares

PACKAGES = ("hominem_mlx", "mlx", "mlx-lm", "numpy", "anthropic")
Finding = tuple[str, str, str]  # what, what was found, what to do about it


@click.command()
@click.option("--selftest", is_flag=True, help="Also run small checks of learning here, a few seconds.")
@click.option("--get-encoder", is_flag=True, help="Fetch the sentence encoder (90 MB) for the reward model.")
@shares()
def doctor(session: Session, selftest: bool, get_encoder: bool) -> None:
    """Look at this machine and say what is missing or slow.

    --selftest runs the checks that need this machine's own hardware and prints rows for docs/VERIFIED.md.
    """
    console = session.console
    if get_encoder:
        from hominem_mlx.models.encoder_fetch import fetch_encoder

        with console.progress() as report:
            folder = fetch_encoder(session.home, report)
        console.say(f"The encoder is in {folder}.")
    findings = [*_software(), *_hardware(session), *_state(session)]
    tested = _selftest(session) if selftest else None
    console.result(
        {
            "findings": [dict(zip(("what", "found", "advice"), finding, strict=True)) for finding in findings],
            "selftest": tested,
        }
    )
    console.table(["", "found", "advice"], findings)
    if tested is not None:
        _print_rows(session, tested)


def _software() -> list[Finding]:
    import hominem_mlx

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    found = [("python", f"{platform.python_version()} in {sys.prefix}", ""), ("packages", packages, "")]
    if sys.platform == "linux":
        advice = "" if hominem_mlx.openblas else "some thirty times slower: apt-get install libopenblas0"
        found.append(("BLAS", hominem_mlx.openblas or "of the MLX wheel", advice))
    return found


def _hardware(session: Session) -> list[Finding]:
    from hominem_mlx.training.selftest import device

    memory, disk = machine.memory_gb(), machine.free_gb(machine.model_cache())
    seen = device()
    used = "Metal" if machine.has_metal() else "CPU" if seen["kind"] == "cpu" else "GPU"
    return [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} processors", ""),
        ("MLX device", f"{used}: {seen['name']}", ""),
        ("memory", f"{memory:.0f} GB", "" if memory >= 8 else "enough for the bundled student and 0.6B models"),
        ("free disk", f"{disk:.0f} GB at {machine.model_cache()}", "" if disk >= 5 else "too little for most models"),
    ]


def _state(session: Session) -> list[Finding]:
    from hominem_mlx.files import lock_holder
    from hominem_mlx.models.encoder import find_encoder

    encoder, base = find_encoder(session.home), session.config.student.base
    ours = session.home / "artifacts" / base  # of `hominem train full`
    is_here = (
        base == "starter" or os.path.exists(os.path.expanduser(base)) or ours.exists() or machine.is_downloaded(base)
    )
    held = {path.name: lock_holder(path) for path in sorted((session.home / "locks").glob("*.lock"))}
    holders = [f"{name}: {holder}" for name, holder in held.items() if holder]
    hint = "the reward model reads the student's hidden states instead; better: hominem doctor --get-encoder"
    return [
        ("home", str(session.home), "" if session.home.exists() else "not there yet: hominem init"),
        ("base", base, "" if is_here else "not downloaded yet; that happens at its first use"),
        ("encoder", str(encoder or "not here"), "" if encoder else hint),
        ("locks held", "; ".join(holders) or "none", ""),
    ]


def _selftest(session: Session) -> list[dict[str, Any]]:
    """Runs on the bundled student, whatever the configured base: the rows of two machines must mean the same."""
    from dataclasses import asdict

    from hominem_mlx.models import backbone
    from hominem_mlx.training.selftest import checks

    done = []
    with session.console.progress() as report:
        lm = backbone.load("starter")
        for number, check in enumerate(checks(lm), 1):
            done.append(asdict(check))
            report({"stage": "selftest", "done": number, "total": None})
    return done


def _print_rows(session: Session, tested: list[dict[str, Any]]) -> None:
    """Rows as docs/VERIFIED.md has them: what, and what was seen where."""
    from hominem_mlx.errors import NotGoodEnough
    from hominem_mlx.training.selftest import device

    where = f"{platform.system()} {platform.machine()}, {device()['name']}, MLX {importlib.metadata.version('mlx')}"
    lines = ["", f"| what | {where} |", "|---|---|"]
    for row in tested:
        mark, measured = "yes" if row["holds"] else "NO", row["measured"].replace("|", "/")
        lines.append(f"| {row['what']} | {mark}: {measured} ({row['seconds']:.2f} s) |")
    session.console.say("\n".join(lines))
    failed = [row["what"] for row in tested if not row["holds"]]
    if failed:
        raise NotGoodEnough(f"{len(failed)} checks failed: {'; '.join(failed)}. Please report the rows above")
