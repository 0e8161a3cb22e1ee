"""Base against adapter on a random model: what is measured, what is left alone, and the report of it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from hominem_mlx.config import Config
from hominem_mlx.errors import InputError, ModelError
from hominem_mlx.evaluation import probes, report
from hominem_mlx.evaluation.compare import as_text, compare
from hominem_mlx.evaluation.goals import figure
from hominem_mlx.evaluation.observe import drift
from hominem_mlx.evaluation.suite import evaluate
from hominem_mlx.files import read_jsonl, write_jsonl
from hominem_mlx.models import lora, sampling
from hominem_mlx.records import Fixture, Label, RecallQuestion, Reward
from hominem_mlx.schema import MANIFOLD, RewardOutput

CONFIG = Config.model_validate(
    {"evaluation": {"samples": 2, "max_tokens": 8, "recall_tokens": 6, "bootstrap": 100, "seed": 3}}
)
NASTY = '<script>alert(1)</script> & "quoted"'


class Words:
    """A judge that likes long words, and remembers whom it was asked about."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def score_many(self, pairs):
        self.asked += pairs
        values = [min(1.0, len(text) / 100) for _, text in pairs]
        return [
            RewardOutput(reward_vector=dict.fromkeys(MANIFOLD.names, v), reward_intensity=v, safety_score=v, scalar=v)
            for v in values
        ]


@pytest.fixture
def suite(registry):
    """A published suite: 3 prompts of 3 replies, 2 questions, 2 fixtures."""
    labels = [
        Label(
            id=f"p{p}-{r}",
            prompt_id=f"p{p}",
            prompt=f"{NASTY} prompt {p}",
            response=f"reply {r} of {p}",
            reward=Reward(scalar=s),
        )
        for p in range(3)
        for r, s in enumerate((0.8, 0.2, -0.4))
    ]
    with registry.draft("suite") as draft:
        write_jsonl(draft.folder / "labels.jsonl", labels)
        questions = [RecallQuestion(id=f"q{i}", fact_id=f"f{i}", question="who?", key=f"Key{i}") for i in range(2)]
        write_jsonl(draft.folder / "recall.jsonl", questions)
        fixtures = [
            Fixture(id="a", prompt="hello", must_not_contain=["zzz"], why=NASTY),
            Fixture(id="b", prompt="hello", better="a kind word", worse="a rude word"),
        ]
        write_jsonl(draft.folder / "fixtures.jsonl", fixtures)
    return draft.published


def make_adapter(registry, lm, *, size: float):
    """An untrained adapter: B drawn at `size`."""
    shape = lora.Shape(rank=4)
    lora.attach(lm, shape, seed=1)
    rng = np.random.default_rng(0)
    values = {
        name: mx.array((size * rng.normal(size=value.shape)).astype(np.float32)) if name.endswith("lora_b") else value
        for name, value in lora.adapter_parameters(lm.model).items()
    }
    with registry.draft("lora", inputs={"base": lm.hash}) as draft:
        lora.save_adapter(lm, draft.folder, shape, values)
    lora.detach(lm)
    return draft.published


def logits_of(lm):
    return np.array(lm.model(mx.array([lm.prompt_tokens("hello")])))


def test_an_adapter_that_says_nothing_is_measured_as_nothing(registry, suite, tiny):
    lm = tiny()
    found = evaluate(lm, suite, adapter=make_adapter(registry, lm, size=0.0), scorer=Words(), config=CONFIG)
    assert found["preference"]["accuracy_after"] == 0.5 and found["preference"]["n"] == 9
    assert found["drift"]["nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert found["generation"]["judges"]["training"]["difference"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert all(row["before"] == row["after"] for row in found["generation"]["answers"])
    assert found["figures"]["A6"]["holds"] and not found["figures"]["A2"]["holds"]
    assert not found["verdict"]["accepted"]
    assert any(reason.startswith("A2:") for reason in found["verdict"]["reasons"])


def test_an_adapter_that_says_something_is_seen_and_the_model_comes_back_as_it_was(registry, suite, tiny):
    lm = tiny()
    bare, weights = logits_of(lm), lm.fingerprint()
    training, audit, events = Words(), Words(), []
    adapter = make_adapter(registry, lm, size=0.5)
    found = evaluate(
        lm, suite, adapter=adapter, scorer=training, audit_scorer=audit, config=CONFIG, progress=events.append
    )
    assert np.array_equal(logits_of(lm), bare) and lm.fingerprint() == weights and lm.adapter is None
    assert found["drift"]["nats_per_token"] > 0.01
    assert found["base_unchanged"] is True
    assert any(row["before"] != row["after"] for row in found["generation"]["answers"])
    assert set(found["preference"]["judges"]) == {"training"}
    assert len(training.asked) == 9 + 2 * 6  # every label and every free answer, once
    assert len(audit.asked) == 2 * 6  # never the labels: it may be fitted on them
    assert {"A2", "A2_low", "A3", "A3_before", "A4_train", "A4_audit", "A6", "fixtures"} <= set(found["figures"])
    for stage in {event["stage"] for event in events}:
        steps = [event for event in events if event["stage"] == stage]
        assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)
        assert all(step["done"] <= step["total"] for step in steps)


