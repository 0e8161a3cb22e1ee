"""A steady reward: edits that mean nothing, noise on embeddings, curvature; by hand, and on models that jump."""

import itertools
import math
import re

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx import metrics
from hominem_mlx.reward import rewording
from hominem_mlx.reward.features import Backbone, LmReader
from hominem_mlx.reward.head import EXTRA, RidgeHead
from hominem_mlx.reward.model import Card, RewardModel
from hominem_mlx.reward.rewording import EDITS, reword
from hominem_mlx.reward.smoothness import flipped, steadiness, under_edits, under_noise
from hominem_mlx.schema import MANIFOLD

TEXT = "I do not know that river. Perhaps your sister remembers its name?"


# --- edits ----------------------------------------------------------------------------------------------------------


def test_every_kind_changes_dress_alone():
    made = {kind: text for number in range(len(EDITS)) for kind, text in [reword(TEXT, number)]}
    assert list(made) == list(EDITS)
    assert sorted(made["typo"]) == sorted(TEXT) and sum(a != b for a, b in zip(made["typo"], TEXT, strict=True)) == 2
    assert made["case"].lower() == TEXT.lower()
    assert made["filler"].endswith(TEXT) and made["filler"].removesuffix(TEXT) in rewording.FILLERS
    assert made["spacing"].split() == TEXT.split()
    assert re.sub(r"\*\*|- |\n", "", made["formatting"]).replace(" ", "") == TEXT.replace(" ", "")
    assert "contraction" in made


def test_contractions_go_both_ways_and_keep_words_whole():
    seen = {reword("I do not, and you are cannotic.", 5, seed=seed)[1] for seed in range(8)}
    assert "I don't, and you're cannotic." in seen
    assert {reword("We can't; they're out.", 5, seed=seed)[1] for seed in range(8)} >= {"We cannot; they are out."}


@pytest.mark.parametrize("text", ["嗯。", "🙂", "1 2", "ok", "Nein!", "a.\n\nb."])
def test_any_text_is_edited_to_another_that_says_something(text):
    for number in range(12):
        _, edited = reword(text, number)
        assert edited != text and edited.strip()


def test_the_same_seed_gives_the_same_edit_and_another_one_another():
    assert reword(TEXT, 0, seed=1) == reword(TEXT, 0, seed=1)
    assert len({reword(TEXT, 0, seed=seed) for seed in range(6)}) > 1


# --- how far the scalar moves ---------------------------------------------------------------------------------------


def test_flips_by_hand():
    labels, groups = np.array([0.9, 0.1, 0.0, 0.5]), np.array(["a", "a", "a", "b"])
    before, after = np.array([0.5, 0.2, 0.1, 9.0]), np.array([0.1, 0.2, 0.1, -9.0])
    # clear pairs: 0 over 1 (turned round) and 0 over 2 (now a tie); 1 over 2 is too close, b is alone
    assert flipped(before, after, labels, groups) == (0.5, 2)
    share, count = flipped(before[3:], after[3:], labels[3:], groups[3:])
    assert math.isnan(share) and count == 0


def rows(prompts=30, replies=3):
    pairs = [(f"Prompt {p}", f"Reply {r} of prompt {p} says that mornings are wonderful.") for p in range(prompts)
             for r in range(replies)]  # fmt: skip
    groups = np.repeat(np.arange(prompts), replies)
    return pairs, groups, np.tile(np.linspace(-0.5, 0.5, replies), prompts)


def test_what_a_judge_moves_by_is_measured_in_its_own_deviations():
    pairs, groups, labels = rows()
    place = {pair[0] + pair[1][:7]: index for index, pair in enumerate(pairs)}
    before = labels * 2.0  # deviation 2 * sqrt(1/6)
    spread = 2 * math.sqrt(1 / 6)
    steady = under_edits(lambda edited: np.zeros(len(edited)) + 0.1, [pairs[0]] * 90, np.zeros(90), labels, groups)
    assert steady["n"] == 0 and math.isnan(steady["median"])  # a scalar without spread moves by nothing that counts

    def shifted(edited):
        return np.array([moves(prompt, reply) for prompt, reply in edited])

    def moves(prompt, reply):
        text = re.sub(r"^(- )?(\w+, )?", "", reply).replace("*", "").replace("  ", " ").capitalize()
        index = place.get(prompt + text[:7])
        return before[index] + 0.05 * spread if index is not None else before[0]

    found = under_edits(shifted, pairs, before, labels, groups, seed=1)
    assert 200 <= found["n"] < 210 and found["median"] == pytest.approx(0.05)
    assert set(found["kinds"]) <= set(EDITS) and found["pairs"] >= 180
    few = under_edits(shifted, pairs, before, labels, groups, wanted=30)
    assert few["n"] == 30


def test_a_jumpy_judge_is_seen():
    pairs, groups, labels = rows()
    hashes = lambda edited: np.array([(sum(map(ord, reply)) * 7919 % 101) / 50 - 1 for _, reply in edited])  # noqa: E731
    found = under_edits(hashes, pairs, hashes(pairs), labels, groups)
    assert found["median"] > 0.3 and found["q95"] > 1.5 and found["flips"] > 0.25


# --- noise ----------------------------------------------------------------------------------------------------------


