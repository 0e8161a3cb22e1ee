"""Which paths each figure needs, and how a figure is made of what they gave."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench_models import SHAPES, Case, real_tokens
from bench_runs import CannotRun, Measured, once, side_by_side

from hominem_mlx.evaluation.goals import figure

B, B_LONG, A, A_LONG = Case("B", 200, 60, 4), Case("B", 1000, 60, 2), Case("A", 200, 60, 4), Case("A", 1000, 60, 2)
T, T_LONG = Case("T", 200, 60, 4), Case("T", 1000, 60, 2)
CANDIDATE_PATHS = ("together", "one-by-one")
CANDIDATES = {  # the prompt has just the stated length: what can be gained hangs on it
    "B7": Case("B", 200, 60, 4, prompt_sigma=0),
    "B7_32": Case("B", 200, 60, 16, prompt_sigma=0),
    "B7_long": Case("B", 1000, 60, 4, prompt_sigma=0),
}
EQUALITY, PROFILE, GPU = Case("T", 40, 12, 3), B, Case("Q", 200, 60, 4)

OURS, CACHE = ("ours", "ours-plain"), "mlx-tune-cache"
ALONE = ("equality", "gemm", "profile", "gemm-share")  # called once, and nothing else runs beside them
BLENDED, DPO = (*OURS, "ours-flat", "ours-checkpointed"), ("mlx-lm-lora", "mlx-tune", CACHE, "trl")
SFT = ("ours-sft", "ours-sft-plain", "mlx-lm")
LOSS = dict.fromkeys(BLENDED, ("dpo", "sft")) | dict.fromkeys(DPO, ("dpo",)) | dict.fromkeys(SFT, ("sft_tokens",))
MIB = 2**20


def needs(only: Sequence[str]) -> dict[Case, list[str]]:
    """The paths that these figures need, by case, in the order in which to run them."""
    torch = {B: ["trl"], B_LONG: ["trl"]}  # a row in the table; no figure hangs on it
    wanted: dict[str, dict[Case, Sequence[str]]] = {
        "B1": {EQUALITY: ["equality"]},
        "B2": {case: [*OURS, "mlx-lm-lora", *torch.get(case, [])] for case in (B, B_LONG, A)} | {A_LONG: ["ours"]},
        "B3": {case: [*OURS, "mlx-tune", CACHE, *torch.get(case, [])] for case in (B, B_LONG, A, T, T_LONG)},
        "B4": {A: ["ours", "mlx-lm-lora"], B: ["ours-checkpointed", "ours-flat", "mlx-lm-lora"]},
        "B5": {B: ["ours", "mlx-lm-lora"]},
        "B6": {B: ["ours-sft", "ours-sft-plain", "mlx-lm"]},
        "B7": {case: list(CANDIDATE_PATHS) for case in CANDIDATES.values()},
        "B8": {EQUALITY: ["gemm"], PROFILE: ["profile"], GPU: ["gemm-share"]},
    }
    found: dict[Case, list[str]] = {}
    for case in (
        EQUALITY,
        B,
        *CANDIDATES.values(),
        PROFILE,
        GPU,
        T,
        T_LONG,
        A_LONG,
        B_LONG,
        A,
    ):  # neighbours' slowest last
        paths = [path for name in only for path in wanted[name].get(case, ())]
        if paths:
            found[case] = list(dict.fromkeys(paths))
    return found


class Results:
    """What paths gave, by case: measurements, or why there is none."""

    def __init__(self) -> None:
        self.measured: dict[tuple[Case, str], Measured] = {}
        self.told: dict[tuple[Case, str], Any] = {}
        self.reasons: dict[tuple[Case, str], str] = {}
        self.naive: dict[Case, dict[str, float]] = {}

    def run(self, case: Case, paths: Sequence[str], rounds: int) -> None:
        """Measure one case; what cannot run leaves its reason."""
        timed = [path for path in paths if path not in ALONE]
        measured, reasons = side_by_side(timed, case, rounds)
        self.measured |= {(case, path): found for path, found in measured.items()}
        self.reasons |= {(case, path): reason for path, reason in reasons.items()}
        for path in set(paths) & set(ALONE):
            try:
                self.told[case, path] = once(path, case)
            except CannotRun as reason:
                self.reasons[case, path] = str(reason)
        if set(measured) & set(LOSS):
            self.naive[case] = once("naive", case)

    def skip(self, case: Case, paths: Sequence[str], reason: str) -> None:
        """Note why a case is not measured."""
        self.reasons |= {(case, path): reason for path in paths}

    def missing(self, case: Case, paths: Iterable[str]) -> str | None:
        """Why a figure that needs these paths cannot be given; None when it can."""
        for path in paths:
            if (case, path) not in self.measured and (case, path) not in self.told:
                return self.reasons.get((case, path), f"{path} was not measured on {case}")
        return None

    def table(self) -> list[dict[str, Any]]:
        """Every measurement, and its first loss beside the naive formula's."""
        return [self._row(case, path, found) for (case, path), found in self.measured.items()]

    def _row(self, case: Case, path: str, found: Measured) -> dict[str, Any]:
        tokens = real_tokens(case.texts)
        row = {
            "case": str(case),
            "path": path,
            "seconds": found.median,
            "spread": [min(found.seconds), max(found.seconds)],
            "cpu_seconds": statistics.median(found.cpu_seconds),
        }
        if path != "trl":  # MLX counts its own memory only
            row |= {"peak_mib": found.peak / MIB, "resident_mib": found.resident / MIB}
        if path in LOSS:
            naive = sum(self.naive[case][term] for term in LOSS[path])
            row |= {"loss": found.given, "naive_loss": naive, "loss_difference": found.given - naive}
            if path not in SFT:
                row["tokens_per_second"] = tokens / found.median
        if rate := self.told.get((EQUALITY, "gemm")):
            row["gemm_share"] = needed_flops(case, path) / found.median / rate
        return row


