"""The attention head: hand-worked losses, a second implementation, and a training in which nothing leaks."""

import math

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx.config import Config
from hominem_mlx.errors import ConfigError, InputError
from hominem_mlx.losses import bradley_terry, huber
from hominem_mlx.reward import attention, attribution, categories
from hominem_mlx.reward import train as training
from hominem_mlx.reward.account import left_out
from hominem_mlx.reward.attention import AttentionHead, Pairs, fit, look, loss, padded
from hominem_mlx.reward.features import Backbone, LmReader
from hominem_mlx.reward.model import Card, RewardModel
from hominem_mlx.reward.reading import ReadRows, read_rows
from hominem_mlx.schema import MANIFOLD, STRANGE
from test_reward_model import OUTPUTS, PAIRS
from test_reward_train import COLD, KIND, change, corpus, dataset, settings  # noqa: F401

RNG = np.random.default_rng(7)


# --- numbers by hand -------------------------------------------------------------------------------------------------


def test_huber_is_a_square_near_zero_and_a_line_beyond():
    found = huber(mx.array([0.0, 0.5, -1.0, 3.0, -3.0]))
    np.testing.assert_allclose(found, [0.0, 0.125, 0.5, 2.5, 2.5])
    np.testing.assert_allclose(huber(mx.array([3.0]), delta=2.0), [2 * (3 - 1)])


def test_bradley_terry_asks_for_the_better_one():
    found = bradley_terry(mx.array([0.0, math.log(3), -math.log(3)]))
    np.testing.assert_allclose(found, [math.log(2), math.log(4 / 3), math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(bradley_terry(mx.array([2.0]), temperature=2.0), [math.log(1 + math.exp(-1))], rtol=1e-6)
    assert bradley_terry(mx.array([-1e4])).item() == pytest.approx(1e4)


def test_pairs_are_those_of_a_prompt_that_differ_by_a_tenth():
    labels = np.array([[0.3, 0.0], [0.2, np.nan], [0.25, 0.9], [0.9, 0.0]])
    pairs = Pairs.of(labels, np.array(["a", "a", "a", "b"]))
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    np.testing.assert_array_equal(pairs.order, [[1, 0], [0, -1], [0, 0]])


def test_the_loss_of_a_small_batch_by_hand():
    said = mx.array([[[0.5]], [[-1.0]], [[2.0]]])  # three rows, one head, one output
    targets = mx.array([[1.0], [-1.0], [0.0]])
    pairs = Pairs(np.array([0, 1]), np.array([1, 2]), np.array([[1.0], [-1.0]], np.float32))
    found = loss(said, targets, mx.array([[1.0, 2.0, 1.0]]), pairs).item()
    rows = (1 * 0.125 + 2 * 0.0 + 1 * 1.5) / 4
    both = (1 * math.log(1 + math.exp(-1.5)) + 2 * math.log(1 + math.exp(-3.0))) / 3
    assert found == pytest.approx(rows + 0.5 * both, rel=1e-6)


def test_a_missing_label_moves_nothing():
    said, targets = mx.array(RNG.normal(size=(4, 2, 3)), mx.float32), RNG.normal(size=(4, 3))
    targets[1, 2] = np.nan
    groups = np.array(["a", "a", "b", "b"])

    def total(said):
        return loss(said, mx.array(targets, mx.float32), mx.ones((2, 4)), Pairs.of(targets, groups)).sum()

    slope = np.array(mx.grad(total)(said))
    assert np.isfinite(slope).all() and (slope[1, :, 2] == 0).all() and (slope[1, :, :2] != 0).all()
    targets[:] = np.nan
    assert total(said).item() == 0.0 and not np.array(mx.grad(total)(said)).any()


# --- a second implementation ----------------------------------------------------------------------------------------


def looked(z, said, query, weight, bias):
    """The same in float64, one number at a time."""
    made = np.zeros((len(z), *bias.shape))
    for row, (first, last) in enumerate(said):
        for place in np.ndindex(bias.shape):
            scores = np.array([query[place] @ state / math.sqrt(z.shape[2]) for state in z[row, first:last]])
            shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            read = [weight[place] @ state for state in z[row, first:last]]
            made[(row, *place)] = shares @ np.array(read) + bias[place]
    return made


def random_numbers(rows=3, tokens=5, size=4, heads=2, outputs=3):
    z, said = RNG.normal(size=(rows, tokens, size)), np.array([[1, 4], [0, 1], [2, 5]])[:rows]
    values = {name: RNG.normal(size=(heads, outputs, size)) for name in ("query", "weight")}
    return z, said, values | {"bias": RNG.normal(size=(heads, outputs))}


def as_mx(values):
    return {name: mx.array(value, mx.float32) for name, value in values.items()}


def test_looking_is_what_a_second_implementation_says_and_sees_nothing_outside():
    z, said, values = random_numbers()
    found = look(mx.array(z, mx.float32), mx.array(said), **as_mx(values))
    np.testing.assert_allclose(found, looked(z, said, **values), atol=1e-5)
    z[0, 0], z[0, 4], z[1, 1:] = 1e6, -1e6, 99.0
    np.testing.assert_allclose(look(mx.array(z, mx.float32), mx.array(said), **as_mx(values))[:2], found[:2], atol=1e-4)


def test_gradients_are_those_of_finite_differences():
    z, said, values = random_numbers()
    targets = RNG.normal(size=(3, 3))
    targets[2, 1] = np.nan
    pairs, counts = Pairs.of(targets, np.array(["a", "a", "a"])), np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])

    def by_numpy(values):
        made, total = looked(z, said, **values), 0.0
        for head, output in np.ndindex(made.shape[1:]):
            there = ~np.isnan(targets[:, output])
            off = np.abs(made[there, head, output] - targets[there, output])
            small = np.minimum(off, 1.0)
            total += np.average(0.5 * small**2 + off - small, weights=counts[head, there])
            order = pairs.order[:, output]
            margin = order * (made[pairs.first, head, output] - made[pairs.second, head, output])
            if order.any():
                total += 0.5 * np.average(np.log1p(np.exp(-margin)), weights=counts[head, pairs.first] * np.abs(order))
        return total

    def by_mlx(values):
        states, places = mx.array(z, mx.float32), mx.array(said)
        times = mx.array(counts, mx.float32)
        return loss(look(states, places, **values), mx.array(targets, mx.float32), times, pairs).sum()

    assert by_mlx(as_mx(values)).item() == pytest.approx(by_numpy(values), rel=1e-5)
    slope = mx.grad(by_mlx)(as_mx(values))
    for name, value in values.items():
        for place in [(0,) * value.ndim, tuple(size - 1 for size in value.shape)]:
            up, down = ({**values, name: value.copy()} for _ in range(2))
            up[name][place] += 1e-5
            down[name][place] -= 1e-5
            wanted = (by_numpy(up) - by_numpy(down)) / 2e-5
            assert np.array(slope[name])[place] == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def random_head(features=6, size=32, outputs=9, members=2, layer=2) -> AttentionHead:
    rng = np.random.default_rng(3)
    head = AttentionHead(features, size, outputs, members, layer)
    shapes = {name: value.shape for name, value in head.parameters().items()}
    head.update({name: mx.array(rng.normal(size=shape) * 0.5, mx.float32) for name, shape in shapes.items()})
    scales = {"feature_scale": features, "label_scale": outputs, "state_scale": size}
    head.update({name: mx.array(rng.uniform(0.5, 2, count), mx.float32) for name, count in scales.items()})
    return head


