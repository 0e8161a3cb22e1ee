"""Base and adapter side by side: what they answer, word by word, and how a judge sees both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hominem_mlx.config import Config
from hominem_mlx.evaluation.probes import changed, numbers
from hominem_mlx.evaluation.suite import attached
from hominem_mlx.evaluation.text import word_diff
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.schema import Scorer
from hominem_mlx.storage.registry import Artifact


def compare(
    lm: LanguageModel,
    adapter: Artifact | Path | str | None,
    prompts: Sequence[str],
    *,
    scorer: Scorer | None = None,
    config: Config | None = None,
    temperature: float = 0.0,
) -> list[dict[str, Any]]:
    """Answers of the base and of the adapter to the same prompts.

    Args:
        lm: the base; it comes back as it was given.
        adapter: a `lora` artifact or its folder; None is the adapter the model was loaded with.
        prompts: what to ask.
        scorer: a judge for both answers, or none.
        config: `config.evaluation.max_tokens`, `.seed` and `config.student.system`.
        temperature: 0 compares each one's likeliest answer.

    Returns: one dict a prompt: `prompt`, `before`, `after`, `diff` (pieces `["same" | "gone" | "new", text]`); with a
        scorer also `judged_before`, `judged_after`, `difference` by dimension, `changed` (see `probes.changed`), and
        of a reward model `after_is_better`, the chance that its raters would say so.
    """
    config = config or Config()

    def ask() -> list[str]:
        return lm.complete(
            prompts,
            max_tokens=config.evaluation.max_tokens,
            temperature=temperature,
            seed=config.evaluation.seed,
            system=config.student.system,
        )

    with attached(lm, adapter):
        with lora.without_adapter(lm):
            before = ask()
        after = ask()
        rows: list[dict[str, Any]] = [
            {"prompt": prompt, "before": first, "after": second, "diff": [list(p) for p in word_diff(first, second)]}
            for prompt, first, second in zip(prompts, before, after, strict=True)
        ]
        if scorer is not None:
            with lora.without_adapter(lm):  # a judge that reads this very model must read the base
                pairs = [(row["prompt"], row[when]) for row in rows for when in ("before", "after")]
                said = scorer.score_many(pairs)
            for row, first, second in zip(rows, said[::2], said[1::2], strict=True):
                row["judged_before"], row["judged_after"] = numbers(first), numbers(second)
                row["difference"] = {
                    name: second.reward_vector[name] - value for name, value in first.reward_vector.items()
                }
                row["changed"] = changed([first, second])
                if chance := getattr(scorer, "preference", None):  # a reward model says how sure it is of an order
                    row["after_is_better"] = chance(second, first)
    return rows


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A comparison for a terminal: words that went in [-brackets-], words that came in {+braces+}."""
    marks = {"same": "{}", "gone": "[-{}-]", "new": "{{+{}+}}"}
    lines: list[str] = []
    for row in rows:
        lines += [f"? {row['prompt']}", f"  before  {row['before']}", f"  after   {row['after']}"]
        lines.append("  diff    " + " ".join(marks[kind].format(text) for kind, text in row["diff"]))
        if "difference" in row:
            first, second = row["judged_before"], row["judged_after"]
            for label, key in (("reward", "scalar"), ("intensity", "reward_intensity"), ("safety", "safety_score")):
                lines.append(f"  {label:<20}{first[key]:>+6.2f} -> {second[key]:>+6.2f}")
            if (chance := row.get("after_is_better")) is not None:
                lines.append(f"  {'chance that it is better':<30}{chance:.2f}")
            for name, value in row["difference"].items():
                mark = "  *" if name in row["changed"] else ""
                before, after = first["reward_vector"][name], second["reward_vector"][name]
                lines.append(f"  {name:<20}{before:>+6.2f} -> {after:>+6.2f}  ({value:+.2f}){mark}")
        lines.append("")
    return "\n".join(lines)
