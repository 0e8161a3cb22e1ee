"""Prompts, candidates and ratings: from seeds to labels, with teachers that fail, are killed, or cost money."""

import json
from collections import Counter

import pytest

from fake_teacher import FakeTeacher, number
from hominem_mlx.config import load_config
from hominem_mlx.data import comparing, prompts, questions, rater, sampler
from hominem_mlx.data import home as homes
from hominem_mlx.data.local import SCALE, LocalTeacher
from hominem_mlx.data.recorded import RecordedTeacher
from hominem_mlx.data.split import near_duplicates
from hominem_mlx.data.teacher import open_teacher
from hominem_mlx.errors import BusyError, InputError, NoAnswer, TeacherError
from hominem_mlx.files import lock, read_jsonl, write_jsonl
from hominem_mlx.records import Label, Prompt, Reward, Trajectory
from hominem_mlx.schema import MANIFOLD, Rating, Teacher


def label(name, prompt, response, **reward):
    return Label(id=name, prompt_id=prompt[:4], prompt=prompt, response=response, reward=Reward(**reward))


# --- prompts --------------------------------------------------------------------------------------------------------


def test_the_starter_material_is_complete_and_its_slots_fit():
    material = prompts.Material()
    assert (len(material.personas), len(material.scenarios), len(material.families)) >= (16, 40, 8)
    for scenario in material.scenarios:
        texts = [scenario.text, *scenario.complications, *scenario.conflicts.values(), *scenario.asks]
        for text in texts:
            assert "{" not in prompts._fill(text, {name: values[0] for name, values in scenario.slots.items()}), text
        assert all("{" + name + "}" in " ".join(texts) for name in scenario.slots), scenario.id
        assert set(scenario.conflicts) == {"mild", "open"}
    assert {s.category for s in material.scenarios} == {p.category for p in starter_prompts()}
    assert all("{prompt}" in wrap for family in material.families for wrap in family.wraps)
    assert {family.operation for family in material.families} == set(prompts.OPERATIONS)


def starter_prompts():
    return read_jsonl(homes.STARTER / "prompts.jsonl", Prompt)


def test_equal_seeds_give_equal_prompts_and_more_begin_with_the_same():
    few, many = prompts.compose(12, seed=3), prompts.compose(30, seed=3)
    assert many[:12] == few
    assert not {p.prompt for p in few} & {p.prompt for p in prompts.compose(12, seed=4)}


def test_generated_prompts_carry_their_factors_and_spread_over_them():
    made = prompts.compose(80, seed=0, avoid=prompts.starter_texts())
    factors = [p.metadata for p in made]
    assert set(factors[0]) == {"seed", "index", "scenario", "persona", "family", "complexity", "conflict"}
    assert set(Counter(f["scenario"] for f in factors).values()) == {2}
    assert set(Counter(f["family"] for f in factors).values()) == {10}
    assert {f["complexity"] for f in factors} == {1, 2, 3} and {f["conflict"] for f in factors} == {
        "none",
        "mild",
        "open",
    }
    assert {p.difficulty for p in made} == {"easy", "medium", "hard"}
    assert not any("{" in p.prompt for p in made)


def test_no_generated_prompt_is_a_starter_prompt_or_near_another():
    made = [p.prompt for p in prompts.compose(60, seed=0, avoid=prompts.starter_texts())]
    starter = prompts.starter_texts()
    assert not near_duplicates([*starter, *made], threshold=prompts.TOO_NEAR) or not [
        (i, j) for i, j, _ in near_duplicates([*starter, *made], threshold=prompts.TOO_NEAR) if j >= len(starter)
    ]


def test_generating_avoids_what_the_home_has_and_is_idempotent(home):
    config = load_config(overrides=["data.prompts=10"])
    taken = prompts.compose(10, seed=0, avoid=prompts.starter_texts())[0].prompt
    homes.write(home, Prompt, [Prompt(id="mine", prompt=taken)])
    made = prompts.generate(home, config)
    assert taken not in [p.prompt for p in made] and len(made) == 10
    before = (home / homes.FILES[Prompt]).read_bytes()
    assert prompts.generate(home, config) == made
    assert (home / homes.FILES[Prompt]).read_bytes() == before
    assert len(homes.read(home, Prompt)) == 11