def test_the_head_standardises_once_and_undoes_it_once():
    head, states = random_head(), RNG.normal(size=(3, 5, 32))
    said = np.array([[0, 5], [1, 4], [2, 3]])
    h = {name: np.array(value, np.float64) for name, value in head.parameters().items()}
    z = (states - h["state_mean"]) / h["state_scale"]
    wanted = looked(z, said, h["query"], h["weight"], h["bias"]) * h["label_scale"] + h["label_mean"]
    attended = head.attend(mx.array(states, mx.float32), mx.array(said))
    values, members = head(mx.concatenate([mx.full((3, 6), 1e3), attended], axis=1))
    np.testing.assert_allclose(values, wanted[:, 0], atol=1e-4)
    np.testing.assert_allclose(np.array(members).swapaxes(0, 1), wanted[:, 1:], atol=1e-4)
    assert head.num_columns == 6 + 3 * 9
    parts, shares = (np.array(f(mx.array(states, mx.float32), mx.array(said))) for f in (head.parts, head.shares))
    np.testing.assert_allclose(parts.sum(axis=1) + np.array(head.start), wanted[:, 0], atol=1e-4)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    assert (shares[1, [0, 4]] == 0).all() and (parts[1, [0, 4]] == 0).all()


# --- training --------------------------------------------------------------------------------------------------------