def needed_flops(case: Case, path: str) -> float:
    """Operations of matrix products that nobody can do without: each prompt once, logits for replies only.

    A frozen base costs 2 a weight and token forward, and 2 more for a gradient; what adapters add is left out.
    """
    shape, pairs = SHAPES[case.shape], case.texts
    prompts, replies = sum(len(pair.prompt) for pair in pairs), [len(reply) for p in pairs for _, reply in p.sides]
    if path in CANDIDATE_PATHS:
        return 2 * shape.body * (len(pairs[0].prompt) + sum(replies)) + 2 * shape.head * sum(replies)
    if path in SFT:
        replies = replies[::2]
    return 4 * shape.body * (prompts + sum(replies)) + 4 * shape.head * sum(replies)


def faster(results: Results, name: str, cases: Sequence[Case], path: str, than: str, how: str) -> dict[str, Any]:
    """How many times faster a path is than another: median of the rounds' ratios, the worst of all cases."""
    found = []
    for case in cases:
        if reason := results.missing(case, (path, than)):
            return figure(name, None, n=0, how=reason)
        ours, theirs = results.measured[case, path].seconds, results.measured[case, than].seconds
        ratios = [their / our for our, their in zip(ours, theirs)]  # who is slow has fewer rounds
        found.append((statistics.median(ratios), ratios, case))
    value, ratios, _ = min(found, key=lambda one: one[0])
    each = ", ".join(f"{case}: {ratio:.2f}" for ratio, _, case in found)
    return figure(name, value, n=len(ratios), spread=(min(ratios), max(ratios)), how=f"{how} ({each})")


def slower(results: Results, name: str, case: Case, path: str, than: str) -> dict[str, Any]:
    """Time of a path as a share of another's: median of the rounds' ratios."""
    if reason := results.missing(case, (path, than)):
        return figure(name, None, n=0, how=reason)
    ours, theirs = results.measured[case, path].seconds, results.measured[case, than].seconds
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    how = f"{path} beside {than}, {case}"
    return figure(name, statistics.median(ratios), n=len(ratios), spread=(min(ratios), max(ratios)), how=how)


def smaller(results: Results, name: str, case: Case, path: str, than: str) -> dict[str, Any]:
    """Peak memory of a step above resident, as a share of another path's."""
    if reason := results.missing(case, (path, than)):
        return figure(name, None, n=0, how=reason)
    ours, theirs = results.measured[case, path].peak, results.measured[case, than].peak
    how = f"{path} {ours / MIB:.0f} MiB, {than} {theirs / MIB:.0f} MiB; MLX's own count, {case}"
    return figure(name, ours / theirs, n=1, how=how)


def b1(results: Results) -> dict[str, Any]:
    """Equality with the naive formula."""
    if reason := results.missing(EQUALITY, ["equality"]):
        return {name: figure(name, None, n=0, how=reason) for name in ("B1", "B1_ln2")}
    told = results.told[EQUALITY, "equality"]
    worst = {path: max(found.values()) for path, found in told["paths"].items()}
    how = "log-softmax, sums and loss in float64; " + ", ".join(f"{path}: {most:.1e}" for path, most in worst.items())
    return {
        "B1": figure(
            "B1", max(worst.values()), n=len(worst), spread=(min(worst.values()), max(worst.values())), how=how
        ),
        "B1_ln2": figure("B1_ln2", told["first_step_bf16"], n=1, how="shape T in bfloat16, adapter with B = 0"),
    }


