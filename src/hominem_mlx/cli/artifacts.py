"""`hominem artifacts`: what was made, from what, and which of it is in use."""

from typing import TYPE_CHECKING, Any

import click

from hominem_mlx.cli.session import InOrder, Session, Words, shares

if TYPE_CHECKING:
    from hominem_mlx.storage.registry import Artifact, Registry

KINDS = ("raw", "dataset", "reward_model", "lora", "full", "report", "calibration", "suite")
SETTINGS = {"lora": "student.adapter", "reward_model": "student.reward_model"}  # which may name a version instead
DAY_SECONDS = 86400.0


@click.group(cls=InOrder)
def artifacts() -> None:
    """What was made, from what, and which of it is in use.

    An artifact is called by kind/version (lora/0007-3fa2c1d0), by as much of it as is clear (lora/7), or by a tag.
    """


@artifacts.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
@shares(config=False)
def list_(session: Session, kind: str | None) -> None:
    """List artifacts, oldest first."""
    _show_list(session, session.registry.artifacts(kind))


@artifacts.command()
@click.argument("words", nargs=-1, required=True)
@shares(config=False)
def search(session: Session, words: tuple[str, ...]) -> None:
    """List artifacts whose name, tags, settings or numbers contain every word.

    For example: hominem artifacts search dual.rank=16
    """
    _show_list(session, session.registry.search(" ".join(words)))


@artifacts.command()
@click.argument("artifact")
@shares(config=False)
def show(session: Session, artifact: str) -> None:
    """Show one artifact: its files, parents, settings and numbers."""
    found = session.registry.find(artifact)
    console, metadata = session.console, found.metadata
    console.result({**_summary(session.registry, found), "folder": str(found.folder), **metadata})
    facts = [
        ("made", metadata["created_at"]),
        ("folder", found.folder),
        ("in use as", ", ".join(_uses(session.registry, found))),
        ("tags", ", ".join(session.registry.tags(found))),
        ("made from", ", ".join(metadata["parents"])),
        ("seed", metadata["seed"]),
        ("files", ", ".join(metadata["files"])),
        *((f"config {key}", value) for key, value in _flat(metadata["config"])),
        *((f"metric {key}", value) for key, value in _flat(metadata["metrics"])),
        *((f"note {key}", value) for key, value in _flat(metadata["notes"])),
    ]
    console.table([found.ref, ""], [[name, _text(value)] for name, value in facts if value not in (None, "")])


@artifacts.command()
@click.argument("artifact")
@shares(config=False)
def lineage(session: Session, artifact: str) -> None:
    """Show what an artifact was made from, down to the raw rows."""
    found = session.registry.lineage(session.registry.find(artifact))
    session.console.result([{"depth": depth, "artifact": each.ref} for depth, each in found])
    for depth, each in found:
        session.console.say(f"{'  ' * depth}{each.ref}  {each.metadata['created_at']}")


@artifacts.command()
@click.argument("artifact")
@click.argument("tag")
@shares(json=False, config=False)
def tag(session: Session, artifact: str, tag: str) -> None:
    """Give an artifact a name of your own. What has a tag is never collected."""
    found = session.registry.find(artifact)
    session.registry.tag(found, tag)
    session.console.say(f"{found.ref} is also called {found.kind}/{tag}.")


@artifacts.command()
@shares(config=False)
def verify(session: Session) -> None:
    """Check every file of every artifact against its hash."""
    from hominem_mlx.errors import RegistryError

    problems, count = session.registry.verify(), len(session.registry.artifacts())
    session.console.result({"artifacts": count, "problems": problems})
    if problems:
        raise RegistryError("\n".join([*problems, f"{len(problems)} problems; roll back to an artifact that is whole"]))
    session.console.say(f"All {count} artifacts are whole.")