def rows_with_one_telling_token(rows=60, size=6, seed=0):
    """Noise in every token, and in one of them, marked in the first feature, the label in the second."""
    rng = np.random.default_rng(seed)
    labels, states = rng.uniform(-1, 1, (rows, 2)), []
    for label in labels:
        tokens = rng.normal(size=(rng.integers(4, 12), size))
        tokens[:, 0] = 0.0
        told = rng.integers(len(tokens))
        tokens[told, :3] = 6.0, 4 * label[0], 4 * label[1]
        states.append(tokens.astype(np.float32))
    return states, labels, np.array([f"p{row // 4:03d}" for row in range(rows)])


def fitted(labels, *, rows=60, members=0, seed=0, **changes):
    states, _, groups = rows_with_one_telling_token(rows)
    features = np.array([each.mean(axis=0) for each in states])
    return fit(states, features, labels, groups, layer=1, folds=3, members=members, seed=seed, **changes)


def arrays(head):
    return {name: np.array(value) for name, value in head.parameters().items()}


def test_it_finds_the_token_that_tells(monkeypatch):
    monkeypatch.setattr(attention, "RATE", 2e-2)
    states, labels, _ = rows_with_one_telling_token(160)
    found = fitted(labels, rows=160, members=2)
    unseen = np.corrcoef((labels - found.left_out)[:, 0], labels[:, 0])[0, 1]
    means = np.array([each.mean(axis=0) for each in states])
    plain = np.corrcoef(means[:, 1], labels[:, 0])[0, 1]
    assert unseen > 0.95 > plain + 0.2
    assert found.left_out.shape == (160, 2) and all(epoch > 0 for epoch in found.epochs)
    shares = np.array(found.head.shares(*padded(states)))[:, :, 0]
    assert np.mean(shares.argmax(axis=1) == [each[:, 0].argmax() for each in states]) > 0.95
    said = found.head(mx.concatenate([mx.array(means), mx.array(found.head.attend_all(states))], axis=1))
    assert np.array(said[1]).std(axis=0).mean() > 0  # members differ
    assert np.corrcoef(np.array(said[0])[:, 0], labels[:, 0])[0, 1] > 0.95


def test_noise_is_not_learnt_and_about_the_mean_is_said():
    labels = np.random.default_rng(5).uniform(-1, 1, (160, 2))
    said = labels - fitted(labels, rows=160).left_out
    assert (said.std(axis=0) < 0.2 * labels.std(axis=0)).all()


