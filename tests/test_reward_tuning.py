"""LoRA on the reward model's backbone: it changes what the reward model reads, and nothing else."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from hominem_mlx.config import Config
from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.models import lora
from hominem_mlx.models.encoder import load_encoder
from hominem_mlx.reward import train as training
from hominem_mlx.reward import tuning
from hominem_mlx.reward.features import EncoderReader, LmReader
from hominem_mlx.reward.head import grouped_folds
from hominem_mlx.reward.model import RewardModel
from hominem_mlx.reward.reading import open_backbone
from hominem_mlx.reward.targets import targets
from hominem_mlx.reward.tuning import Beside, Tuning
from test_encoder import folder  # noqa: F401
from test_reward_model import PAIRS
from test_reward_train import COLD, KIND, corpus, dataset, settings  # noqa: F401

TUNED = {"head": "attention", "attention_layer": 1.0, "lora_rank": 2}
PAIR = ("my dog died", "i am sorry for you")


@pytest.fixture
def fast(monkeypatch):
    """Few and long steps: the corpus of the tests is small."""
    monkeypatch.setattr(tuning, "EPOCHS", 4)
    monkeypatch.setattr(tuning, "PROMPTS", 4)
    monkeypatch.setattr(tuning, "RATE", 2e-2)


def moved(parts: Tuning, seed: int = 0) -> Tuning:
    rng = np.random.default_rng(seed)
    return Tuning({name: mx.array(rng.normal(size=v.shape) * 0.3, mx.float32) for name, v in parts.values.items()})


def states(reader, pairs, layer=2) -> list[np.ndarray]:
    return [np.array(reader.hidden_states([reader.passage(*pair)], [layer])[0]) for pair in pairs]


def test_a_layer_with_a_part_beside_it_by_hand():
    layer = nn.Linear(2, 2)
    layer.weight, layer.bias = mx.array([[1.0, 0.0], [0.0, 1.0]]), mx.array([0.5, 0.0])
    made = Beside(layer, mx.array([[1.0], [2.0]]), mx.array([[0.1, -0.1]]))(mx.array([[3.0, 4.0]]))
    np.testing.assert_allclose(made, [[3.5 + 2 * 11 * 0.1, 4.0 - 2 * 11 * 0.1]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "lm"])
def test_fresh_parts_change_nothing_moved_ones_do_and_the_model_never_does(tiny, folder, kind):  # noqa: F811
    reader = LmReader(tiny()) if kind == "lm" else EncoderReader(load_encoder(folder), "bert")
    model = reader.lm.model if kind == "lm" else reader.encoder.model
    layers = [layer for _, layer in model.named_modules()]
    before, bytes_before = states(reader, [PAIR]), [np.array(v) for _, v in nn.utils.tree_flatten(model.parameters())]
    fresh = Tuning.fresh(reader.blocks, 2, seed=0)
    np.testing.assert_array_equal(states(reader.tuned(fresh), [PAIR]), before)
    other = moved(fresh)
    assert not np.allclose(states(reader.tuned(other), [PAIR]), before, atol=1e-3)
    np.testing.assert_array_equal(states(reader.tuned(other), [PAIR], 0), states(reader, [PAIR], 0))
    np.testing.assert_array_equal(states(reader, [PAIR]), before)
    with pytest.raises(KeyError), other.beside(reader.blocks):
        raise KeyError
    assert [layer for _, layer in model.named_modules()] == layers
    for value, was in zip((v for _, v in nn.utils.tree_flatten(model.parameters())), bytes_before, strict=True):
        np.testing.assert_array_equal(np.array(value), was)


def test_gradients_reach_the_parts_and_are_those_of_finite_differences(tiny):
    reader = LmReader(tiny())
    values = moved(Tuning.fresh(reader.blocks, 2, seed=0)).values
    passage = reader.passage(*PAIRS[0])

    def total(values):
        return mx.square(reader.tuned(Tuning(values)).hidden_states([passage], [2])[0]).mean()

    slope, name = mx.grad(total)(values), "0.self_attn.v_proj.b"
    step = mx.zeros_like(values[name])
    step[1, 3] = 1e-2
    wanted = (total({**values, name: values[name] + step}) - total({**values, name: values[name] - step})) / 2e-2
    assert slope[name][1, 3].item() == pytest.approx(wanted.item(), rel=2e-2, abs=1e-5)
    assert all(mx.abs(value).max().item() > 0 for value in slope.values())


def test_it_goes_through_the_whole_line_and_belongs_to_the_reward_model(
    registry,
    dataset,  # noqa: F811
    tiny,
    fast,
):
    lm, rows = tiny(), corpus(10)
    before, parent = lm.fingerprint(), dataset(rows[:32], rows[32:])
    artifact = training.train(registry, parent, settings("lm", **TUNED), lm=lm)
    assert registry.verify() == [] and lm.fingerprint() == before
    assert artifact.metadata["config"]["lora_rank"] == 2 and artifact.file("lora.safetensors").exists()
    assert artifact.metadata["metrics"]["outputs"]["empathy"]["pearson"] > 0.3
    assert artifact.metadata["notes"]["head"] == "attention on block 2, with LoRA of rank 2 below it"

    model = RewardModel.load(artifact.folder, lm=lm)
    assert any(mx.abs(value).max().item() > 0 for name, value in model.tuning.values.items() if name.endswith(".b"))
    kind, cold = said = model.score_many([("hello", KIND[0] + " river."), ("hello", COLD[0] + " river.")])
    assert kind.reward_vector["empathy"] > cold.reward_vector["empathy"] and kind.uncertainty["scalar"] > 0
    assert model.settings(settings("lm")).reward.lora_rank == 2
    bare = model.features.plain
    assert bare.reader.tuning is None and bare.spec.model == lm.hash
    assert not np.allclose(bare.states(PAIRS[:1], 2)[0], model.features.states(PAIRS[:1], 2)[0])

    lora.attach(lm, lora.Shape(rank=4), seed=0)  # the student learns on, and the judge does not notice
    values = {name: mx.ones_like(value) for name, value in lora.adapter_parameters(lm.model).items()}
    lora.set_parameters(lm.model, values)
    pairs = [("hello", KIND[0] + " river."), ("hello", COLD[0] + " river.")]
    assert RewardModel.load(artifact.folder, lm=lm).score_many(pairs) == said
    assert training.train(registry, parent, settings("lm", **TUNED), lm=tiny()).ref == artifact.ref


def test_only_the_fold_that_was_never_learnt_from_says_how_far_off_it_is(tiny, home, fast):
    rows = corpus(9)
    backbone = open_backbone("lm", settings("lm", **TUNED), home, tiny())
    groups = [row.prompt_id for row in rows]
    labels, pairs = targets(rows), [(row.prompt, row.response) for row in rows]
    options = {"rank": 2, "layer": 2, "folds": 3, "members": 1, "seed": 0}
    told = []
    found, parts = tuning.fit(backbone, pairs, labels, groups, **options, tell=lambda *line: told.append(line))
    assert [epoch for epoch, _ in told] == [*range(1, len(told) + 1)] and len(told) >= found.epochs[0]
    outside = grouped_folds(groups, 3, seed=0) == 0
    assert np.isnan(found.left_out[~outside]).all() and np.isfinite(found.left_out[outside]).all()
    reads = backbone.looked_at_by(found.head, parts)
    said = np.array(found.head(mx.array(reads.read(pairs)[0]))[0])
    np.testing.assert_allclose((labels - said)[outside], found.left_out[outside], atol=2e-3)
    kept = found.epochs
    lied = labels.copy()
    lied[outside] = -lied[outside]  # they may only say when to stop
    other, _ = tuning.fit(backbone, pairs, lied, groups, **options)
    if other.epochs == kept:
        np.testing.assert_array_equal(np.array(other.head.weight), np.array(found.head.weight))
    np.testing.assert_array_equal(np.array(other.head.label_mean), np.array(found.head.label_mean))


def spoil(**changes):
    def do(values):
        return {name: value for name, value in (values | changes).items() if value is not None}

    return do


NAME = "0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoil(**{f"{NAME}.b": None}), f"{NAME}.b is missing"),
        (spoil(**{f"{NAME}.a": mx.full((32, 2), float("nan"))}), f"{NAME}.a holds NaN"),
        (spoil(**{f"{NAME}.a": mx.zeros((31, 2))}), f"{NAME}.a .* fits no layer"),
        (spoil(**{"9.strange.a": mx.zeros((32, 2)), "9.strange.b": mx.zeros((2, 32))}), "9.strange.a .* fits no layer"),
        (lambda values: {"x": mx.zeros((1,))}, "x.*|missing"),
    ],
)
def test_spoilt_parts_are_refused(tiny, tmp_path, change, said):
    from test_reward_attention import attending_model

    lm = tiny()
    model = attending_model(lm)
    parts = moved(Tuning.fresh(LmReader(lm).blocks, 2, seed=0))
    card = model.card.model_copy(update={"lora_rank": 2})
    RewardModel(card, model.head, model.features, tuning=parts).save(tmp_path)
    path = str(tmp_path / "lora.safetensors")
    assert RewardModel.load(tmp_path, lm=lm).score(*PAIRS[0]) != model.score(*PAIRS[0])
    mx.save_safetensors(path, change(dict(mx.load(path))))
    with pytest.raises((InputError, ModelError), match=said):
        RewardModel.load(tmp_path, lm=lm).score(*PAIRS[0])


def test_parts_that_are_gone_are_missed(tiny, tmp_path):
    from test_reward_attention import attending_model

    model = attending_model(tiny())
    RewardModel(model.card.model_copy(update={"lora_rank": 2}), model.head, model.features).save(tmp_path)
    with pytest.raises(InputError, match=r"lora\.safetensors: cannot be read"):
        RewardModel.load(tmp_path)


def test_a_ridge_cannot_be_tuned_through():
    with pytest.raises(ValueError, match="lora_rank needs head = attention"):
        Config.model_validate({"reward": {"lora_rank": 2}})