@artifacts.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--all", "everything", is_flag=True, help="Also what is younger than a day.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@shares(config=False)
def gc(session: Session, dry_run: bool, everything: bool, yes: bool) -> None:
    """Delete what nothing needs: neither in use, nor tagged, nor needed for a rollback, nor a parent of such.

    Drafts and temporary files of killed runs go too.

    With --all make sure that no other run is at work: its fresh artifacts have no one to name them yet.
    """
    age = 0.0 if everything else DAY_SECONDS
    gone = session.registry.gc(min_age_seconds=age, dry_run=True)
    question = f"Delete {len(gone)} artifacts and leftovers of killed runs for good?"
    deleted = bool(gone) and not dry_run and session.ask(question, yes=yes)
    if deleted:
        gone = session.registry.gc(min_age_seconds=age)
    session.console.result({"deleted": deleted, "artifacts": gone})
    for ref in gone:
        session.console.say(ref)
    session.console.say(f"{len(gone)} {'deleted' if deleted else 'could go' if gone else 'to delete'}.")


@artifacts.command()
@click.argument("artifact")
@click.option("--note", type=Words(), default="", help="Kept in the history.")
@shares(json=False)
def use(session: Session, artifact: str, note: str) -> None:
    """Make an artifact the current one.

    An adapter becomes current for the base it was trained on. A version pinned in hominem.toml is set to `current`. A
    model that `train full` made becomes the base: student.base in hominem.toml.

    One that an examination has refused is used all the same; the reasons are said.
    """
    registry = session.registry
    is_adapter = "/" not in artifact and _is_adapter(registry, artifact)
    found = registry.get("lora", artifact) if is_adapter else registry.find(artifact)
    pointer = pointer_of(found)
    registry.use(found, pointer=pointer, note=note)
    session.console.say(f"{found.ref} is in use{'' if pointer == 'default' else f' for {pointer}'}.")
    if reasons := registry.refused(found):
        session.console.say(
            "\n".join(
                [
                    f"It was examined and refused; `hominem artifacts rollback {found.kind}` goes back:",
                    *(f"  {reason}" for reason in reasons),
                ]
            )
        )
    _unpin(session, found.kind)
    if found.kind == "full":
        _make_base(session, found.ref)
    base, configured = found.metadata["notes"].get("base"), session.config.student.base
    if found.kind == "lora" and base and base != configured:
        session.console.say(
            f"It belongs to {base}, and the settings name {configured}: hominem chat student.base={base}"
        )


@artifacts.command()
@click.argument("kind", type=click.Choice(KINDS), default="lora")
@click.option("--pointer", help="Which one, where several are in use (see `hominem status`).")
@click.option("--note", type=Words(), default="", help="Kept in the history.")
@shares(json=False)
def rollback(session: Session, kind: str, pointer: str | None, note: str) -> None:
    """Go back to what was in use before (of adapters, unless another KIND is named). Can be repeated."""
    pointer = pointer or _only_pointer(session, kind)
    left = session.registry.current(kind, pointer=pointer)
    before = session.registry.rollback(kind, pointer=pointer, note=note)
    if kind == "full" and left is not None:
        _make_base(session, before.ref if before else left.metadata["notes"]["base"])
    if before is not None:
        session.console.say(f"Back to {before.ref}.")
    else:
        session.console.say("Back to the base without an adapter." if kind == "lora" else f"No {kind} is in use now.")
    _unpin(session, kind)


@artifacts.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--rank", type=click.IntRange(1, 512), help="Rank of the result; else that of the first.")
@shares(config=False)
def merge(session: Session, adapters: tuple[str, ...], rank: int | None) -> None:
    """Make one adapter that does what several do together, as nearly as its rank allows.

    Folds an adapter into the one it was trained on top of (name that one first). The result stands alone, mlx-lm loads
    it too; it is not used until it was judged. One ADAPTER with a smaller --rank is cut down.
    """
    from hominem_mlx.models.merge import merge as add_up

    registry = session.registry
    parents = [_adapter(session, name) for name in adapters]
    if len({parent.ref for parent in parents}) < len(parents):
        raise click.UsageError("an adapter is named twice, and would count double")
    if len(parents) == 1 and rank is None:
        raise click.UsageError("one adapter alone needs --rank; to merge name two or more")
    notes, base = parents[0].metadata["notes"], parents[0].metadata["inputs"]
    with registry.draft("lora", parents=parents, config={"merge": {"rank": rank}}, inputs=base) as draft:
        found = add_up([parent.folder for parent in parents], draft.folder, rank=rank)
        draft.metrics = {"merge": found}
        draft.notes = {name: notes[name] for name in ("base", "pointer") if name in notes}
    made = draft.published
    session.console.result({"artifact": made.ref, "parents": [parent.ref for parent in parents], **found})
    session.console.say(
        f"{made.ref} adds up {', '.join(parent.ref for parent in parents)} at rank {found['rank']}: "
        f"{found['energy_lost']:.2%} of the change's energy is lost, "
        f"at most {found['worst_layer_lost']:.2%} of a layer's ({found['worst_layer']})."
    )
    session.console.say(f"It is not in use yet. Judge it: hominem evaluate policy --adapter {made.ref}")