def test_too_many_prompts_are_refused_with_a_way_out(tmp_path):
    for name in ("personas", "families"):
        (tmp_path / f"{name}.jsonl").write_bytes((homes.STARTER / f"{name}.jsonl").read_bytes())
    one = (homes.STARTER / "scenarios.jsonl").read_text().splitlines()[0]
    (tmp_path / "scenarios.jsonl").write_text(one + "\n")
    with pytest.raises(InputError, match="write more of them"):
        prompts.compose(100, seed=0, material=prompts.Material(tmp_path))


def test_perturbations_change_the_surface_alone():
    import random

    text = "My mother hid the letters. Should I read them?"
    assert prompts._lower(text, random.Random(0)) == "my mother hid the letters should i read them?"
    heated = prompts._heated(text, random.Random(0))
    assert heated.lower() == text.lower().replace(".", "!", 1) and heated != text.replace(".", "!", 1)
    slipped = prompts._slips(text * 20, random.Random(0))
    assert slipped != text * 20 and abs(len(slipped) - len(text * 20)) < 10
    assert prompts._slips("a be see", random.Random(0)) == "a be see"


# --- candidates -----------------------------------------------------------------------------------------------------


class Echo:
    """A student whose replies hang on prompt and seed."""

    hash = "echo"

    def __init__(self):
        self.calls = []

    def complete(self, prompts, *, max_tokens, temperature, seed, system=None):
        self.calls.append((list(prompts), seed))
        return [f"I, the student, say {seed % 97} to {prompt[:12]}" for prompt in prompts]


@pytest.fixture
def asked(home):
    """A home with three prompts."""
    homes.write(home, Prompt, [Prompt(id=f"p{n}", prompt=f"Question {n}?", category="c") for n in range(3)])
    return home


def configured(server, *more):
    base = ["teacher.kind=anthropic", "teacher.model=judge", f"teacher.base_url={server.url}", "teacher.max_retries=0"]
    return load_config(overrides=[*base, *more])


def contents(home):
    names = [homes.FILES[Trajectory], homes.FILES[Label], homes.UNLABELLED, homes.UNSAMPLED]
    return {name: (home / name).read_bytes() for name in names if (home / name).exists()}


def test_each_prompt_gets_good_bad_and_ambiguous_candidates_and_some_of_the_students(asked):
    student = Echo()
    with FakeTeacher() as server:
        config = configured(server, "data.candidates=5", "data.student_candidates=2")
        teacher = open_teacher(config, asked)
        assert sampler.cost(asked, config, teacher, student=student).requests == 9
        done = sampler.sample(asked, config, teacher, student=student)
    assert (done.teacher, done.student, done.failed) == (9, 6, {})
    rows = homes.read(asked, Trajectory)
    mine = [row for row in rows if row.prompt_id == "p0"]
    assert [row.metadata.get("kind") for row in mine] == ["good", "bad", "ambiguous", None, None]
    assert len({row.persona for row in mine[:3]}) == 3, "each candidate has another speaker"
    assert [row.labeller for row in mine] == ["judge"] * 3 + ["student"] * 2
    said = [body["messages"][0]["content"] for _, body in server.requests]
    assert sum(questions.KINDS["bad"] in text for text in said) == 3


def test_sampling_goes_on_where_it_stopped_and_pays_for_nothing_twice(asked):
    with FakeTeacher() as server:
        config = configured(server, "data.student_candidates=0", "teacher.concurrency=1")
        undisturbed = asked.with_name("other")
        homes.write(undisturbed, Prompt, homes.read(asked, Prompt))
        sampler.sample(undisturbed, config, open_teacher(config, undisturbed))
        assert len(server.requests) == 12

        def stop(event):
            if event["done"] == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sampler.sample(asked, config, open_teacher(config, asked), progress=stop)
        assert not (asked / homes.FILES[Trajectory]).exists(), "nothing half done is shown"
        sampler.sample(asked, config, open_teacher(config, asked))
        assert len(server.requests) == 24
        assert contents(asked) == contents(undisturbed)
        again = sampler.sample(asked, config, open_teacher(config, asked))
        assert (again.kept, again.teacher, len(server.requests)) == (12, 0, 24)


def test_the_students_replies_are_stored_by_chunk(asked):
    teacher, config = RecordedTeacher(), load_config(overrides=["data.candidates=2"])
    student = Echo()
    sampler.sample(asked, config, teacher, student=student)
    assert [len(asked_for) for asked_for, _ in student.calls] == [6]
    (asked / homes.FILES[Trajectory]).unlink()
    again = Echo()
    done = sampler.sample(asked, config, teacher, student=again)
    assert (done.student, again.calls) == (6, [])


