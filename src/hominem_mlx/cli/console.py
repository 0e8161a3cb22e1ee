"""What a command shows: lines, tables, progress, and the JSON twin of a table.

Results go to stdout and progress to stderr. With `--json -` stdout carries the JSON alone and everything else moves to
stderr. Rich is loaded for terminals only; a pipe gets plain aligned text, whole and without colours. NO_COLOR holds.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

LONGEST_NAME = 32
SECONDS_BETWEEN_LINES = 5.0  # of progress where there is no terminal to draw on


class Console:
    """One command's output.

    Args:
        json_path: value of `--json`: a file, `-` for stdout, or None.
    """

    def __init__(self, json_path: str | None = None):
        self.json_path = json_path
        self.to_stderr = json_path == "-"

    def say(self, text: str = "") -> None:
        """A line of the result, for people."""
        click.echo(text, err=self.to_stderr)

    def note(self, text: str) -> None:
        """A line about the work, not part of the result."""
        click.echo(text, err=True)

    def result(self, value: Any) -> None:
        """The result for programs, where `--json` asked for it."""
        if self.json_path is None:
            return
        from hominem_mlx.files import write_json

        if self.to_stderr:
            click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
        else:
            write_json(Path(self.json_path), json.loads(json.dumps(value, default=str)))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are right-aligned, None is empty."""
        cells = [[_shown(value) for value in row] for row in rows]
        right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
        stream = sys.stderr if self.to_stderr else sys.stdout
        if stream.isatty():
            _draw(columns, cells, right, stream)
            return
        for line in _aligned(columns, cells, right):
            self.say(line)

    @contextmanager
    def progress(self) -> Iterator:
        """Gives the callback that long work reports to: `{"stage", "done", "total", ...}`.

        An event with a `note` is a line to be read, and no progress.
        """
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            with _bars() as report:
                yield report
        else:
            yield _Lines(self.note)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    return " ".join(str(value).split())


def _aligned(columns: Sequence[str], cells: list[list[str]], right: list[bool]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        yield "  ".join(padded).rstrip()


def _draw(columns: Sequence[str], cells: list[list[str]], right: list[bool], stream) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console as Rich
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, (name, is_right) in enumerate(zip(columns, right, strict=True)):
        is_name = (
            max((len(row[index]) for row in cells), default=0) <= LONGEST_NAME
        )  # people copy names: keep them whole
        table.add_column(name, justify="right" if is_right else "left", overflow="fold", no_wrap=is_name)
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    Rich(file=stream).print(table)


@contextmanager
def _bars() -> Iterator:
    from rich.console import Console as Rich
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    more = TextColumn("{task.fields[more]}", table_column=Column(no_wrap=False))  # on a narrow terminal in two lines
    with Progress(*columns, more, console=Rich(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def report(event: dict[str, Any]) -> None:
            if "note" in event:
                progress.console.print(f"{event['stage']}: {event['note']}", markup=False, highlight=False)
                return
            stage, total = event["stage"], event.get("total")
            if stage not in tasks or progress.tasks[tasks[stage]].finished:
                tasks[stage] = progress.add_task(stage, total=total, more="")
            progress.update(tasks[stage], completed=event["done"], total=total, more=_details(event))

        yield report


class _Lines:
    """Progress where nothing can be drawn over: a line at the end of each stage, and one now and then in between."""

    def __init__(self, note):
        self.note = note
        self.stages: dict[str, tuple[float, float, int]] = {}  # when it began, when it last spoke, what was done then

    def __call__(self, event: dict[str, Any]) -> None:
        if "note" in event:
            self.note(f"{event['stage']}: {event['note']}")
            return
        now = time.monotonic()
        stage, done, total = event["stage"], event["done"], event.get("total")
        began, spoke, before = self.stages.get(stage, (now, now, 0))
        if done < before:  # the next one of the same name
            began, spoke = now, now
        is_quiet = done != total and now - spoke < SECONDS_BETWEEN_LINES
        self.stages[stage] = began, spoke if is_quiet else now, done
        if done == total:
            del self.stages[stage]
        if is_quiet:
            return
        spent = now - began
        left = ""
        if total and done and done < total:  # work that went on where it was knows better how fast it is
            left = f", about {event.get('seconds_left', spent / done * (total - done)):.0f} s left"
        details = f", {text}" if (text := _details(event)) else ""
        self.note(f"{stage}: {done}/{total or '?'}, {spent:.0f} s{left}{details}")


def _details(event: dict[str, Any]) -> str:
    """What training tells beside its place: losses, speed and memory."""
    losses = [f"{name} {event[name]:.3f}" for name in ("memory", "preference") if isinstance(event.get(name), float)]
    shown = [f"loss: {', '.join(losses)}"] * bool(losses)
    if "tokens_per_second" in event:
        shown.append(f"{event['tokens_per_second']:.0f} tokens/s")
    if "peak_gb" in event:
        shown.append(f"peak {event['peak_gb']:.1f} GB")
    return ", ".join(shown)