def probe(f, x, direction, h):
    return [f(x), f(x + h * direction), f(x - h * direction), f(x + 2 * h * direction), f(x - 2 * h * direction)]


def test_linear_quadratic_and_stepped_rewards_by_hand():
    line = steadiness(np.array([probe(lambda x: 3 * x, 1.0, 1.0, 0.1)] * 2), np.array([0.1, 0.1]), step=0.1)
    assert line["ratio"] == pytest.approx(2) and line["lipschitz"] == pytest.approx(3)
    assert line["curvature"] == pytest.approx(0, abs=1e-9)
    bowl = steadiness(np.array([probe(lambda x: 5 * x * x, 0.0, 1.0, 0.1)] * 2), np.array([0.1, 0.1]), step=0.1)
    assert bowl["ratio"] == pytest.approx(4) and bowl["curvature"] == pytest.approx(10) and bowl["is_steady"]
    step = steadiness(np.array([probe(lambda x: float(x > 0), 0.0, 1.0, 0.1)] * 2), np.array([0.1, 0.1]), step=0.1)
    assert step["ratio"] == pytest.approx(1) and not step["is_steady"]


def test_curvature_is_the_trace_and_its_variance_that_between_probes():
    """Hutchinson: signs drawn evenly give the trace of the second derivative, and directions' noise is taken off."""
    rng, size, directions, h = np.random.default_rng(0), 6, 64, 0.05
    traces, values = [], []
    for _ in range(60):
        half = rng.normal(size=(size, size))
        matrix = half + half.T + np.eye(size) * rng.normal()
        traces.append(np.trace(matrix))
        f = lambda e, m=matrix: e @ m @ e / 2  # noqa: E731
        ways, x = rng.choice([-1.0, 1.0], (directions, size)), rng.normal(size=size)
        values.append([f(x), *(f(x + step * h * v) for step in (1, -1, 2, -2) for v in ways)])
    found = steadiness(np.array(values), np.ones(60), step=h)
    assert found["curvature"] == pytest.approx(np.mean(traces), abs=0.5) and found["is_steady"]
    assert found["curvature_variance"] == pytest.approx(np.var(traces, ddof=1), rel=0.25)


def test_variance_between_by_hand():
    # means 1 and 3, variance 2; within 2 and 0, mean 1, over 2 measurements .5
    assert metrics.variance_between(np.array([[0.0, 2.0], [3.0, 3.0]])) == pytest.approx(1.5)
    assert metrics.variance_between(np.array([[0.0, 2.0], [2.0, 0.0]])) == 0.0


def test_drift_rows():
    """Nothing for a turn, more the more noise, and the same as by plain loops."""
    rng = np.random.default_rng(0)
    probes = rng.normal(size=(64, 32))
    turn = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    assert metrics.rdm_drift(probes, 3 * probes @ turn + 1) == pytest.approx(0, abs=1e-9)
    noise = rng.normal(size=probes.shape)
    drifts = [metrics.rdm_drift(probes, probes + size * noise) for size in (0.1, 0.5, 1, 2, 5)]
    assert drifts == sorted(drifts) and drifts[0] < 0.02 and drifts[-1] > 0.8

    def unlike(values):
        rows = [row - values.mean(axis=0) for row in values]
        return [1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in itertools.combinations(rows, 2)]

    places = [np.argsort(np.argsort(unlike(view))) for view in (probes, probes + noise)]
    assert drifts[2] == pytest.approx(1 - np.corrcoef(*places)[0, 1])
    assert math.isnan(metrics.rdm_drift(probes[:19], probes[:19]))
    assert math.isnan(metrics.rdm_drift(np.ones((30, 3)), probes[:30]))


@pytest.fixture
def model(tiny):
    backbone = Backbone(LmReader(tiny()), [1, 2], ["mean", "std"])
    outputs = (*MANIFOLD.names, *EXTRA)
    head = RidgeHead(4 * 32, len(outputs), 0)
    head.weight = mx.random.normal(head.weight.shape, key=mx.random.key(1))
    card = Card(manifold=MANIFOLD, outputs=outputs, backbone="lm", backbone_name="tiny")
    return RewardModel(card, head, backbone)


def test_noise_reaches_the_reply_alone_and_a_small_one_twice_as_large_moves_twice_as_far(model, monkeypatch):
    seen = []
    features = Backbone.features

    def watch(self, passages, embedded=None):
        seen.append((passages[0].said, embedded))
        return features(self, passages, embedded)

    monkeypatch.setattr(Backbone, "features", watch)
    pairs = [("hi there", "you could ask her"), ("well", "that sounds heavy today")]
    found = under_noise(model, pairs)
    assert found["n"] == 2 and 1.5 < found["ratio"] < 2.5 and found["lipschitz"] > 0
    for (first, last), points in seen:
        off = np.array(points - points[:1])
        assert np.abs(off[:, :first]).max() == 0 and np.abs(off[:, last:]).sum() == 0
        own = np.linalg.norm(np.array(points[0, first:last]), axis=-1)
        assert np.linalg.norm(off[1, first:last], axis=-1) == pytest.approx(0.02 * own, rel=1e-4)
        assert off[1] == pytest.approx(-off[5], abs=1e-7) and off[9] == pytest.approx(2 * off[1], abs=1e-6)
    assert found == under_noise(model, pairs)
