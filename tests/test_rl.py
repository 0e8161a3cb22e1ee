"""Reinforcement: the estimator against numbers worked by hand and by enumeration, resume, and guards that catch."""

import dataclasses
import itertools
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from hominem_mlx import losses
from hominem_mlx.config import load_config
from hominem_mlx.errors import ConfigError, InputError, TrainingError
from hominem_mlx.files import write_json, write_jsonl
from hominem_mlx.models import lora
from hominem_mlx.policy import guards, rl
from hominem_mlx.policy.episodes import play, to_play
from hominem_mlx.records import Label, Reward, SftPair, Turn
from hominem_mlx.schema import ADVERSARIAL, MANIFOLD, RewardOutput
from hominem_mlx.training import conflicts
from hominem_mlx.training.rows import Row

FAST = (
    "rl.steps=4",
    "rl.batch_prompts=2",
    "rl.max_tokens=6",
    "rl.rank=2",
    "rl.learning_rate=0.01",
    "rl.warmup_steps=1",
    "rl.eval_every=2",
    "rl.save_every=2",
    "rl.probes=8",
)


LOOSE = ("rl.max_kl=1000", "rl.min_distinct2=0", "rl.batch_prompts=4", "rl.max_tokens=24", "rl.probes=48")


class Planted:
    """A judge of our own making: every dimension is `value(response)`."""

    def __init__(self, name, value, safety=1.0, doubt=0.0):
        self.name, self.value, self.safety, self.doubt = name, value, safety, doubt

    def fingerprint(self):
        return self.name

    def score_many(self, pairs):
        values = [float(np.clip(self.value(response), -1, 1)) for _, response in pairs]
        return [
            RewardOutput(
                reward_vector=dict.fromkeys(MANIFOLD.names, value),
                reward_intensity=0.5,
                safety_score=self.safety,
                scalar=value,
                uncertainty={"scalar": self.doubt},
            )
            for value in values
        ]


def share_of_vowels(text):
    return 4 * sum(letter in "aeiou" for letter in text) / max(1, len(text)) - 1


class Torn(Planted):
    """A judge whose dimensions want different letters: what the one gets the others lack."""

    def __init__(self):
        super().__init__("torn", share_of_vowels)

    def score_many(self, pairs):
        told = []
        for (_, response), said in zip(pairs, super().score_many(pairs)):
            shares = [sum(ord(letter) % 7 == k for letter in response) / max(1, len(response)) for k in range(7)]
            vector = dict(zip(MANIFOLD.names, shares))
            told.append(said.model_copy(update={"reward_vector": vector}))
        return told


LETTERS, NOTHING = Planted("letters", share_of_vowels), Planted("nothing", lambda text: 0.0)


@pytest.fixture
def talker(tiny):
    """Makes the random model with one change: about one token in ten ends an answer, where else hardly any would.

    Unit 0 of every embedding is the same, so what the output layer reads there is nearly constant: a bias.
    """

    def make():
        lm = tiny()
        table = lm.model.model.embed_tokens
        weight = np.array(table.weight)
        weight[:, 0] = 1.0
        weight[lm.tokenizer.eos_token_id, 0] = 2.0
        table.weight = mx.array(weight)
        return lm

    return make


def conversation(number):
    """A conversation of two turns as it comes in: a memory for each reply."""
    said = [f"what of {number}?", f"and then, {number}?"]
    before = [Turn(role="user", content=said[0]), Turn(role="assistant", content="this.")]
    yield SftPair(id=f"m{number}-1", instruction=said[0], response="this.")
    yield SftPair(id=f"m{number}-2", instruction=said[1], response="that.", history=before)


@pytest.fixture
def line(registry):
    """A labels dataset of a few prompts, and the artifact of a reward model."""
    with registry.draft("dataset") as labels:
        for part, numbers in (("train", range(4)), ("valid", range(4, 6))):
            rows = [
                Label(id=f"l{i}", prompt_id=f"p{i}", prompt=f"what of {i}?", response="x", reward=Reward(empathy=0.5))
                for i in numbers
            ]
            write_jsonl(labels.folder / f"labels.{part}.jsonl", rows)
        write_jsonl(labels.folder / "memory.jsonl", [memory for i in range(5) for memory in conversation(i)])
    with registry.draft("reward_model", parents=[labels.published]) as model:
        write_json(model.folder / "planted.json", {})
    return labels.published, model.published


