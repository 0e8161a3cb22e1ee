"""Snapshots: split by prompt, hashed, leak-free, and blind to held-out rows. Pairs made from them."""

import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hominem_mlx.config import Config, PairConfig, load_config
from hominem_mlx.data import dataset, preferences
from hominem_mlx.data import home as homes
from hominem_mlx.data.split import Texts, by_split, near_duplicates, split_of, words
from hominem_mlx.errors import ConfigError, InputError
from hominem_mlx.files import read_jsonl, write_jsonl
from hominem_mlx.records import Label, Preference, RecallQuestion, Reward, SftPair, Thumb
from hominem_mlx.schema import ADVERSARIAL, MANIFOLD, RewardOutput

# --- the split ------------------------------------------------------------------------------------------------------


def test_the_split_hangs_on_the_prompt_alone_and_has_the_right_shares():
    shares = Counter(split_of(f"prompt {n}") for n in range(4000))
    assert shares["train"] / 4000 == pytest.approx(0.6, abs=0.03)
    assert shares["valid"] / 4000 == pytest.approx(0.15, abs=0.02)
    assert split_of("emo-001") == split_of("emo-001")


def overlap(a, b):
    """Second implementation of the word-triple overlap."""
    one, other = ({" ".join(w[i : i + 3]) for i in range(max(1, len(w) - 2))} for w in (words(a), words(b)))
    return len(one & other) / len(one | other)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=7).map(" ".join), max_size=8), st.sampled_from([0.3, 0.5, 1]))
def test_near_duplicates_are_all_pairs_that_overlap_enough(texts, threshold):
    expected = [(i, j) for j in range(len(texts)) for i in range(j) if overlap(texts[i], texts[j]) >= threshold]
    found = near_duplicates(texts, threshold=threshold)
    assert [(i, j) for i, j, _ in found] == expected
    assert all(share == pytest.approx(overlap(texts[i], texts[j])) for i, j, share in found)


def test_texts_find_again_what_they_have_seen():
    seen = Texts(["the cat sat on the mat", "a dog"])
    assert seen.near("The cat sat on the mat!") == [(0, 1.0)]
    assert seen.near("the cat sat on the hat", threshold=0.5) == [(0, 0.6)]
    assert seen.near("nothing like it") == []


# --- snapshots ------------------------------------------------------------------------------------------------------


def ids_in(part, count, prefix="p"):
    """Prompt ids that fall into a split."""
    names = (f"{prefix}{n}" for n in range(10_000))
    found = []
    for name in names:
        if split_of(name) == part:
            found.append(name)
            if len(found) == count:
                return found


def row(prompt_id, value=0.0, *, suffix="a", prompt=None, response=None, **reward):
    reward = dict.fromkeys(MANIFOLD.names, value) | reward
    return Label(
        id=f"{prompt_id}-{suffix}",
        prompt_id=prompt_id,
        prompt=prompt or f"A question all of its own, called {prompt_id}, for somebody",
        response=response or f"Reply {suffix} to {prompt_id}.",
        reward=Reward(**reward),
    )


def fill(home, labels, memory=(), recall=(), given_pairs=()):
    homes.write(home, Label, labels)
    homes.write(home, SftPair, memory)
    homes.write(home, RecallQuestion, recall)
    homes.write(home, Preference, given_pairs)


@pytest.fixture
def some():
    """Two replies to each of eight training, three validation and four test prompts, and memories."""
    ids = [*ids_in("train", 8), *ids_in("valid", 3), *ids_in("test", 4)]
    labels = [row(name, value, suffix=suffix) for name in ids for suffix, value in (("a", 0.5), ("b", -0.25))]
    memory = [SftPair(id=f"m{n}", instruction=f"Number {n}?", response=f"It is {n}.") for n in range(3)]
    recall = [RecallQuestion(id="q1", fact_id="f", question="Which number?", key="3")]
    return labels, memory, recall


