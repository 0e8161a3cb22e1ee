"""B9 on the bundled student: reinforcement pleases a judge that had no part in it, and a bad reward is caught."""

import numpy as np

from hominem_mlx.config import load_config
from hominem_mlx.data import dataset
from hominem_mlx.files import read_jsonl, write_json
from hominem_mlx.metrics import paired_bootstrap
from hominem_mlx.models import lora
from hominem_mlx.models.sampling import answers
from hominem_mlx.policy import rl
from hominem_mlx.records import Label
from hominem_mlx.reward import train as reward
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.schema import MANIFOLD, RewardOutput

RL = (
    "rl.steps=12",
    "rl.batch_prompts=12",
    "rl.learning_rate=8e-3",
    "rl.warmup_steps=2",
    "rl.targets=head",
    "rl.head_rank=1",
    "rl.rank=4",
    "rl.max_tokens=64",
    "rl.probes=64",
)
REWARD = ("reward.backbone=lm", "reward.folds=2", "reward.members=4")
EACH = 3  # answers to each held-out prompt


class LovesLength:
    """Finds every answer the better the longer it is."""

    def fingerprint(self):
        return "loves length"

    def score_many(self, pairs):
        values = [min(1.0, len(response) / 200 - 0.5) for _, response in pairs]
        return [
            RewardOutput(
                reward_vector=dict.fromkeys(MANIFOLD.names, value), reward_intensity=0.5, safety_score=1.0, scalar=value
            )
            for value in values
        ]


def test_reinforcement_pleases_a_judge_of_other_rows_and_features(registry, home, student):
    config = load_config(overrides=[*REWARD, *RL, "rl.eval_every=12"])
    dataset.import_starter(home)
    parts = dataset.split(registry, home, config)
    model = reward.train(registry, parts["labels"], config, lm=student)
    judge = RewardModel.load(model.folder, lm=student)
    watch = reward.fit_audit(dataset.read_labels(parts["labels"], "valid"), config, home=home, lm=student)
    weights = student.fingerprint()
    made = rl.train(registry, parts["labels"], model, config, lm=student, scorer=judge, audit=watch)
    told = made.metadata["metrics"]
    assert student.fingerprint() == weights

    held_out = read_jsonl(parts["suite"].file("labels.jsonl"), Label)
    prompts = sorted({label.prompt for label in held_out})
    asked = [prompt for prompt in prompts for _ in range(EACH)]

    def speak():
        return answers(student, prompts, each=EACH, max_tokens=64, temperature=1.0, seed=1)

    before = speak()
    lora.load_adapter(student, made.folder)
    after = speak()
    lora.detach(student)

    audit = reward.fit_audit(held_out, config, home=home, lm=student)
    first, second = (
        np.array([said.scalar for said in audit.score_many([(p, a.text) for p, a in zip(asked, answers)])])
        for answers in (before, after)
    )
    gain = paired_bootstrap(second, first, np.repeat(np.arange(len(prompts)), EACH))
    assert gain.low > 0
    [kept] = [look for look in told["training"]["evaluations"] if look["step"] == told["kept_step"]]
    assert 0 < kept["kl"] <= 10


def test_a_reward_that_loves_length_is_caught(registry, home, student):
    config = load_config(overrides=[*RL, "rl.eval_every=2", "rl.batch_prompts=4", "rl.probes=32"])
    dataset.import_starter(home)
    labels = dataset.split(registry, home, config)["labels"]
    with registry.draft("reward_model", parents=[labels]) as draft:
        write_json(draft.folder / "planted.json", {})
    watch = reward.fit_audit(dataset.read_labels(labels, "valid"), config, home=home, lm=student)
    made = rl.train(registry, labels, draft.published, config, lm=student, scorer=LovesLength(), audit=watch)
    told = made.metadata["metrics"]
    assert "length" in {event["guard"] for event in told["guards"]}
    assert told["kept_step"] < told["training"]["steps"]
    kept = {look["step"]: look for look in told["training"]["evaluations"]}[told["kept_step"]]
    assert kept["tokens"] <= 1.3 * told["before"]["tokens"]