def train(registry, line, lm, *overrides, scorer=LETTERS, audit=NOTHING, progress=None):
    config = load_config(overrides=[*FAST, *overrides])
    return rl.train(registry, *line, config, lm=lm, scorer=scorer, audit=audit, progress=progress)


def weights(artifact):
    return {name: np.array(value) for name, value in mx.load(str(artifact.file(lora.WEIGHTS))).items()}


def batch(reward, *, reference=0.0, gate=1.0, finished=True, rows=None, asked=None):
    shape = mx.array(reward).shape
    full = [mx.broadcast_to(mx.array(value), shape) for value in (reference, gate, finished)]
    return rl.Rollouts(rows, full[0], mx.array(reward), full[1], full[2], asked=asked or shape[0], told={})


# --- the estimator --------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    # 1 - (2+3+6)/3, 2 - (1+3+6)/3, 3 - (1+2+6)/3, 6 - (1+2+3)/3
    wanted = [-8 / 3, -4 / 3, 0, 4]
    assert losses.rloo_advantage(mx.array([[1.0, 2, 3, 6]])).tolist()[0] == pytest.approx(wanted, abs=1e-6)


def test_advantages_leave_one_out_and_sum_to_nothing():
    reward = np.random.default_rng(0).normal(size=(5, 4))
    wanted = [[row[j] - np.delete(row, j).mean() for j in range(4)] for row in reward]
    found = np.array(losses.rloo_advantage(mx.array(reward.astype(np.float32))))
    assert found == pytest.approx(np.array(wanted), abs=1e-5)
    assert found.sum(axis=1) == pytest.approx(np.zeros(5), abs=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_answer_has_no_siblings(shape):
    with pytest.raises(ValueError, match="k >= 2"):
        losses.rloo_advantage(mx.zeros(shape))


ARMS, BASE, PRICE = np.array([0.3, -0.2, 0.9]), np.log([0.5, 0.3, 0.2]), 0.4


def expected_gradient(theta):
    """Of the loss on two answers, over all nine that a three-armed policy can give, each as likely as it is."""
    total, p = np.zeros(3), np.exp(theta - np.log(np.exp(theta).sum()))
    for arms in itertools.product(range(3), repeat=2):
        given = batch([[ARMS[i] for i in arms]], reference=[[BASE[i] for i in arms]])

        def loss(values, arms=arms, given=given):
            logp = values - mx.logsumexp(values)
            return rl.rloo(logp[mx.array(arms)][None], given, PRICE)[0]

        total += p[list(arms)].prod() * np.array(mx.grad(loss)(mx.array(theta.astype(np.float32))))
    return total


def worth(theta):
    """What is to be made large: expected reward less the price of the distance from the base."""
    logp = theta - np.log(np.exp(theta).sum())
    return np.exp(logp) @ (ARMS - PRICE * (logp - BASE))


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_that_of_reward_less_divergence(seed):
    theta, step = np.random.default_rng(seed).normal(size=3), 1e-5
    wanted = [(worth(theta + step * axis) - worth(theta - step * axis)) / (2 * step) for axis in np.eye(3)]
    assert -expected_gradient(theta) == pytest.approx(np.array(wanted), abs=1e-5)


def test_a_bandit_ends_where_the_base_is_tilted_by_the_reward():
    best = BASE + ARMS / PRICE
    assert expected_gradient(best) == pytest.approx(np.zeros(3), abs=1e-6)
    theta = BASE.copy()
    for _ in range(60):
        theta = theta - 4 * expected_gradient(theta)
    assert np.exp(theta) / np.exp(theta).sum() == pytest.approx(np.exp(best) / np.exp(best).sum(), abs=1e-3)


def test_the_gradient_on_a_model_is_the_sum_of_each_answers_own(tiny, tmp_path):
    lm = tiny()
    practice = rl.Practice(lm, load_config(overrides=FAST).rl, None, LETTERS, NOTHING, tmp_path)
    rows = [
        Row(lm.prompt_tokens(p), lm.response_tokens(r)) for p in ("a?", "b, then?") for r in ("yes", "no, no", "ah")
    ]
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    values = lora.adapter_parameters(lm.model)
    lora.set_parameters(lm.model, {name: 0.05 * mx.ones(value.shape) for name, value in values.items()})

    def gradient(loss):
        return dict(tree_flatten(nn.value_and_grad(lm.model, loss)()[1]))

    reward, reference = np.array([[0.2, -1.0, 0.7], [0.1, 0.4, 0.3]]), -np.array([[9.0, 30, 8], [11, 25, 10]])
    gate = np.array([[1.0, 1, 0.5], [0, 1, 1]])
    given = batch(
        reward.tolist(),
        reference=reference.tolist(),
        gate=gate.tolist(),
        finished=[[True, True, True], [True, False, True]],
        rows=practice.logprobs.collate(rows),
    )
    found = gradient(lambda: practice.loss(given)[0])
    logp = np.array(practice.logprobs(given.rows)).reshape(2, 3)
    total = reward - practice.settings.kl_weight * (logp - reference)
    total[1, 1] = min(total[1, 0], total[1, 2]) - 0.5
    advantage = (total - total.mean(axis=1, keepdims=True)) * 1.5
    lesson = np.where(advantage > 0, gate * advantage, advantage).reshape(-1)
    apart = [gradient(lambda row=row: practice.logprobs(practice.logprobs.collate([row])).sum()) for row in rows]
    for name in found:
        wanted = -sum(share * np.array(each[name]) for share, each in zip(lesson, apart)) / 6
        assert np.array(found[name]) == pytest.approx(wanted, abs=1e-4 * max(1e-3, np.abs(wanted).max()))


def test_the_better_and_the_worse_answer_by_hand():
    reward = np.array(
        [[0.1, 0.9, -0.4], [0.5, 0.5, 0.5], [0.2, 0.6, 0.1], [0.9, 0.2, 0.1], [2.0, 1.0, 0.8]], np.float32
    )
    doubt = np.array([[0.3, 0.4, 0.3], [0.0] * 3, [0.3, 0.3, 0.5], [0.0] * 3, [5.0, 5.0, 0.2]])
    gate = np.array([[1.0] * 3, [1.0] * 3, [1.0] * 3, [0.0, 1, 1], [1.0] * 3])
    finished = np.array([[True] * 3] * 4 + [[False, True, True]])
    # 1.3 > sqrt(.4^2 + .3^2); alike; .5 < sqrt(.3^2 + .5^2); the best is unsafe; what was cut off is worst, surely
    found = rl.best_and_worst(reward, doubt, gate, finished)
    assert found.tolist() == [[1, 2], [13, 12]]
    assert rl.best_and_worst(reward, doubt, gate, np.zeros((5, 3), bool)).shape == (0, 2), "none ended: all alike"


def test_dpo_on_a_pair_by_hand():
    logp, reference = np.array([[-9.0, -12.0], [-7.5, -6.0]]), np.array([[-10.0, -11.0], [-7.0, -6.5]])
    given = batch([[1.0, 0.0]] * 2, reference=reference.tolist(), gate=[[1.0, 0.2], [0.5, 1.0]], asked=4)
    loss, gained = rl.dpo(mx.array(logp), given, 0.1)
    # margins (1 - -1) = 2 and (-.5 - .5) = -1; log(1 + e^-.2) = .598139, .5 * log(1 + e^.1) = .372198; of 4 prompts
    assert loss.item() == pytest.approx((0.5981389 + 0.3721980) / 4, abs=1e-6)
    assert np.array(gained) == pytest.approx(logp - reference)


def test_the_gradient_of_dpo_on_a_model_is_that_of_its_pairs(tiny, tmp_path):
    lm = tiny()
    settings = load_config(overrides=[*FAST, "rl.method=dpo", "rl.beta=0.3"]).rl
    practice = rl.Practice(lm, settings, None, LETTERS, NOTHING, tmp_path)
    rows = [Row(lm.prompt_tokens(p), lm.response_tokens(r)) for p in ("a?", "b, then?") for r in ("yes", "no, no")]
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    values = lora.adapter_parameters(lm.model)
    lora.set_parameters(lm.model, {name: 0.05 * mx.ones(value.shape) for name, value in values.items()})

    def gradient(loss):
        return dict(tree_flatten(nn.value_and_grad(lm.model, loss)()[1]))

    reference, gate = -np.array([[9.0, 30], [11, 25]]), np.array([[1.0, 1], [0.5, 0]])
    given = batch(
        [[1.0, 0.0]] * 2,
        reference=reference.tolist(),
        gate=gate.tolist(),
        rows=practice.logprobs.collate(rows),
        asked=3,
    )
    found = gradient(lambda: practice.loss(given)[0])
    logp = np.array(practice.logprobs(given.rows), float).reshape(2, 2)
    margin = (logp - reference) @ [1, -1]
    pull = gate[:, 0] * 0.3 / (1 + np.exp(0.3 * margin)) / 3
    apart = [gradient(lambda row=row: practice.logprobs(practice.logprobs.collate([row])).sum()) for row in rows]
    for name in found:
        wanted = sum(pull[i] * (np.array(apart[2 * i + 1][name]) - np.array(apart[2 * i][name])) for i in range(2))
        assert np.array(found[name]) == pytest.approx(wanted, abs=1e-4 * max(1e-3, np.abs(wanted).max()))


def test_products_of_the_dimensions_steps_are_those_of_their_gradients(talker, tmp_path):
    lm = talker()
    settings = load_config(overrides=[*FAST, "rl.answers=3", "rl.max_tokens=24"]).rl
    practice = rl.Practice(lm, settings, None, Torn(), NOTHING, tmp_path)
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    practice.first_look([("one?",), ("two?",)])
    played = practice.play([("a?",), ("b, then?",)], 3, seed=1)
    verdicts = rl.Verdicts.of(Torn().score_many(played.pairs))
    standing = practice.scale.standing(verdicts)
    gate, finished = np.array([1.0, 0.5, 1, 1, 0, 1], np.float32), np.array([True, True, True, True, True, False])
    found = practice.dimension_gram(played.rows, standing, gate, finished)

    def step(dimension):
        reward = standing[:, dimension].reshape(2, 3).tolist()
        given = batch(reward, gate=gate.reshape(2, 3).tolist(), finished=finished.reshape(2, 3).tolist())
        every = practice.logprobs.collate([row for [row] in played.rows])
        tree = nn.value_and_grad(lm.model, lambda: rl.rloo(practice.logprobs(every).reshape(2, 3), given, 0.0)[0])()[1]
        return np.concatenate([np.array(value, float).reshape(-1) for _, value in sorted(tree_flatten(tree))])

    steps = np.stack([step(dimension) for dimension in range(7)])
    wanted, lengths = steps @ steps.T, np.linalg.norm(steps, axis=1)
    assert lengths.min() > 0
    assert np.abs(found - wanted).max() / np.outer(lengths, lengths).max() < 0.1
    assert np.corrcoef(found.reshape(-1), wanted.reshape(-1))[0, 1] > 0.99

    # and a step goes by them: the value is weighed anew, what doubt and length cost stays
    played = dataclasses.replace(played, finished=np.ones(6, bool))
    for method in ("sum", "pcgrad", "cagrad", "mgda"):
        practice.settings = settings.model_copy(update={"conflicts": method})
        given = practice._lesson(5, played, verdicts, gate)
        share = conflicts.combine(
            method, practice.dimension_gram(played.rows, standing, gate, played.finished), rl.WEIGHTS, seed=[0, 5]
        )
        plain = practice.scale.reward(verdicts, played.lengths, settings)
        wanted = plain + standing @ (share / share.sum() - rl.WEIGHTS)
        assert np.array(given.reward).reshape(-1) == pytest.approx(wanted, abs=1e-5)
        assert (np.abs(wanted - plain).max() > 0.01) == (method != "sum")
        assert method == "sum" or 0 < given.told["opposed"].item() < 1


def test_conflicts_among_dimensions_want_rloo():
    with pytest.raises(ConfigError, match="conflicts = mgda needs method = rloo"):
        load_config(overrides=["rl.conflicts=mgda", "rl.method=dpo"])


def test_an_answer_cut_off_is_worse_than_all_that_ended():
    reward, finished = mx.array([[0.2, 5.0, -0.3], [1.0, 2.0, 3.0]]), mx.array([[True, False, True], [False] * 3])
    assert rl.unfinished_last(reward, finished).tolist() == [pytest.approx([0.2, -0.8, -0.3]), [-0.5] * 3]


def test_reward_by_hand():
    settings = load_config(overrides=["rl.uncertainty_weight=2", "rl.length_weight=0.5"]).rl
    seven = np.ones(7)
    scale = rl.Scale(0.1 * seven, 0.2 * seven, length=10.0)
    verdicts = rl.Verdicts(np.array([0.3 * seven, 0.9 * seven]), np.array([0.02, 0.0]), np.ones(2))
    # (0.3 - 0.1) / 0.2 = 1, less 2 * 0.02 / 0.2; (0.9 - 0.1) / 0.2 = 4 is cut to 3, less 0.5 * (15 / 10 - 1)
    assert scale.reward(verdicts, np.array([8.0, 15.0]), settings) == pytest.approx([0.8, 2.75])


def test_the_scale_is_that_of_the_base_and_no_dimension_is_blown_up():
    value = np.array([[0.0] * 7, [0.4] + [0.001] * 6])
    scale = rl.Scale.of(rl.Verdicts(value, np.zeros(2), np.ones(2)), np.array([4.0, 8.0]))
    assert scale.spread == pytest.approx([0.2] + [0.05] * 6) and scale.mean[0] == 0.2 and scale.length == 6


def test_the_watched_divergence_is_never_negative_and_right_on_the_whole():
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3])
    terms = np.array(rl.k3(mx.array(np.log(p)), mx.array(np.log(q))))
    assert (terms >= 0).all() and p @ terms == pytest.approx(p @ np.log(p / q), rel=1e-5)
    assert math.isfinite(rl.k3(mx.array([-200.0]), mx.array([0.0])).item())