def test_split_makes_snapshots_of_what_may_be_learnt_and_what_is_held_out(registry, home, some):
    fill(home, *some)
    made = dataset.split(registry, home, Config())
    assert {name: artifact.kind for name, artifact in made.items()} == {
        "raw": "raw",
        "labels": "dataset",
        "suite": "suite",
    }
    train, valid = (dataset.read_labels(made["labels"], part) for part in ("train", "valid"))
    assert (len(train), len(valid)) == (16, 6)
    assert {split_of(r.prompt_id) for r in train} == {"train"} and {split_of(r.prompt_id) for r in valid} == {"valid"}
    raw = read_jsonl(made["raw"].file("labels.jsonl"), Label)
    assert [r.id for r in raw] == sorted(r.id for r in [*train, *valid])
    held = read_jsonl(made["suite"].file("labels.jsonl"), Label)
    assert len(held) == 8 and {split_of(r.prompt_id) for r in held} == {"test"}
    assert len(dataset.read_memory(made["labels"])) == 3
    assert made["labels"].metadata["parents"] == [made["raw"].ref] and made["suite"].metadata["parents"] == []
    assert registry.current("dataset", pointer="labels") == made["labels"]
    assert registry.verify() == []


def test_the_order_of_the_files_does_not_matter_and_splitting_twice_makes_nothing_new(registry, home, some):
    fill(home, *some)
    first = dataset.split(registry, home, Config())
    labels, memory, recall = some
    random.Random(1).shuffle(labels)
    fill(home, labels, memory[::-1], recall)
    assert dataset.split(registry, home, Config()) == first
    assert len(registry.artifacts()) == 3


def test_altering_every_held_out_row_leaves_the_training_artifacts_as_they_are(registry, home, some):
    labels, memory, recall = some
    fill(home, labels, memory, recall)
    before = dataset.split(registry, home, Config())
    pairs = preferences.pair(registry, before["labels"], Config())
    altered = [
        r if split_of(r.prompt_id) != "test" else row(r.prompt_id, -0.9, suffix=r.id[-1], prompt="Something else")
        for r in labels
    ]
    fill(home, altered, memory, [RecallQuestion(id="q1", fact_id="g", question="Who else?", key="none")])
    after = dataset.split(registry, home, Config())
    assert after["suite"] != before["suite"]
    assert (after["raw"], after["labels"]) == (before["raw"], before["labels"])
    assert preferences.pair(registry, after["labels"], Config()) == pairs


def test_altering_held_out_rows_into_training_texts_changes_only_the_suite(registry, home, some):
    labels, memory, recall = some
    fill(home, labels, memory, recall)
    before = dataset.split(registry, home, Config())
    known = next(r for r in labels if split_of(r.prompt_id) == "train")
    copies = [
        r if split_of(r.prompt_id) != "test" else row(r.prompt_id, 0.1, suffix=r.id[-1], prompt=known.prompt + "!")
        for r in labels
    ]
    fill(home, copies, memory, [RecallQuestion(id="q1", fact_id="g", question="number 1", key="1")])
    after = dataset.split(registry, home, Config())
    assert (after["raw"], after["labels"]) == (before["raw"], before["labels"])
    assert read_jsonl(after["suite"].file("labels.jsonl"), Label, may_be_empty=True) == []
    assert read_jsonl(after["suite"].file("recall.jsonl"), RecallQuestion, may_be_empty=True) == []
    reasons = [item["reason"] for item in after["suite"].metadata["notes"]["left_out"]]
    assert len(reasons) == 9 and "it is taught word for word" in reasons


def test_a_memory_pair_keeps_its_question_out_of_the_examination(registry, home, some):
    labels, memory, recall = some
    held = next(r for r in labels if split_of(r.prompt_id) == "test")
    fill(home, labels, [*memory, SftPair(id="m9", instruction=held.prompt, response="So.")], recall)
    suite = dataset.split(registry, home, Config())["suite"]
    assert held.prompt_id not in {r.prompt_id for r in read_jsonl(suite.file("labels.jsonl"), Label)}


def test_learnable_prompts_that_say_the_same_go_to_one_side_together(registry, home, some):
    labels, memory, recall = some
    text = "My brother sold the boat without asking any of us, what would you do in my place"
    twin, other = ids_in("train", 1, "twin")[0], ids_in("valid", 1, "twin")[0]
    labels += [row(twin, 0.1, prompt=text), row(other, 0.3, prompt=text + " now")]
    labels += [row(twin, 0.2, suffix="c", prompt="The same id with quite other words in it, which is allowed")]
    fill(home, labels, memory, recall)
    made = dataset.split(registry, home, Config())["labels"]
    assert {r.prompt_id for r in dataset.read_labels(made, "valid")} >= {twin, other}
    assert twin not in {r.prompt_id for r in dataset.read_labels(made, "train")}


