"""Teachers behind HTTP: faults, stores, costs, keys. Against a server on loopback that fails on demand."""

import json
import threading

import pytest

from fake_teacher import FakeTeacher, number
from hominem_mlx.config import Config, Inference, TeacherConfig
from hominem_mlx.data import questions, teacher, wire
from hominem_mlx.data.answers import AnswerStore, ask_all
from hominem_mlx.data.teacher import AnthropicTeacher, HttpGenerator
from hominem_mlx.errors import ConfigError, InputError, ModelError, NoAnswer, TeacherError
from hominem_mlx.schema import MANIFOLD, Generator, Teacher

DIMENSIONS = MANIFOLD.dimensions


def make(server, store=None, **settings):
    defaults = {"kind": "anthropic", "model": "judge", "base_url": server.url, "max_retries": 2, "timeout_seconds": 10}
    return AnthropicTeacher(TeacherConfig(**(defaults | settings)), store)


def rate(judge, response="Fine."):
    return judge.rate("Hello?", response, dimensions=DIMENSIONS)


def test_a_rating_has_every_number_asked_for_and_the_rationale():
    with FakeTeacher() as server:
        judge = make(server)
        assert isinstance(judge, Teacher)
        rating = rate(judge)
    said = server.requests[0][1]["messages"][0]["content"]
    assert rating.reward == {d.name: number(said, d.name) for d in DIMENSIONS}
    assert rating.reward_intensity == number(said, "reward_intensity")
    assert rating.rationale == "It says what it should."


def test_the_request_asks_for_a_schema_caches_the_rubric_and_has_no_temperature():
    with FakeTeacher() as server:
        rate(make(server))
    body = server.requests[0][1]
    schema = body["output_config"]["format"]["schema"]
    assert list(schema["properties"])[:3] == ["rationale", "empathy", "social_coherence"]
    assert schema["required"] == list(schema["properties"]) and schema["additionalProperties"] is False
    assert body["system"][0]["cache_control"] == {"type": "ephemeral"}
    assert "temperature" not in body


def test_the_dimensions_are_asked_for_in_the_order_given():
    with FakeTeacher() as server:
        order = tuple(reversed(DIMENSIONS))
        make(server).rate("a", "b", dimensions=order, overall=False)
    body = server.requests[0][1]
    assert list(body["output_config"]["format"]["schema"]["properties"]) == ["rationale", *(d.name for d in order)]
    assert "in this order: curiosity, narrative_alignment" in body["messages"][0]["content"]


@pytest.mark.parametrize("fault", ["429 slow down", "500 oops", "529 overloaded"])
def test_the_client_retries_what_passes(fault):
    with FakeTeacher(lambda body, count: fault if count <= 2 else None) as server:
        assert rate(make(server)).scalar is not None
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("429 slow down", "429 from", 3),
        ("500 oops", "500 from", 3),
        ("400 prompt is too long", "prompt is too long", 1),
        ("drop", "the connection was dropped", 3),
        ("slow", "no answer within 0.2 seconds", 3),
        ("bad_body", "malformed", 1),
        ("html", "malformed", 1),
        ("empty_object", "malformed", 1),
        ("refusal", "refused", 1),
        ("max_tokens", "cut off", 1),
        ("empty", "empty", 1),
        ("not_json", "not JSON", 2),
        ("out_of_range", "empathy = 1.7", 2),
        ("text_number", "empathy = '0.5'", 2),
        ("nan", "empathy = nan", 2),
        ("missing", "lacks scalar", 2),
    ],
)
def test_a_fault_leaves_one_item_without_a_label_after_bounded_tries(fault, reason, requests):
    with FakeTeacher(lambda body, count: fault) as server:
        judge = make(server, timeout_seconds=0.2 if fault == "slow" else 10)
        with pytest.raises(NoAnswer, match=reason):
            rate(judge)
    assert len(server.requests) == requests


def test_an_unusable_answer_is_asked_again_once_with_the_fault_named():
    with FakeTeacher(lambda body, count: "out_of_range" if count == 1 else None) as server:
        assert rate(make(server)).reward["empathy"] <= 1
    again = server.requests[1][1]["messages"]
    assert [turn["role"] for turn in again] == ["user", "assistant", "user"]
    assert "empathy = 1.7" in again[2]["content"]


def test_a_server_without_structured_output_is_read_from_its_text():
    fault = "400 output_config: unknown field"
    with FakeTeacher(lambda body, count: fault if "output_config" in body else None) as server:
        assert rate(make(server)).reward["empathy"] >= 0
        assert make(server).prefers("a", "b", "c") == 0.8


@pytest.mark.parametrize("fault", ["401 bad key", "403 no", "404 no such model"])
def test_what_would_fail_for_every_item_stops_the_run(fault):
    with FakeTeacher(lambda body, count: fault) as server, pytest.raises(TeacherError, match="check the") as caught:
        rate(make(server))
    assert not isinstance(caught.value, NoAnswer)