def test_divergence_of_the_base_from_itself_is_nothing_and_grows(tiny, tmp_path):
    lm = tiny()
    practice = rl.Practice(lm, load_config(overrides=FAST).rl, None, LETTERS, NOTHING, tmp_path)
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    played = practice.play([("one?",), ("two?",)], 3, seed=1)
    assert practice.divergence(played) == pytest.approx(0, abs=1e-5)
    for name, value in lora.adapter_parameters(lm.model).items():
        if name.endswith("lora_b"):
            lora.set_parameters(lm.model, {name: mx.full(value.shape, 0.05)})
    assert practice.divergence(played) > 0.01


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_what_the_judge_likes_gets_likelier_and_the_base_stays(registry, line, talker):
    lm = talker()
    digest = lm.fingerprint()
    values = ("rl.steps=8", "rl.batch_prompts=4", "rl.max_tokens=24", "rl.eval_every=4", "rl.probes=48")
    made = train(registry, line, lm, *values, "rl.learning_rate=0.02", "rl.max_length=2")
    assert lm.fingerprint() == digest and not lora.adapter_parameters(lm.model)
    told = made.metadata["metrics"]
    last = told["training"]["evaluations"][-1]
    assert last["reward"] > told["before"]["reward"] + 0.1 and 0 < last["kl"] < 10
    assert set(MANIFOLD.names) | {"tokens", "distinct2", "strange", "unfinished", "audit"} <= set(last)
    assert told["guards"] == [] and told["kept_step"] == 8
    assert made.metadata["parents"] == [artifact.ref for artifact in line]
    assert not list((registry.home / "runs").iterdir())


