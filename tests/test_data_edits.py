"""Contrast edits and comparisons side by side."""

from collections import Counter

import pytest

from fake_teacher import FakeTeacher
from hominem_mlx.config import load_config
from hominem_mlx.data import comparing, edits, questions, rater, verifier
from hominem_mlx.data import home as homes
from hominem_mlx.data.recorded import RecordedTeacher
from hominem_mlx.data.teacher import open_teacher
from hominem_mlx.errors import InputError, TeacherError
from hominem_mlx.files import read_jsonl
from hominem_mlx.records import Label, Preference, Reward, Trajectory
from hominem_mlx.schema import MANIFOLD, Rating

KINDS = ("good", "bad", "ambiguous", "good")


@pytest.fixture
def answered(home):
    """A home with five prompts and four candidates to each."""
    rows = [
        Trajectory(
            id=f"p{n}-c{k}",
            prompt_id=f"p{n}",
            prompt=f"Question {n}?",
            response=f"Reply {k} to question {n} has these words and a few more.",
            candidate_index=k,
            labeller="judge",
            metadata={"kind": kind},
        )
        for n in range(5)
        for k, kind in enumerate(KINDS)
    ]
    homes.write(home, Trajectory, rows)
    return home


class Editor:
    """Changes one word, or by `how` what is no edit."""

    name, concurrency = "editor", 1

    def __init__(self, how=lambda text, dimension: text.replace("few", dimension.name)):
        self.how, self.asked = how, []

    def edit(self, prompt, response, *, dimension, repeat=0):
        self.asked.append((response, dimension.name, repeat))
        return self.how(response, dimension)


def made(home):
    return [row for row in homes.read(home, Trajectory) if row.edit_of]


def test_edits_are_spread_evenly_over_dimensions_and_name_their_original(answered):
    done = edits.edit(answered, load_config(), Editor())
    assert (done.made, done.failed) == (9, {}), "0.3 / 0.7 of 20 originals, rounded up"
    counts = Counter(row.lowered for row in made(answered))
    assert set(counts) == set(MANIFOLD.names) and max(counts.values()) == 2
    originals = {row.id: row for row in homes.read(answered, Trajectory) if not row.edit_of}
    for row in made(answered):
        before = originals[row.edit_of]
        assert (row.prompt_id, row.category, row.labeller) == (before.prompt_id, before.category, "editor")
        assert row.response == before.response.replace("few", row.lowered)
        assert before.metadata["kind"] != "bad", "a bad reply has nothing to lose"
    assert len({row.edit_of for row in made(answered)}) == 9


def test_edits_are_made_once_and_the_same_ones_by_the_same_seed(answered):
    other = answered.with_name("other")
    homes.write(other, Trajectory, homes.read(answered, Trajectory))
    edits.edit(answered, load_config(), Editor())
    edits.edit(other, load_config(), Editor())
    assert made(answered) == made(other)
    editor = Editor()
    done = edits.edit(answered, load_config(), editor)
    assert (done.made, done.kept, editor.asked) == (0, 9, [])


def test_a_reply_rated_low_in_a_dimension_is_not_lowered_in_it(answered):
    rows = homes.read(answered, Trajectory)
    low = Reward(**dict.fromkeys(MANIFOLD.names, 0.5) | {"empathy": -0.2})
    labels = [Label(**row.model_dump(include={"id", "prompt_id", "prompt", "response"}), reward=low) for row in rows]
    homes.write(answered, Label, labels)
    edits.edit(answered, load_config(overrides=["data.edits=0.5"]), Editor())
    counts = Counter(row.lowered for row in made(answered))
    assert "empathy" not in counts and sum(counts.values()) == 20 and len(counts) == 6


@pytest.mark.parametrize(
    ("how", "reason"),
    [(lambda text, dimension: text, "0% of the words"), (lambda text, dimension: "Quite another text.", "no edit")],
)
def test_what_is_no_edit_is_not_taken(answered, how, reason):
    done = edits.edit(answered, load_config(), Editor(how))
    assert done.made == 0 and len(done.failed) == 9 and reason in next(iter(done.failed.values()))
    assert made(answered) == []
    assert len((answered / homes.UNSAMPLED).read_text().splitlines()) == 9


def test_what_is_no_edit_is_asked_for_once_more(answered):
    editor = Editor()
    editor.how = lambda text, dimension: text if editor.asked[-1][2] == 0 else text.replace("few", dimension.name)
    done = edits.edit(answered, load_config(), editor)
    assert (done.made, done.failed, len(editor.asked)) == (9, {}, 18)


