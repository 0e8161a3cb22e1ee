"""The six axes of emotion: carried by labels, learnt beside the seven, counted in nothing else."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from hominem_mlx.cli import cli
from hominem_mlx.config import Config
from hominem_mlx.data import dataset as data
from hominem_mlx.data import home as homes
from hominem_mlx.errors import InputError
from hominem_mlx.files import write_json, write_jsonl
from hominem_mlx.records import Label, Reward
from hominem_mlx.reward import train as training
from hominem_mlx.reward.acceptance import checks
from hominem_mlx.reward.account import left_out
from hominem_mlx.reward.head import EXTRA
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.own import LEAST_PROMPTS, felt
from hominem_mlx.schema import EMOTIONS, MANIFOLD

CONFIG = Config.model_validate({"reward": {"backbone": "ngram", "folds": 3, "members": 2}})
K = len(MANIFOLD.names)
GLAD, SAD = "what lovely news", "that is a heavy loss"


def rated(prompts: int = 14, *, with_feelings: int = 0) -> list[Label]:
    """Four replies a prompt; kind words raise three dimensions, and of some prompts glad ones what was felt."""
    rng, rows = np.random.default_rng(0), []
    for number in range(prompts):
        for letter in "abcd":
            kind, glad = rng.random(2) < 0.5
            vector = rng.uniform(-0.1, 0.1, K)
            vector[:3] += 0.6 if kind else -0.6
            reward = dict(zip(MANIFOLD.names, vector.round(2).tolist(), strict=True))
            reward |= {"reward_intensity": 0.5, "safety_score": 0.9 if kind else 0.2}
            if number < with_feelings:
                reward |= {"valence": 0.8 if glad else -0.8, "arousal": 1.0 if glad else 0.0}
            rows.append(
                Label(
                    id=f"p{number:03d}-{letter}",
                    prompt_id=f"p{number:03d}",
                    prompt=f"Prompt number {number}",
                    response=f"{'thank you for telling me' if kind else 'stop whining now'}, {GLAD if glad else SAD}",
                    reward=reward,
                )
            )
    return rows


def without(row: Label) -> Label:
    """The row with the numbers of the seven, intensity and safety alone."""
    known = {name: value for name, value in row.reward.model_dump(exclude_none=True).items() if name not in FELT}
    return row.model_copy(update={"reward": Reward(**known)})


FELT = tuple(axis.name for axis in EMOTIONS)


@pytest.fixture
def labels(registry):
    """Publishes a labels dataset."""

    def make(train, valid=()):
        with registry.draft("dataset") as draft:
            write_jsonl(draft.folder / "labels.train.jsonl", train)
            write_jsonl(draft.folder / "labels.valid.jsonl", valid)
        return draft.published

    return make


# --- labels ---------------------------------------------------------------------------------------------------------


def test_there_are_the_six_axes_with_their_ranges():
    assert {axis.name: axis.range for axis in EMOTIONS} == {
        "valence": (-1, 1),
        "arousal": (0, 1),
        "dominance": (-1, 1),
        "predictive_discrepancy": (-1, 1),
        "temporal_orientation": (-1, 1),
        "social_broadcast": (0, 1),
    }
    assert MANIFOLD.hash == "9ba3d5884eff56de", "they are no part of the manifold"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        ('"arousal": -0.2', "reward.arousal = -0.2: the range of arousal is 0 to 1"),
        ('"valence": 2', "reward.valence = 2: .*1"),
        ('"valence": "glad"', "reward.valence = 'glad'"),
        ('"valence": NaN', "valence"),
        ('"valense": 0.5', "reward.valense = 0.5: there is no dimension valense; .* axes of emotion are valence, arou"),
    ],
)
def test_what_cannot_be_felt_is_refused_with_its_place(home, tmp_path, number, reason):
    good = '{"prompt": "Hm?", "response": "Yes.", "reward": {"empathy": 0.1, "valence": 0.5, "social_broadcast": null}}'
    path = tmp_path / "labels.jsonl"
    path.write_text(good + "\n" + good.replace("Yes", "No").replace('"valence": 0.5', number) + "\n")
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}:2: .*{reason}"):
        data.import_file(home, path, manifold=MANIFOLD)
    assert homes.read(home, Label) == []


def test_feelings_alone_join_the_label_that_the_reply_has(home, tmp_path):
    before = rated(1)
    homes.write(home, Label, before)
    felt_by = {"prompt": before[0].prompt, "response": before[0].response, "reward": {"valence": -0.3}}
    (tmp_path / "felt.jsonl").write_text(json.dumps(felt_by))
    data.import_file(home, tmp_path / "felt.jsonl", labeller="human", manifold=MANIFOLD)
    first, *others = homes.read(home, Label, MANIFOLD)
    assert others == before[1:] and first.labeller == before[0].labeller
    assert first.reward.own == {"valence": -0.3} and first.metadata["own"] == {"valence": "human"}
    assert first.reward.overall() == before[0].reward.overall()
    assert homes.read(home, Label, MANIFOLD)[0].reward.number("arousal") is None


# --- the reward model -----------------------------------------------------------------------------------------------


def test_they_are_learnt_beside_the_seven_which_stay_what_they_were(registry, labels):
    rows = rated(with_feelings=12)
    old = training.train(registry, labels([*map(without, rows)]), CONFIG)
    new = training.train(registry, labels(rows), CONFIG)
    before, after = RewardModel.load(old.folder), RewardModel.load(new.folder)
    assert after.card.outputs == (*MANIFOLD.names, *EXTRA, "valence", "arousal") and after.manifold == MANIFOLD
    pairs = [("Hm?", f"{said} {said}") for said in (GLAD, SAD)]
    for one, two in zip(before.score_many(pairs), after.score_many(pairs), strict=True):
        assert one.emotion == {} and list(two.emotion) == ["valence", "arousal"]
        assert two.reward_vector == pytest.approx(one.reward_vector, abs=1e-6)
        assert two.scalar == pytest.approx(one.scalar, abs=1e-6)
        assert two.uncertainty["scalar"] == pytest.approx(one.uncertainty["scalar"], abs=1e-6)
        assert {"valence", "arousal"} <= two.uncertainty.keys() & two.width.keys() & two.unclipped.keys()
    glad, sad = after.score_many(pairs)
    assert glad.emotion["valence"] > 0.3 > -0.3 > sad.emotion["valence"]
    assert all(0 <= said.emotion["arousal"] <= 1 for said in (glad, sad))
    assert min(sad.unclipped["arousal"], 1 - glad.unclipped["arousal"]) < 0, "or clipping is not put to the test"
    was, now = old.metadata["metrics"], new.metadata["metrics"]
    assert set(now["own"]) == set(now["baseline_own"]) == {"valence", "arousal"}
    assert now["own"]["valence"]["rows"] == 48 and now["own"]["valence"]["pearson"] > 0.8
    assert now["outputs"].keys() == was["outputs"].keys() and now["calibration"].keys() == was["calibration"].keys()
    assert now["residual"]["mean"] == pytest.approx(was["residual"]["mean"], abs=1e-5)
    assert [(check.check, check.holds) for check in checks(now)] == [(c.check, c.holds) for c in checks(was)]
    ranges = {entry["name"]: (entry["range"], entry["meaning"]) for entry in new.metadata["notes"]["outputs"]}
    assert ranges["arousal"] == ([0.0, 1.0], "How stirred was the person?")


def test_an_axis_with_too_few_labels_waits(registry, labels):
    made = training.train(registry, labels(rated(with_feelings=LEAST_PROMPTS - 1)), CONFIG)
    assert made.metadata["notes"]["not_learnt_yet"] == {"valence": 1, "arousal": 1}
    assert RewardModel.load(made.folder).score("Hm?", GLAD).emotion == {}
    assert felt(rated(with_feelings=LEAST_PROMPTS), MANIFOLD) == ("valence", "arousal")


def test_an_axis_that_never_moves_is_refused(registry, labels):
    rows = [
        row.model_copy(update={"reward": Reward(**row.reward.model_dump(exclude_none=True) | {"dominance": 0.5})})
        for row in rated()
    ]
    with pytest.raises(InputError, match=r"dominance is 0\.5 in all 56 training rows"):
        training.train(registry, labels(rows), CONFIG)


def test_a_dimension_of_the_persons_own_takes_the_place_of_an_axis(registry, labels):
    block = {"name": "valence", "rubric": "Is it glad?", "bad": "sad", "good": "glad"}
    config = Config.model_validate({"manifold": {"dimension": [block]}, "reward": CONFIG.reward})
    made = training.train(registry, labels(rated(with_feelings=12)), config)
    model = RewardModel.load(made.folder, manifold=config.manifold.in_use)
    assert model.card.outputs == (*MANIFOLD.names, "valence", *EXTRA, "arousal")
    said = model.score("Hm?", GLAD)
    assert list(said.emotion) == ["arousal"] and said.reward_vector["valence"] > 0.3


def test_held_out_parts_are_told_of_the_seven_alone():
    rows = rated(with_feelings=14)
    parts = np.arange(len(rows)) // 4 % 2
    found = left_out(rows, parts, None, None, CONFIG)
    plain = left_out([*map(without, rows)], parts, None, None, CONFIG)
    assert found.shape == (56, K + 2)
    np.testing.assert_allclose(found, plain, atol=1e-6)


def test_outputs_in_another_order_are_refused(registry, labels):
    made = training.train(registry, labels(rated(with_feelings=12)), CONFIG)
    card = json.loads((made.folder / "reward_model.json").read_text())
    card["outputs"][-2:] = card["outputs"][:-3:-1]
    folder = registry.home / "copy"
    folder.mkdir()
    for path in made.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_json(folder / "reward_model.json", card)
    with pytest.raises(InputError, match="are not those of its manifold"):
        RewardModel.load(folder)


def test_score_shows_them(home, registry, labels):
    registry.use(training.train(registry, labels(rated(with_feelings=12)), CONFIG))
    (home / "hominem.toml").write_text("[reward]\nbackbone = 'ngram'\n")
    (home / "replies.jsonl").write_text(json.dumps({"prompt": "Hm?", "response": GLAD}))
    for words in (["-p", "Hm?", "-r", GLAD], ["--file", str(home / "replies.jsonl")]):
        done = CliRunner().invoke(cli, ["score", *words])
        assert done.exit_code == 0 and "valence" in done.output and "arousal" in done.output
        done = CliRunner().invoke(cli, ["score", *words, "--json", "-"])
        assert set(json.loads(done.stdout)["scores"][0]["emotion"]) == {"valence", "arousal"}
