"""What every command shares: the options, the home, the configuration, the registry, the models it names."""

import functools
import os
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hominem_mlx.cli.console import Console

if TYPE_CHECKING:
    from hominem_mlx.config import Config
    from hominem_mlx.models.backbone import LanguageModel
    from hominem_mlx.reward.model import RewardModel
    from hominem_mlx.schema import Generator
    from hominem_mlx.storage.registry import Artifact, Registry

TEMPLATE = Path(__file__).parents[1] / "starter" / "hominem.toml"


class InOrder(click.Group):
    """A group whose help lists commands in the order of the work, which is that of the module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names as they were defined."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The first sentence of each command, whole."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=999)) for name in self.commands])


class Words(click.ParamType):
    """What somebody said, as an option. Bytes that are not UTF-8 arrive as characters that no tokenizer can read."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text as it is, or the place of its first byte that is no text."""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            read = value[max(0, error.start - 20) : error.start]
            where = f"after {read!r}" if read else "at its start"
            self.fail(f"is not UTF-8 {where}; give it as UTF-8, or in a --file", param, ctx)
        return value


class Session:
    """One call of the command line. Everything is loaded when it is first asked for."""

    def __init__(
        self, home: str | None, config: str | None = None, overrides: tuple[str, ...] = (), json: str | None = None
    ):
        self.config_file, self.overrides = config, overrides
        self.console = Console(json)
        self._home = home
        self.home_was_given = home is not None

    def override(self, setting: str) -> None:
        """Add a `table.key=value` of the command's own, stronger than all others."""
        self.overrides += (setting,)
        self.__dict__.pop("config", None)

    @property
    def words(self) -> list[str]:
        """The common options as they were given, for the same command in another process."""
        given = (("--home", self._home), ("--config", self.config_file), ("--json", self.console.json_path))
        return [*(word for name, value in given if value is not None for word in (name, value)), *self.overrides]

    @cached_property
    def home(self) -> Path:
        """The home folder; it may not be there yet."""
        from hominem_mlx.config import home_folder

        return home_folder(self._home)

    @cached_property
    def config(self) -> "Config":
        """The resolved configuration: flags over `--config` over hominem.toml over defaults."""
        from hominem_mlx.config import load_config

        return load_config(self.home, Path(self.config_file) if self.config_file else None, self.overrides)

    @cached_property
    def registry(self) -> "Registry":
        """The artifacts of this home."""
        from hominem_mlx.storage.registry import Registry

        return Registry(self.home)

    @cached_property
    def base(self) -> "LanguageModel":
        """The configured base model, without an adapter."""
        from hominem_mlx.models import backbone

        student = self.config.student
        is_here = student.base == "starter" or student.base.startswith("full/")
        is_told = os.environ.get("MLX_RANK", "0") == "0"  # of several processes of one training the first alone speaks
        if is_told and not is_here and not Path(student.base).expanduser().exists():
            self.console.note(f"Looking for {student.base}; it is downloaded when it is not here yet.")
        return backbone.load(student.base, revision=student.revision or None, home=self.home)

    def current(self, kind: str, maker: str, *, pointer: str = "default") -> "Artifact":
        """The artifact in use; where there is none, RegistryError names the command that makes one."""
        from hominem_mlx.errors import RegistryError

        found = self.registry.current(kind, pointer=pointer)
        if found is None:
            what = kind if pointer == "default" else f"{kind} of {pointer}"
            raise RegistryError(f"there is no {what.replace('_', ' ')} yet; `{maker}` makes one")
        return found

    def adapter(self, name: str | None = None) -> "Artifact | None":
        """The adapter called `name` (else the configured one), or None for the bare base."""
        name = name or self.config.student.adapter
        if name == "none":
            return None
        if name == "current":
            return self.registry.current("lora", pointer=self.base.pointer)
        return self.registry.get("lora", name.removeprefix("lora/"))

    def speaking(self, name: str | None = None) -> "LanguageModel":
        """The base with that adapter on."""
        from hominem_mlx.models import lora

        adapter = self.adapter(name)
        if adapter is not None:
            lora.load_adapter(self.base, adapter.folder)
        return self.base

    @cached_property
    def generator(self) -> "Generator":
        """Who answers as the student: the server of `[inference]`, else the base here with its adapter."""
        if self.config.inference.endpoint:
            from hominem_mlx.data.teacher import HttpGenerator

            return HttpGenerator(self.config.inference)
        return self.speaking()

    def reward_artifact(self) -> "Artifact | None":
        """The configured reward model, or None while there is none."""
        name = self.config.student.reward_model
        if name == "current":
            return self.registry.current("reward_model")
        return self.registry.get("reward_model", name.removeprefix("reward_model/"))

    def reward_model(self) -> "RewardModel":
        """The configured reward model, ready to score."""
        from hominem_mlx.reward.model import RewardModel

        artifact = self.reward_artifact() or self.current("reward_model", "hominem train reward")
        lm = self.__dict__.get("base")  # one base in memory, if any
        return RewardModel.load(artifact.folder, lm=lm, manifold=self.config.manifold.in_use)

    def ask(self, question: str, *, yes: bool) -> bool:
        """A yes-or-no question, on stderr; `yes` answers it beforehand."""
        return yes or click.confirm(question, err=True)


def _check_overrides(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if "=" not in value:
            raise click.UsageError(
                f"{value!r} is neither an option nor a setting; settings are table.key=value, such as dual.rank=8",
                ctx=ctx,
            )
    return values


def _complete_overrides(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """`table.key=` names, read from the shipped template so that nothing heavy is imported for a Tab."""
    table, names = "", []
    for line in TEMPLATE.read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            table = match[1]
        elif match := re.match(r"# (\w+) = ", line):
            names.append(f"{table}.{match[1]}=")
    return [name for name in names if name.startswith(incomplete)]


HOME = click.option(
    "--home", metavar="FOLDER", type=click.Path(file_okay=False), help="Home; else $HOMINEM_HOME, else ~/.hominem."
)
JSON = click.option("--json", metavar="PATH", help="Write the result as JSON too; - is standard output.")
CONFIG = click.option(
    "--config", metavar="FILE", type=click.Path(dir_okay=False), help="TOML file that wins over hominem.toml."
)
OVERRIDES = click.argument(
    "overrides",
    nargs=-1,
    metavar="[TABLE.KEY=VALUE]...",
    callback=_check_overrides,
    shell_complete=_complete_overrides,
)


def shares(*, json: bool = True, config: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the common options and hand it a `Session` as its first argument.

    Args:
        json: whether the command has a result to write as JSON.
        config: whether settings matter to it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(home: str | None, **values: Any) -> None:
            own = {name: values.pop(name) for name in ("config", "overrides", "json") if name in values}
            session = Session(home, **own)
            if own.get("config") or own.get("overrides"):
                _ = session.config  # a mistyped setting is said even where this command has no use for it
            command(session, **values)

        options = [HOME, *([CONFIG, OVERRIDES] if config else []), *([JSON] if json else [])]
        return functools.reduce(lambda function, option: option(function), options, run)

    return decorate
