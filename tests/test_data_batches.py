"""Message batches: paid for once, whatever breaks and whenever the process is killed."""

import functools
import itertools
import json
import subprocess
import sys
import time
from collections import Counter

import pytest

from fake_batches import FakeBatches
from hominem_mlx import files
from hominem_mlx.config import load_config
from hominem_mlx.data import answers, batches, rater, sampler, wire
from hominem_mlx.data import home as homes
from hominem_mlx.data.teacher import open_teacher
from hominem_mlx.errors import TeacherError
from hominem_mlx.records import Label, Prompt, Trajectory


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits of milliseconds."""
    monkeypatch.setattr(batches, "APPEARS_SECONDS", 0.05)
    monkeypatch.setattr(batches, "OUTAGE_SECONDS", 0.3)


def fill(home, count=6):
    rows = [
        Trajectory(id=f"p{n}-c0", prompt_id=f"p{n}", prompt=f"Question {n}?", response=f"Reply {n}.")
        for n in range(count)
    ]
    homes.write(home, Trajectory, rows)
    return home


@pytest.fixture
def answered(home):
    """A home with six candidate replies."""
    return fill(home)


def settings(server, *more):
    return [
        "teacher.kind=anthropic",
        "teacher.model=judge",
        "teacher.batch=true",
        "teacher.batch_poll_seconds=0.001",
        "teacher.max_retries=0",
        f"teacher.base_url={server.url}",
        *more,
    ]


def rate(home, server, *more, progress=None):
    config = load_config(overrides=settings(server, *more))
    return rater.rate(home, config, open_teacher(config, home), progress=progress)


def events(home):
    return [json.loads(line)["event"] for line in (home / homes.BATCHES).read_text().splitlines()]


def test_answers_in_any_order_become_the_labels_that_single_requests_give(answered):
    from fake_teacher import FakeTeacher

    with FakeBatches() as server:
        done = rate(answered, server)
    assert (done.rated, done.unlabelled) == (6, {})
    assert [row["custom_id"] for row in server.batches["msgbatch_1"]["rows"]] != list(server.paid), "shuffled"
    other = fill(answered.with_name("other"))
    with FakeTeacher() as single:
        config = load_config(
            overrides=["teacher.kind=anthropic", "teacher.model=judge", f"teacher.base_url={single.url}"]
        )
        rater.rate(other, config, open_teacher(config, other))
    assert homes.read(answered, Label) == homes.read(other, Label)
    assert events(answered) == ["planned", "sent", "fetched"]
    assert "Reply" not in (answered / homes.BATCHES).read_text(), "the ledger holds no text"


def test_candidates_can_be_sampled_in_batches_too(home):
    homes.write(home, Prompt, [Prompt(id=f"p{n}", prompt=f"Question {n}?") for n in range(3)])
    with FakeBatches() as server:
        config = load_config(overrides=settings(server, "data.student_candidates=0"))
        done = sampler.sample(home, config, open_teacher(config, home))
    assert (done.teacher, done.failed, len(server.batches)) == (12, {}, 1)


def test_the_second_run_sends_nothing(answered):
    with FakeBatches() as server:
        rate(answered, server)
        (answered / homes.FILES[Label]).unlink()
        calls = sum(server.calls.values())
        assert rate(answered, server).rated == 6
        assert sum(server.calls.values()) == calls


def test_what_expired_or_failed_in_passing_is_asked_again_up_to_a_limit(answered):
    def outcome(body, turn):
        said = body["messages"][0]["content"]
        if "Reply 0." in said:
            return "expired"
        if "Reply 1." in said:
            return "errored overloaded_error"
        if "Reply 2." in said and turn == 1:
            return "expired"
        if "Reply 3." in said:
            return "errored invalid_request_error"
        return "canceled" if "Reply 4." in said else None

    with FakeBatches(outcome) as server:
        done = rate(answered, server)
        assert done.rated == 2 and set(server.paid.values()) == {1}
        assert done.unlabelled["p0-c0"] == "the batch expired before its turn came"
        assert done.unlabelled["p1-c0"] == "overloaded_error: it went wrong"
        assert done.unlabelled["p3-c0"] == "invalid_request_error: it went wrong"
        assert done.unlabelled["p4-c0"] == "the batch was cancelled"
        assert sorted(server.turns.values()) == [1, 1, 1, 2, 3, 3]
        server.outcome = lambda body, turn: None
        assert rate(answered, server).rated == 4, "the next run asks for them anew"
        assert set(server.paid.values()) == {1}


def test_an_unreadable_answer_is_asked_again_in_a_batch_with_the_fault_named(answered):
    def outcome(body, turn):
        first = len(body["messages"]) == 1
        return "out_of_range" if first and "Reply 2." in body["messages"][0]["content"] else None

    with FakeBatches(outcome) as server:
        assert rate(answered, server).rated == 6
    assert [len(batch["rows"]) for batch in server.batches.values()] == [6, 1]
    assert "= 1.7" in server.bodies[-1]["messages"][2]["content"]


def test_refusals_are_stored_and_not_asked_for_again(answered):
    with FakeBatches(lambda body, turn: "refusal") as server:
        assert set(rate(answered, server).unlabelled.values()) == {"the teacher refused"}
        rate(answered, server)
    assert len(server.batches) == 1


def test_one_dimension_a_call_goes_out_in_parts_and_progress_is_shown(answered, monkeypatch):
    monkeypatch.setattr(batches, "REQUESTS", 20)
    seen = []
    with FakeBatches(looks=2) as server:
        assert rate(answered, server, "teacher.rate_mode=single", progress=seen.append).rated == 6
    assert [len(batch["rows"]) for batch in server.batches.values()] == [20, 20, 8]
    assert seen[0] == {"stage": "batch", "done": 0, "total": 48} and seen[-1]["done"] == 48
    assert [event["done"] for event in seen] == sorted(event["done"] for event in seen)


# --- cost -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_estimated_at_half_the_price_and_counts_what_is_under_way(answered):
    prices = ("teacher.usd_per_million_input=3", "teacher.usd_per_million_output=15")
    with FakeBatches() as server:
        config = load_config(overrides=settings(server, *prices))
        whole = load_config(overrides=settings(server, *prices, "teacher.batch=false"))
        half = rater.cost(answered, config, open_teacher(config, answered))
        full = rater.cost(answered, whole, open_teacher(whole, answered))
        assert half.usd == pytest.approx(full.usd / 2) and half.requests == full.requests == 6
        with pytest.raises(KeyboardInterrupt):
            rate(answered, server, progress=stop)
        waiting = rater.cost(answered, config, open_teacher(config, answered))
        assert (waiting.under_way, waiting.requests, waiting.usd) == (6, 0, 0)


def stop(event):
    raise KeyboardInterrupt


def test_the_cost_limit_holds_before_and_during_a_run(answered):
    prices = ("teacher.usd_per_million_output=1000", "teacher.max_tokens=1000")
    with FakeBatches(lambda body, turn: "missing") as server:
        with pytest.raises(TeacherError, match="nothing was sent"):
            rate(answered, server, *prices, "teacher.max_cost_usd=2.9")
        assert not server.batches
        done = rate(answered, server, *prices, "teacher.max_cost_usd=3.1")  # six answers of 0.50 USD at most
    assert len(server.batches) == 1, "asking all of them again would cost as much once more"
    assert all("above teacher.max_cost_usd = 3.1" in reason for reason in done.unlabelled.values())


def test_only_anthropics_teacher_has_batches(home):
    with pytest.raises(TeacherError, match=r"teacher\.kind = anthropic"):
        open_teacher(load_config(overrides=["teacher.batch=true"]), home)


# --- what breaks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop", "lost", "503"])
@pytest.mark.parametrize("call", ["POST 3", "GET 4", "GET results"])
def test_a_call_that_breaks_once_is_made_good_and_nothing_is_paid_twice(answered, fault, call):
    server = FakeBatches()
    server.fault = lambda method, path, count: fault if server.calls[call] == 1 and _is(call, method, path) else None
    with server:
        assert rate(answered, server).rated == 6
    assert set(server.paid.values()) == {1} and len(server.paid) == 6


def _is(call, method, path):
    kind = "results" if path.endswith("/results") else str(path.count("/"))
    return call == f"{method} {kind}"


def test_results_that_break_off_are_read_again(answered):
    server = FakeBatches()
    server.fault = lambda method, path, count: "cut" if path.endswith("/results") and count < 3 else None
    with server:
        assert rate(answered, server).rated == 6
    assert set(server.paid.values()) == {1}


def test_results_that_cannot_be_read_at_all_stay_open_and_are_fetched_by_the_next_run(answered):
    server = FakeBatches(fault=lambda method, path, count: "cut" if path.endswith("/results") else None)
    with server:
        with pytest.raises(TeacherError, match="run the same command again"):
            rate(answered, server)
        server.fault = lambda method, path, count: None
        assert rate(answered, server).rated == 6
    assert set(server.paid.values()) == {1} and len(server.batches) == 1


def test_a_server_that_goes_away_for_a_while_is_waited_for(answered):
    server = FakeBatches(looks=6)
    server.fault = lambda method, path, count: "503" if path.count("/") == 4 and 2 <= count <= 4 else None
    with server:
        assert rate(answered, server).rated == 6


def test_a_server_that_is_away_from_the_start_of_a_run_is_said_at_once_and_nothing_is_lost(answered):
    with FakeBatches(looks=10) as server:
        with pytest.raises(KeyboardInterrupt):
            rate(answered, server, progress=stop)
        server.fault = lambda method, path, count: "503"
        with pytest.raises(TeacherError, match="nothing is lost: run the same command again"):
            rate(answered, server)
        server.fault = lambda method, path, count: None
        server.looks = 0
        assert rate(answered, server).rated == 6
    assert set(server.paid.values()) == {1}


def test_a_batch_that_never_arrives_is_given_up_after_some_tries(answered):
    with FakeBatches(fault=lambda method, path, count: "lost" if method == "POST" else None) as server:
        with pytest.raises(TeacherError, match="could not be sent"):
            rate(answered, server)
        assert server.calls["POST 3"] == batches.TRIES
        assert events(answered) == ["planned", "dropped"]
        server.fault = lambda method, path, count: None
        assert rate(answered, server).rated == 6


def test_when_nobody_can_say_whether_a_batch_arrived_it_is_not_sent_again_until_somebody_can(answered):
    def fault(method, path, count):
        return "drop" if method == "POST" else "503"

    with FakeBatches(fault=fault) as server:
        with pytest.raises(TeacherError, match="cannot be found out: 503"):
            rate(answered, server)
        assert events(answered) == ["planned"]
        server.fault = lambda method, path, count: None
        assert rate(answered, server).rated == 6
    assert set(server.paid.values()) == {1} and len(server.batches) == 1


@pytest.mark.parametrize(
    ("code", "reason"), [("404", "no message batches"), ("401", "check the key"), ("400", "refused")]
)
def test_a_server_without_batches_says_so(answered, code, reason):
    with FakeBatches(fault=lambda method, path, count: code) as server, pytest.raises(TeacherError, match=reason):
        rate(answered, server)
    assert events(answered) == ["planned", "dropped"]


def test_a_batch_deleted_on_the_server_is_asked_for_anew(answered):
    with FakeBatches(looks=10) as server:
        with pytest.raises(KeyboardInterrupt):
            rate(answered, server, progress=stop)
        server.batches = {"msgbatch_9": server.batches.popitem()[1]}
        server.looks = 0
        assert rate(answered, server).rated == 6
    assert events(answered) == ["planned", "sent", "dropped", "planned", "sent", "fetched"]


def test_the_key_follows_no_results_to_another_host(answered):
    with FakeBatches() as server:
        server.results_host = "http://localhost.example"
        with pytest.raises(TeacherError, match="another host"):
            rate(answered, server)


def test_a_strangers_batch_of_the_same_size_is_not_taken_for_ours(answered):
    calls = itertools.count()

    def fault(method, path, count):
        return "lost" if method == "POST" and next(calls) == 0 else None

    with FakeBatches(fault=fault) as server:
        strange = [(f"theirs-{n}", {"model": "m", "messages": [{"role": "user", "content": "?"}]}) for n in range(6)]
        server.add(strange)
        done = rate(answered, server)
    assert done.rated == 6 and {server.paid[key] for key in server.paid} == {1}
    assert events(answered) == ["planned", "sent", "planned", "dropped", "planned", "sent", "fetched"]
    assert len(homes.read(answered, Label)) == 6


def test_the_ledger_holds_no_password_and_older_ones_are_understood(tmp_path):
    path, url = tmp_path / "ledger.jsonl", "http://zoe:s3cret@localhost:1234/v1"
    entry = batches.Ledger(path, url).plan(["a", "b"])
    line = path.read_text()
    assert "zoe" not in line and "s3cret" not in line and json.loads(line)["server"] == "http://localhost:1234/v1"
    for server in (url, "http://localhost:1234/v1"):
        assert batches.Ledger(path, server).open == {entry.name: entry}
    path.write_text(line.replace("http://", "http://zoe:s3cret@"))
    assert batches.Ledger(path, url).open == {entry.name: entry}
    assert not batches.Ledger(path, "http://localhost:1235/v1").open


def spoil(server):
    """Of six results two cannot be understood, one lacks its answer, one names no request, and one is missing."""
    rows = server.batches["msgbatch_1"]["rows"]
    rows[0]["result"] = {"type": "postponed"}
    rows[1]["result"] = None
    del rows[2]["result"]["message"]
    del rows[3]["custom_id"]
    del rows[4]


def test_results_that_are_malformed_or_missing_fail_alone_and_block_no_later_run(answered):
    with FakeBatches(looks=10) as server:
        with pytest.raises(KeyboardInterrupt):
            rate(answered, server, progress=stop)
        spoil(server)
        server.looks = 0
        done = rate(answered, server)
        assert done.rated == 1 and len(server.batches) == 1
        assert Counter(done.unlabelled.values()) == {
            "the server says 'postponed' of it, which is no known result": 1,
            "the server's answer is malformed": 2,
            "it is not in the results of its batch": 2,
        }
        assert events(answered) == ["planned", "sent", "fetched"]
        assert rate(answered, server).rated == 5, "the next run is not held up, and asks for them anew"


def test_a_server_that_cannot_be_reached_for_its_results_is_asked_once_more(answered, monkeypatch):
    whole, calls = wire.Server.results, itertools.count()

    def results(self, name):
        if next(calls) < 2:
            raise wire.Unreachable("nobody there")
        yield from whole(self, name)

    waits = []
    with FakeBatches() as server:
        monkeypatch.setattr(wire.Server, "results", results)
        monkeypatch.setattr(batches.time, "sleep", waits.append)
        assert rate(answered, server).rated == 6
    assert waits.count(0.001) >= 2 and next(calls) == 3


def hidden_for(seconds, monkeypatch):
    """The server's list of batches is empty for some time from now."""
    until, whole = time.monotonic() + seconds, wire.Server.batches
    monkeypatch.setattr(batches, "APPEARS_SECONDS", 2 * seconds)
    monkeypatch.setattr(wire.Server, "batches", lambda self: iter(()) if time.monotonic() < until else whole(self))