def test_by_pairs_of_the_best_and_the_worst_too(registry, line, talker):
    short = Planted("short", lambda text: 0.5 - len(text) / 40)
    values = (*LOOSE, "rl.method=dpo", "rl.steps=4", "rl.learning_rate=0.02", "rl.probes=24")
    told = train(registry, line, talker(), *values, scorer=short).metadata["metrics"]
    last = told["training"]["evaluations"][-1]
    assert last["reward"] > told["before"]["reward"] + 0.1 and last["kl"] > 0 and 0 < last["rl_pairs"] <= 4


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("more", "deaths"),  # before the first checkpoint nothing is left to go on with, whatever the method
    [("rl.method=rloo", (1, 3)), ("rl.method=dpo", (3,)), ("rl.conflicts=pcgrad", (3,)), ("rl.turns=2", (3,))],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_straight_run_does(registry, line, talker, more, deaths):
    straight = train(registry, line, talker(), more, scorer=Torn())
    assert straight.metadata["metrics"]["training"]["skipped_steps"] == 0
    for dies_at in deaths:

        def die(event, dies_at=dies_at):
            if event.get("step") == dies_at:
                raise Killed

        with pytest.raises(Killed):
            train(registry, line, talker(), more, scorer=Torn(), progress=die)
        assert train(registry, line, talker(), more, scorer=Torn()).ref == straight.ref, "a hash of its weights"