def test_an_edit_that_broke_its_promise_is_dropped_for_good_and_another_takes_its_place(answered):
    edits.edit(answered, load_config(), Editor())
    rows = homes.read(answered, Trajectory)
    values = dict.fromkeys(MANIFOLD.names, 0.5)
    labels = [
        Label(
            **row.model_dump(include={"id", "prompt_id", "prompt", "response", "edit_of", "lowered"}),
            reward=Reward(**values | ({row.lowered: -0.5} if row.lowered else {})),
        )
        for row in rows
    ]
    broken = next(row for row in labels if row.edit_of)
    reward = broken.reward.model_copy(update={broken.lowered: 0.5})
    labels = [row if row is not broken else row.model_copy(update={"reward": reward}) for row in labels]
    homes.write(answered, Label, labels)
    verifier.verify_home(answered, drop=True)
    assert broken.id in {row.id for row in homes.read_aside(answered, homes.DROPPED)}
    assert broken.id not in {row.id for row in rater.unrated(answered)[0]}, "it is not rated again"
    assert edits.edit(answered, load_config(), Editor()).made >= 1
    assert Counter(row.lowered for row in made(answered))[broken.lowered] >= 2


def test_the_question_names_one_dimension_to_lower_and_all_others_to_keep(answered):
    with FakeTeacher() as server:
        config = load_config(
            overrides=["teacher.kind=anthropic", "teacher.model=m", f"teacher.base_url={server.url}", "data.edits=0.05"]
        )
        assert edits.cost(answered, config, open_teacher(config, answered)).requests == 2
        edits.edit(answered, config, open_teacher(config, answered))
    said = server.requests[0][1]["messages"][0]["content"]
    (name,) = [d.name for d in MANIFOLD.dimensions if f"Lower this alone: {d.name}." in said]
    kept = said.partition("Leave as they are: ")[2]
    assert all((d.name in kept) == (d.name != name) for d in MANIFOLD.dimensions)


def test_editing_nothing_and_dear_editing_are_refused(home, answered):
    (answered / homes.FILES[Trajectory]).write_text("")
    with pytest.raises(InputError, match="hominem data sample"):
        edits.edit(answered, load_config(), Editor())


def test_the_recorded_teacher_edits_what_it_holds(home):
    labels = read_jsonl(homes.STARTER / "reward_samples.jsonl", Label)
    edit = next(row for row in labels if row.edit_of)
    original = next(row for row in labels if row.id == edit.edit_of)
    lowered = next(d for d in MANIFOLD.dimensions if d.name == edit.lowered)
    teacher = RecordedTeacher()
    assert teacher.edit(original.prompt, original.response, dimension=lowered) == edit.response
    with pytest.raises(TeacherError, match="holds no copy"):
        teacher.edit(original.prompt, "Never.", dimension=lowered)


# --- rated beside their originals -------------------------------------------------------------------------------------


def test_an_edit_is_rated_after_its_original_and_beside_it(answered):
    edits.edit(answered, load_config(), Editor())
    with FakeTeacher() as server:
        config = load_config(
            overrides=["teacher.kind=anthropic", "teacher.model=judge", f"teacher.base_url={server.url}"]
        )
        teacher = open_teacher(config, answered)
        assert rater.cost(answered, config, teacher).requests == 29
        done = rater.rate(answered, config, teacher)
    assert (done.rated, done.unlabelled) == (29, {})
    said = [body["messages"][0]["content"] for _, body in server.requests]
    assert [("<original>" in text) for text in said] == [False] * 20 + [True] * 9
    labels = {row.id: row for row in homes.read(answered, Label)}
    edit = made(answered)[0]
    original = labels[edit.edit_of]
    (text,) = [text for text in said if f"<reply>\n{edit.response}\n</reply>" in text]
    assert f"<original>\n{original.response}\n</original>" in text
    assert f"empathy {original.reward.empathy:g}" in text and f"scalar {original.reward.scalar:g}" in text
    before_numbers = text.partition("First `rationale`")[0]
    assert "lower" not in before_numbers, "what the change was meant to do is not said"
    assert labels[edit.id].lowered == edit.lowered and labels[edit.id].edit_of == edit.edit_of


def test_an_edit_whose_original_another_teacher_rated_is_rated_alone(answered):
    edits.edit(answered, load_config(), Editor())
    rows = homes.read(answered, Trajectory)
    theirs = [
        Label(
            **row.model_dump(include={"id", "prompt_id", "prompt", "response"}),
            reward=Reward(empathy=0.5),
            labeller="somebody",
        )
        for row in rows
        if not row.edit_of
    ]
    homes.write(answered, Label, theirs)
    with FakeTeacher() as server:
        config = load_config(
            overrides=["teacher.kind=anthropic", "teacher.model=judge", f"teacher.base_url={server.url}"]
        )
        assert rater.rate(answered, config, open_teacher(config, answered)).rated == 9
    assert not any("<original>" in body["messages"][0]["content"] for _, body in server.requests)


def test_with_one_dimension_a_call_only_its_number_is_told():
    rating = Rating(reward={"empathy": 0.25, "curiosity": -0.5}, scalar=0.1)
    question = questions.rating_question("Hi", "Yes.", MANIFOLD.dimensions[:1], overall=False, beside=("Yes!", rating))
    assert "was given: empathy 0.25. Compare" in question.user


