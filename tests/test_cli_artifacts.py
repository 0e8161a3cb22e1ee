"""Artifacts from the command line: find, tag, use, roll back, verify, collect; hominem.toml follows, comments kept."""

import json

import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli
from hominem_mlx.config import load_config
from hominem_mlx.storage.registry import Registry

POINTER = "starter@0123456789ab"


def hominem(*words, **options):
    return CliRunner().invoke(cli, list(words), **options)


@pytest.fixture
def three(registry):
    """A dataset and two adapters made of it."""
    with registry.draft("dataset", config={"holds": "pairs"}) as draft:
        (draft.folder / "rows.jsonl").write_text('{"n": 1}\n')
    adapters = []
    for rank in (4, 8):
        with registry.draft("lora", parents=[draft.published], config={"dual": {"rank": rank}}) as other:
            (other.folder / "adapters.safetensors").write_bytes(bytes([rank]))
            other.notes = {"base": "starter", "pointer": POINTER}
        adapters.append(other.published)
    return draft.published, *adapters


def test_list_show_search_and_lineage_tell_the_same_on_paper_and_in_json(three):
    _, first, second = three
    assert first.ref in hominem("artifacts", "list").output
    listed = json.loads(hominem("artifacts", "list", "lora", "--json", "-").stdout)
    assert [row["artifact"] for row in listed] == [first.ref, second.ref]
    found = json.loads(hominem("artifacts", "search", "dual.rank=8", "--json", "-").stdout)
    assert [row["artifact"] for row in found] == [second.ref]
    shown = json.loads(hominem("artifacts", "show", first.ref, "--json", "-").stdout)
    assert shown["config"] == {"dual": {"rank": 4}}
    tree = json.loads(hominem("artifacts", "lineage", "lora/2", "--json", "-").stdout)
    assert [row["depth"] for row in tree] == [0, 1]


def test_using_two_adapters_and_rolling_back_twice_ends_at_the_bare_base(three, home):
    _, first, second = three
    for adapter in (first, second):
        assert hominem("artifacts", "use", adapter.ref).exit_code == 0
    assert Registry(home).current("lora", pointer=POINTER).ref == second.ref
    assert first.ref in hominem("artifacts", "rollback").output
    assert Registry(home).current("lora", pointer=POINTER).ref == first.ref
    assert "without an adapter" in hominem("artifacts", "rollback").output
    assert Registry(home).current("lora", pointer=POINTER) is None
    again = hominem("artifacts", "rollback")
    assert again.exit_code == 2
    assert "nothing to roll back" in again.output


def test_a_bare_number_is_an_adapter_and_a_dataset_goes_to_its_own_pointer(three, home):
    assert hominem("artifacts", "use", "2").exit_code == 0
    assert Registry(home).current("lora", pointer=POINTER).ref == three[2].ref
    assert hominem("artifacts", "use", three[0].ref).exit_code == 0
    assert Registry(home).pointers("dataset") == {"pairs": three[0].version}


def test_use_unpins_a_version_in_hominem_toml_and_keeps_the_comments(three, home):
    path = home / "hominem.toml"
    path.write_text('# mine\n[student]\nadapter = "0001"  # pinned in May\nsystem = "Be kind."\n')
    done = hominem("artifacts", "use", three[2].ref)
    assert "named 0001" in done.output
    assert path.read_text() == '# mine\n[student]\nadapter = "current"  # pinned in May\nsystem = "Be kind."\n'


def test_an_adapter_of_another_base_is_used_for_that_base_and_says_so(three, home):
    (home / "hominem.toml").write_text('[student]\nbase = "elsewhere/model"\n')
    done = hominem("artifacts", "use", three[1].ref)
    assert done.exit_code == 0
    assert "belongs to starter" in done.output
    assert load_config(home).student.base == "elsewhere/model"


def test_what_has_a_tag_or_is_in_use_is_not_collected(three, home):
    _, first, second = three
    assert hominem("artifacts", "tag", first.ref, "keep-me").exit_code == 0
    gone = json.loads(hominem("artifacts", "gc", "--all", "--dry-run", "--json", "-").stdout)
    assert gone == {"deleted": False, "artifacts": [second.ref]}
    assert second.folder.exists()
    assert hominem("artifacts", "gc", "--all", input="n\n").exit_code == 0
    assert second.folder.exists()
    assert hominem("artifacts", "gc", "--all", "--yes").exit_code == 0
    assert not second.folder.exists()
    assert first.folder.exists()
    assert hominem("artifacts", "show", "keep-me").exit_code == 0


def test_young_artifacts_are_not_collected_by_default(three):
    assert "0 to delete" in hominem("artifacts", "gc", "--yes").output


def test_verify_names_the_changed_file_with_exit_code_2(three):
    assert hominem("artifacts", "verify").exit_code == 0
    (three[1].folder / "adapters.safetensors").write_bytes(b"other")
    done = hominem("artifacts", "verify")
    assert done.exit_code == 2
    assert f"{three[1].ref}: adapters.safetensors was changed" in done.output


def test_what_is_not_there_is_bad_input_that_names_what_is(three):
    done = hominem("artifacts", "show", "lora/99")
    assert done.exit_code == 2
    assert three[2].version in done.output
    assert hominem("artifacts", "list", "adapter").exit_code == 2
