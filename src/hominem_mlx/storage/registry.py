"""Artifacts: immutable folders that name their parents, and the few pointers that may move.

    artifacts/<kind>/<ordinal>-<hash>/METADATA.json + files      never changed once there
    artifacts/<kind>/current.json  history.json  tags.json       replaced whole, under one lock

A draft is written beside its final place, synced and renamed: after a kill an artifact is there wholly or not at all.
The hash covers files, parents, configuration and seed but neither dates nor measured seconds, so a run repeated after
a kill arrives at the artifact it would have made, and publishing the same thing twice gives the first one back.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hominem_mlx.errors import InputError, RegistryError
from hominem_mlx.files import (
    append_jsonl,
    is_alive,
    leftovers,
    lock,
    read_json,
    read_objects,
    scratch_folder,
    sha256_folder,
    sha256_json,
    sync,
    write_json,
)
from hominem_mlx.schema import MANIFOLD, Manifold

KINDS = ("raw", "dataset", "reward_model", "lora", "full", "report", "calibration", "suite")
METADATA = "METADATA.json"
ANY_BASE = "default"  # the pointer of kinds that do not depend on a base model
PACKAGES = ("hominem_mlx", "mlx", "mlx-lm", "numpy")


@dataclass(frozen=True)
class Artifact:
    """One immutable folder; `ref` (`lora/0007-3fa2c1d0`) is its name everywhere."""

    kind: str
    version: str
    folder: Path
    metadata: dict[str, Any] = field(repr=False)

    @property
    def ref(self) -> str:
        """Kind and version."""
        return f"{self.kind}/{self.version}"

    @property
    def hash(self) -> str:
        """The full content hash, equal for equal content whatever the ordinal."""
        return self.metadata["content_hash"]

    def file(self, name: str) -> Path:
        """A file of the artifact, which must be there."""
        path = self.folder / name
        if not path.exists():
            raise RegistryError(f"{self.ref} has no {name}; run `hominem artifacts verify`")
        return path


@dataclass
class Draft:
    """An artifact being written. Put files into `folder`, fill `metrics`; it is published when the block ends well."""

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None

    @property
    def published(self) -> Artifact:
        """The artifact, once the block has ended."""
        if self.artifact is None:
            raise RegistryError("the draft has not been published yet")
        return self.artifact


class Registry:
    """All artifacts below one home folder.

    Args:
        home: `$HOMINEM_HOME`; made when missing.
    """

    def __init__(self, home: str | os.PathLike):
        self.home = Path(home).expanduser().absolute()
        self.root = self.home / "artifacts"

    # --- writing ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def draft(
        self,
        kind: str,
        *,
        parents: Sequence[Artifact] = (),
        config: dict | None = None,
        seed: int | None = None,
        inputs: dict[str, str] | None = None,
        manifold: Manifold = MANIFOLD,
        tags: Iterable[str] = (),
    ) -> Iterator[Draft]:
        """Write an artifact; it appears when the block ends well and leaves nothing when it does not.

        Args:
            kind: one of `KINDS`.
            parents: what it was made from.
            config: resolved settings that shaped the content (part of its identity).
            seed: the seed that shaped it.
            inputs: content hashes of inputs that are not artifacts, by name (part of its identity).
            manifold: the manifold its numbers are in.
            tags: tags to set at once.
        """
        folder = self._folder(kind)
        with scratch_folder(folder, prefix=f".draft-{os.getpid()}-") as scratch:
            draft = Draft(scratch)
            yield draft
            files = sha256_folder(scratch)
            if not files:
                raise RegistryError(f"an empty {kind} cannot be published")
            identity = {
                "kind": kind,
                "files": files,
                "parents": [parent.hash for parent in parents],
                "config": config or {},
                "seed": seed,
                "inputs": inputs or {},
                "manifold": manifold.hash,
            }
            content_hash = sha256_json(identity)
            metadata = {
                "kind": kind,
                "content_hash": content_hash,
                "created_at": _now(),
                "parents": [parent.ref for parent in parents],
                "parent_hashes": identity["parents"],
                "inputs": identity["inputs"],
                "seed": seed,
                "manifold": {"version": manifold.version, "hash": manifold.hash, "dimensions": list(manifold.names)},
                "config": identity["config"],
                "metrics": draft.metrics,
                "notes": draft.notes,
                "packages": _package_versions(),
                "files": files,
            }
            draft.artifact = self._publish(kind, scratch, metadata)
            for tag in tags:
                self.tag(draft.artifact, tag)

    def _publish(self, kind: str, scratch: Path, metadata: dict) -> Artifact:
        folder = self._folder(kind)
        with self._lock(f"publishing a {kind}"):
            for artifact in self.artifacts(kind):
                if artifact.hash == metadata["content_hash"]:
                    return artifact
            ordinals = [int(name.split("-")[0]) for name in self._versions(kind)]
            version = f"{max(ordinals, default=0) + 1:04d}-{metadata['content_hash'][:8]}"
            write_json(scratch / METADATA, {"version": version, **metadata})
            for path in [*scratch.rglob("*"), scratch]:
                sync(path)
            os.chmod(scratch, 0o755)
            os.rename(scratch, folder / version)
            sync(folder)
        self.audit("publish", f"{kind}/{version}")
        return self.get(kind, version)

    def tag(self, artifact: Artifact, tag: str) -> None:
        """Give an artifact a name people can use instead of its version; tagged artifacts are never collected."""
        if not re.fullmatch(r"[A-Za-z][\w.:-]{0,63}", tag) or tag in ("current", "none"):
            raise RegistryError(f"{tag!r} is not a tag: start with a letter; letters, digits, . : _ - follow")
        with self._lock("tagging"):
            tags = self._read(artifact.kind, "tags.json", {})
            tags.setdefault(artifact.version, [])
            if tag not in tags[artifact.version]:
                tags[artifact.version].append(tag)
                write_json(self._folder(artifact.kind) / "tags.json", tags)

    def use(self, artifact: Artifact, *, pointer: str = ANY_BASE, note: str = "") -> None:
        """Make an artifact `current`. The pointer file is the commit; history is written before it.

        Args:
            artifact: what to use.
            pointer: for adapters the base model they belong to, else `ANY_BASE`.
            note: kept in history.
        """
        self._move_pointer(artifact.kind, pointer, artifact.version, "use", note)

    def rollback(self, kind: str, *, pointer: str = ANY_BASE, note: str = "") -> Artifact | None:
        """Go back to what was current before; None when that was nothing (the bare base). Can be repeated.

        Raises: RegistryError when there is nothing to go back from.
        """
        current = self.pointers(kind).get(pointer)
        if current is None:
            raise RegistryError(f"no {kind} is in use, so there is nothing to roll back")
        moves = [move for move in self.history(kind) if move["pointer"] == pointer and move["action"] == "use"]
        before = next((move["previous"] for move in reversed(moves) if move["version"] == current), None)
        self._move_pointer(kind, pointer, before, "rollback", note)
        return self.get(kind, before) if before else None

    def _move_pointer(self, kind: str, pointer: str, version: str | None, action: str, note: str) -> None:
        with self._lock(f"{action} of a {kind}"):
            pointers = self.pointers(kind)
            previous = pointers.get(pointer)
            if previous == version:
                return
            move = {"action": action, "pointer": pointer, "version": version, "previous": previous, "at": _now()}
            if note:
                move["note"] = note
            folder = self._folder(kind)
            write_json(folder / "history.json", [*self.history(kind), move])
            pointers.pop(pointer, None)
            if version is not None:
                pointers[pointer] = version
            write_json(folder / "current.json", pointers)
        self.audit(action, f"{kind}/{version}", note=note)

    def audit(self, action: str, ref: str, **details) -> None:
        """Add a line to `audit.jsonl`: what was trained, published, used, rolled back or deleted, and when."""
        with lock(self.home / "locks" / "audit.lock", "auditing"):
            row = {"at": _now(), "action": action, "ref": ref, **{k: v for k, v in details.items() if v}}
            append_jsonl(self.home / "audit.jsonl", [row])

    def examined(self, artifact: Artifact, reasons: Sequence[str], *, by: str) -> None:
        """Note that `by` (a command) has examined an artifact, and why it refused it; no reason: it did not."""
        self.audit("examine", artifact.ref, by=by, refused=list(reasons))

    def refused(self, artifact: Artifact) -> list[str]:
        """Why an artifact should not be used, by the last word of each command that examined it."""
        last = {row.get("by"): row.get("refused", []) for row in self._audited(artifact.ref, "examine")}
        return list(dict.fromkeys(reason for reasons in last.values() for reason in reasons))

    def _last_audit(self, ref: str) -> str | None:
        actions = [row.get("action") for row in self._audited(ref)]
        return actions[-1] if actions else None

    def _audited(self, ref: str, action: str | None = None) -> list[dict]:
        path = self.home / "audit.jsonl"
        rows = read_objects(path, torn_tail=True)[0] if path.exists() else []
        ours = [row for _, row in rows if isinstance(row, dict) and row.get("ref") == ref]
        return [row for row in ours if action in (None, row.get("action"))]

    # --- reading ---------------------------------------------------------------------------------------------------

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """Artifacts of one kind, or of all, oldest first. A damaged one is left to `verify`."""
        found = []
        for each in [kind] if kind else KINDS:
            for version in self._versions(each):
                with contextlib.suppress(RegistryError):
                    found.append(self._load(each, version))
        return found

    def get(self, kind: str, name: str = "current", *, pointer: str = ANY_BASE) -> Artifact:
        """The artifact called `name`: `current`, a version, the start of one (`7`, `0007`, a hash), or a tag."""
        self._folder(kind)
        if name == "current":
            version = self.pointers(kind).get(pointer)
            if version is None:
                raise RegistryError(f"no {kind} is in use yet; see `hominem artifacts list {kind}`")
            return self._load(kind, version)
        versions = self._versions(kind)
        if name in versions:
            return self._load(kind, name)
        tagged = [version for version, tags in self._read(kind, "tags.json", {}).items() if name in tags]
        digits = [v for v in versions if name.isdigit() and int(v.split("-")[0]) == int(name)]
        matches = (
            tagged or digits or [v for v in versions if len(name) >= 4 and name in (v[: len(name)], v[5:][: len(name)])]
        )
        if len(matches) == 1:
            return self._load(kind, matches[0])
        if matches:
            raise RegistryError(f"{kind} {name!r} may be any of {', '.join(sorted(matches))}; write more of it")
        known = f"there are {', '.join(versions[-5:])}" if versions else f"there is no {kind} yet"
        raise RegistryError(f"there is no {kind} called {name!r}; {known}")

    def find(self, ref: str) -> Artifact:
        """The artifact of a `kind/version` reference, or of a bare version when only one kind has it."""
        kind, slash, name = ref.partition("/")
        if slash:
            return self.get(kind, name)
        matches = []
        for each in KINDS:
            with contextlib.suppress(RegistryError):
                if ref != "current":
                    matches.append(self.get(each, ref))
        if len(matches) != 1:
            kinds = ", ".join(artifact.ref for artifact in matches) or "none"
            raise RegistryError(f"{ref!r} names {len(matches)} artifacts ({kinds}); write it as kind/version")
        return matches[0]

    def at(self, folder: Path) -> Artifact | None:
        """The artifact that lies in this very folder, or None: for models, which are known by their folder."""
        kind, version = Path(folder).resolve().parts[-2:]
        is_ours = Path(folder).resolve().parents[1] == self.root.resolve() and kind in KINDS
        return self._load(kind, version) if is_ours and version in self._versions(kind) else None

    def current(self, kind: str, *, pointer: str = ANY_BASE) -> Artifact | None:
        """What is in use, or None."""
        version = self.pointers(kind).get(pointer)
        return self._load(kind, version) if version else None

    def pointers(self, kind: str) -> dict[str, str]:
        """Versions in use by pointer name."""
        return self._read(kind, "current.json", {})

    def history(self, kind: str) -> list[dict]:
        """Every move of a pointer, oldest first."""
        return self._read(kind, "history.json", [])

    def tags(self, artifact: Artifact) -> list[str]:
        """The artifact's tags."""
        return self._read(artifact.kind, "tags.json", {}).get(artifact.version, [])

    def search(self, text: str) -> list[Artifact]:
        """Artifacts whose kind, version, tags, configuration or metrics contain every word of `text`."""
        wanted = text.lower().split()
        found = []
        for artifact in self.artifacts():
            hay = " ".join([artifact.ref, *self.tags(artifact), *_flat(artifact.metadata)]).lower()
            if all(word in hay for word in wanted):
                found.append(artifact)
        return found

    def lineage(self, artifact: Artifact) -> list[tuple[int, Artifact]]:
        """The artifact and everything it was made from, as `(depth, artifact)`, depth first."""
        found: list[tuple[int, Artifact]] = []

        def walk(node: Artifact, depth: int) -> None:
            found.append((depth, node))
            for ref in node.metadata["parents"]:
                walk(self.find(ref), depth + 1)

        walk(artifact, 0)
        return found

    # --- keeping order ---------------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Everything that is wrong: changed, missing or foreign files, lost parents, pointers to nothing."""
        problems = []
        for kind in KINDS:
            for version in self._versions(kind):
                try:
                    artifact = self._load(kind, version)
                except RegistryError as error:
                    problems.append(str(error))
                    continue
                problems += [f"{artifact.ref}: {problem}" for problem in self._check(artifact)]
            try:
                for pointer, version in self.pointers(kind).items():
                    if version not in self._versions(kind):
                        problems.append(f"{kind}/current.json: {pointer} names {version}, which is not there")
                for version in self._read(kind, "tags.json", {}):
                    if version not in self._versions(kind):
                        problems.append(f"{kind}/tags.json names {version}, which is not there")
                self.history(kind)
            except InputError as error:
                problems += error.problems
        return problems

    def _check(self, artifact: Artifact) -> Iterator[str]:
        expected = artifact.metadata["files"]
        actual = sha256_folder(artifact.folder, leave_out=[METADATA])
        yield from (f"{name} is missing" for name in expected if name not in actual)
        yield from (f"{name} does not belong to it" for name in actual if name not in expected)
        yield from (f"{name} was changed" for name in expected if actual.get(name, expected[name]) != expected[name])
        if not artifact.hash.startswith(artifact.version.split("-")[1]):
            yield "its version does not match its hash"
        for ref in artifact.metadata["parents"]:
            parent_kind, version = ref.split("/")
            if version not in self._versions(parent_kind):
                yield f"its parent {ref} is not there"

    def reachable(self) -> set[str]:
        """References that must be kept: in use, tagged, needed for a rollback, and all their ancestors."""
        roots: set[str] = set()
        for kind in KINDS:
            versions = set(self.pointers(kind).values()) | set(self._read(kind, "tags.json", {}))
            versions |= {move[end] for move in self.history(kind) for end in ("version", "previous") if move[end]}
            roots |= {f"{kind}/{version}" for version in versions if version in self._versions(kind)}
        kept: set[str] = set()
        while roots:
            ref = roots.pop()
            if ref not in kept:
                kept.add(ref)
                kind, version = ref.split("/")
                if version in self._versions(kind):
                    roots |= set(self._load(kind, version).metadata["parents"])
        return kept

    def gc(self, *, min_age_seconds: float = 86400.0, dry_run: bool = False) -> list[str]:
        """Delete what nothing needs, and the leavings of killed writers. Returns what went (or would go).

        Args:
            min_age_seconds: younger artifacts stay: a run in progress may be about to name them as parents. Younger
                temporary files stay too: their writer may run where its number means nothing here.
            dry_run: only say.
        """
        gone = []
        with self._lock("collecting garbage"):
            kept = self.reachable()
            for kind in KINDS:
                folder = self.root / kind
                if not folder.exists():
                    continue
                for path in sorted(folder.glob(".draft-*")):
                    pid = path.name.split("-")[1]
                    if not (pid.isdigit() and is_alive(int(pid))):
                        gone.append(f"{kind}/{path.name}")
                        if not dry_run:
                            shutil.rmtree(path, ignore_errors=True)
                for path in sorted(folder.glob(".trash-*")):  # of a collection that was killed: it ends here
                    gone.append(f"{kind}/{path.name}")
                    if not dry_run:
                        ref = f"{kind}/{path.name.removeprefix('.trash-')}"
                        if self._last_audit(ref) != "delete":
                            self.audit("delete", ref)
                        shutil.rmtree(path, ignore_errors=True)
                for version in self._versions(kind):
                    ref, path = f"{kind}/{version}", folder / version
                    if ref in kept or time.time() - path.stat().st_mtime < min_age_seconds:
                        continue
                    gone.append(ref)
                    if not dry_run:
                        trash = folder / f".trash-{version}"
                        os.rename(path, trash)
                        self.audit("delete", ref)  # the trash goes last: after a kill it tells that this may be missing
                        shutil.rmtree(trash, ignore_errors=True)
            for path in leftovers(self.home, min_age_seconds=min_age_seconds):
                gone.append(path.relative_to(self.home).as_posix())
                if not dry_run:
                    path.unlink(missing_ok=True)
        return gone

    # --- inside ----------------------------------------------------------------------------------------------------

    def _lock(self, purpose: str):
        return lock(self.home / "locks" / "registry.lock", purpose)

    def _folder(self, kind: str) -> Path:
        if kind not in KINDS:
            raise RegistryError(f"there is no kind {kind!r}; kinds are {', '.join(KINDS)}")
        return self.root / kind

    def _versions(self, kind: str) -> list[str]:
        folder = self._folder(kind)
        names = os.listdir(folder) if folder.exists() else []
        return sorted(name for name in names if re.fullmatch(r"\d{4,}-[0-9a-f]{8}", name))

    def _load(self, kind: str, version: str) -> Artifact:
        folder = self._folder(kind) / version
        try:
            metadata = read_json(folder / METADATA)
            if metadata["version"] != version or metadata["kind"] != kind:
                raise KeyError("version")
            return Artifact(kind, version, folder, metadata)
        except (InputError, KeyError, TypeError) as error:
            raise RegistryError(f"{kind}/{version} is missing or damaged ({error}); roll back or delete it") from None

    def _read(self, kind: str, name: str, default):
        path = self._folder(kind) / name
        return read_json(path) if path.exists() else default


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _flat(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item, prefix)
    else:
        yield f"{prefix.rstrip('.')}={value if isinstance(value, str) else json.dumps(value)}"
