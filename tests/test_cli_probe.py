"""Probes, counterfactuals and the map from the command line, over a reward model of n-grams."""

import json

import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli
from hominem_mlx.config import load_config
from hominem_mlx.data import dataset
from hominem_mlx.data import home as homes
from hominem_mlx.data.split import split_of
from hominem_mlx.errors import InputError
from hominem_mlx.files import read_jsonl, write_jsonl
from hominem_mlx.records import Label
from hominem_mlx.reward import train as reward

PAIR = ("-p", "I failed my exam.", "-r", "That must hurt. What would help you now?")


def hominem(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def value(*words):
    done = hominem(*words, "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def judged(home, registry):
    """A home with starter labels of a few prompts of every part, and a reward model of n-grams."""
    (home / "hominem.toml").write_text('[reward]\nbackbone = "ngram"\nfolds = 2\nmembers = 3\n')
    kept: dict[str, set[str]] = {}
    rows = []
    for row in read_jsonl(homes.STARTER / "reward_samples.jsonl", Label):
        mine = kept.setdefault(split_of(row.prompt_id), set())
        if row.prompt_id in mine or len(mine) < 4:
            mine.add(row.prompt_id)
            rows.append(row)
    homes.write(home, Label, rows)
    parts = dataset.split(registry, home, load_config(home))
    registry.use(reward.train(registry, parts["labels"], load_config(home)))
    return home


def test_probes(judged, tmp_path):
    found = value("evaluate", "probe", *PAIR, "-r", "So?", "--plot", tmp_path / "probe.svg")
    first = found["candidates"][0]
    assert first["uncertainty"]["empathy"] > 0 and set(found["differences"]) >= {"empathy", "safety_score", "scalar"}
    assert "What would help you now?" in (tmp_path / "probe.svg").read_text()

    asked = value("evaluate", "probe", *PAIR, "--swap", "hurt=>be silly", "--prompt-instead", "I passed.",
                  "--plot", tmp_path / "shifts.png")  # fmt: skip
    silly, passed = asked["counterfactuals"]
    assert silly["reply"] == "That must be silly. What would help you now?" and passed["prompt"] == "I passed."
    shift = silly["judged"]["scalar"] - asked["as_is"]["scalar"]
    assert silly["shifts"]["scalar"]["shift"] == pytest.approx(shift)
    assert (tmp_path / "shifts.png").read_bytes()[1:4] == b"PNG"

    suite = next((judged / "artifacts/suite").glob("0*/labels.jsonl"))
    done = hominem("evaluate", "probe", "--file", suite, "--plot", tmp_path / "many.png", "--json", tmp_path / "x.json")
    assert done.exit_code == 0 and "pairs of replies to 4 prompts" in done.stdout, done.output
    many = json.loads((tmp_path / "x.json").read_text())
    assert many["relations"]["pairs"] == 40 and len(many["probes"]) == 4
    assert -1 <= many["relations"]["dimensions"]["curiosity"]["safety_change"]["r"] <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --prompt and --response, or --file"),
        (("-p", "x"), "give --prompt and --response, or --file"),
        ((*PAIR, "--file", "x"), "give --prompt and --response, or --file"),
        ((*PAIR, "-r", "So?", "--swap", "a=>b"), "ask about one reply"),
        (("--file", "x", "--swap", "a=>b"), "ask about one reply"),
        ((*PAIR, "--plot", "probe.gif"), "probe.gif"),
    ],
)
def test_what_cannot_be_asked(home, words, said):
    done = hominem("evaluate", "probe", *words)
    assert done.exit_code == 2 and said in done.output


def test_what_is_not_there_is_named(judged, write_rows):
    done = hominem("evaluate", "probe", *PAIR, "--swap", "mother=>father")
    assert done.exit_code == 2 and "'mother' does not occur" in done.output
    done = hominem("evaluate", "probe", "--file", write_rows("one.jsonl", [{"prompt": "p", "response": "r"}]))
    assert done.exit_code == 2 and "no prompt has two replies" in done.output


def test_the_map(judged):
    done = hominem("evaluate", "map", "--json", judged / "map.json")
    assert done.exit_code == 0 and "participation ratio" in done.output, done.output
    found = json.loads((judged / "map.json").read_text())
    assert found["directions"]["rows"] == 20 and len(found["files"]) == 6
    assert all(path.startswith(str(judged / "plots")) for path in found["files"])


def test_an_empty_reply_is_scored_with_its_flag_and_bytes_that_are_no_text_are_refused(judged):
    scored = value("score", "-p", "I passed.", "-r", "")["scores"][0]
    assert scored["flags"] == ["empty_response"] and scored["scalar"] < 0 < scored["uncertainty"]["scalar"]
    no_text = b"So? \xff".decode("utf-8", "surrogateescape")  # as such bytes arrive on the command line
    for command in (("score",), ("evaluate", "probe"), ("evaluate", "compare")):
        option = "-p" if command[-1] == "compare" else "-r"
        done = hominem(*command, "-p", "I passed.", option, no_text)
        assert done.exit_code == 2 and "is not UTF-8 after 'So? '" in done.output, done.output
    done = hominem("evaluate", "probe", *PAIR, "--swap", f"hurt=>{no_text}")
    assert done.exit_code == 2 and "is not UTF-8" in done.output


def test_what_labels_lack_is_said_before_anything_is_read(judged, registry):
    made = registry.current("dataset", pointer="labels")
    rows = dataset.read_labels(made, "train")
    bare = [row.model_copy(update={"reward": row.reward.model_copy(update={"curiosity": None})}) for row in rows]
    told = []
    with registry.draft("dataset", parents=[], config={}, seed=0) as draft:
        write_jsonl(draft.folder / "labels.train.jsonl", bare)
        write_jsonl(draft.folder / "labels.valid.jsonl", dataset.read_labels(made, "valid"))
    with pytest.raises(InputError, match="curiosity is labelled on 0 prompts"):
        reward.train(registry, draft.published, load_config(judged), progress=told.append)
    assert told == []