def test_where_nothing_can_be_learnt_members_still_differ(monkeypatch):
    monkeypatch.setattr(attention, "EPOCHS", 0)
    labels = np.random.default_rng(5).uniform(-1, 1, (60, 2))
    labels[::2, 1] = np.nan
    found = fitted(labels, members=2)
    _, _, groups = rows_with_one_telling_token()
    drawn = attention.bootstrap_rows(groups, 2, seed=0)
    values, members = found.head(mx.array([[0.0] * 6 + found.head.bias.flatten().tolist()]))
    np.testing.assert_allclose(values[0], np.nanmean(labels, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.array(members)[:, 0], [np.nanmean(labels[rows], axis=0) for rows in drawn], atol=1e-6)
    fold = attention.grouped_folds(groups, 3, seed=0)
    said = (labels - found.left_out)[fold == 1]
    np.testing.assert_allclose(said[:, 0], labels[fold != 1, 0].mean(), atol=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_members_change_no_judge(monkeypatch):
    monkeypatch.setattr(attention, "EPOCHS", 3)
    _, labels, _ = rows_with_one_telling_token()
    first, again, other = fitted(labels, members=2), fitted(labels, members=2), fitted(labels, members=2, seed=1)
    for name, value in arrays(first.head).items():
        np.testing.assert_array_equal(value, arrays(again.head)[name])
    assert not np.array_equal(arrays(first.head)["weight"], arrays(other.head)["weight"])
    alone = fitted(labels)
    np.testing.assert_allclose(arrays(alone.head)["weight"][0], arrays(first.head)["weight"][0], atol=1e-5)


def test_labels_that_are_missing_and_outputs_apart_do_not_touch_one_another(monkeypatch):
    monkeypatch.setattr(attention, "EPOCHS", 3)
    _, labels, _ = rows_with_one_telling_token()
    gone = labels.copy()
    gone[::3, 1] = np.nan
    whole, some = fitted(labels), fitted(gone)
    np.testing.assert_allclose(arrays(some.head)["weight"][:, 0], arrays(whole.head)["weight"][:, 0], atol=1e-6)
    assert np.isnan(some.left_out[::3, 1]).all() and np.isfinite(some.left_out[:, 0]).all()
    assert np.isfinite(arrays(some.head)["weight"]).all()


def test_what_is_said_of_a_fold_hangs_on_no_label_in_it(monkeypatch):
    monkeypatch.setattr(attention, "EPOCHS", 1)
    monkeypatch.setattr(attention, "label_moments", lambda labels: (np.zeros(2), np.ones(2)))
    _, labels, groups = rows_with_one_telling_token()
    fold = attention.grouped_folds(groups, 3, seed=0)
    turned = np.where((fold == 0)[:, None], -labels, labels)
    found = [fitted(now) for now in (labels, turned)]
    first, second = (now - each.left_out for now, each in zip((labels, turned), found, strict=True))
    kept = [output for output in range(2) if found[0].epochs[output] == found[1].epochs[output] == 1]
    assert kept
    np.testing.assert_allclose(first[fold == 0][:, kept], second[fold == 0][:, kept], atol=1e-6)
    assert not np.allclose(first[fold != 0][:, kept], second[fold != 0][:, kept], atol=1e-3)


# --- the whole line --------------------------------------------------------------------------------------------------

ATTENDING = {"head": "attention", "attention_layer": 1.0}


@pytest.fixture
def fast(monkeypatch):
    """Few and long steps: the corpus of the tests is small."""
    monkeypatch.setattr(attention, "EPOCHS", 8)
    monkeypatch.setattr(attention, "RATE", 2e-2)


def attending_model(lm) -> RewardModel:
    reader, head = LmReader(lm), random_head(features=2 * 32)
    card = Card(
        manifold=MANIFOLD,
        outputs=OUTPUTS,
        backbone="lm",
        backbone_name=lm.name,
        backbone_hash=lm.hash,
        layers=(0,),
        poolings=("mean", "gap"),
        attention_layer=2,
    )
    return RewardModel(card, head, Backbone(reader, (0,), ("mean", "gap"), attention=head))


def test_scores_are_those_of_the_head_on_the_reply_s_states_and_come_back_from_disk(tiny, tmp_path):
    lm = tiny()
    model = attending_model(lm)
    said = model.score_many(PAIRS)
    for pair, output in zip(PAIRS, said, strict=True):
        states = model.features.states([pair], 2)[0]
        h = {name: np.array(value, np.float64) for name, value in model.head.parameters().items()}
        z = ((states - h["state_mean"]) / h["state_scale"])[None]
        wanted = looked(z, [(0, len(states))], h["query"], h["weight"], h["bias"])[0] * h["label_scale"]
        wanted += h["label_mean"]
        np.testing.assert_allclose(list(output.unclipped.values()), wanted[0], atol=1e-3)
        np.testing.assert_allclose(output.members["empathy"], wanted[1:, 0], atol=1e-3)
    model.save(tmp_path)
    loaded = RewardModel.load(tmp_path, lm=lm)
    assert loaded.fingerprint() == model.fingerprint() and loaded.score_many(PAIRS) == said
    plain = model.features.plain
    assert plain.attention is None and plain.read(PAIRS)[0].shape == (len(PAIRS), 64)
    np.testing.assert_array_equal(model.read(PAIRS, tmp_path), plain.read_cached(PAIRS, tmp_path))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"query": None}, "query is missing"),
        ({"query": mx.zeros((3, 9, 31))}, "query has shape"),
        ({"bias": mx.full((3, 9), float("inf"))}, "bias holds NaN or infinity"),
        ({"member_bias": mx.zeros((1,))}, "member_bias does not belong"),
    ],
)
def test_a_spoilt_attention_head_is_refused(tiny, tmp_path, spoil, said):
    attending_model(tiny()).save(tmp_path)
    path = str(tmp_path / "head.safetensors")
    kept = {name: value for name, value in {**mx.load(path), **spoil}.items() if value is not None}
    mx.save_safetensors(path, kept)
    with pytest.raises(InputError, match=said):
        RewardModel.load(tmp_path)


