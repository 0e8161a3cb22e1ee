"""Quantiles of what labels scatter by: of least pinball loss, never crossed, and with as many inside as they say."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli
from hominem_mlx.config import Config
from hominem_mlx.errors import InputError
from hominem_mlx.files import write_jsonl
from hominem_mlx.policy import rl
from hominem_mlx.records import Label
from hominem_mlx.reward import train as training
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.quantiles import LEVELS, QuantileHead, fit, interval, pinball, regress, spread
from hominem_mlx.schema import MANIFOLD


def scattered(rows: int = 400, *, seed: int = 0):
    """Outputs of four, two labels that scatter by 0.1 to 0.5 as the first output rises, and their scalar."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (rows, 4))
    by = 0.3 + 0.2 * values[:, :1]
    labels = np.concatenate([values[:, :2] + by * rng.normal(size=(rows, 2)), values[:, 2:]], axis=1)
    return values, labels, labels[:, :2].mean(axis=1)


def test_without_slopes_they_are_the_quantiles_of_the_numbers():
    y = np.arange(11.0)[::-1] / 3
    found = regress(np.zeros((11, 0)), y, (0.1, 0.5, 0.9), 1e-3)
    assert found.shape == (3, 1)
    assert found[:, 0] * 3 == pytest.approx([1, 5, 9], abs=0.01)  # 1.1 of 11 numbers lie below the second smallest


def test_pinball_by_hand():
    # 0.2 above the tenth's quantile costs a tenth of it, 0.2 below it nine tenths
    assert pinball(np.array([0.2, -0.2, 0.0]), np.array([0.1])) == pytest.approx([0.02, 0.18, 0.0])


def test_no_other_line_has_a_smaller_loss():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 2))
    y = x[:, 0] + (1 + 0.5 * x[:, 1]) * rng.normal(size=60)
    for penalty in (0.0, 0.01):
        for level, line in zip(LEVELS, regress(x, y, LEVELS, penalty), strict=True):

            def loss(line, level=level, penalty=penalty):
                off = y - x @ line[:2] - line[2]
                return np.where(off < 0, (level - 1) * off, level * off).mean() + penalty * line[:2] @ line[:2]

            others = [loss(line + size * rng.normal(size=3)) for size in (0.003, 0.03, 0.3) for _ in range(60)]
            assert loss(line) <= min(others) + 2e-4


def test_the_scatter_is_told_reply_by_reply():
    values, labels, scalar = scattered()
    head = fit(values, labels, scalar, [1.0, 1.0])
    found = np.array(head(mx.array(np.array([[-0.9, 0, 0, 0], [0.9, 0, 0, 0]], np.float32))))
    assert found.shape == (2, 3, 9)
    calm, wild = spread(found)
    assert calm[:2] == pytest.approx(0.12, abs=0.05) and wild[:2] == pytest.approx(0.48, abs=0.08)
    assert wild[2] == pytest.approx(0.48 / np.sqrt(2), abs=0.08), "the mean of two scatters less"
    fresh, given, overall = scattered(2000, seed=1)
    quantiles = np.array(head(mx.array(fresh.astype(np.float32))))
    off = np.c_[given[:, :2], overall] - np.c_[fresh[:, :2], fresh[:, :2].mean(axis=1)]
    for level in (0.5, 0.8, 0.9):
        low, high = interval(quantiles, level)
        assert ((low <= off) & (off <= high)).mean() == pytest.approx(level, abs=0.04)
    wide = values[:, 0] > 0
    constant = np.quantile((labels - values)[:, 0], 0.9)
    assert ((labels - values)[wide, 0] > constant).mean() > 0.14, "equal widths would be wrong about both halves"
    same = fit(values, labels, scalar, [1.0, 1.0])
    assert all(mx.array_equal(head[name], same[name]) for name in ("weight", "bias"))


def test_missing_labels_are_left_out_and_few_give_no_slopes():
    values, labels, scalar = scattered()
    labels[150:, 0] = np.nan
    labels[60:, 1] = np.nan
    head = fit(values, labels, np.where(np.isnan(labels[:, 1]), np.nan, scalar), [1.0, 1.0])
    alone = fit(values[:150], labels[:150], scalar[:150], [1.0, 1.0])
    ours, theirs = (np.array(each(mx.array(values[:5].astype(np.float32)))) for each in (head, alone))
    assert np.isfinite(ours).all()
    assert spread(ours[:, 0]) == pytest.approx(spread(theirs[:, 0]), rel=0.05)
    assert np.ptp(ours[:, 1:], axis=0) == pytest.approx(0, abs=1e-6) and np.ptp(ours[:, 0], axis=0).max() > 0.05


def test_crossing_quantiles_change_places():
    head = QuantileHead(1, 1)
    head.weight = mx.array(np.tile(-np.arange(9.0), 2)[None], mx.float32)
    found = np.array(head(mx.array([[1.0], [-1.0], [0.0]])))
    assert found[0, 0].tolist() == [*range(-8, 1)] and found[1, 1].tolist() == [*range(9)] and not found[2].any()