def test_candidates_that_cannot_be_had_are_named_with_their_reason(asked):
    with FakeTeacher(
        lambda body, count: "refusal" if "Question 1" in body["messages"][0]["content"] else None
    ) as server:
        config = configured(server, "data.student_candidates=0")
        done = sampler.sample(asked, config, open_teacher(config, asked))
    assert set(done.failed) == {f"p1-c{n}" for n in range(4)} and done.teacher == 8
    kept = [json.loads(line) for line in (asked / homes.UNSAMPLED).read_text().splitlines()]
    assert kept[0] == {"id": "p1-c0", "teacher": "judge", "reason": "the teacher refused"}


def test_sampling_without_prompts_says_how_to_get_some(home):
    with pytest.raises(InputError, match="hominem data generate"):
        sampler.sample(home, load_config(), RecordedTeacher())


def test_only_prompts_of_ones_own_get_candidates_unless_the_starters_are_asked_for(home):
    taken = starter_prompts()[0]
    mine = [taken.model_copy(update={"id": "my-1", "source": "human"}), Prompt(id="my-2", prompt="Question?")]
    homes.write(home, Prompt, [*starter_prompts()[1:4], *mine])
    config, student = load_config(overrides=["data.candidates=2", "data.student_candidates=2"]), Echo()
    sampler.sample(home, config, RecordedTeacher(), student=student)
    assert {row.prompt_id for row in homes.read(home, Trajectory)} == {"my-1", "my-2"}
    assert sampler.cost(home, config, RecordedTeacher()).requests == 0
    assert sampler.cost(home, config, RecordedTeacher(), starter=True).requests == 2 * 3
    homes.write(home, Prompt, starter_prompts()[1:4])
    with pytest.raises(InputError, match=r"prompts\.jsonl: .*hominem data generate.*--starter for the 3 bundled ones"):
        sampler.sample(home, config, RecordedTeacher())


def test_two_writers_do_not_meet(asked):
    with lock(asked / "locks" / "data.lock", "rating candidates"), pytest.raises(BusyError, match="rating candidates"):
        sampler.sample(asked, load_config(), RecordedTeacher())


# --- ratings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(home):
    """A home with six candidate replies."""
    rows = [
        Trajectory(
            id=f"p{n // 3}-c{n % 3}", prompt_id=f"p{n // 3}", prompt=f"Question {n // 3}?", response=f"Reply {n}."
        )
        for n in range(6)
    ]
    homes.write(home, Trajectory, rows)
    return home


def test_rating_writes_whole_labels_in_order(answered):
    with FakeTeacher() as server:
        config = configured(server)
        done = rater.rate(answered, config, open_teacher(config, answered))
    labels = homes.read(answered, Label)
    assert (done.rated, done.unlabelled) == (6, {})
    assert [row.id for row in labels] == [f"p{n // 3}-c{n % 3}" for n in range(6)]
    said = "<reply>\nReply 4.\n</reply>"
    assert labels[4].reward.vector() == [number(said, name) for name in MANIFOLD.names]
    assert labels[4].reward.safety_score == number(said, "safety_score")
    assert labels[4].labeller == "judge" and labels[4].rationale


def test_the_order_of_dimensions_is_shuffled_by_item_and_there_are_few_orders():
    orders = Counter(tuple(d.name for d in questions.order_of(f"item {n}", 0)) for n in range(200))
    assert len(orders) == questions.ORDERS and min(orders.values()) > 5
    assert all(sorted(order) == sorted(MANIFOLD.names) for order in orders)
    assert questions.order_of("item 1", 0) == questions.order_of("item 1", 0)


def test_one_dimension_a_call_gives_the_same_kind_of_label(answered):
    with FakeTeacher() as server:
        config = configured(server, "teacher.rate_mode=single")
        teacher = open_teacher(config, answered)
        assert rater.cost(answered, config, teacher).requests == 6 * 8
        rater.rate(answered, config, teacher)
    assert len(server.requests) == 6 * 8
    numbers = Counter(len(body["output_config"]["format"]["schema"]["properties"]) - 1 for _, body in server.requests)
    assert numbers == {1: 42, 3: 6}
    assert all(None not in row.reward.model_dump().values() for row in homes.read(answered, Label))


