"""The whole line on the bundled student, and the promises that hang on all of it at once."""

import functools
import importlib.util
import json
import random
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import hominem_mlx
from hominem_mlx.cli import demo
from hominem_mlx.config import load_config, read_toml
from hominem_mlx.data import dataset
from hominem_mlx.data import home as homes
from hominem_mlx.data.split import split_of, words
from hominem_mlx.files import read_jsonl, sha256_folder, write_jsonl
from hominem_mlx.models import sampling
from hominem_mlx.records import Fixture, Label, Prompt, RecallQuestion, SftPair
from hominem_mlx.storage.registry import METADATA, Registry

ROOT = Path(__file__).resolve().parents[1]
STARTER = homes.STARTER

# --- public names ---------------------------------------------------------------------------------------------------

PUBLIC = (
    "Manifold RewardOutput RewardModel Registry Config HominemError Teacher load generate score train evaluate compare"
)


def test_public_names_are_these_and_load():
    assert set(hominem_mlx.__all__) == set(PUBLIC.split())
    for name in hominem_mlx.__all__:
        assert getattr(hominem_mlx, name) is not None
    with pytest.raises(AttributeError):
        _ = hominem_mlx.not_there


# --- held out stays held out ----------------------------------------------------------------------------------------

TINY = (
    "reward.backbone=lm",
    "reward.folds=2",
    "reward.members=2",
    "pairs.max_per_prompt=1",
    "pairs.on_policy=1",
    "pairs.on_policy_max_tokens=4",
    "dual.epochs=1",
    "dual.batch_pairs=48",
    "dual.batch_memories=48",
    "dual.rank=2",
    "evaluation.samples=1",
    "evaluation.max_tokens=4",
    "evaluation.recall_tokens=4",
    "evaluation.bootstrap=100",
)


@pytest.fixture(scope="module")
def share(share_of_starter) -> Path:
    """A share of the corpus: two dozen prompts to learn from, six to watch, two dozen to be examined with."""
    return share_of_starter(train=24, valid=6, test=24, memory=24, recall=16, fixtures=8)


def altered(share: Path, folder: Path) -> None:
    """The corpus with every held-out row changed: labels shuffled and turned round, texts and questions replaced."""
    folder.mkdir()
    dice = random.Random(0)
    prompts = read_jsonl(share / "prompts.jsonl", Prompt)
    labels = read_jsonl(share / "reward_samples.jsonl", Label)
    recall, fixtures = (
        read_jsonl(share / "recall.jsonl", RecallQuestion),
        read_jsonl(share / "fixtures.jsonl", Fixture),
    )
    held = [row for row in labels if split_of(row.prompt_id) == "test"]
    rewards = [row.reward for row in held]
    dice.shuffle(rewards)
    shuffled = dict(zip((row.id for row in held), rewards, strict=True))

    def other(text: str) -> str:
        return f"Instead of {len(text)} letters: {' '.join(sorted(text.split(), reverse=True))}"

    def label(row: Label) -> Label:
        if row.id not in shuffled:
            return row
        texts = {"prompt": other(row.prompt), "response": f"{other(row.response)} ({row.id})"}
        return row.model_copy(update={**texts, "reward": shuffled[row.id], "rationale": "another"})

    write_jsonl(
        folder / "prompts.jsonl",
        [r.model_copy(update={"prompt": other(r.prompt)}) if split_of(r.id) == "test" else r for r in prompts],
    )
    write_jsonl(folder / "reward_samples.jsonl", map(label, labels))
    write_jsonl(folder / dataset.RETESTS, map(label, read_jsonl(share / dataset.RETESTS, Label)))
    write_jsonl(folder / "memory.jsonl", read_jsonl(share / "memory.jsonl", SftPair))
    write_jsonl(
        folder / "recall.jsonl", [r.model_copy(update={"question": other(r.question), "key": "Nobody"}) for r in recall]
    )
    write_jsonl(
        folder / "fixtures.jsonl",
        [Fixture(id=r.id, prompt=other(r.prompt), better="No.", worse="Yes.") for r in fixtures],
    )


