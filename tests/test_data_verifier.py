"""What no single label shows: repeats, halo, broken edits, length, leaks. And the views on labels."""

import numpy as np
import pytest

from hominem_mlx.data import home as homes
from hominem_mlx.data import verifier
from hominem_mlx.data.split import split_of
from hominem_mlx.files import read_jsonl
from hominem_mlx.records import Label, RecallQuestion, Reward, SftPair
from hominem_mlx.schema import MANIFOLD

WORDS = ["apple", "bridge", "candle", "drum", "eagle", "forest", "garden", "harbour", "island", "jungle", "kettle"]


def row(name, vector, *, prompt="Why?", response=None, labeller="teacher", prompt_id=None, **more):
    reward = dict(zip(MANIFOLD.names, [float(v) for v in vector], strict=True))
    return Label(
        id=name,
        prompt_id=prompt_id or name.split("-")[0],
        prompt=prompt,
        response=response or f"A reply that is called {name}.",
        reward=Reward(**reward, **more.pop("numbers", {})),
        labeller=labeller,
        **more,
    )


def independent(count, seed=0, *, response=None, prompt=None):
    """Rows whose seven numbers have nothing to do with one another."""
    rng = np.random.default_rng(seed)
    return [
        row(
            f"r{n}-a",
            rng.uniform(-1, 1, 7),
            prompt=prompt or f"Question {n}?",
            response=response(n, rng) if response else " ".join([*rng.choice(WORDS, rng.integers(2, 12)), str(n)]),
        )
        for n in range(count)
    ]


def rules(verdict):
    return {problem.rule for problem in verdict.problems}


def test_good_labels_have_no_problem_and_are_measured():
    verdict = verifier.verify(independent(200))
    assert verdict.is_good, verdict.problems
    assert set(verdict.measures) == {
        "repeated_vectors",
        "participation_ratio",
        "mean_abs_correlation",
        "length_correlation",
        "gross",
        "injected_replies",
        "adversarial_prompts",
    }
    assert verdict.measures["participation_ratio"] > 6


def test_the_starter_corpus_holds_all_of_its_promises():
    labels = read_jsonl(homes.STARTER / "reward_samples.jsonl", Label)
    memory = read_jsonl(homes.STARTER / "memory.jsonl", SftPair)
    recall = read_jsonl(homes.STARTER / "recall.jsonl", RecallQuestion)
    verdict = verifier.verify(labels, memory=memory, recall=recall)
    assert verdict.is_good, verdict.problems


@pytest.mark.parametrize(("shared", "has_halo"), [(0.0, False), (0.5, False), (2.0, True)])
def test_labels_ruled_by_one_impression_are_a_halo(shared, has_halo):
    rng = np.random.default_rng(0)
    values = np.tanh(shared * rng.normal(size=(300, 1)) + 0.6 * rng.normal(size=(300, 7)))
    labels = [row(f"r{n}-a", vector, prompt=f"Question {n}?") for n, vector in enumerate(values)]
    verdict = verifier.verify(labels)
    assert ("halo" in rules(verdict)) == has_halo
    # Second implementation: eigenvalues of the correlation matrix.
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(values.T))
    assert verdict.measures["participation_ratio"] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def test_equal_replies_are_dropped_but_never_a_persons():
    vector = [0.1] * 7
    labels = [row("a-1", vector, response="Same."), row("a-2", [0.2] * 7, response="Same.", labeller="human")]
    verdict = verifier.verify([*labels, *independent(30)])
    (problem,) = [p for p in verdict.problems if p.rule == "duplicate"]
    assert problem.drop == ["a-1"] and "a-1 is the same reply as a-2" in problem.text
    assert {r.id for r in verifier.kept(labels, verdict)} == {"a-2"}


def test_near_repeats_are_named_edits_are_not():
    long = " ".join(WORDS)
    labels = [
        row("a-1", [0.5] * 7, response=long),
        row("a-2", [0.4] * 7, response=long + " lamp"),
        row("a-3", [0.5] * 6 + [-0.1], response=long + " oak moss", edit_of="a-1", lowered="curiosity"),
        row("b-1", [0.3] * 7, response=long, prompt="Another question?"),
    ]
    verdict = verifier.verify(labels)
    (problem,) = [p for p in verdict.problems if p.rule == "near-duplicate"]
    assert problem.rows == ["a-1", "a-2"] and problem.drop == ["a-2"]


def edit_problem(before, after, old="one two three four five six", new="one two three four nine ten", **more):
    labels = [row("a-1", before, response=old)]
    labels.append(row("a-2", after, response=new, edit_of="a-1", lowered="empathy", **more))
    found = [p for p in verifier.verify(labels).problems if p.rule == "edit"]
    return found[0].text if found else None