def test_equal_replies_are_rated_once(answered):
    rows = homes.read(answered, Trajectory)
    homes.write(answered, Trajectory, [*rows, rows[0].model_copy(update={"id": "p0-s7"})])
    with FakeTeacher() as server:
        config = configured(server)
        for rated in (6, 0):
            done = rater.rate(answered, config, open_teacher(config, answered))
            assert (done.rated, done.kept) == (rated, 7 - rated)
    assert len(server.requests) == 6


@pytest.mark.parametrize("mode", ["shuffled", "single"])
def test_an_item_with_a_fault_stays_unlabelled_with_its_reason_and_the_run_goes_on(answered, mode):
    def fault(body, count):
        return "500 oops" if "Reply 2." in body["messages"][0]["content"] else None

    with FakeTeacher(fault) as server:
        config = configured(server, f"teacher.rate_mode={mode}")
        done = rater.rate(answered, config, open_teacher(config, answered))
        assert (done.rated, list(done.unlabelled)) == (5, ["p0-c2"])
        row = json.loads((answered / homes.UNLABELLED).read_text())
        assert row["id"] == "p0-c2" and "500" in row["reason"] and "Reply" not in json.dumps(row)
        server.fault = lambda body, count: None
        before = len(server.requests)
        done = rater.rate(answered, config, open_teacher(config, answered))
        assert (done.rated, done.kept, done.unlabelled) == (1, 5, {})
        assert len(server.requests) == before + (1 if mode == "shuffled" else 8)
    assert (answered / homes.UNLABELLED).read_text() == ""


def test_a_killed_rating_reaches_the_bytes_of_an_undisturbed_one(answered):
    with FakeTeacher() as server:
        config = configured(server, "teacher.concurrency=3")
        undisturbed = answered.with_name("other")
        homes.write(undisturbed, Trajectory, homes.read(answered, Trajectory))
        rater.rate(undisturbed, config, open_teacher(config, undisturbed))

        def stop(event):
            if event["done"] == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rater.rate(answered, config, open_teacher(config, answered), progress=stop)
        rater.rate(answered, config, open_teacher(config, answered))
        assert len(server.requests) == 12
    assert contents(answered) == contents(undisturbed)


def test_a_dear_rating_sends_and_writes_nothing(answered):
    with FakeTeacher() as server:
        config = configured(server, "teacher.usd_per_million_output=1000", "teacher.max_cost_usd=0.01")
        with pytest.raises(TeacherError, match="nothing was sent"):
            rater.rate(answered, config, open_teacher(config, answered))
        assert server.requests == [] and not contents(answered).get(homes.FILES[Label])


def test_a_persons_label_is_not_asked_for_again(answered):
    mine = Label(
        id="my-own",
        prompt_id="p0",
        prompt="Question 0?",
        response="Reply 1.",
        reward=Reward(empathy=1),
        labeller="human",
    )
    homes.write(answered, Label, [mine])
    with FakeTeacher() as server:
        config = configured(server)
        assert rater.rate(answered, config, open_teacher(config, answered)).rated == 5
    assert homes.read(answered, Label)[0] == mine


# --- pairs in both orders -------------------------------------------------------------------------------------------


class Judge:
    """Prefers longer replies, and the one it sees first by `bias`."""

    name, concurrency = "judge", 1

    def __init__(self, bias=0.0):
        self.bias = bias

    def prefers(self, prompt, first, second):
        if "?" in (first, second):
            raise NoAnswer("refused")
        return min(1.0, max(0.0, 0.5 + 0.1 * (len(first) - len(second)) + self.bias))


def test_position_bias_is_measured_and_cancels_out_of_the_verdicts():
    pairs = [("p", "aaa", "a"), ("p", "b", "bb"), ("p", "c", "c")]
    fair, biased = comparing.compare_pairs(Judge(), pairs), comparing.compare_pairs(Judge(0.15), pairs)
    assert fair.probabilities == pytest.approx([0.7, 0.4, 0.5])
    assert biased.probabilities == pytest.approx(fair.probabilities)
    assert fair.position_bias == pytest.approx(0) and biased.position_bias == pytest.approx(0.15)
    assert fair.consistent == 1 and biased.consistent == pytest.approx(1 / 3)