def pointer_of(artifact: "Artifact") -> str:
    """The name under which an artifact is current: its base's for an adapter, its part of the line for a dataset."""
    if artifact.kind == "dataset":
        return artifact.metadata["config"].get("holds", "labels")
    return artifact.metadata["notes"].get("pointer", "default") if artifact.kind in ("lora", "full") else "default"


def _adapter(session: Session, name: str) -> "Artifact":
    """The adapter called by a version, a tag or `current`, the one in use for the configured base."""
    name = name.removeprefix("lora/")
    pointer = _only_pointer(session, "lora") if name == "current" else "default"
    return session.registry.get("lora", name, pointer=pointer)


def _is_adapter(registry: "Registry", name: str) -> bool:
    """Whether a bare name may be read as an adapter's: `hominem artifacts use 3` is about adapters."""
    from hominem_mlx.errors import RegistryError

    try:
        registry.get("lora", name)
    except RegistryError:
        return False
    return True


def _only_pointer(session: Session, kind: str) -> str:
    """The pointer that is meant when none was named: that of the configured base, or the only one there is."""
    pointers = sorted(session.registry.pointers(kind))
    if kind == "lora":
        base = session.config.student.base.rstrip("/").split("/")[-1]
        pointers = [name for name in pointers if name.rpartition("@")[0] == base] or pointers
    if len(pointers) > 1:
        raise click.UsageError(f"several are in use; add --pointer with one of: {', '.join(pointers)}")
    return pointers[0] if pointers else "default"


def _unpin(session: Session, kind: str) -> None:
    """What was just chosen must not lose against a version that hominem.toml still names."""
    from hominem_mlx.cli.settings import set_value
    from hominem_mlx.config import load_config

    key = SETTINGS.get(kind)
    if key is None:
        return
    pinned = getattr(load_config(session.home).student, key.partition(".")[2])
    if pinned != "current" and set_value(session.home, key, "current"):
        session.console.say(f"hominem.toml named {pinned}; {key} is `current` now.")


def _make_base(session: Session, base: str) -> None:
    from hominem_mlx.cli.settings import set_value

    set_value(session.home, "student.base", base)
    session.console.say(f"student.base in hominem.toml is {base} now; adapters of another base do not fit it.")


def _show_list(session: Session, found: "list[Artifact]") -> None:
    rows = [_summary(session.registry, artifact) for artifact in found]
    session.console.result(rows)
    if not rows:
        session.console.say("Nothing found. `hominem status` says what to do next.")
        return
    cells = [
        [row["artifact"], row["created_at"][:16].replace("T", " "), ", ".join(row["in_use"]), ", ".join(row["tags"])]
        for row in rows
    ]
    session.console.table(["artifact", "made", "in use", "tags"], cells)


def _summary(registry: "Registry", artifact: "Artifact") -> dict[str, Any]:
    return {
        "artifact": artifact.ref,
        "created_at": artifact.metadata["created_at"],
        "in_use": _uses(registry, artifact),
        "tags": registry.tags(artifact),
        "parents": artifact.metadata["parents"],
    }


def _uses(registry: "Registry", artifact: "Artifact") -> list[str]:
    pointers = registry.pointers(artifact.kind).items()
    return ["current" if name == "default" else name for name, version in pointers if version == artifact.version]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested tables as dotted names; a list stays a value."""
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        found += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", item)]
    return found


def _text(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