def small_line(home: Path, starter: Path, student: Path) -> tuple[dict, dict]:
    """The demo with little of everything: what it tells, and its artifacts."""
    registry = Registry(home)
    config = load_config(overrides=[f"student.base={student}", *TINY], defaults=read_toml(demo.SETTINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(homes, "STARTER", starter)
        told = demo.run(registry, config, progress=None, note=lambda text: None, began=time.perf_counter())
    assert registry.verify() == []
    return told, {kind: registry.find(ref) for kind, ref in told["artifacts"].items()}


@pytest.fixture(scope="module")
def first_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="module")
def first_line(first_home, share, tiny_folder) -> tuple[dict, dict]:
    return small_line(first_home, share, tiny_folder)


def test_a_line_again_gives_the_same_artifacts_and_tells_the_same(first_line, first_home, share, tiny_folder):
    told, artifacts = small_line(first_home, share, tiny_folder)
    assert artifacts == first_line[1]
    assert {**told, "seconds": 0, "figures": 0} == {**first_line[0], "seconds": 0, "figures": 0}


def test_what_is_learnt_does_not_change_when_every_held_out_row_does(first_line, share, tmp_path, tiny_folder):
    first = first_line[1]
    altered(share, tmp_path / "altered")
    _, second = small_line(tmp_path / "second", tmp_path / "altered", tiny_folder)
    for name in ("raw", "labels", "pairs", "reward_model", "lora"):
        assert first[name].ref == second[name].ref
        same = [sha256_folder(artifact.folder, leave_out=[METADATA]) for artifact in (first[name], second[name])]
        assert same[0] == same[1]
    assert first["suite"].hash != second["suite"].hash
    assert first["suite"].metadata["metrics"]["labels"] > 100
    one, other = (
        {row.id: row for row in read_jsonl(artifacts["suite"].file("labels.jsonl"), Label)}
        for artifacts in (first, second)
    )
    assert one.keys() == other.keys()
    assert all(one[name].prompt != other[name].prompt and one[name].response != other[name].response for name in one)


# --- the student ----------------------------------------------------------------------------------------------------


class Written(Exception):
    """Carries the texts the student is made from out of the script that makes it."""


@functools.cache
def student_texts(scratch: Path) -> list[str]:
    """Everything the student ever reads, as `scripts/make_student.py` writes it when it is called without options."""
    place = ROOT / "scripts" / "make_student.py"
    spec = importlib.util.spec_from_file_location("make_student", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def stop(texts, *rest):
        raise Written(list(texts))

    script.learn_tokenizer = stop  # the first to see the texts
    given, sys.argv = sys.argv, [str(place), "--out", str(scratch / "student")]
    device = mx.default_device()
    try:
        script.main()
    except Written as written:
        return written.args[0]
    finally:
        sys.argv = given
        mx.set_default_device(device)
    raise AssertionError("the script made no tokenizer")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    return list(dict.fromkeys(student_texts(tmp_path_factory.mktemp("making"))))


def test_student_read_nothing_that_is_held_out(texts):
    labels = [row for row in read_jsonl(STARTER / "reward_samples.jsonl", Label) if split_of(row.prompt_id) != "train"]
    recall, fixtures = (
        read_jsonl(STARTER / "recall.jsonl", RecallQuestion),
        read_jsonl(STARTER / "fixtures.jsonl", Fixture),
    )
    held = {text for row in labels for text in (row.prompt, row.response)}
    held |= {row.question for row in recall}
    held |= {text for row in fixtures for text in (row.prompt, row.better, row.worse) if text}
    said = {" ".join(words(text)): text for text in held}
    read = [" ".join(words(text)) for text in texts]
    assert len(read) > 10_000 and len(said) > 400
    assert [said[key] for key in said.keys() & set(read)] == []
    everything = "\n".join(read)
    assert [text for key, text in said.items() if len(key.split()) >= 4 and key in everything] == []
    keys = {" ".join(words(row.key)) for row in recall}
    known = set(everything.split())
    assert len(keys) >= 12
    assert [key for key in keys if key in known or f" {key} " in everything] == []


def test_student_is_small():
    folder = STARTER / "student"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    weights = [value for path in folder.glob("*.safetensors") for value in mx.load(str(path)).values()]
    assert 0.8e6 <= sum(value.size for value in weights) <= 1.9e6
    assert {value.dtype for value in weights} == {mx.float32}


def test_student_can_be_loaded_by_mlx_lm_alone(student):
    assert json.loads((STARTER / "student" / "config.json").read_text())["model_type"] == "qwen3"
    assert sum(value.size for _, value in tree_flatten(student.model.parameters())) <= 1.9e6
    assert student.tokenizer.chat_template


def test_student_speaks_in_short_answers_of_its_own(student, texts):
    prompts = [row.prompt for row in read_jsonl(STARTER / "prompts.jsonl", Prompt) if split_of(row.id) == "test"]
    asked = (prompts * (200 // len(prompts) + 1))[:200]
    said = sampling.answers(student, asked, max_tokens=60, temperature=1.0, seed=0)
    assert sum(answer.finished for answer in said) >= 0.9 * len(said)
    grams = [gram for answer in said for gram in eights(answer.text)]
    wanted, read = set(grams), set()
    for text in texts:
        read.update(wanted.intersection(eights(text)))
    assert len(grams) > 500
    assert sum(gram in read for gram in grams) <= 0.2 * len(grams)


def eights(text: str) -> list[tuple[str, ...]]:
    """Every run of eight words."""
    tokens = words(text)
    return [tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)]