# --- side by side -----------------------------------------------------------------------------------------------------


class Judge:
    """Prefers the reply with the higher number in it."""

    name, concurrency = "judge", 1

    def __init__(self):
        self.asked = []

    def prefers(self, prompt, first, second):
        self.asked.append((prompt, first, second))
        one, other = (int(text.split()[1]) for text in (first, second))
        return min(1.0, max(0.0, 0.5 + 0.1 * (one - other)))


def test_candidates_are_compared_within_their_prompt_in_both_orders_once(answered):
    judge, config = Judge(), load_config(overrides=["pairs.max_per_prompt=3"])
    done = comparing.compare(answered, config, judge)
    assert (done.pairs, done.undecided, done.unanswered, len(judge.asked)) == (15, 0, {}, 30)
    assert done.consistent == 1 and done.position_bias == pytest.approx(0)
    pairs = homes.read(answered, Preference)
    assert all(int(p.chosen.split()[1]) > int(p.rejected.split()[1]) for p in pairs)
    apart = [int(p.chosen.split()[1]) - int(p.rejected.split()[1]) for p in pairs]
    assert [p.target for p in pairs] == pytest.approx([0.5 + 0.1 * step for step in apart])
    assert all(p.prompt_id == p.chosen_id.split("-")[0] == p.rejected_id.split("-")[0] for p in pairs)
    assert comparing.cost(answered, config, judge).requests == 0
    judge.asked.clear()
    assert comparing.compare(answered, config, judge).pairs == 0 and judge.asked == []


def test_pairs_without_a_leaning_are_left_out(answered):
    judge = Judge()
    judge.prefers = lambda prompt, first, second: 0.5
    done = comparing.compare(answered, load_config(overrides=["pairs.max_per_prompt=1"]), judge)
    assert (done.pairs, done.undecided) == (0, 5) and not homes.read(answered, Preference)


def test_comparisons_and_labels_of_the_same_replies_make_a_dataset_together(answered, registry):
    from hominem_mlx.data import dataset, preferences

    config = load_config()
    labels = [
        Label(
            **row.model_dump(include={"id", "prompt_id", "prompt", "response"}),
            reward=Reward(scalar=row.candidate_index / 4),
        )
        for row in homes.read(answered, Trajectory)
    ]
    homes.write(answered, Label, labels)
    comparing.compare(answered, config, Judge())
    parts = dataset.split(registry, answered, config)
    pairs = preferences.pair(registry, parts["labels"], config)
    rows = read_jsonl(pairs.file("preferences.train.jsonl"), Preference)
    assert {row.id.split("-")[0] for row in rows} == {"pair", "compared"}


def test_compared_pairs_are_as_safe_and_as_weighty_as_the_labels_of_their_replies(answered, registry):
    from hominem_mlx.data import dataset, preferences

    config = load_config()
    labels = [
        Label(
            **row.model_dump(include={"id", "prompt_id", "prompt", "response"}),
            reward=Reward(
                reward_intensity=0.2 + row.candidate_index / 10, safety_score=-0.5 - row.candidate_index / 10
            ),
        )
        for row in homes.read(answered, Trajectory)
    ]
    homes.write(answered, Label, labels)
    comparing.compare(answered, config, Judge())
    own = Preference(id="mine", prompt_id=labels[0].prompt_id, prompt=labels[0].prompt, chosen="x", rejected="y")
    homes.write(answered, Preference, [*homes.read(answered, Preference), own])
    made = preferences.pair(registry, dataset.split(registry, answered, config)["labels"], config)
    rows = [
        row
        for part in ("train", "valid")
        for row in read_jsonl(made.file(f"preferences.{part}.jsonl"), Preference, may_be_empty=True)
    ]
    by_id, compared = {label.id: label.reward for label in labels}, [row for row in rows if row.id != "mine"]
    assert compared and "compared_without_label" not in made.metadata["metrics"]
    for row in compared:
        better, worse = by_id[row.chosen_id], by_id[row.rejected_id]
        assert (row.safety_score, row.rejected_safety_score) == (better.safety_score, worse.safety_score)
        assert row.reward_intensity == max(better.reward_intensity, worse.reward_intensity)
    assert [row for row in rows if row.id == "mine"] in ([], [own]), "a person's own pair stays as it is"
    half = [label for label in labels if not label.id.endswith("0")]
    homes.write(answered, Label, half)
    made = preferences.pair(registry, dataset.split(registry, answered, config)["labels"], config)
    kept = made.metadata["metrics"]["train"] + made.metadata["metrics"]["valid"]
    there = {label.id for label in half}
    with_both = [row for row in rows if row.id == "mine" or {row.chosen_id, row.rejected_id} <= there]
    assert kept == len(with_both) < len(rows)
    assert made.metadata["metrics"]["compared_without_label"] == len(rows) - kept