def test_what_is_measured_hangs_on_the_seed_alone(registry, suite, tiny):
    lm = tiny()
    adapter = make_adapter(registry, lm, size=0.5)
    first = evaluate(lm, suite, adapter=adapter, scorer=Words(), config=CONFIG)
    mx.random.normal((3,))  # somebody else draws in between
    second = evaluate(lm, suite, adapter=adapter, scorer=Words(), config=CONFIG)
    first.pop("seconds"), second.pop("seconds")
    assert first == second


def test_the_adapter_the_model_came_with_is_examined_and_kept(registry, suite, tiny):
    lm = tiny()
    adapter = make_adapter(registry, lm, size=0.5)
    lora.load_adapter(lm, adapter.folder)
    dressed = logits_of(lm)
    own = evaluate(lm, suite.folder, config=CONFIG)
    assert (
        own["figures"]["A2"]["value"] == evaluate(lm, suite, adapter=adapter, config=CONFIG)["figures"]["A2"]["value"]
    )
    assert np.array_equal(logits_of(lm), dressed) and lm.adapter == str(adapter.folder)


def test_without_any_adapter_there_is_nothing_to_examine(suite, tiny):
    with pytest.raises(ModelError, match="nothing to examine"):
        evaluate(tiny(), suite, config=CONFIG)


def test_parts_that_a_suite_lacks_are_not_measured(registry, tiny, tmp_path):
    lm = tiny()
    write_jsonl(tmp_path / "recall.jsonl", [RecallQuestion(id="q", fact_id="f", question="who?", key="Key")])
    found = evaluate(lm, tmp_path, adapter=make_adapter(registry, lm, size=0.1), scorer=Words(), config=CONFIG)
    assert [found[part] for part in ("preference", "generation", "drift", "fixtures")] == [None] * 4
    assert set(found["figures"]) == {"A3", "A3_before", "A6"}
    assert "Taught facts" in report.page(report.plain(found))


def test_an_empty_suite_is_refused_by_name(registry, tiny, tmp_path):
    lm = tiny()
    with pytest.raises(InputError, match="a suite needs rows"):
        evaluate(lm, tmp_path, adapter=make_adapter(registry, lm, size=0.1), config=CONFIG)


def test_drift_is_the_exact_kl_over_the_whole_vocabulary(registry, tiny):
    lm = tiny()
    prompts = ["hello", "Is the earth flat?", "x"]
    said = sampling.answers(lm, prompts, max_tokens=5, temperature=1.0, seed=0)
    rows = [
        (lm.prompt_tokens(p), [*a.tokens, *([lm.tokenizer.eos_token_id] * a.finished)]) for p, a in zip(prompts, said)
    ]

    def distributions():
        for prompt, reply in rows:
            logits = np.array(lm.model(mx.array([prompt + reply])), np.float64)[0, len(prompt) - 1 : -1]
            yield (
                logits
                - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
                - logits.max(1, keepdims=True)
            )

    base = list(distributions())
    lora.load_adapter(lm, make_adapter(registry, lm, size=0.5).folder)
    expected = [float((np.exp(p) * (p - q)).sum()) for p, q in zip(distributions(), base, strict=True)]
    nats, tokens = drift(lm, prompts, said, CONFIG, progress=None)
    assert nats == pytest.approx(expected, rel=1e-3) and min(expected) > 0
    assert tokens.tolist() == [len(reply) for _, reply in rows]


