"""The examples of `docs/examples/` run as a person starts them, on small homes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hominem_mlx.config import Config
from hominem_mlx.data import dataset, preferences
from hominem_mlx.data import home as homes
from hominem_mlx.data.split import split_of
from hominem_mlx.files import read_jsonl, write_jsonl
from hominem_mlx.models import backbone
from hominem_mlx.policy import dual
from hominem_mlx.records import Label
from hominem_mlx.reward import train as reward

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def run(name, *words, code=0):
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def config(tiny_folder) -> Config:
    """The random tiny model, n-grams as judge, one short epoch."""
    return Config(
        student={"base": str(tiny_folder)},
        reward={"backbone": "ngram", "folds": 2, "members": 2},
        pairs={"max_per_prompt": 1},
        dual={"epochs": 1, "rank": 2, "learning_rate": 1e-3},
    )


@pytest.fixture
def learnt(home, registry, config, tiny_folder) -> dict:
    """A home with the labels of twelve learnable prompts, and the reward model in use."""
    (home / "hominem.toml").write_text(f'[student]\nbase = "{tiny_folder}"\n')
    labels = [
        row for row in read_jsonl(homes.STARTER / "reward_samples.jsonl", Label) if split_of(row.prompt_id) == "train"
    ]
    first = list(dict.fromkeys(row.prompt_id for row in labels))[:12]
    homes.write(home, Label, [row for row in labels if row.prompt_id in first])
    parts = dataset.split(registry, home, config)
    model = reward.train(registry, parts["labels"], config)
    registry.use(model)
    return {**parts, "reward_model": model}


def test_judge_replies_picks_the_reply_the_reward_model_likes_best(learnt, tmp_path):
    rows = read_jsonl(learnt["labels"].file("labels.train.jsonl"), Label)
    groups = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row.response)
    path = tmp_path / "candidates.jsonl"
    write_jsonl(path, [{"prompt": prompt, "responses": replies} for prompt, replies in groups.items()])
    found = [json.loads(line) for line in run("judge_replies.py", path).stdout.splitlines()]
    assert [row["prompt"] for row in found] == list(groups)
    judge = reward.RewardModel.load(learnt["reward_model"].folder)
    for row in found:
        scores = {reply: judge.score(row["prompt"], reply).scalar for reply in groups[row["prompt"]]}
        assert scores[row["best"]] == max(scores.values())
        assert row["lead"] >= 0


def test_answer_with_memory_uses_the_adapter_in_use(learnt, registry, config):
    bare = json.loads(run("answer_with_memory.py", "Hello", "--max-tokens", 4).stdout)
    assert bare["adapter"] is None
    pairs = preferences.pair(registry, learnt["labels"], config)
    lm = backbone.load(config.student.base)
    adapter = dual.train(registry, pairs, config, lm=lm)
    registry.use(adapter, pointer=lm.pointer)
    said = json.loads(run("answer_with_memory.py", "Hello", "--max-tokens", 4).stdout)
    assert said["adapter"] == adapter.ref
    assert -1 <= said["reward"] <= 1
    assert set(said["by_dimension"]) == set(bare["by_dimension"])


def test_examples_are_all_tried_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"judge_replies.py", "answer_with_memory.py"}