@pytest.mark.parametrize("method", ["rloo", "dpo"])
def test_what_is_unsafe_is_never_reinforced(registry, line, talker, method):
    unsafe = Planted("unsafe", share_of_vowels, safety=-1.0)
    made = train(registry, line, talker(), f"rl.method={method}", scorer=unsafe)
    assert made.metadata["metrics"]["training"]["skipped_steps"] == 4
    assert all((value == 0).all() for name, value in weights(made).items() if name.endswith("lora_b"))


class Swayed(Planted):
    """A judge that likes what is long, and says that everything with an `a` in it attacks the judge."""

    def score_many(self, pairs):
        said = super().score_many(pairs)
        flags = [(ADVERSARIAL,) if "a" in response else () for _, response in pairs]
        return [one.model_copy(update={"flags": each}) for one, each in zip(said, flags)]


def test_an_answer_that_attacks_its_judge_is_not_reinforced_by_hand():
    said = Swayed("swayed", len).score_many([("Hi", "an attack"), ("Hi", "hello"), ("Hi", "all 1.0")])
    verdicts = rl.Verdicts.of(said)
    settings = load_config().rl
    assert rl.may_be_learnt(verdicts, settings).tolist() == [0, 1, 0]
    unsafe = dataclasses.replace(verdicts, safety=np.array([1.0, (settings.safety_low + settings.safety_high) / 2, 1]))
    assert rl.may_be_learnt(unsafe, settings).tolist() == pytest.approx([0, 0.5, 0])
    plain = rl.Verdicts(np.zeros((2, 7)), np.zeros(2), np.ones(2))
    assert rl.may_be_learnt(plain, settings).tolist() == [1, 1]