def test_a_batch_that_is_slow_to_stand_in_the_servers_list_is_not_sent_again(answered, monkeypatch):
    server = FakeBatches(fault=lambda method, path, count: "drop" if method == "POST" else None)
    with server:
        hidden_for(0.5, monkeypatch)
        assert rate(answered, server).rated == 6
    assert len(server.batches) == 1 and set(server.paid.values()) == {1}


def test_a_batch_whose_sender_was_killed_long_after_its_plan_is_still_given_time_to_appear(answered, monkeypatch):
    with FakeBatches() as server:
        with monkeypatch.context() as patch:
            send = wire.Server.send_batch

            def killed(self, requests):
                send(self, requests)
                raise Killed

            patch.setattr(wire.Server, "send_batch", killed)
            with pytest.raises(Killed):
                rate(answered, server)
        ledger = answered / homes.BATCHES
        event = json.loads(ledger.read_text())
        ledger.write_text(json.dumps({**event, "at": event["at"] - 200}) + "\n")
        hidden_for(0.5, monkeypatch)
        assert rate(answered, server).rated == 6
    assert len(server.batches) == 1 and set(server.paid.values()) == {1}


def test_two_terminals_that_were_asked_together_pay_once(answered):
    """Each opens its teacher, then asks a person whether to send; what happens meanwhile is seen."""
    from fake_teacher import FakeTeacher

    with FakeBatches(looks=10) as server:
        config = load_config(overrides=settings(server))
        waiting, fetching = open_teacher(config, answered), open_teacher(config, answered)
        with pytest.raises(KeyboardInterrupt):
            rate(answered, server, progress=stop)
        server.looks = 0
        assert rater.rate(answered, config, waiting).rated == 6
        (answered / homes.FILES[Label]).unlink()
        assert rater.rate(answered, config, fetching).rated == 6
        assert len(server.batches) == 1 and set(server.paid.values()) == {1}
    (answered / homes.FILES[Label]).unlink()
    with FakeTeacher() as single:
        config = load_config(
            overrides=["teacher.kind=anthropic", "teacher.model=judge", f"teacher.base_url={single.url}"]
        )
        one, other = open_teacher(config, answered), open_teacher(config, answered)
        rater.rate(answered, config, one)
        (answered / homes.FILES[Label]).unlink()
        assert rater.rate(answered, config, other).rated == 6
        assert len(single.requests) == 6


