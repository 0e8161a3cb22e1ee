"""One whole demo on the bundled student, as a person starts it: what it writes, and that it keeps its figures."""

import json
import re
from pathlib import Path

import pytest

from hominem_mlx.cli import demo
from hominem_mlx.evaluation.goals import goals
from hominem_mlx.storage.registry import Registry

pytestmark = pytest.mark.timeout(1800)  # without OpenBLAS, beside other tests
KEYS = {
    "reward_model": "backbone pair_accuracy baseline_pair_accuracy pearson_mean residual_pearson_mean "
    "baseline_residual_pearson_mean",
    "preference": "accuracy_before accuracy_after n",
    "memory": "recalled_before recalled_after total",
    "generation": "reward_before reward_after reward_sd audit_before audit_after",
}
ENTRY = {"value", "goal", "holds", "n", "spread", "how"}


# Not reached yet; README says how far. A1 is a time, and a test may share its machine: it is read here, not held.
MISSED = {"A1", "A1_slow", "A2", "A3"}


@pytest.fixture(scope="module")
def found(demo_process) -> dict:
    """What one whole demo, with the bundled student, writes as JSON; its output under "output"."""
    code = demo_process.wait(timeout=1700)
    output = demo_process.output.read_text()
    assert code in (0, 1), output
    return {**json.loads((demo_process.home / "demo.json").read_text()), "output": output, "code": code}


def test_demo_writes_what_it_promises(found):
    for table, names in KEYS.items():
        assert set(found[table]) >= set(names.split())
        assert all(value is not None for value in found[table].values())
    assert set(found) >= {"seconds", "base_unchanged", "artifacts", "report", "figures"}
    assert set(found["artifacts"]) == {"raw", "labels", "suite", "pairs", "reward_model", "lora", "report"}
    assert all(set(entry) == ENTRY for entry in found["figures"].values())


def test_demo_keeps_its_figures(found):
    expected = {"A2", "A2_low", "A3", "A3_before", "A4_train", "A4_audit", "A4_length", "A4_distinct2", "A6"}
    expected |= {"fixtures", "fixtures_order", "A1" if demo.fast_blas() else "A1_slow"}
    if found["reward_model"]["backbone"] == "encoder":
        expected |= {"A5", "A9", "A9_p"}
    assert set(found["figures"]) == expected <= set(goals())
    missed = {name for name, entry in found["figures"].items() if not entry["holds"]}
    assert missed <= MISSED
    assert found["verdict"]["accepted"] == (found["code"] == 0) == (not found["verdict"]["reasons"])


def test_demo_leaves_base_and_reward_model_as_they_were(found):
    assert found["base_unchanged"] is True
    assert found["figures"]["A6"]["holds"]


def test_demo_counts_enough(found):
    """What a figure may be read from, as the issue asks for it."""
    assert found["preference"]["n"] >= 80
    assert found["preference"]["accuracy_before"] == 0.5
    assert found["memory"]["total"] >= 48
    assert found["figures"]["A4_train"]["n"] >= 24 * 4


def test_demo_says_what_it_reads_with(found):
    backbone = found["reward_model"]["backbone"]
    assert f"reads with: {backbone}" in found["output"]
    assert backbone == "encoder" or "doctor --get-encoder" in found["output"]


def test_demo_report_needs_nothing_else(found):
    page = Path(found["report"]).read_text(encoding="utf-8")
    attributes = r"""\b(?:src|srcset|href|action|poster|data)\s*=(?!\s*["']?(?:#|data:))"""
    loads = rf"""{attributes}|url\((?!\s*["']?(?:#|data:))|@import|<script|<link|<iframe"""
    assert re.findall(loads, page, re.IGNORECASE) == []
    assert "<svg" in page
    assert (Path(found["report"]).parent / "report.json").exists()


def test_demo_home_is_whole_and_its_adapter_has_a_past(found, demo_process):
    registry = Registry(demo_process.home)
    assert registry.verify() == []
    adapter = registry.find(found["artifacts"]["lora"])
    ancestors = {artifact.ref for _, artifact in registry.lineage(adapter)}
    assert ancestors >= {found["artifacts"][name] for name in ("raw", "labels", "pairs", "reward_model")}
    assert found["artifacts"]["suite"] not in ancestors
    in_use = registry.current("lora", pointer=adapter.metadata["notes"]["pointer"])
    assert in_use == (adapter if found["verdict"]["accepted"] else None)
    assert registry.current("reward_model").ref == found["artifacts"]["reward_model"]