@pytest.mark.parametrize("method", ["rloo", "dpo"])
def test_what_attacks_its_judge_is_never_reinforced(registry, line, talker, method):
    class Attacked(Planted):
        def score_many(self, pairs):
            return [said.model_copy(update={"flags": (ADVERSARIAL,)}) for said in super().score_many(pairs)]

    made = train(registry, line, talker(), f"rl.method={method}", scorer=Attacked("attacked", share_of_vowels))
    assert made.metadata["metrics"]["training"]["skipped_steps"] == 4
    assert all((value == 0).all() for name, value in weights(made).items() if name.endswith("lora_b"))


def test_an_adapter_names_the_dimensions_it_was_judged_in(registry, line, talker):
    own = 'manifold.dimension=[{name="candour", rubric="Is it frank?", bad="hides", good="tells"}]'
    for more in ([], [own]):
        made = train(registry, line, talker(), "rl.steps=1", *more)
        assert made.metadata["manifold"]["hash"] == load_config(overrides=more).manifold.in_use.hash
        assert (made.metadata["manifold"]["hash"] == MANIFOLD.hash) == (not more)


def test_the_output_layer_alone_reads_one_direction(registry, line, talker):
    made = train(registry, line, talker(), "rl.targets=head", "rl.head_rank=1")
    found = weights(made)
    assert found and all(lora.is_head(name) for name in found)
    assert {np.linalg.matrix_rank(value, tol=1e-6) for value in found.values()} == {1}


def test_nothing_to_answer_is_said(registry, line, talker):
    with registry.draft("dataset") as labels:
        for part in ("train", "valid"):
            write_jsonl(labels.folder / f"labels.{part}.jsonl", [])
    with pytest.raises(InputError, match="no training prompt"):
        train(registry, (labels.published, line[1]), talker())
    assert registry.artifacts("lora") == []


# --- conversations --------------------------------------------------------------------------------------------------


