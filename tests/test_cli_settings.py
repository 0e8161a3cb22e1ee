"""hominem.toml: what init writes, what a person reads in it, what we change in it."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli, docs, machine, settings
from hominem_mlx.cli.init import MODELS, choose
from hominem_mlx.cli.session import TEMPLATE
from hominem_mlx.config import Config, load_config

ROOT = Path(__file__).parents[1]


def hominem(*words, **options):
    return CliRunner().invoke(cli, list(words), **options)


def test_the_shipped_template_is_the_configurations_own_words():
    assert TEMPLATE.read_text() == settings.template(), "run: python -m hominem_mlx.cli.docs"


def test_every_setting_stands_in_the_template_with_its_meaning_and_its_default(tmp_path):
    text = TEMPLATE.read_text()
    lines = text.split("\n")
    for table, field in Config.model_fields.items():
        for key in field.annotation.model_fields:
            place = lines.index(
                next(line for line in lines[lines.index(f"[{table}]") :] if line.startswith(f"# {key} = "))
            )
            assert lines[place - 1].startswith("# "), f"{table}.{key} has no explanation"
    active = re.sub(r"(?m)^# (\w+ = (?!.*# not set))", r"\1", text)
    assert active.count("\n# ") < text.count("\n# ") - 40
    (tmp_path / "hominem.toml").write_text(active)
    assert load_config(tmp_path) == Config()


def test_init_without_anyone_to_ask_downloads_nothing_and_writes_a_config_that_loads(home):
    done = hominem("init", "--json", str(home / "out.json"))
    assert done.exit_code == 0, done.output
    assert load_config(home).student.base == "starter"
    text = (home / "hominem.toml").read_text()
    assert text.replace('\nbase = "starter"', '\n# base = "starter"') == TEMPLATE.read_text()
    assert json.loads((home / "out.json").read_text())["base"] == "starter"


def test_init_keeps_the_base_and_the_comments_a_person_chose(home, tiny_folder):
    (home / "hominem.toml").write_text(f'# mine\n[student]\nbase = "{tiny_folder}" # good\n')
    assert hominem("init").exit_code == 0
    assert (home / "hominem.toml").read_text() == f'# mine\n[student]\nbase = "{tiny_folder}" # good\n'
    assert hominem("init", "--base", "starter").exit_code == 0
    assert (home / "hominem.toml").read_text() == '# mine\n[student]\nbase = "starter" # good\n'


def test_init_refuses_a_base_that_is_neither_folder_nor_repository_and_writes_nothing(home):
    done = hominem("init", "--base", "qwen")
    assert done.exit_code == 2
    assert "mlx-community/" in done.output
    assert not (home / "hominem.toml").exists()


def test_a_download_that_fails_says_so_and_writes_nothing(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "cache"))
    done = hominem("init", "--base", "mlx-community/Qwen3-0.6B-4bit", "--yes")
    assert done.exit_code == 2
    assert "could not be downloaded" in done.output
    assert not (home / "hominem.toml").exists()


def test_init_brings_in_the_starter_corpus_and_keeps_rows_of_ones_own(home):
    assert hominem("init", "--starter").exit_code == 0
    labels = home / "data" / "labeled" / "reward_samples.jsonl"
    before = labels.read_text()
    assert hominem("init", "--starter").exit_code == 0
    assert labels.read_text() == before


def test_the_suggested_model_grows_with_memory_and_yields_to_disk():
    models = tomllib.loads(MODELS.read_text())["model"]
    assert [m["memory_gb"] for m in models] == sorted(m["memory_gb"] for m in models)
    names = [choose(models, memory, 1000)["repository"] for memory in (8.6, 17.2, 34.4, 137.0)]
    assert names == [f"mlx-community/Qwen3-{size}-4bit" for size in ("1.7B", "4B", "8B", "32B")]
    assert choose(models, 137.0, 4.0)["download_gb"] <= 2.0
    assert choose(models, 2.0, 1000) is None
    for model in models:  # the sizes are arithmetic: 4.5 or 8.5 bits a weight
        weights, bits = model["repository"].split("-")[-2:]
        billions = {"0.6B": 0.596, "1.7B": 1.72, "4B": 4.02, "8B": 8.19, "14B": 14.77, "32B": 32.76}[weights]
        assert model["download_gb"] == pytest.approx(billions * (4.5 if bits == "4bit" else 8.5) / 8, rel=0.05)


def test_a_key_that_was_never_there_takes_the_place_of_its_commented_default(home):
    assert settings.set_value(home, "dual.seed", "1")
    lines = (home / "hominem.toml").read_text().split("\n")
    place = lines.index('seed = "1"')
    assert place > lines.index("[dual]")
    assert place < lines.index("[evaluation]")
    assert not settings.set_value(home, "dual.seed", "1")


def test_a_table_that_was_never_there_is_added_at_the_end(home):
    (home / "hominem.toml").write_text("[dual]\nrank = 4")
    settings.set_value(home, "student.adapter", "current")
    assert (home / "hominem.toml").read_text() == '[dual]\nrank = 4\n\n[student]\nadapter = "current"\n'


@pytest.mark.parametrize("name", ["data", "reward", "dual", "rl", "full", "evaluation"])
def test_the_example_configs_load_begin_with_their_command_and_explain_every_key(name, tmp_path):
    path = ROOT / "configs" / f"{name}.toml"
    load_config(tmp_path, path)
    lines = path.read_text().split("\n")
    assert any(line.startswith("#   hominem ") and f"--config configs/{name}.toml" in line for line in lines[:6])
    explained = False
    for line in lines:
        if line.startswith("["):
            explained = False
        elif line.startswith("#"):
            explained = True
        elif line.strip():
            assert explained, f"{path.name}: {line} has no explanation"


def test_the_model_cache_is_where_the_hub_puts_it(monkeypatch):
    from huggingface_hub import constants

    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert str(machine.model_cache()).endswith("/.cache/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    assert str(machine.model_cache()) == "/somewhere/hub"
    assert constants.HF_HUB_CACHE  # the variable the rule is named after


def test_the_command_page_is_what_the_commands_say():
    assert (ROOT / "docs" / "CLI.md").read_text() == docs.page(), "run: python -m hominem_mlx.cli.docs"


def test_every_command_and_every_option_has_help():
    import click

    for command, ctx in docs.everything():
        assert command.help, ctx.command_path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{ctx.command_path} {parameter.opts}"
