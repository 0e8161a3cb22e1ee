"""Reading and writing files so that a kill at any moment loses nothing.

Writes go to a temporary file in the same folder, are synced, then renamed: a reader sees the old file or the new one.
Append-only logs take one `write` per record; the half line a kill may leave is dropped by the next writer.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hominem_mlx.errors import BusyError, InputError

Record = TypeVar("Record", bound=BaseModel)
MAX_LINE_BYTES = 1 << 20  # a longer JSONL line is a wrong file, not a row
TEMPORARY = re.compile(r"\..+\.(\d{1,9})-\w+\.tmp")  # what `write_atomic` writes to, with its process


# --- hashes ---------------------------------------------------------------------------------------------------------


def sha256_bytes(data: bytes) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value) -> str:
    """Hex digest of a JSON value, independent of key order and spacing."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def sha256_folder(folder: Path, *, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """Digest of every file below `folder` by relative path, in path order; `leave_out` names top-level files."""
    left_out = set(leave_out)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = ((path.relative_to(folder).as_posix(), path) for path in files)
    return {name: sha256_file(path) for name, path in named if name not in left_out}


# --- atomic writes --------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` with `data` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}-", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync(path.parent)
    except OSError as error:  # nobody asked for the temporary file
        error.filename, error.filename2 = str(path), None
        raise


def replace(source: Path, path: Path) -> None:
    """Put the file `source` in the place of `path`, on the same volume, in one step."""
    sync(source)
    os.replace(source, path)
    sync(path.parent)


def leftovers(folder: Path, *, min_age_seconds: float) -> list[Path]:
    """Temporary files below `folder` that a killed `write_atomic` left: old enough, and their writer is gone."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            match = TEMPORARY.fullmatch(name)
            if match is None or is_alive(int(match[1])):
                continue
            path = Path(place) / name
            with contextlib.suppress(FileNotFoundError):  # renamed since it was listed, by a writer that ended well
                if time.time() - path.stat().st_mtime >= min_age_seconds:
                    found.append(path)
    return sorted(found)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value) -> None:
    """Replace `path` with readable JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[BaseModel | dict]) -> None:
    """Replace `path` with one JSON object a line."""
    write_atomic(path, "".join(json_line(row) for row in rows))


def json_line(row: BaseModel | dict) -> str:
    """One record as one line; fields that were never set are left out."""
    value = row.model_dump(mode="json", exclude_none=True) if isinstance(row, BaseModel) else row
    return json.dumps(value, ensure_ascii=False) + "\n"


def append_jsonl(path: Path, rows: Iterable[BaseModel | dict]) -> None:
    """Add rows to a log and sync it. A half line left by a kill is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _cut_torn_tail(file)
        file.write("".join(json_line(row) for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_tail(file) -> None:
    end = position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 4096)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        file.truncate(position)
    file.seek(0, os.SEEK_END)


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str = ".draft-") -> Iterator[Path]:
    """A temporary folder on the same volume as `parent`; gone afterwards unless it was renamed away."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- reading --------------------------------------------------------------------------------------------------------


def read_text(path: Path, *, torn_tail: bool = False) -> str:
    """The text of a file a person handed over; says what is wrong when it is missing or not UTF-8. `.gz` is unpacked.

    Args:
        path: the file.
        torn_tail: leave out a last line without newline, which may end within a character.
    """
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if Path(path).suffix == ".gz" else data
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file") from None
    except PermissionError:
        raise InputError(f"{path}: cannot be read (permission denied)") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole gzip file ({error}); fetch it again") from None
    if torn_tail:
        data = data[: data.rfind(b"\n") + 1]
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_json(path: Path):
    """A JSON value from a file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None


def read_jsonl(
    path: Path,
    model: type[Record],
    *,
    unique: str | None = "id",
    may_be_empty: bool = False,
    torn_tail: bool = False,
    context: dict | None = None,
) -> list[Record]:
    """All records of a JSONL file, or one `InputError` naming every bad line.

    Args:
        path: the file.
        model: the pydantic record each line must be.
        unique: a field whose values must not repeat, or None.
        may_be_empty: whether no rows is fine.
        torn_tail: drop a last line without newline instead of complaining: it is what a killed writer of ours leaves.
        context: what the record's validators look into, such as the manifold of a label.
    """
    values, problems = read_objects(path, torn_tail=torn_tail)
    rows: list[Record] = []
    seen: dict[object, str] = {}
    for where, value in values:
        try:
            row = model.model_validate(value, context=context)
        except ValidationError as error:
            problems += [f"{where}: {reason}" for reason in explain(error)]
            continue
        if unique is not None:
            key = getattr(row, unique)
            if key in seen:
                problems.append(f"{where}: {unique} = {key!r} is already used in {seen[key]}; give it another")
                continue
            seen[key] = f"line {where.rpartition(':')[2]}"
        rows.append(row)
    if problems:
        raise InputError(problems)
    if not rows and not may_be_empty:
        raise InputError(f"{path}: there is no row in it")
    return rows


def read_objects(path: Path, *, torn_tail: bool = False) -> tuple[list[tuple[str, object]], list[str]]:
    """The JSON value of every line with its place (`file:line`), and what is wrong with the lines that hold none."""
    values: list[tuple[str, object]] = []
    problems: list[str] = []
    # Not splitlines: U+2028 is legal inside JSON strings.
    for number, line in enumerate(read_text(path, torn_tail=torn_tail).split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if len(line.encode()) > MAX_LINE_BYTES:
            problems.append(f"{where}: the line is longer than {MAX_LINE_BYTES:,} bytes; is this the right file?")
            continue
        try:
            values.append((where, json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON ({error.msg} at column {error.colno}): is the line cut off?")
        except (RecursionError, ValueError):  # the latter: an integer of thousands of digits
            problems.append(f"{where}: nested too deeply or with an endless number; is this the right file?")
    return values, problems


def explain(error: ValidationError) -> list[str]:
    """A pydantic error as plain sentences: `reward.empathy = 1.7: input should be at most 1`."""
    reasons = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"]) or "row"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            reasons.append(f"{place} is missing")
            continue
        reasons.append(f"{place} = {shown(item.get('input'))}: {message[:1].lower()}{message[1:]}")
    return reasons


def shown(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- locks ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, purpose: str, *, wait: bool = True) -> Iterator[None]:
    """Hold `path` exclusively. The kernel drops it when the holder dies, so a kill leaves nothing to clean up.

    Args:
        path: the lock file; made when missing, never removed (removing would let two processes hold "the" lock).
        purpose: what the holder is doing, shown to whoever finds it locked.
        wait: wait for the holder, or raise `BusyError` at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{path.name} is held by {holder}; wait for it or end that process") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} ({purpose})")
        file.flush()
        yield


def lock_holder(path: Path) -> str | None:
    """Who holds `path` and for what, or None when it is free. Only looks; a lock seen free may be taken right after."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None