def test_edits_must_keep_their_promise():
    good = [0.5] * 7
    assert edit_problem(good, [0.1, *good[1:]]) is None
    assert edit_problem(good, [0.1, 0.65, *good[2:]]) is None, "0.15 is allowed, also in binary fractions"
    assert "empathy falls by 0.39" in edit_problem(good, [0.11, *good[1:]])
    assert "social_coherence moves by -0.20" in edit_problem(good, [0.0, 0.3, *good[2:]])
    assert "100% of the words differ" in edit_problem(good, [0.0, *good[1:]], new="quite another text altogether")
    assert "0% of the words differ" in edit_problem(good, [0.0, *good[1:]], new="One, two three; four five six!")
    assert edit_problem(good, [0.4, *good[1:]], labeller="human") is None, "numbers of two raters are not compared"


def test_the_share_of_changed_words_is_that_worked_by_hand():
    assert verifier.words_changed("a b c d", "a b c d") == 0
    assert verifier.words_changed("a b c d", "a b x d") == 0.25
    assert verifier.words_changed("a b", "a b c d") == 0.5


def test_repeated_vectors_length_and_gross_replies_are_named():
    habit = [*independent(60), *(row(f"h{n}-a", [0.5] * 7, prompt=f"Habit {n}?") for n in range(10))]
    assert "repeated" in rules(verifier.verify(habit))
    rng = np.random.default_rng(1)
    talker = []
    for n in range(100):
        vector = rng.uniform(-0.6, 0.6, 7)
        talker.append(row(f"t{n}-a", vector, prompt=f"Q {n}?", response="word " * int(20 + 15 * vector.mean() * 4)))
    assert "length" in rules(verifier.verify(talker))
    gross = [*independent(60), *(row(f"g{n}-a", [-0.8 - n / 1000] * 7, prompt=f"G {n}?") for n in range(10))]
    assert "gross" in rules(verifier.verify(gross))


def test_leaks_between_what_is_taught_and_what_is_examined_are_named():
    names = {part: next(f"x{n}" for n in range(99) if split_of(f"x{n}") == part) for part in ("train", "test")}
    text = "My brother sold the boat without asking any of us, what now"
    labels = [
        row(f"{names['train']}-a", [0.1] * 7, prompt=text),
        row(f"{names['test']}-a", [0.2] * 7, prompt=text + "?"),
    ]
    memory = [SftPair(id="m1", instruction="What is my dog called?", response="Rex.")]
    recall = [RecallQuestion(id="q1", fact_id="f", question="what is my dog called", key="Rex")]
    verdict = verifier.verify(labels, memory=memory, recall=recall)
    leaks = [p for p in verdict.problems if p.rule == "leak"]
    assert [sorted(p.rows) for p in leaks] == [sorted(names.values()), ["m1", "q1"]]
    assert f"only {names['test']} is held out" in leaks[0].text and not any(p.drop for p in leaks)


def test_labels_with_gaps_are_no_problem():
    partial = [
        Label(id=f"p{n}", prompt_id="p", prompt=f"P {n}", response="r", reward=Reward(empathy=n / 50))
        for n in range(40)
    ]
    verdict = verifier.verify(
        [*partial, Label(id="s", prompt_id="s", prompt="S", response="t", reward=Reward(scalar=1))]
    )
    assert verdict.is_good and "participation_ratio" not in verdict.measures
    assert verifier.verify([]).is_good


def test_drop_takes_out_only_what_is_named(home):
    labels = [*independent(30), row("a-1", [0.1] * 7, response="Same."), row("a-2", [0.2] * 7, response="Same.")]
    homes.write(home, Label, labels)
    assert not verifier.verify_home(home).is_good
    assert len(homes.read(home, Label)) == 32
    verdict = verifier.verify_home(home, drop=True)
    assert rules(verdict) == {"duplicate"}
    assert [r.id for r in homes.read(home, Label)] == [r.id for r in labels if r.id != "a-2"]
    assert verifier.verify_home(home).is_good


# --- views ----------------------------------------------------------------------------------------------------------


def test_a_random_sample_is_seeded_in_order_and_never_too_long():
    labels = independent(50)
    shown = verifier.sample_rows(labels, 5, seed=1)
    assert shown == verifier.sample_rows(labels, 5, seed=1) != verifier.sample_rows(labels, 5, seed=2)
    assert [labels.index(r) for r in shown] == sorted(labels.index(r) for r in shown)
    assert verifier.sample_rows(labels, 99) == labels


