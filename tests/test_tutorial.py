"""The tutorial says only what is so: commands parse, settings exist, rows load, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from hominem_mlx.cli import cli
from hominem_mlx.config import load_config
from hominem_mlx.data import dataset

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "TUTORIAL.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^bin/hominem (.+)$", TEXT, re.MULTILINE)
ROWS = re.findall(r"`mine/(\w+)\.jsonl`[^`]*(?:`[^`]+`[^`]*)?```json\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_tutorial_is_one(line):
    words = shlex.split(line)
    if words[0] == "test":  # the shim's own
        return
    command, context = cli, None
    while hasattr(command, "get_command"):
        context = command.make_context(words[0], [], parent=context, resilient_parsing=True)
        command, words = command.get_command(context, words[0]), words[1:]
        assert command is not None, line
    parsed = command.make_context(command.name, words, parent=context)
    load_config(overrides=parsed.params.get("overrides") or ())


def test_rows_of_the_tutorial_load(home, tmp_path):
    assert [name for name, _ in ROWS] == ["prompts", "memories", "questions", "labels", "pairs"]
    for name, rows in ROWS:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(rows)
        counts = dataset.import_file(home, path, labeller="human")
        assert sum(count["added"] for count in counts.values()) == len(rows.splitlines())


def test_links_of_the_tutorial_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []
