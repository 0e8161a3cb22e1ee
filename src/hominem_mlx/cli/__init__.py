"""The command line. Errors become exit codes here and nowhere else.

    0 done   1 judged not good enough   2 bad input   130 interrupted   (70: a mistake of ours; 141: nobody reads on)

`hominem --help` and shell completion must be quick, so words and their one-line help stand in tables and a command's
module is imported when the command runs. Modules of this package import nothing but click and one another at their top.
"""

import importlib
import os
import sys

import click

from hominem_mlx.errors import HominemError

BUG, NO_READER = 70, 141  # EX_SOFTWARE; what a shell reports for a writer whose pipe was closed


class LazyGroup(click.Group):
    """A group whose commands are named in a table and imported when they are used.

    Args:
        lazy: command name to (`module:attribute`, one-line help).
    """

    def __init__(self, *args, lazy: dict[str, tuple[str, str]], **kwargs):
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table, which is the order of the work."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list:
        """Names that begin so, without importing them."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(n, help=text) for n, (_, text) in self.lazy.items() if n.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        """The command of the first word; an unknown one is answered with the nearest."""
        if args[0] not in self.lazy and not args[0].startswith("-"):
            raise click.exceptions.NoSuchCommand(args[0], possibilities=self.lazy, ctx=ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context):
        """Run the command. Click would make exit code 1 of a reader that went away; here that means something else."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            return _nobody_reads()

    def main(self, *args, **kwargs):
        """Run, then leave with an exit code. Never returns."""
        kwargs["standalone_mode"] = False
        sys.exit(_exit_code(lambda: super(LazyGroup, self).main(*args, **kwargs)))


def _exit_code(run) -> int:
    try:
        result = run()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except HominemError as error:
        click.echo(f"hominem: {error}", err=True)
        return error.exit_code
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"hominem: {error.format_message()}", err=True)
        return 2
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):
            click.echo("hominem: nobody is there to answer; give --yes if the answer is yes", err=True)
            return 2
        click.echo("hominem: interrupted", err=True)
        return 130
    except KeyboardInterrupt:
        click.echo("hominem: interrupted", err=True)
        return 130
    except BrokenPipeError:
        return _nobody_reads()
    except OSError as error:
        if error.filename is None and error.errno is None:
            return _bug()
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"hominem: {place}{error.strerror or error}", err=True)
        return 2
    except Exception:
        return _bug()


def _nobody_reads() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout once more on its way out
    return NO_READER


def _bug() -> int:
    import traceback

    traceback.print_exc()
    click.echo("hominem: this is a mistake in hominem itself; the lines above say where", err=True)
    return BUG


def _module(name: str) -> str:
    return f"hominem_mlx.cli.{name}:{name}"


@click.group(
    cls=LazyGroup,
    lazy={
        "init": (_module("init"), "Choose a base model for this machine and write hominem.toml."),
        "data": (_module("data"), "Prompts, candidate replies, labels, and the datasets made of them."),
        "train": (_module("train"), "Train a reward model, an adapter, or a whole model."),
        "evaluate": (_module("evaluate"), "Judge a reward model or an adapter on held-out material."),
        "score": (_module("score"), "Let the reward model judge replies."),
        "chat": (_module("chat"), "Talk with the base and its current adapter."),
        "artifacts": (_module("artifacts"), "What was made, from what, and which of it is in use."),
        "status": (_module("status"), "What is in use, how much there is of everything, what to do next."),
        "demo": (_module("demo"), "The whole line, from prompts to a better adapter, in minutes, offline."),
        "doctor": (_module("doctor"), "Look at this machine and say what is missing or slow."),
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(package_name="hominem_mlx", prog_name="hominem")
def cli() -> None:
    """A model on your own machine that learns from what you liked and corrected.

    Begin with `hominem demo`, then `hominem init`.
    """


def main() -> None:
    """The console script."""
    cli(prog_name="hominem")