def test_no_prompt_of_the_starter_is_in_two_parts(registry, home):
    dataset.import_starter(home)
    made = dataset.split(registry, home, Config())
    parts = [dataset.read_labels(made["labels"], part) for part in ("train", "valid")]
    parts.append(read_jsonl(made["suite"].file("labels.jsonl"), Label))
    texts = [sorted({r.prompt for r in part}) for part in parts]
    assert len({r.prompt_id for r in parts[2]}) >= 24
    assert made["suite"].metadata["notes"]["left_out"] == []
    flat = [(number, text) for number, group in enumerate(texts) for text in group]
    assert not [1 for i, j, _ in near_duplicates([t for _, t in flat]) if flat[i][0] != flat[j][0]]


def test_nothing_to_learn_from_is_said_with_the_way_out(registry, home):
    with pytest.raises(InputError, match="import the starter corpus"):
        dataset.split(registry, home, Config())
    fill(home, [row(ids_in("test", 1)[0], 0.5)])
    with pytest.raises(InputError, match="no labelled reply to learn from"):
        dataset.split(registry, home, Config())
    assert registry.artifacts() == []


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "t", "u", "v", "expected"),
    [(0.25, 0.25, 0, 0, 1 / (1 + math.exp(-1))), (0.5, 0.3, 0, 0.4, 1 / (1 + math.exp(-1))), (0, 0.25, 1, 1, 0.5)],
)
def test_soft_targets_are_those_worked_by_hand(margin, t, u, v, expected):
    assert preferences.soft_target(margin, temperature=t, better=u, worse=v) == pytest.approx(expected)


@given(st.floats(0, 2), st.floats(0.01, 2), st.floats(0, 2), st.floats(0, 2))
def test_soft_targets_rise_with_the_margin_and_fall_with_doubt(margin, temperature, u, v):
    target = preferences.soft_target(margin, temperature=temperature, better=u, worse=v)
    assert 0.5 <= target <= 1
    assert preferences.soft_target(margin + 0.1, temperature=temperature, better=u, worse=v) >= target
    assert preferences.soft_target(margin, temperature=temperature, better=u + 0.1, worse=v) <= target


def test_a_pair_carries_margin_target_intensity_and_the_safety_of_both_sides():
    good = row("p", 0.6, suffix="a", reward_intensity=0.4, safety_score=0.9)
    bad = row("p", 0.1, suffix="b", scalar=0.1, reward_intensity=0.7, safety_score=-0.8)
    (pair,) = preferences.from_labels([bad, good], PairConfig())
    assert (pair.chosen_id, pair.rejected_id, pair.prompt_id) == ("p-a", "p-b", "p")
    assert (pair.chosen, pair.rejected) == (good.response, bad.response)
    assert pair.score_margin == pytest.approx(0.5) and pair.target == pytest.approx(1 / (1 + math.exp(-2)))
    assert (pair.reward_intensity, pair.safety_score, pair.rejected_safety_score) == (0.7, 0.9, -0.8)


def test_missing_intensity_is_how_far_a_reply_stands_out():
    one, other = row("p", 0.6, suffix="a", curiosity=1.0), row("p", 0.2, suffix="b", curiosity=-0.6)
    overall = (6 * 0.6 + 1.0) / 7  # its curiosity lies 0.8 above the mean of the two
    assert preferences.intensity_of(one, [one, other]) == pytest.approx(overall / 2 + 0.4)
    assert preferences.intensity_of(row("p", 1.0), [row("p", 1.0), row("p", -1.0)]) == 1.0


def test_replies_to_different_prompts_close_ones_and_unrated_ones_make_no_pair():
    rows = [
        row("p", 0.5),
        row("q", -0.5),
        row("p", 0.45, suffix="b"),
        row("p", 0.9, suffix="c", response="Reply a to p."),
    ]
    rows.append(Label(id="x", prompt_id="p", prompt=rows[0].prompt, response="z", reward=Reward(empathy=1.0)))
    pairs = preferences.from_labels(rows, PairConfig())
    assert [(p.chosen_id, p.rejected_id) for p in pairs] == [("p-c", "p-b")]