class Page(HTMLParser):
    """Collects ids, addresses and text, and checks that tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self.labels: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [found[key] for key in ("href", "src") if key in found]
        self.labels += [found["aria-label"]] if found.get("role") == "img" else []
        self.scripts += tag == "script"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_is_one_page_without_outside_addresses_and_the_same_bytes_again(registry, suite, tiny):
    lm = tiny()
    adapter = make_adapter(registry, lm, size=0.5)
    found = evaluate(lm, suite, adapter=adapter, scorer=Words(), audit_scorer=Words(), config=CONFIG)
    artifact = report.publish(registry, found, parents=[adapter, suite])
    slower = {**found, "seconds": 99.0, "figures": {"A1": figure("A1", 999.0, n=1), **found["figures"]}}
    again = report.publish(registry, slower, parents=[adapter, suite])
    assert artifact.ref == again.ref and artifact.kind == "report"
    assert artifact.metadata["parents"] == [adapter.ref, suite.ref]
    text = artifact.file("report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.scripts == 0
    assert "http" not in text and "//" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert all(name in page.ids for name in re.findall(r"url\(#([\w-]+)\)", text))
    assert len(page.ids) == len(set(page.ids))
    assert len(page.labels) == text.count("<svg") == 6 and all(len(label) > 20 for label in page.labels)
    assert "&lt;script&gt;alert(1)" in text
    assert "Refused" in text and str(lm.folder) not in text
    content = json.loads(artifact.file("report.json").read_text())
    assert content["figures"] == report.plain(found["figures"]) and "seconds" not in content


def test_numbers_that_json_lacks_become_null():
    assert report.plain({"a": [float("nan"), float("inf"), np.float64(1.5)], 2: (True, None)}) == {
        "a": [None, None, 1.5],
        "2": [True, None],
    }


def test_compare_shows_both_answers_their_words_and_the_difference(registry, tiny):
    lm = tiny()
    adapter = make_adapter(registry, lm, size=0.5)
    bare = logits_of(lm)
    rows = compare(lm, adapter, ["hello", "Is the earth flat?"], scorer=Words(), config=CONFIG)
    assert np.array_equal(logits_of(lm), bare)
    assert [row["before"] for row in rows] == lm.complete(
        ["hello", "Is the earth flat?"], max_tokens=8, temperature=0, seed=3
    )
    for row in rows:
        kept = [text for kind, text in row["diff"] if kind in ("same", "new")]
        assert " ".join(kept).split() == row["after"].split()
        first, second = row["judged_before"], row["judged_after"]
        assert row["difference"]["empathy"] == pytest.approx(
            second["reward_vector"]["empathy"] - first["reward_vector"]["empathy"]
        )
    text = as_text(rows)
    assert "intensity" in text and "safety" in text and "curiosity" in text


def test_compare_works_without_a_judge(registry, tiny):
    lm = tiny()
    rows = compare(lm, make_adapter(registry, lm, size=0.5), ["hello"], config=CONFIG)
    assert set(rows[0]) == {"prompt", "before", "after", "diff"} and as_text(rows)


def judged(empathy: float, curiosity: float, noise: float) -> RewardOutput:
    vector = dict.fromkeys(MANIFOLD.names, 0.0) | {"empathy": empathy, "curiosity": curiosity}
    return RewardOutput(
        reward_vector=vector,
        reward_intensity=0.3,
        safety_score=0.9,
        scalar=0.0,
        uncertainty=dict.fromkeys(vector, noise),
    )


def test_a_dimension_has_changed_only_beyond_the_judges_own_noise():
    outputs = [judged(0.5, 0.0, 0.1), judged(0.2, 0.05, 0.1), judged(-0.3, 0.0, 0.1)]
    assert probes.changed(outputs) == {
        "empathy": {"difference": 0.8, "noise": pytest.approx(0.1 * 2**0.5), "highest": 0, "lowest": 2}
    }
    assert probes.changed([judged(0.5, 0, 0.6), judged(-0.3, 0, 0.6)]) == {}  # sd of the difference is 0.85
    assert probes.changed([]) == {}


def test_a_probe_lists_every_number_of_every_candidate():
    found = probes.probe(Words(), "hello", ["short", "a much longer reply, " * 3])
    assert [c["reply"] for c in found["candidates"]] == ["short", "a much longer reply, " * 3]
    assert set(found["changed"]) == set(MANIFOLD.names)
    assert found["candidates"][1]["scalar"] == pytest.approx(0.63)
    text = probes.as_text(found)
    assert all(name in text for name in MANIFOLD.names) and "+0.63" in text


STARTER = Path(probes.__file__).parents[1] / "starter"


def test_starter_fixtures_are_enough_short_unequal_and_new():
    fixtures = read_jsonl(STARTER / "fixtures.jsonl", Fixture)
    assert len(fixtures) >= 24
    assert [fixture.id for fixture in fixtures] == [f"fix-{i + 1:03d}" for i in range(len(fixtures))]
    texts = [fixture.prompt for fixture in fixtures]
    assert len(set(texts)) == len(texts) and all(fixture.why for fixture in fixtures)
    for fixture in fixtures:
        assert fixture.better != fixture.worse
        assert all(8 <= len(reply.split()) <= 30 for reply in (fixture.better, fixture.worse))
    corpus = {row["prompt"] for row in map(json.loads, (STARTER / "prompts.jsonl").read_text().splitlines())}
    assert not corpus & set(texts)