def b2(results: Results) -> dict[str, Any]:
    """Against mlx-lm-lora."""
    plain = {case: faster(results, "B2", [case], "ours-plain", "mlx-lm-lora", "")["value"] for case in (B, B_LONG, A)}
    return {
        name: faster(
            results, name, [case], "ours", "mlx-lm-lora", f"without models/platform.py's functions {_say(plain[case])}"
        )
        for name, case in (("B2", B), ("B2_long", B_LONG), ("B2_A", A))
    }


def b3(results: Results) -> dict[str, Any]:
    """Against mlx-tune."""
    figures = {}
    for prefix, ours, how in (
        ("B3", "ours", "as it is"),
        ("B3_plain", "ours-plain", "mlx-lm's elementwise functions put back"),
    ):
        for name, cases, than in (
            (prefix, (B, B_LONG, A, T, T_LONG), "mlx-tune"),
            (f"{prefix}_cache_long", (B_LONG,), CACHE),
            (f"{prefix}_cache", (B, A, T, T_LONG), CACHE),
        ):
            figures[name] = faster(results, name, cases, ours, than, how)
    return figures


def b4(results: Results) -> dict[str, Any]:
    """Memory of a step."""
    return {
        "B4": smaller(results, "B4", B, "ours-checkpointed", "mlx-lm-lora"),
        "B4_time": slower(results, "B4_time", B, "ours-checkpointed", "ours-flat"),
        "B4_A": smaller(results, "B4_A", A, "ours", "mlx-lm-lora"),
    }


def b5(results: Results) -> dict[str, Any]:
    """Copies of the base."""
    if reason := results.missing(B, ["ours"]):
        return {"B5": figure("B5", None, n=0, how=reason)}

    def copies(path: str) -> float:
        shape = SHAPES[B.shape]
        return (results.measured[B, path].resident / 4 - 3 * shape.adapter) / shape.weights

    peer = "mlx-lm-lora"
    other = results.missing(B, [peer]) or f"{peer}: {copies(peer):.2f}"
    return {"B5": figure("B5", copies("ours"), n=1, how=f"active memory after a step, {B}; {other}")}


def b6(results: Results) -> dict[str, Any]:
    """SFT against mlx-lm."""
    plain = faster(results, "B6", [B], "ours-sft-plain", "mlx-lm", "")["value"]
    how = f"without models/platform.py's functions {_say(plain)}"
    return {
        "B6": faster(results, "B6", [B], "ours-sft", "mlx-lm", how),
        "B6_memory": smaller(results, "B6_memory", B, "ours-sft", "mlx-lm"),
    }


def b7(results: Results) -> dict[str, Any]:
    """Many candidates of one prompt."""
    how = "forward only; one by one has a BLAS thread a core; by token count at most {:.2f}"
    return {
        name: faster(results, name, [case], "together", "one-by-one", how.format(most(case)))
        for name, case in CANDIDATES.items()
    }


def most(case: Case) -> float:
    """Tokens read one by one over tokens read together."""
    prompt, replies = len(case.texts[0].prompt), [len(reply) for pair in case.texts for _, reply in pair.sides]
    return (prompt * len(replies) + sum(replies)) / (prompt + sum(replies))


def b8(results: Results) -> dict[str, Any]:
    """Where the time goes."""
    figures = {}
    if reason := results.missing(PROFILE, ["profile"]):
        figures["B8"] = figure("B8", None, n=0, how=reason)
    else:
        told = results.told[PROFILE, "profile"]
        parts = sorted(told["parts"].items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {seconds / told['seconds']:.3f}" for name, seconds in parts)
        figures["B8"] = figure(
            "B8", told["accounted"], n=1, how=f"shares of {told['seconds']:.2f} s: {shares}; {PROFILE}"
        )
    if reason := results.missing(GPU, ["gemm-share"]):
        figures["B8_gpu"] = figure("B8_gpu", None, n=0, how=reason)
    else:
        told = results.told[GPU, "gemm-share"]
        how = f"{told['seconds']:.3f} s a step, matrix product of 8192 at {told['rate'] / 1e12:.0f} TFLOP/s; {GPU}"
        figures["B8_gpu"] = figure("B8_gpu", told["share"], n=1, how=how)
    return figures


MAKE = {"B1": b1, "B2": b2, "B3": b3, "B4": b4, "B5": b5, "B6": b6, "B7": b7, "B8": b8}


def _say(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.3g}"