def test_intervals_by_hand():
    quantiles = np.array([-4.0, -3, -2, -1, 0, 1, 2, 3, 6])
    assert interval(quantiles, 0.8) == (-4, 6)
    assert interval(quantiles, 0.5) == (-2.5, 2.5)
    low, high = interval(quantiles, 0.9)  # normal: 1.644854 / 1.281552 = 1.283486 times as far from the median
    assert (low, high) == (pytest.approx(-5.133944, abs=1e-5), pytest.approx(7.700917, abs=1e-5))
    assert spread(quantiles) == pytest.approx(10 / 2.563103, abs=1e-4)


# --- in the reward model --------------------------------------------------------------------------------------------


def settings(**changes) -> Config:
    return Config.model_validate({"reward": {"backbone": "ngram", "folds": 3, "members": 2, **changes}})


@pytest.fixture
def rows() -> list[Label]:
    """Five replies to each of 24 prompts; what is said of kind ones scatters less than what is said of cold ones."""
    rng, found = np.random.default_rng(0), []
    for number in range(24):
        for letter in "abcde":
            kind = rng.random() < 0.5
            vector = np.clip((0.5 if kind else -0.3) + (0.05 if kind else 0.4) * rng.normal(size=7), -1, 1)
            reward = dict(zip(MANIFOLD.names, vector.round(2).tolist(), strict=True)) | {
                "safety_score": 0.5 + 0.3 * kind
            }
            words = " ".join(rng.permutation(["morning", "house", "river", "window"])[:2])
            text = f"{'thank you for telling me' if kind else 'stop whining now'} {words} {letter}"
            label = {"id": f"p{number}-{letter}", "prompt_id": f"p{number}", "prompt": f"Prompt {number}"}
            found.append(Label(**label, response=text, reward=reward))
    return found


@pytest.fixture
def trained(registry, rows):
    """The reward model's artifact with these settings."""

    def make(**changes):
        with registry.draft("dataset") as draft:
            write_jsonl(draft.folder / "labels.train.jsonl", rows)
            write_jsonl(draft.folder / "labels.valid.jsonl", [])
        return training.train(registry, draft.published, settings(**changes))

    return make


def test_the_reward_model_tells_scatter_and_nothing_else_changes(trained):
    plain, made = trained(), trained(quantiles=True)
    before, model = RewardModel.load(plain.folder), RewardModel.load(made.folder)
    pairs = [("Hm?", "thank you for telling me"), ("Hm?", "stop whining now")]
    for one, two in zip(before.score_many(pairs), model.score_many(pairs), strict=True):
        assert one.scatter == {} and one.doubt("scalar") == one.uncertainty["scalar"]
        assert set(two.scatter) == {*MANIFOLD.names, "scalar"}
        assert two.model_copy(update={"scatter": {}}) == one
        assert two.doubt("empathy") == pytest.approx(np.hypot(one.uncertainty["empathy"], two.scatter["empathy"]))
        assert two.doubt("safety_score") == one.uncertainty["safety_score"]
    kind, cold = model.score_many(pairs)
    assert cold.scatter["empathy"] > 2 * kind.scatter["empathy"] > 0
    told = rl.Verdicts.of([kind, cold])
    assert told.doubt == pytest.approx([kind.doubt("scalar"), cold.doubt("scalar")])
    assert model.score("Hm?", " ").scatter == {}
    assert before.fingerprint() != model.fingerprint() == RewardModel.load(made.folder).fingerprint()
    was, now = dict(plain.metadata["metrics"]), dict(made.metadata["metrics"])
    found = now.pop("quantiles")
    assert now == was and set(found) == {"coverage", "width", "equal_width"}
    assert found["coverage"]["0.8"] == pytest.approx(0.8, abs=0.08)
    assert found["width"]["0.9"] < found["equal_width"]["0.9"]


def test_it_is_used_from_the_command_line_and_refused_when_damaged(trained, registry, home):
    made, folder = trained(quantiles=True), home / "copy"
    registry.use(made)
    asked = ["score", "-p", "Hm?", "-r", "stop whining now"]
    (output,) = json.loads(CliRunner().invoke(cli, [*asked, "--json", "-"]).stdout)["scores"]
    assert output["scatter"]["scalar"] > 0
    assert "scatter" in CliRunner().invoke(cli, asked).output
    folder.mkdir()
    for path in made.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    mx.save_safetensors(str(folder / "quantiles.safetensors"), {"weight": mx.zeros((3, 72)), "bias": mx.zeros((72,))})
    with pytest.raises(InputError, match=r"quantiles.safetensors: weight has shape \(3, 72\), expected \(9, 72\)"):
        RewardModel.load(folder)