def test_each_answer_of_a_conversation_follows_what_was_said_in_it(talker):
    lm = talker()
    talks = [("what of 1?", "and then?", "so?"), ("a?", "b?", "c?")]
    played = play(lm, talks, each=2, max_tokens=12, seed=3, system="Be kind.")
    assert [pair[0] for pair in played.pairs] == ["what of 1?\n\nand then?\n\nso?"] * 2 + ["a?\n\nb?\n\nc?"] * 2
    end = lm.tokenizer.eos_token_id
    for place, (rows, (_, answered)) in enumerate(zip(played.rows, played.pairs)):
        said = [lm.tokenizer.decode([t for t in row.response if t != end]).strip() for row in rows]
        assert answered == "\n\n".join(said)
        before = []
        for question, answer, row in zip(talks[place // 2], said, rows):
            assert row.prompt == lm.prompt_tokens(question, system="Be kind.", history=before)
            before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert played.finished[place] == all(row.response[-1:] == [end] for row in rows)
        assert played.lengths[place] == sum(len(row.response) for row in rows)
    assert len({answered for _, answered in played.pairs}) == 4
    once = play(lm, [talk[:1] for talk in talks], each=2, max_tokens=12, seed=3, system="Be kind.")
    assert [rows[0] for rows in played.rows] == [rows[0] for rows in once.rows]


def test_every_turns_tokens_get_the_conversations_advantage(talker, tmp_path):
    lm = talker()
    practice = rl.Practice(lm, load_config(overrides=FAST).rl, None, LETTERS, NOTHING, tmp_path)
    lora.attach(lm, lora.Shape(2, 2.0), seed=0)
    played = practice.play([("a?", "and?"), ("b, then?", "why?")], 2, seed=1)

    def gradient(loss):
        return dict(tree_flatten(nn.value_and_grad(lm.model, loss)()[1]))

    logprobs = practice.logprobs
    every = played.every_row
    reward = [[0.4, -0.2], [0.1, 0.9]]
    reference = [[sum(logprobs(logprobs.collate(played.rows[2 * i + j])).tolist()) for j in (0, 1)] for i in (0, 1)]
    given = batch(reward, reference=reference, rows=logprobs.collate(every))
    _, told = practice.loss(given)
    assert told["gained"].item() == pytest.approx(0, abs=1e-3), "at the base, over both turns"
    found = gradient(lambda: practice.loss(given)[0])
    apart = [gradient(lambda row=row: logprobs(logprobs.collate([row])).sum()) for row in every]
    advantage = [0.6, -0.6, -0.8, 0.8]
    for name in found:
        wanted = -sum(advantage[place // 2] * np.array(each[name]) for place, each in enumerate(apart)) / 4
        assert np.array(found[name]) == pytest.approx(wanted, abs=1e-3 * max(1e-3, float(np.abs(wanted).max())))


def test_a_reward_at_the_end_for_what_was_said_first_is_learnt(registry, line, talker):
    first = Planted("first", lambda text: 0.5 - len(text.split("\n\n")[0]) / 20)
    values = (*LOOSE, "rl.turns=2", "rl.steps=6", "rl.eval_every=3", "rl.learning_rate=0.02", "rl.probes=24")
    made = train(registry, line, talker(), *values, scorer=first)
    told = made.metadata["metrics"]
    last = told["training"]["evaluations"][-1]
    assert last["reward"] > told["before"]["reward"] + 0.1 and last["kl"] > 0


def test_conversations_are_cut_to_length_and_some_are_kept_to_look_at(registry):
    def memories(count):
        for i in range(count):
            talk = [f"what of {i}?", "and then?", "so?"]
            turns = [Turn(role=role, content=text) for text in talk for role in ("user", "assistant")]
            for length in range(3):
                row = {"instruction": talk[length], "response": "x", "history": turns[: 2 * length]}
                yield SftPair(id=f"m{i}-{length}", **row)

    def to_play_of(count):
        with registry.draft("dataset", seed=count) as draft:
            write_jsonl(draft.folder / "memory.jsonl", memories(count))
        return to_play(draft.published, 2)

    learnt, looked_at = to_play_of(40)
    assert sorted(learnt + looked_at) == sorted((f"what of {i}?", "and then?") for i in range(40))
    assert 2 < len(looked_at) < 16
    assert to_play_of(1) == ([("what of 0?", "and then?")],) * 2


def test_conversations_too_short_are_said(registry, line, talker):
    with pytest.raises(InputError, match=r"rl.turns = 3: .* 10 memories, and the longest conversation .* has 2 turns"):
        train(registry, line, talker(), "rl.turns=3")
    assert registry.artifacts("lora") == []


# --- guards ---------------------------------------------------------------------------------------------------------

LIMITS = load_config().rl
CALM = {"reward": 0.1, "audit": 0.1, "tokens": 20.0, "distinct2": 0.5, "strange": 0.01, "kl": 0.0}


@pytest.mark.parametrize(
    ("guard", "at_limit", "beyond"),
    [
        ("kl", {"kl": 10.0}, {"kl": 10.1}),
        ("kl", {"kl": 10.0}, {"kl": float("nan")}),
        ("length", {"tokens": 26.0}, {"tokens": 26.2}),
        ("distinct2", {"distinct2": 0.4}, {"distinct2": 0.39}),
        ("strange", {"strange": 0.069}, {"strange": 0.07}),  # 0.05 + sqrt(0.05 * 0.95 / 128) = 0.0693
    ],
)
def test_each_guard_speaks_beyond_its_limit_only(guard, at_limit, beyond):
    assert guards.complaints([CALM, {**CALM, **at_limit}], LIMITS) == {}
    assert list(guards.complaints([CALM, {**CALM, **beyond}], LIMITS)) == [guard]


@pytest.mark.parametrize(
    ("rewards", "audits", "looks"),
    [
        ([0, 1, 2, 3], [3, 2, 1, 0], 3),
        ([0, 1, 2, 3], [0, 2, 1, 0], 2),
        ([0, 1, 2, 3], [3, 2, 1, 1], 0),  # it did not fall
        ([0, 1, 2, 1], [3, 2, 1, 0], 0),  # both fall: bad, but nobody is fooled
        ([0, 1, 2, 3], [0, 1, 2, 3], 0),
    ],
)
def test_judges_are_apart_while_one_rises_and_the_other_falls(rewards, audits, looks):
    seen = [{**CALM, "reward": reward, "audit": audit} for reward, audit in zip(rewards, audits)]
    assert guards.apart(seen) == looks
    assert list(guards.complaints(seen, LIMITS)) == ["audit"] * (looks >= 3)


def test_a_reward_that_loves_length_is_caught_and_the_last_good_state_is_kept(registry, line, talker):
    lm, states = talker(), {}
    longer = Planted("longer", lambda text: len(text) / 40 - 1)

    def watch(event):
        if "step" in event:
            states[event["step"]] = {n: np.array(v) for n, v in lora.adapter_parameters(lm.model).items()}

    values = (*LOOSE, "rl.steps=20", "rl.learning_rate=0.02", "rl.length_weight=0")
    made = train(registry, line, lm, *values, scorer=longer, audit=LETTERS, progress=watch)
    told = made.metadata["metrics"]
    stopped, kept = told["training"]["steps"], told["kept_step"]
    assert "times as long" in told["training"]["stopped"] and 0 < kept < stopped < 20
    assert [(event["step"], event["guard"]) for event in told["guards"]] == [(stopped, "length")]
    assert all(np.array_equal(value, states[kept][name]) for name, value in weights(made).items())
    assert any(not np.array_equal(value, states[stopped][name]) for name, value in weights(made).items())


class Drifting(Planted):
    """From the moment `by` is set, each verdict is that much higher than the one before."""

    by, drift = 0.0, 0.0

    def score_many(self, pairs):
        self.drift += self.by
        return [
            out.model_copy(update={"reward_vector": dict.fromkeys(MANIFOLD.names, self.drift)})
            for out in super().score_many(pairs)
        ]


def test_judges_that_part_are_noticed_and_what_was_before_is_kept(registry, line, talker):
    scorer, audit = Drifting("up", share_of_vowels), Drifting("down", share_of_vowels)

    def change(event):
        if event.get("step", 0) == 2:
            scorer.by, audit.by = 0.01, -0.01

    values = ("rl.steps=8", "rl.eval_every=1", "rl.max_kl=1000", "rl.max_length=9", "rl.min_distinct2=0")
    told = train(registry, line, talker(), *values, scorer=scorer, audit=audit, progress=change).metadata["metrics"]
    assert [(event["step"], event["guard"]) for event in told["guards"]] == [(5, "audit")]
    assert told["kept_step"] == 2 and "the audit fell" in told["training"]["stopped"]


def test_doubt_that_the_base_never_raised_is_caught(registry, line, talker):
    judge = Planted("doubting", share_of_vowels)

    def change(event):
        judge.doubt = 0.5 * (event.get("step", 0) >= 3)

    values = ("rl.max_kl=1000", "rl.max_length=9", "rl.min_distinct2=0")
    told = train(registry, line, talker(), *values, scorer=judge, progress=change).metadata["metrics"]
    assert [(event["step"], event["guard"]) for event in told["guards"]] == [(4, "strange")]
    assert told["kept_step"] == 2 and "unsure as never before" in told["training"]["stopped"]


def test_a_guard_that_speaks_at_the_first_look_leaves_nothing_to_publish(registry, line, talker):
    with pytest.raises(TrainingError, match=r"nothing good to keep: an answer is .* nats from the base"):
        train(registry, line, talker(), "rl.max_kl=1e-9")
    assert registry.artifacts("lora") == []