# --- kills ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What nothing catches."""


def odd(body, turn):
    """One answer that must be asked again, and one request that expires at first."""
    said = body["messages"][0]["content"]
    if "Reply 2." in said and len(body["messages"]) == 1:
        return "out_of_range"
    return "expired" if "Reply 3." in said and turn == 1 else None


def ticking(function, tick):
    """`function`, with a moment to be killed at before and after it."""

    def run(*args, **values):
        tick()
        result = function(*args, **values)
        tick()
        return result

    return run


def torn(append, tick):
    """`append_jsonl` that may be killed within a line and after it."""

    def run(path, rows):
        rows = list(rows)
        try:
            tick()
        except Killed:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(files.json_line(rows[0])[:-5])
            raise
        append(path, rows)
        tick()

    return run


def test_a_kill_at_any_write_or_call_pays_for_nothing_twice_and_loses_nothing(home, monkeypatch):
    monkeypatch.setattr(wire, "_client", functools.cache(wire._client))  # its certificates take long to load
    with FakeBatches(odd) as server:
        reference = fill(home / "reference")
        rate(reference, server)
        expected = (reference / homes.FILES[Label]).read_bytes()
        for moment in itertools.count():
            folder, clock = fill(home / f"killed-{moment}"), itertools.count()
            server.forget()

            def tick(moment=moment, clock=clock):
                if next(clock) == moment:
                    raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(batches, "append_jsonl", torn(files.append_jsonl, tick))
                patch.setattr(answers, "append_jsonl", torn(files.append_jsonl, tick))
                patch.setattr(rater, "write_jsonl", ticking(files.write_jsonl, tick))
                for name in ("send_batch", "batch"):
                    patch.setattr(wire.Server, name, ticking(getattr(wire.Server, name), tick))
                try:
                    rate(folder, server)
                    break
                except Killed:
                    pass
            assert rate(folder, server).unlabelled == {}, moment
            assert (folder / homes.FILES[Label]).read_bytes() == expected, moment
            assert set(server.paid.values()) == {1} and len(server.paid) == 7, (moment, server.paid)
    assert moment > 20


CHILD = """
import sys
from pathlib import Path
from hominem_mlx.config import load_config
from hominem_mlx.data import batches, rater
from hominem_mlx.data.teacher import open_teacher
batches.APPEARS_SECONDS = 0.05
home = Path(sys.argv[1])
config = load_config(overrides=sys.argv[2:])
rater.rate(home, config, open_teacher(config, home))
"""


def test_a_real_kill_while_a_batch_is_waited_for(answered):
    with FakeBatches(odd, looks=10**9) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(answered), *settings(server)])
        deadline = time.monotonic() + 30
        while server.calls["GET 4"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert len(server.batches) == 1 and server.calls["GET 4"] >= 3
        server.looks = 0
        assert rate(answered, server).rated == 6
    assert set(server.paid.values()) == {1} and len(server.paid) == 7