def test_a_pair_without_an_answer_is_left_open():
    result = comparing.compare_pairs(Judge(), [("p", "aa", "b"), ("p", "?", "b")])
    assert result.probabilities[1] is None and result.unanswered == {1: "refused; refused"}
    assert comparing.compare_pairs(Judge(), []).position_bias is None


# --- the recorded and the local teacher -----------------------------------------------------------------------------


def test_the_recorded_teacher_answers_what_it_holds_and_says_what_it_does_not(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [
        label("a", "Why?", "Because.", empathy=0.5, curiosity=-0.2, scalar=0.3),
        label("b", "Why?", "No.", empathy=-0.5, scalar=-0.3),
        label("c", "Why?", "Because!", empathy=0.1).model_copy(update={"edit_of": "a", "lowered": "empathy"}),
    ]
    write_jsonl(path, rows)
    teacher = RecordedTeacher(path)
    assert isinstance(teacher, Teacher)
    ask = {"persona": "", "instruction": ""}
    assert [teacher.sample("Why?", index=n, **ask) for n in (0, 1)] == ["Because.", "No."]
    with pytest.raises(NoAnswer, match=r"holds 2 replies .* teacher\.kind"):
        teacher.sample("Why?", index=2, **ask)
    rating = teacher.rate("Why?", "Because.", dimensions=MANIFOLD.dimensions)
    assert rating == Rating(reward={"empathy": 0.5, "curiosity": -0.2}, scalar=0.3)
    assert teacher.rate("Why?", "No.", dimensions=MANIFOLD.dimensions[:1], overall=False).scalar is None
    with pytest.raises(NoAnswer, match="rate it yourself"):
        teacher.rate("Why?", "Never.", dimensions=MANIFOLD.dimensions)
    assert teacher.prefers("Why?", "Because.", "No.") == 1.0 and teacher.prefers("Why?", "No.", "Because.") == 0.0


def test_the_starter_corpus_is_the_default_teacher(home):
    prompt = starter_prompts()[0].prompt
    teacher = open_teacher(load_config(), home)
    reply = teacher.sample(prompt, persona="", instruction="", index=0)
    assert len(teacher.rate(prompt, reply, dimensions=MANIFOLD.dimensions).reward) == 7


def test_the_local_teacher_reads_expected_values_off_the_answer_probabilities(tiny, tmp_path):
    import mlx.core as mx

    lm = tiny()
    teacher = LocalTeacher(lm)
    assert isinstance(teacher, Teacher)
    shares = teacher._shares("Answer with one digit.", SCALE)
    logits = lm.model(mx.array([lm.prompt_tokens("Answer with one digit.")]))[0, -1]
    digits = [lm.tokenizer.encode(digit, add_special_tokens=False)[0] for digit in SCALE]
    weights = mx.exp(logits[mx.array(digits)])
    assert shares == pytest.approx((weights / weights.sum()).tolist(), rel=1e-4)
    teacher._shares = lambda text, options: [0, 0, 0, 0, 0, 0, 0, 0.25, 0.75]  # 0.25 at 0.75, 0.75 at 1
    rating = teacher.rate("Hi", "Yes.", dimensions=MANIFOLD.dimensions[:2])
    assert rating.reward == pytest.approx({"empathy": 0.9375, "social_coherence": 0.9375})
    assert rating.reward_intensity == pytest.approx(0.96875) and rating.rationale == ""


def test_the_local_teacher_repeats_itself_and_stores_what_it_said(tiny, home):
    config = load_config(overrides=["teacher.kind=local", "teacher.max_tokens=8"])
    from hominem_mlx.data.answers import AnswerStore

    lm = tiny()
    first, second = LocalTeacher(lm, max_tokens=8), LocalTeacher(lm, max_tokens=8)
    ask = {"persona": "a cook", "instruction": "Reply."}
    assert first.rate("Hi", "Yes.", dimensions=MANIFOLD.dimensions) == second.rate(
        "Hi", "Yes.", dimensions=MANIFOLD.dimensions
    )
    assert first.sample("Hi", index=0, **ask) == second.sample("Hi", index=0, **ask)
    assert 0 < first.prefers("Hi", "Yes.", "No.") < 1
    stored = LocalTeacher(lm, AnswerStore(home / "a.jsonl"))
    there = stored.prefers("Hi", "Yes.", "No.")
    stored._next_logits = pytest.fail
    assert stored.prefers("Hi", "Yes.", "No.") == there
    assert config.teacher.kind == "local"