def test_it_goes_through_the_whole_line(registry, dataset, tiny, fast):  # noqa: F811
    lm, rows = tiny(), corpus(14)
    lines = []
    config = settings("lm", **ATTENDING)
    before = lm.fingerprint()
    artifact = training.train(registry, dataset(rows[:48], rows[48:]), config, lm=lm, progress=lines.append)
    assert registry.verify() == []
    metrics, notes = artifact.metadata["metrics"], artifact.metadata["notes"]
    assert min(row["epochs"] for row in notes["outputs"]) >= 0 and "penalty" not in notes["outputs"][0]
    assert notes["head"] == "attention on block 2" and artifact.metadata["config"]["head"] == "attention"
    assert metrics["outputs"]["empathy"]["pearson"] > 0.5 and 0 <= metrics["baseline_pair_accuracy"] <= 1
    assert 0 <= metrics["valid_pair_accuracy"] <= 1 and metrics["hidden_norm"] is not None
    assert {line["stage"] for line in lines} >= {"features", "token states", "folds", "epochs, at most"}
    assert lm.fingerprint() == before

    model = RewardModel.load(artifact.folder, lm=lm)
    kind, cold = model.score_many([("hello", KIND[0] + " river."), ("hello", COLD[0] + " river.")])
    assert kind.reward_vector["empathy"] > cold.reward_vector["empathy"]
    assert min(kind.uncertainty.values()) > 0 and set(kind.width) == set(OUTPUTS)
    again = training.train(registry, artifact_parent(registry, artifact), config, lm=tiny())
    assert again.ref == artifact.ref
    ridge = settings("lm")
    assert model.settings(ridge).reward.head == "attention" and model.settings(config) == config
    found = categories.carried_over(
        rows, model.features.read_cached(ReadRows(rows).pairs, registry.home), *[model.features, model.settings(ridge)]
    )
    assert found is None or found["categories"]


def artifact_parent(registry, artifact):
    kind, _, version = artifact.metadata["parents"][0].partition("/")
    return registry.get(kind, version)


def test_a_row_left_out_is_judged_without_its_label(tiny, home, fast):
    rows = corpus(9)
    config = settings("lm", **ATTENDING)
    read = read_rows(rows, "lm", config, home, tiny())
    parts = np.array([row.prompt_id for row in rows])
    first = left_out(rows, np.where(parts == "p-000", "a", "b"), read.features, read.backbone, config)
    lied = [change(row, empathy=-row.reward.empathy) if row.prompt_id == "p-000" else row for row in rows]
    second = left_out(lied, np.where(parts == "p-000", "a", "b"), read.features, read.backbone, config)
    own = parts == "p-000"
    np.testing.assert_array_equal(first[own], second[own])
    assert not np.array_equal(first[~own], second[~own])


def test_rows_far_away_are_strange_with_this_head_too(registry, dataset, tiny, fast, monkeypatch):  # noqa: F811
    monkeypatch.setattr(attention, "EPOCHS", 2)
    artifact = training.train(registry, dataset(corpus(27)), settings("lm", **ATTENDING), lm=tiny())
    assert artifact.file("distribution.safetensors").exists()
    model = RewardModel.load(artifact.folder, lm=tiny())
    assert STRANGE in model.score("hello", "zq " * 150).flags
    assert STRANGE not in model.score("Prompt number 3 about my day", KIND[0] + " today morning.").flags


def test_a_killed_training_leaves_nothing(registry, dataset, tiny, fast):  # noqa: F811
    parent = dataset(corpus(9))

    def die(line):
        if line["stage"] == "head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(registry, parent, settings("lm", **ATTENDING), lm=tiny(), progress=die)
    kept = registry.home / "artifacts" / "reward_model"
    assert not kept.exists() or not [folder for folder in kept.iterdir() if folder.name[0].isdigit()]


def test_ngrams_have_no_tokens_to_look_at():
    with pytest.raises((ConfigError, ValueError), match="head = ridge"):
        Config.model_validate({"reward": {"backbone": "ngram", "head": "attention"}})


def test_where_it_looks_is_shown_as_no_cause(tiny):
    from hominem_mlx.cli import highlight

    model = attending_model(tiny())
    found = attribution.report(model, "Is 1 < 2?", "<b>Yes</b> & sure.", ["empathy", "scalar"], steps=4)
    for one in found["outputs"]:
        looks = one["attention"]
        assert sum(looks["values"]) == pytest.approx(1.0, abs=1e-5) and looks["is_a_cause"] is False
        assert "".join(word for word, _ in looks["words"]) == "".join(one["pieces"])
        assert len(looks["values"]) == len(one["values"])
        places = one["places"]
        assert sum(places["values"]) + places["start"] == pytest.approx(one["value"], abs=1e-3)
    page = highlight.page(found)
    assert "display only, not a cause" in page and "&lt;b&gt;Yes" in page and "<b>Yes" not in page
    (words,) = attribution.explain(model, "Hi", "That sounds heavy. Rest.", ["curiosity"])
    assert words.is_complete and words.value == pytest.approx(
        model.score("Hi", "That sounds heavy. Rest.").unclipped["curiosity"], abs=1e-3
    )
