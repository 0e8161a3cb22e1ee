"""Pages that cannot rot: `python -m hominem_mlx.cli.docs` writes docs/CLI.md and the shipped hominem.toml anew."""

from pathlib import Path

import click

from hominem_mlx.cli import cli
from hominem_mlx.cli.session import TEMPLATE
from hominem_mlx.cli.settings import template

HEAD = """\
# Command line

Generated from the commands by `python -m hominem_mlx.cli.docs`; a test keeps the two equal.

Every command takes `--home`. Commands that read settings take `--config FILE` and `table.key=value` words; settings are
found in this order: word > `--config` > `$HOMINEM_HOME/hominem.toml` > default. Commands with a result take
`--json PATH` (`-` is standard output; progress and tables are on standard error then).

| exit code | means |
|---|---|
| 0 | done |
| 1 | judged, and not good enough |
| 2 | bad input: the message says which file, line, field or setting, and the way out |
| 130 | interrupted (Ctrl-C) |
| 70 | a mistake in hominem itself |
| 141 | whoever read the output went away |

Completion: zsh, see `scripts/setup-env.zsh`; bash: `eval "$(_HOMINEM_COMPLETE=bash_source hominem)"`.
"""
WIDTH = 100


def commands(group: click.Group, ctx: click.Context):
    """Every command below a group with its context, in the order of the help."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is not None and not command.hidden:
            inner = click.Context(command, parent=ctx, info_name=name)
            yield command, inner
            if isinstance(command, click.Group):
                yield from commands(command, inner)


def everything():
    """Every command with its context, the top first."""
    settings = {**cli.context_settings, "max_content_width": WIDTH, "terminal_width": WIDTH}
    top = click.Context(cli, info_name="hominem", **settings)
    yield cli, top
    yield from commands(cli, top)


def page() -> str:
    """docs/CLI.md."""
    parts = [HEAD]
    for command, ctx in everything():
        level = "##" if len(ctx.command_path.split()) < 3 else "###"
        parts.append(f"\n{level} {ctx.command_path}\n\n```text\n{command.get_help(ctx).rstrip()}\n```\n")
    return "".join(parts)


def main() -> None:
    """Write both files, in a source tree."""
    root = Path(__file__).parents[3]
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "CLI.md").write_text(page(), encoding="utf-8")
    TEMPLATE.write_text(template(), encoding="utf-8")


if __name__ == "__main__":
    main()