def test_the_cap_is_drawn_by_chance_and_does_not_reshuffle():
    rng = random.Random(0)
    values = [rng.uniform(-1, 1) for _ in range(9)]
    rows = [row("p", value, suffix=str(number)) for number, value in enumerate(values)]
    config = PairConfig(max_per_prompt=6, min_margin=0.1)
    everything = preferences.from_labels(rows, PairConfig(max_per_prompt=1000, min_margin=0.1))
    margins = [
        pair.score_margin
        for seed in range(150)
        for pair in preferences.from_labels(rows, config.model_copy(update={"seed": seed}))
    ]
    assert len(margins) == 900
    mean = sum(p.score_margin for p in everything) / len(everything)
    assert sum(margins) / 900 == pytest.approx(mean, abs=0.06), "neither wide nor narrow margins are preferred"
    kept = preferences.from_labels(rows, config)
    assert preferences.from_labels(rows[::-1], config) == kept
    more = preferences.from_labels([*rows, row("p", 0.33, suffix="x")], config)
    assert len({p.id for p in kept} & {p.id for p in more}) >= 3


def output(value, u=0.0, **more):
    return RewardOutput(
        reward_vector=dict.fromkeys(MANIFOLD.names, value),
        reward_intensity=more.get("intensity", 0.5),
        safety_score=more.get("safety", 1.0),
        scalar=value,
        uncertainty={"scalar": u} if u else {},
    )


def test_of_scored_candidates_the_surest_good_one_meets_the_worst():
    scored = [
        ("bold", output(0.7, 0.5)),
        ("solid", output(0.6, 0.1, intensity=0.8)),
        ("bad", output(-0.2, 0.05)),
        (" ", output(-1)),
    ]
    (pair,) = preferences.from_scores({"Q": scored}, PairConfig())
    assert (pair.chosen, pair.rejected) == ("solid", "bad")
    assert pair.target == pytest.approx(1 / (1 + math.exp(-0.8 / math.sqrt(0.25**2 + 0.1**2 + 0.05**2))))
    assert pair.reward_intensity == 0.8
    doubtful = [("a", output(0.2, 0.4)), ("b", output(-0.1, 0.4))]
    assert (
        preferences.from_scores({"Q": doubtful, "R": [("a", output(1.0))], "S": [("a", output(1.0))] * 2}, PairConfig())
        == []
    )


def test_spread_without_a_scalar_is_the_most_the_dimensions_allow():
    given_by_dimension = output(0.5).model_copy(update={"uncertainty": dict.fromkeys(MANIFOLD.names, 0.2)})
    assert preferences.spread(given_by_dimension) == pytest.approx(0.2)
    assert preferences.spread(output(0.5)) == 0.0


class Student:
    hash = "student"

    def complete(self, prompts, *, max_tokens, temperature, seed, system=None):
        self.asked = (prompts, max_tokens, temperature, system)
        return [
            f"{'good' if number % 2 else 'bad'} reply {number} to {prompt}" for number, prompt in enumerate(prompts)
        ]


class Scorer:
    def score_many(self, pairs):
        return [output(0.5 if reply.startswith("good") else -0.5) for _, reply in pairs]


def test_pair_makes_a_dataset_with_a_persons_own_pairs_in_it(registry, home, some):
    own = [homes.identified(Preference(prompt=f"Own {n}?", chosen="x", rejected="y")) for n in range(12)]
    fill(home, *some, own)
    made = dataset.split(registry, home, Config())
    pairs = preferences.pair(registry, made["labels"], Config())
    train = read_jsonl(pairs.file("preferences.train.jsonl"), Preference)
    valid = read_jsonl(pairs.file("preferences.valid.jsonl"), Preference)
    parts = by_split(own)
    assert len(train) == 8 + len(parts["train"]) and len(valid) == 3 + len(parts["valid"])
    assert parts["test"] and len(read_jsonl(made["suite"].file("preferences.jsonl"), Preference)) == len(parts["test"])
    assert pairs.metadata["parents"] == [made["labels"].ref]
    assert registry.current("dataset", pointer="pairs") == pairs
    assert len(dataset.read_memory(pairs)) == 3


def test_thumbs_about_training_prompts_go_with_the_pairs_and_no_others_do(registry, home, some):
    fill(home, *some)
    without = dataset.split(registry, home, Config())
    own = [homes.identified(Thumb(prompt=f"Own {n}?", response="x", good=n % 2 == 0)) for n in range(12)]
    homes.write(home, Thumb, own)
    made = dataset.split(registry, home, Config())
    learnt = sorted(by_split(own)["train"], key=lambda row: row.id)
    assert 0 < len(learnt) < 12
    assert dataset.read_thumbs(made["labels"]) == read_jsonl(made["raw"].file("thumbs.jsonl"), Thumb) == learnt
    counted = made["raw"].metadata["metrics"]
    assert (counted["thumbs"], counted["thumbs_left_out"]) == (len(learnt), 12 - len(learnt))
    pairs = preferences.pair(registry, made["labels"], Config())
    assert dataset.read_thumbs(pairs) == learnt and pairs.metadata["metrics"]["thumbs"] == len(learnt)
    # a thumb of a prompt that nobody may learn changes nothing that is learnt from
    homes.write(home, Thumb, by_split(own)["test"])
    assert {name: dataset.split(registry, home, Config())[name] for name in ("raw", "labels")} == {
        name: without[name] for name in ("raw", "labels")
    }
    assert not (preferences.pair(registry, without["labels"], Config()).folder / "thumbs.jsonl").exists()


