"""hominem.toml as a person reads and edits it: every setting with its meaning, comments kept when we change a value."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

HEAD = """\
# Settings of hominem. Every line that begins with "# name = value" shows the default: take the # away to change it.
# Order: key=value on the command line > --config FILE > this file > defaults. `hominem status` shows what is in use.
# Keys and passwords do not belong here: the file names environment variables, never their contents.
"""
WIDTH = 116


def template() -> str:
    """The commented hominem.toml, made from the configuration's own words."""
    from hominem_mlx.config import Config

    parts = [HEAD]
    for table, field in Config.model_fields.items():
        section = field.annotation
        lines = ["", *_comment(section.__doc__ or ""), f"[{table}]"]
        for key, setting in section.model_fields.items():  # type: ignore[union-attr]
            lines += _comment(setting.description or "")
            default = setting.get_default()
            example = 0.5 if "float" in str(setting.annotation) else ""
            shown = f"{_toml(example)}  # not set" if default is None else _toml(default)
            lines.append(f"# {key} = {shown}")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def set_value(home: Path, key: str, value: str) -> bool:
    """Set `table.key` in the home's hominem.toml, its comments kept; makes the file when it is missing.

    Returns: whether the file had to change.
    Raises: ConfigError when the file is not TOML.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    from hominem_mlx.cli.session import TEMPLATE
    from hominem_mlx.errors import ConfigError
    from hominem_mlx.files import read_text, write_atomic

    path = home / "hominem.toml"
    text = read_text(path) if path.exists() else TEMPLATE.read_text(encoding="utf-8")
    table, _, name = key.partition(".")
    try:
        document: Any = tomlkit.parse(text)
        if document.get(table, {}).get(name) == value:
            return False
        if name in document.get(table, {}):
            document[table][name] = value
            text = tomlkit.dumps(document)
        else:
            text = _put_after_comment(text, table, name, value)
            tomlkit.parse(text)
    except TOMLKitError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    write_atomic(path, text)
    return True


def _put_after_comment(text: str, table: str, name: str, value: str) -> str:
    """The text with a new key, in the place of its commented default when that is there."""
    line = f"{name} = {json.dumps(value, ensure_ascii=False)}"
    head = re.search(rf"(?m)^\[{re.escape(table)}\][^\n]*\n?", text)
    if head is None:
        return f"{text.rstrip()}\n\n[{table}]\n{line}\n"
    start = head.end()
    following = re.search(r"(?m)^\[", text[start:])
    end = start + following.start() if following else len(text)
    default = re.search(rf"(?m)^# {re.escape(name)} = [^\n]*$", text[start:end])
    if default:
        return text[: start + default.start()] + line + text[start + default.end() :]
    gap = "" if text[:start].endswith("\n") else "\n"
    return f"{text[:start]}{gap}{line}\n{text[start:]}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH)]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)
