"""The registry: immutable, complete after any kill, reversible, and never collecting what is needed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest

from hominem_mlx.errors import InputError, RegistryError
from hominem_mlx.files import write_json
from hominem_mlx.storage.registry import KINDS, METADATA, Registry


def make(registry, kind="raw", text="x", parents=(), **options):
    with registry.draft(kind, parents=parents, **options) as draft:
        (draft.folder / "file.txt").write_text(text)
    return draft.published


def test_equal_content_is_one_artifact_and_any_difference_is_another(registry):
    first = make(registry, config={"k": 1}, seed=1)
    assert make(registry, config={"k": 1}, seed=1).ref == first.ref
    others = [
        make(registry, text="y", config={"k": 1}, seed=1),
        make(registry, config={"k": 2}, seed=1),
        make(registry, config={"k": 1}, seed=2),
        make(registry, config={"k": 1}, seed=1, parents=[first]),
        make(registry, config={"k": 1}, seed=1, inputs={"a": "b"}),
    ]
    assert len({artifact.version for artifact in [first, *others]}) == 6
    assert [artifact.version[:4] for artifact in others] == ["0002", "0003", "0004", "0005", "0006"]


def test_metadata_says_where_it_came_from(registry):
    parent = make(registry)
    child = make(registry, "dataset", parents=[parent], config={"pairs": {"min_margin": 0.1}}, seed=3)
    metadata = child.metadata
    assert metadata["parents"] == [parent.ref] and metadata["seed"] == 3 and metadata["config"]["pairs"]
    assert metadata["manifold"]["dimensions"][0] == "empathy" and "mlx" in metadata["packages"]
    assert [(depth, node.ref) for depth, node in registry.lineage(child)] == [(0, child.ref), (1, parent.ref)]


def test_a_failed_draft_leaves_nothing(registry):
    with pytest.raises(ZeroDivisionError), registry.draft("raw") as draft:
        (draft.folder / "file.txt").write_text("x")
        _ = 1 / 0
    assert registry.artifacts() == [] and os.listdir(registry.root / "raw") == []


def test_an_empty_artifact_is_refused(registry):
    with pytest.raises(RegistryError, match="empty"), registry.draft("raw"):
        pass


def test_names_resolve_and_strangers_are_told_what_there_is(registry):
    first, second = make(registry), make(registry, text="y")
    registry.use(second)
    registry.tag(first, "good")
    assert registry.get("raw").ref == registry.get("raw", "2").ref == registry.get("raw", second.version[5:]).ref
    assert registry.get("raw", "good").ref == registry.get("raw", "0001").ref == registry.find("good").ref == first.ref
    with pytest.raises(RegistryError, match=rf"no raw called 'nine'; there are {first.version}"):
        registry.get("raw", "nine")
    with pytest.raises(RegistryError, match="there is no kind 'cake'"):
        registry.get("cake")
    with pytest.raises(RegistryError, match="not a tag"):
        registry.tag(first, "7 up")


def test_rollback_goes_back_step_by_step_to_the_bare_base(registry):
    a, b, c = (make(registry, "lora", text) for text in "abc")
    for artifact in (a, b, c):
        registry.use(artifact, pointer="base@1")
    registry.use(a, pointer="other@2")
    assert registry.rollback("lora", pointer="base@1").ref == b.ref
    assert registry.rollback("lora", pointer="base@1").ref == a.ref
    assert registry.rollback("lora", pointer="base@1") is None
    assert registry.pointers("lora") == {"other@2": a.version}
    with pytest.raises(RegistryError, match="nothing to roll back"):
        registry.rollback("lora", pointer="base@1")
    assert [move["action"] for move in registry.history("lora")] == ["use"] * 4 + ["rollback"] * 3


def test_garbage_collection_spares_whatever_is_reachable(registry):
    raw, tagged_parent, lost = make(registry), make(registry, text="t"), make(registry, text="lost")
    used = make(registry, "dataset", "d", parents=[raw])
    tagged = make(registry, "dataset", "e", parents=[tagged_parent])
    replaced = make(registry, "dataset", "f")
    for artifact in (replaced, used):
        registry.use(artifact)
    registry.tag(tagged, "keep")
    assert registry.gc(min_age_seconds=0, dry_run=True) == [lost.ref]
    assert registry.gc() == []  # too young
    assert registry.gc(min_age_seconds=0) == [lost.ref]
    assert registry.gc(min_age_seconds=0) == [] and registry.verify() == []
    assert registry.rollback("dataset").ref == replaced.ref


def test_garbage_collection_sweeps_the_temporary_files_of_the_dead_alone(registry, home):
    gone = multiprocessing.Process(target=int)
    gone.start()
    gone.join()
    dead, alive = (home / "data" / "raw" / f".prompts.jsonl.{pid}-abcd_123.tmp" for pid in (gone.pid, os.getpid()))
    dead.parent.mkdir(parents=True)
    for path in (dead, alive):
        path.touch()
        os.utime(path, (0, 0))
    name = dead.relative_to(home).as_posix()
    assert registry.gc(dry_run=True) == [name] and dead.exists()
    assert registry.gc() == [name]
    assert not dead.exists() and alive.exists()


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("where", ["audit", "rmtree"])
def test_a_collection_killed_at_any_step_is_audited_exactly_once(registry, monkeypatch, where):
    lost = make(registry, text="lost")

    def die(*args, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(registry if where == "audit" else shutil, where, die)
        with pytest.raises(Killed):
            registry.gc(min_age_seconds=0)
    assert not lost.folder.exists()
    assert registry.gc(min_age_seconds=0) == [f"raw/.trash-{lost.version}"]
    assert registry.gc(min_age_seconds=0) == []
    rows = [json.loads(line) for line in (registry.home / "audit.jsonl").read_text().splitlines()]
    assert [(row["action"], row["ref"]) for row in rows] == [("publish", lost.ref), ("delete", lost.ref)]


def test_verify_finds_every_kind_of_damage(registry):
    a, b, c = make(registry, text="a"), make(registry, text="b"), make(registry, text="c")
    child = make(registry, "dataset", parents=[c])
    assert registry.verify() == []
    (a.folder / "file.txt").write_text("changed")
    (a.folder / "guest.txt").write_text("?")
    (b.folder / "file.txt").unlink()
    (b.folder / METADATA).rename(b.folder / "gone")
    shutil.rmtree(c.folder)
    write_json(registry.root / "lora" / "current.json", {"base": "0009-00000000"})
    text = "\n".join(registry.verify())
    for piece in (f"{a.ref}: file.txt was changed", "guest.txt does not belong", f"{b.ref} is missing or damaged"):
        assert piece in text
    assert f"{child.ref}: its parent {c.ref} is not there" in text and "names 0009-00000000" in text


def test_damaged_bookkeeping_is_reported_not_swallowed(registry):
    make(registry)
    (registry.root / "raw" / "current.json").write_text("{")
    assert any("current.json" in problem for problem in registry.verify())
    with pytest.raises(InputError):
        registry.current("raw")


def test_search_reads_tags_settings_and_metrics(registry):
    a, b = make(registry, config={"dual": {"rank": 8}}), make(registry, text="y", config={"dual": {"rank": 4}})
    registry.tag(b, "cosy")
    assert [x.ref for x in registry.search("rank=8")] == [a.ref] and [x.ref for x in registry.search("COSY raw")] == [
        b.ref
    ]


def _publish_many(home, start):
    registry = Registry(home)
    for number in range(start, start + 8):
        make(registry, text=f"text {number}")


def test_writers_at_once_never_share_an_ordinal(home):
    processes = [multiprocessing.Process(target=_publish_many, args=(home, 100 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    versions = [artifact.version for artifact in Registry(home).artifacts("raw")]
    assert [int(version[:4]) for version in versions] == list(range(1, 25)) and Registry(home).verify() == []


def _work_for_ever(home):
    registry, number = Registry(home), 0
    while True:
        number += 1
        artifact = make(registry, text=f"text {number}")
        registry.use(artifact)
        registry.tag(artifact, "newest")
        if number % 3 == 0:
            registry.rollback("raw")
        registry.gc(min_age_seconds=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_kill_at_any_moment_leaves_a_registry_that_verifies_and_goes_on(home, seed):
    process = multiprocessing.Process(target=_work_for_ever, args=(home,))
    process.start()
    time.sleep(0.15 + random.Random(seed).random() * 0.25)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    registry = Registry(home)
    assert registry.verify() == []
    current = registry.current("raw")
    registry.gc(min_age_seconds=0)
    assert registry.verify() == [] and registry.current("raw") == current
    assert not [name for kind in KINDS for name in _listing(registry, kind) if name.startswith((".draft", ".trash"))]
    registry.use(make(registry, text="after"))
    assert registry.verify() == []


def _listing(registry, kind):
    return os.listdir(registry.root / kind) if (registry.root / kind).exists() else []