def test_thumbs_alone_make_a_dataset(registry, home):
    fill(home, [row(name, 0.5) for name in ids_in("train", 3)])
    homes.write(
        home, Thumb, [homes.identified(Thumb(prompt_id=ids_in("train", 1)[0], prompt="a", response="b", good=True))]
    )
    pairs = preferences.pair(registry, dataset.split(registry, home, Config())["labels"], Config())
    assert len(dataset.read_thumbs(pairs)) == 1 and pairs.metadata["metrics"]["train"] == 0


def test_on_policy_pairs_come_from_training_prompts_alone(registry, home, some):
    fill(home, *some)
    labels = dataset.split(registry, home, Config())["labels"]
    with registry.draft("reward_model") as draft:
        (draft.folder / "x").write_text("x")
    config = load_config(overrides=["pairs.on_policy=4", "student.system=Be kind."])
    student, seen = Student(), []
    made = preferences.pair(
        registry,
        labels,
        config,
        scorer=Scorer(),
        generator=student,
        reward_model=draft.published,
        progress=seen.append,
    )
    train = read_jsonl(made.file("preferences.train.jsonl"), Preference)
    new = [pair for pair in train if pair.chosen_id.startswith("sampled")]
    assert len(new) == 8 and {split_of(pair.prompt_id) for pair in new} == {"train"}
    assert all(pair.chosen.startswith("good") and pair.rejected.startswith("bad") for pair in new)
    assert student.asked[1:] == (64, 1.0, "Be kind.") and len(student.asked[0]) == 32
    assert made.metadata["parents"] == [labels.ref, draft.published.ref]
    assert seen[-1] == {"stage": "on-policy pairs", "done": 8, "total": 8}
    with pytest.raises(ConfigError, match=r"pairs\.on_policy = 4 needs"):
        preferences.pair(registry, labels, config)


def test_an_answer_that_attacks_its_judge_anchors_nothing(registry, home, some):
    fill(home, *some)

    class Attacked(Scorer):
        def score_many(self, pairs):
            flagged = {"flags": (ADVERSARIAL,)}
            return [said.model_copy(update=flagged) if "bad" in reply or number % 16 > 11 else said
                    for number, ((_, reply), said) in enumerate(zip(pairs, super().score_many(pairs)))]  # fmt: skip

    config = load_config(overrides=["pairs.on_policy=4"])
    labels = dataset.split(registry, home, Config())["labels"]
    made = preferences.pair(registry, labels, config, scorer=Attacked(), generator=Student())
    anchors = read_jsonl(made.file("anchors.jsonl"), SftPair)
    assert len(anchors) == 6, "every answer to one prompt in four attacks"
    assert all(anchor.response.startswith("good") for anchor in anchors), "the first answer to each is flagged"


def test_labels_that_make_no_pair_are_refused(registry, home):
    fill(home, [row(name, 0.5) for name in ids_in("train", 3)])
    labels = dataset.split(registry, home, Config())["labels"]
    with pytest.raises(InputError, match=r"pairs\.min_margin = 0\.1"):
        preferences.pair(registry, labels, Config())


def test_the_starter_makes_enough_pairs(registry, home):
    dataset.import_starter(home)
    made = preferences.pair(registry, dataset.split(registry, home, Config())["labels"], Config())
    train = read_jsonl(made.file("preferences.train.jsonl"), Preference)
    assert len(train) >= 250 and max(Counter(p.prompt_id for p in train).values()) <= 6
    assert all(p.chosen_score > p.rejected_score for p in train)
    assert json.loads(made.file("memory.jsonl").read_text().splitlines()[0])["instruction"]
    write_jsonl(home / "x.jsonl", train)
    assert read_jsonl(home / "x.jsonl", Preference) == train