def test_a_server_that_is_not_there_stops_the_run_and_says_where_it_looked():
    with FakeTeacher() as server:
        url = server.url
    judge = AnthropicTeacher(TeacherConfig(kind="anthropic", model="m", base_url=url, max_retries=0))
    with pytest.raises(TeacherError, match="is the server running") as caught:
        rate(judge)
    assert url in str(caught.value) and not isinstance(caught.value, NoAnswer)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_anthropics_key_never_goes_to_another_host(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret-1")
    with FakeTeacher() as server:
        rate(make(server))
    assert "sk-secret-1" not in json.dumps(server.requests)


def test_another_hosts_key_goes_there_and_into_no_message(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "sk-secret-2")
    with FakeTeacher(lambda body, count: "401 key sk-secret-2 is wrong") as server:
        with pytest.raises(TeacherError) as caught:
            rate(make(server, api_key_env="LOCAL_KEY"))
        assert any("sk-secret-2" in text for text in server.requests[0][0].values())
    assert "sk-secret-2" not in str(caught.value) and "***" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_the_cloud_wants_a_key_and_names_the_variable(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    with pytest.raises(TeacherError, match="ANTHROPIC_API_KEY"):
        AnthropicTeacher(TeacherConfig(kind="anthropic", model="m"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret-3")
    judge = AnthropicTeacher(TeacherConfig(kind="anthropic", model="m"))
    assert str(judge._server._client.base_url).startswith(wire.CLOUD), "a variable must not redirect the texts"


def test_settings_that_cannot_work_are_refused_before_anything_is_sent():
    with pytest.raises(TeacherError, match=r"teacher\.model"):
        AnthropicTeacher(TeacherConfig(kind="anthropic"))
    for address in ("localhost:1234", "http://", "ftp://x", "http://x:port"):
        with pytest.raises(ConfigError, match="not an address"):
            AnthropicTeacher(TeacherConfig(kind="anthropic", model="m", base_url=address))


def test_the_default_teacher_sends_nothing(home, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret-4")
    assert teacher.open_teacher(Config(), home).name == "starter"


# --- the store ------------------------------------------------------------------------------------------------------


def test_nothing_is_paid_for_twice_not_even_a_refusal(tmp_path):
    path = tmp_path / "answers.jsonl"
    with FakeTeacher(lambda body, count: "refusal" if "bad" in body["messages"][0]["content"] else None) as server:
        first = rate(make(server, AnswerStore(path)))
        with pytest.raises(NoAnswer):
            rate(make(server, AnswerStore(path)), "bad")
        again = make(server, AnswerStore(path))
        assert rate(again) == first
        with pytest.raises(NoAnswer, match="refused"):
            rate(again, "bad")
    assert len(server.requests) == 2


def test_a_fault_of_the_wire_is_not_stored_so_the_next_run_asks_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    with FakeTeacher(lambda body, count: "500 oops" if count == 1 else None) as server:
        with pytest.raises(NoAnswer):
            rate(make(server, AnswerStore(path), max_retries=0))
        assert not path.exists()
        rate(make(server, AnswerStore(path)))


def test_another_model_or_address_is_another_question(tmp_path):
    store = AnswerStore()
    with FakeTeacher() as one, FakeTeacher() as other:
        rate(make(one, store))
        rate(make(one, store, model="another"))
        rate(make(other, store))
    assert (len(one.requests), len(other.requests)) == (2, 1)


@pytest.mark.parametrize("tail", [b'{"key": "x", "ans', '{"key": "Zoë'.encode()[:-1]])
def test_the_half_line_of_a_killed_run_is_forgotten_and_written_over(tmp_path, tail):
    path = tmp_path / "answers.jsonl"
    store = AnswerStore(path)
    store.remember({"ask": 1}, lambda: {"text": "Zoë"}, teacher="t")
    with open(path, "ab") as file:
        file.write(tail)
    store = AnswerStore(path)
    assert store.remember({"ask": 1}, pytest.fail, teacher="t") == {"text": "Zoë"}
    store.remember({"ask": 2}, lambda: {"text": "b"}, teacher="t")
    assert len(path.read_text().splitlines()) == 2
    assert {"ask": 2} in AnswerStore(path) and {"ask": 3} not in AnswerStore(path)


def test_a_damaged_store_is_named_with_its_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "answer": {}}\nrubbish\n')
    with pytest.raises(InputError, match=r"answers\.jsonl:2"):
        AnswerStore(path)


def test_half_characters_in_an_answer_do_not_break_the_store(tmp_path):
    path = tmp_path / "answers.jsonl"
    with FakeTeacher() as server:
        judge = make(server, AnswerStore(path))
        judge._send = lambda request: wire._content(_message_with("odd \ud800 text"))
        text = judge.sample("Hi", persona="a cook", instruction="Reply.", index=0)
    assert text == "odd ? text"
    assert AnswerStore(path)._answers


def _message_with(text):
    import anthropic

    block = anthropic.types.TextBlock.model_construct(type="text", text=text, citations=None)
    return anthropic.types.Message.model_construct(content=[block], stop_reason="end_turn", usage=None)


# --- concurrency ----------------------------------------------------------------------------------------------------


def test_requests_run_together_up_to_the_bound_and_come_back_in_order():
    seen = []
    with FakeTeacher(lambda body, count: "slow") as server:
        judge = make(server, concurrency=3)
        jobs = [lambda text=text: judge.sample(text, persona="p", instruction="i", index=0) for text in "abcdef"]
        replies = ask_all(jobs, concurrency=3, stage="sample", progress=seen.append)
    assert server.most_together == 3
    assert replies == [judge.sample(text, persona="p", instruction="i", index=0) for text in "abcdef"]
    assert [event["done"] for event in seen] == [1, 2, 3, 4, 5, 6] and seen[0]["total"] == 6


def test_one_thread_means_the_calling_one():
    names = ask_all([threading.get_ident] * 3, concurrency=1, stage="x")
    assert set(names) == {threading.get_ident()}


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_fatal_fault_ends_the_run_and_drops_what_has_not_begun(concurrency):
    asked = []

    def job(number):
        asked.append(number)
        raise TeacherError("no key")

    with pytest.raises(TeacherError, match="no key"):
        ask_all([lambda n=n: job(n) for n in range(50)], concurrency=concurrency, stage="x")
    assert len(asked) < 50


# --- cost -----------------------------------------------------------------------------------------------------------


def test_the_cost_is_estimated_on_this_machine_and_errs_high():
    asked = [questions.rating_question("Hello?", f"reply {n}", DIMENSIONS, overall=True) for n in range(10)]
    with FakeTeacher() as server:
        judge = make(server, usd_per_million_input=3.0, usd_per_million_output=15.0, max_tokens=1000)
        cost = teacher.estimate(judge, asked)
        assert server.requests == []
        rate(judge, "reply 0")
        assert teacher.estimate(judge, asked).stored == 1
    characters = len(json.dumps(judge._request(asked[0], teacher._user(asked[0]))))
    assert cost.requests == 10 and cost.output_tokens == 10_000
    assert 10 * characters / 4 < cost.input_tokens < 10 * characters / 2
    assert cost.usd == pytest.approx(cost.input_tokens * 3e-6 + 10_000 * 15e-6)


def test_a_run_dearer_than_allowed_sends_nothing():
    asked = [questions.rating_question("Hello?", "reply", DIMENSIONS, overall=True)]
    with FakeTeacher() as server:
        dear = make(server, usd_per_million_output=1000.0, max_cost_usd=0.5)
        with pytest.raises(TeacherError, match=r"max_cost_usd = 0\.5; nothing was sent"):
            teacher.refuse_if_dear(dear, teacher.estimate(dear, asked))
        unpriced = make(server, max_cost_usd=0.5)
        with pytest.raises(TeacherError, match="no prices"):
            teacher.refuse_if_dear(unpriced, teacher.estimate(unpriced, asked))
        cheap = make(server, usd_per_million_output=1.0, max_cost_usd=0.5)
        teacher.refuse_if_dear(cheap, teacher.estimate(cheap, asked))
    assert server.requests == []


# --- the student behind HTTP ----------------------------------------------------------------------------------------


def generator(server, **settings):
    return HttpGenerator(Inference(**({"endpoint": server.url, "model": "student"} | settings)), timeout_seconds=5)


def test_the_http_student_answers_in_order_with_system_and_temperature():
    with FakeTeacher() as server:
        student = generator(server)
        assert isinstance(student, Generator)
        texts = student.complete(["a", "b"], max_tokens=20, temperature=0.4, seed=1, system="Be brief.")
        assert texts == [student.complete([t], max_tokens=20, temperature=0.4, seed=1)[0] for t in "ab"]
    body = server.requests[0][1]
    assert (body["temperature"], body["system"], body["max_tokens"]) == (0.4, "Be brief.", 20)


def test_the_http_student_streams_a_conversation():
    with FakeTeacher() as server:
        turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        assert list(generator(server).stream(turns)) == ["One ", "word ", "at a time."]
    body = server.requests[0][1]
    assert body["system"] == "Be kind." and [turn["role"] for turn in body["messages"]] == ["user"]


@pytest.mark.parametrize("fault", ["500 oops", "404 gone", "bad_body", "drop"])
def test_a_failing_http_student_says_so(fault):
    with FakeTeacher(lambda body, count: fault) as server, pytest.raises(ModelError, match="student: "):
        generator(server).complete(["a"], max_tokens=5, temperature=0.0, seed=0)


def test_an_http_student_must_be_named_and_placed():
    with pytest.raises(ModelError, match=r"inference\.endpoint"):
        HttpGenerator(Inference(model="m"))


@pytest.mark.parametrize("fault", ["break", "end"])
def test_a_stream_that_breaks_off_says_so_after_what_came(fault):
    with FakeTeacher(lambda body, count: fault) as server:
        pieces = generator(server).stream([{"role": "user", "content": "Hi"}])
        assert next(pieces) == "One "
        with pytest.raises(ModelError, match="student: "):
            list(pieces)