def test_stats_are_those_of_numpy_by_category_and_leave_gaps_out():
    labels = [
        row("a-1", [0.2] * 7, category="x", numbers={"safety_score": 0.5}),
        row("a-2", [0.6] * 7, category="x", response="b"),
        row("a-3", [-0.4] * 7, category="y", response="c"),
    ]
    found = {(stat.category, stat.number): stat for stat in verifier.stats(labels)}
    stat = found["x", "empathy"]
    assert (stat.n, stat.low, stat.high) == (2, 0.2, 0.6)
    assert stat.mean == pytest.approx(0.4) and stat.sd == pytest.approx(0.2)
    assert found["all", "scalar"].n == 3 and found["all", "safety_score"].n == 1
    assert ("y", "safety_score") not in found


# --- the gate of `data stats` -----------------------------------------------------------------------------------------


def without(rows, name, keep=0):
    """The rows without one number, but in the first `keep` of them."""
    return [
        r if n < keep else r.model_copy(update={"reward": r.reward.model_copy(update={name: None})})
        for n, r in enumerate(rows)
    ]


def constant(rows, name, value=0.3):
    return [r.model_copy(update={"reward": r.reward.model_copy(update={name: value})}) for r in rows]


def test_a_constant_dimension_is_named_and_the_others_are_still_measured():
    found = verifier.halo(constant(independent(120), "curiosity"))
    assert not found.is_good and "curiosity is 0.3 in all 120 rows" in found.faults[0]
    assert len(found.dimensions) == 6 and found.participation_ratio > 5
    assert "halo" in rules(verifier.verify(constant(independent(120), "curiosity")))


def test_a_dimension_without_any_label_is_said_and_does_not_hide_a_halo():
    good = verifier.halo(without(independent(120), "curiosity"))
    assert good.is_good and "curiosity: no reply has a label" in good.notes[0]
    same = [row(f"r{n}-a", [v] * 7) for n, v in enumerate(np.linspace(-1, 1, 60))]
    found = verifier.halo(without(same, "curiosity"))
    assert not found.is_good and found.participation_ratio == pytest.approx(1)
    assert "halo" in rules(verifier.verify(without(same, "curiosity")))


def test_labels_of_different_dimensions_in_different_rows_are_measured_in_pairs():
    rows = independent(300)
    rows = without(rows[:150], "curiosity") + without(rows[150:], "empathy")
    found = verifier.halo(rows)
    assert "both curiosity and empathy" in found.notes[0] and found.is_good
    assert found.dimensions == list(MANIFOLD.names[:-1]) and found.participation_ratio > 5
    rows = independent(300)
    found = verifier.halo(without(rows, "curiosity", keep=100))
    values = verifier.matrix(rows)
    squares = 7.0
    for i in range(7):
        for j in range(7):
            if i != j:
                kept = values[:100] if 6 in (i, j) else values
                squares += np.corrcoef(kept[:, i], kept[:, j])[0, 1] ** 2
    assert found.participation_ratio == pytest.approx(49 / squares)


def test_a_dimension_with_few_labels_does_not_hide_a_halo_of_the_others():
    same = [row(f"r{n}-a", [v] * 7) for n, v in enumerate(np.linspace(-1, 1, 60))]
    for kept in (1, 29):
        found = verifier.halo(without(same, "curiosity", keep=kept))
        assert not found.is_good and found.participation_ratio == pytest.approx(1)
        assert f"curiosity: {kept} labels in it are too few" in found.notes[0] and len(found.dimensions) == 6
    apart = [*without(same[:30], "empathy"), *without(same[30:], "curiosity")]
    found = verifier.halo(apart)
    assert not found.is_good and found.participation_ratio == pytest.approx(1) and len(found.dimensions) == 6


@pytest.mark.parametrize(("dimensions", "wanted"), [(7, 2.5), (5, 2.0), (3, 1.5), (2, 1.25)])
def test_fewer_dimensions_want_fewer_independent_directions(dimensions, wanted):
    rows = independent(60)
    for name in MANIFOLD.names[dimensions:]:
        rows = without(rows, name)
    assert verifier.halo(rows).wanted == pytest.approx(wanted)


def test_too_few_labels_and_too_few_dimensions_are_said_and_shut_no_gate():
    few = verifier.halo(independent(29))
    assert few.is_good and "29 labels are too few" in few.notes[0]
    rows = independent(60)
    for name in MANIFOLD.names[1:]:
        rows = without(rows, name)
    assert "fewer than two dimensions" in verifier.halo(rows).notes[-1]
    assert verifier.halo([]).is_good
