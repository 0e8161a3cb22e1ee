"""Reinforcement by the reward model: the student answers, and what does better than its siblings gets likelier.

    R = sum_i w_i clip((r_i - mean_i) / sd_i, -3, 3) - c_u u - c_L max(0, length / L0 - 1) - c_KL (log p - log p_base)
    A_j = R_j - mean of R over the other answers to the same prompt          loss = -mean_j A_j log p(answer_j)

Mean, spread and L0 are those of the base's own answers and never change: a moving scale would move the goal. Every
batch is drawn from the policy as it is and used for one step, so there is no ratio, no clipping, no critic. The base
is frozen and is the reference. Source: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740); `science.md` 3.6.

With `rl.method = "dpo"` the best and the worst answer to a prompt, by the same R, are a pair for one step of DPO
against the base instead. R then has no term of distance: DPO's beta holds the policy near the base. Source: Guo et al.
2024, OAIF (arXiv 2402.04792).

Where dimensions pull against each other `rl.conflicts` settles, batch by batch, what each of them weighs in R instead
of w_i: PCGrad, CAGrad or MGDA on the products of the steps that each of them alone would take.

With `rl.turns` above 1 an answer is a conversation: the user's turns are given, the judge reads it once, at its end,
and log p is that of all that the assistant said in it. So what is said first is learnt by what comes of it.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from hominem_mlx import losses
from hominem_mlx.config import Config, RlConfig
from hominem_mlx.errors import TrainingError
from hominem_mlx.files import lock, sha256_json, write_jsonl
from hominem_mlx.metrics import distinct2
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.policy.episodes import Played, Talk, play, to_play
from hominem_mlx.policy.guards import apart, complaints, story
from hominem_mlx.schema import ADVERSARIAL, MANIFOLD, Manifold, RewardOutput, Scorer
from hominem_mlx.storage.registry import Artifact, Registry
from hominem_mlx.training import conflicts
from hominem_mlx.training.directions import strongest_directions
from hominem_mlx.training.kept import keep, take_back
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.loop import METRICS, Channel, Look, Plan, as_stage
from hominem_mlx.training.loop import train as run_loop
from hominem_mlx.training.rows import Order, Row, Rows, by_prompt
from hominem_mlx.training.sketch import sketch

Progress = Callable[[dict[str, Any]], None]
RECIPE = 2  # goes up when the same settings make another adapter, so that no run goes on by another recipe
CLIP = 3.0  # standard deviations that one dimension may count, so that none of them buys all the others
LEAST_SPREAD = 0.05  # of a dimension; a smaller one would blow up the noise of the reward model
WORSE = 0.5  # how far an answer that did not end lies below the worst of its siblings


def weights_of(names: Iterable[str], manifold: Manifold = MANIFOLD) -> np.ndarray:
    """Shares of the dimensions in the overall preference, `[K]`, summing to 1."""
    known = {dimension.name: dimension.weight for dimension in manifold.dimensions}
    weights = np.array([known[name] for name in names])
    return weights / weights.sum()


WEIGHTS = weights_of(MANIFOLD.names)


class Judge(Scorer, Protocol):
    """A scorer that can say who it is: two judges of one fingerprint judge alike."""

    def fingerprint(self) -> str:
        """Digest of everything a score hangs on."""
        ...


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of `n` answers: each dimension `[n, K]`; the standard deviation of the overall value `[n]`, 0
    where the judge gives none; the lower bound of safety `[n]`; names and weights of the dimensions, `[K]`; whether an
    answer attacks its judge, bool `[n]` (or one for all)."""

    value: np.ndarray
    doubt: np.ndarray
    safety: np.ndarray
    names: tuple[str, ...] = MANIFOLD.names
    weights: np.ndarray = field(default_factory=lambda: WEIGHTS)
    attacks: np.ndarray = field(default_factory=lambda: np.array(False))

    @classmethod
    def of(cls, outputs: Sequence[RewardOutput], manifold: Manifold = MANIFOLD) -> "Verdicts":
        """From the judge's outputs, in order; its dimensions are those of the manifold, or some of them."""
        names = tuple(outputs[0].reward_vector)
        return cls(
            np.array([said.vector for said in outputs]),
            np.array([said.doubt("scalar") for said in outputs]),
            np.array([said.safety_score - said.uncertainty.get("safety_score", 0.0) for said in outputs]),
            names,
            weights_of(names, manifold),
            np.array([ADVERSARIAL in said.flags for said in outputs]),
        )

    @property
    def scalar(self) -> float:
        """Mean of the overall reward, in [-1, 1]."""
        return float((self.value @ self.weights).mean())


@dataclass(frozen=True)
class Scale:
    """The base's own answers, by which every later one is measured: mean and spread `[K]`, tokens an answer."""

    mean: np.ndarray
    spread: np.ndarray
    length: float

    @classmethod
    def of(cls, verdicts: Verdicts, lengths: np.ndarray) -> "Scale":
        """From verdicts on `n` answers and their lengths `[n]`."""
        spread = np.maximum(verdicts.value.std(axis=0), LEAST_SPREAD)
        return cls(verdicts.value.mean(axis=0), spread, float(lengths.mean()))

    def doubt(self, verdicts: Verdicts) -> np.ndarray:
        """`u`: how unsure the judge is of each answer `[n]`, in the unit of `R`."""
        return verdicts.doubt * (verdicts.weights / self.spread).sum()

    def standing(self, verdicts: Verdicts) -> np.ndarray:
        """Each dimension of each answer `[n, K]`, in standard deviations."""
        return np.clip((verdicts.value - self.mean) / self.spread, -CLIP, CLIP)

    def reward(
        self, verdicts: Verdicts, lengths: np.ndarray, settings: RlConfig, weights: np.ndarray | None = None
    ) -> np.ndarray:
        """`R` of each answer `[n]`, in standard deviations, but for its term of distance from the base.

        `weights` `[K]` of the dimensions, where they are not the judge's.
        """
        value = self.standing(verdicts) @ (verdicts.weights if weights is None else weights)
        too_long = np.maximum(0, lengths / self.length - 1)
        return value - settings.uncertainty_weight * self.doubt(verdicts) - settings.length_weight * too_long


@dataclass(frozen=True)
class Rollouts:
    """`B` prompts with `k` answers each, neighbours, and of each answer, `[B, k]`: log p under the base, `R` without
    its term of distance, how much of it may be learnt, whether it came to an end.

    For DPO only prompts whose answers could be told apart are here, with k = 2, the better one first. `asked` prompts
    were answered; `told` is what a step reports of all their answers.
    """

    rows: Rows
    reference: mx.array
    reward: mx.array
    gate: mx.array
    finished: mx.array
    asked: int
    told: dict[str, mx.array]


def train(
    registry: Registry,
    labels: Artifact,
    reward_model: Artifact,
    config: Config,
    *,
    lm: LanguageModel,
    scorer: Judge,
    audit: Judge,
    progress: Progress | None = None,
) -> Artifact:
    """Train an adapter on its own answers and publish it; a killed run goes on from its last checkpoint.

    Args:
        labels: the "labels" dataset: prompts of its training part are answered, those of its validation part probed;
            with `rl.turns` above 1 conversations among its memories.
        reward_model: the artifact behind `scorer`, a parent.
        config: `config.rl` and `config.student.system` shape the adapter and are part of its identity.
        lm: the base, without an adapter; it is handed back without one.
        scorer: judges what is learnt from.
        audit: a second opinion that is only watched; it should share neither rows nor features with `scorer`.

    Returns: the `lora` artifact, not yet `current`. Where a guard stopped the run it is the adapter of the last look
        that nothing spoke against, and `metrics` says which and why.
    Raises: TrainingError when that is the untrained one, or a loss is not finite; InputError with nothing to answer.
    """
    settings = config.rl
    judges = {"scorer": scorer.fingerprint(), "audit": audit.fingerprint()}
    identity = {"base": lm.hash, "system": config.student.system, "recipe": RECIPE}
    resolved: dict[str, Any] = {"rl": settings.model_dump(mode="json"), **identity, **judges}
    parents = [labels, reward_model, *(each for each in [registry.at(lm.folder)] if each)]
    run = registry.home / "runs" / f"rl-{sha256_json([[parent.hash for parent in parents], resolved])[:16]}"
    with lock(registry.home / "locks" / f"{run.name}.lock", f"training {run.name}", wait=False):
        practice = Practice(lm, settings, config.student.system, scorer, audit, run, config.manifold.in_use)
        talks, probes = to_play(labels, settings.turns)
        first = practice.first_look(probes)
        directions = practice.head_directions()
        shape = lora.Shape(settings.rank, settings.scale, 0.0, settings.num_layers)
        linear, head = settings.targets in ("linear", "all"), settings.targets in ("head", "all")
        lora.attach(lm, shape, seed=settings.seed, keys=lora.targets(lm, linear=linear, head=head))
        if directions is not None:
            lora.aim_head(lm, directions)
        try:
            summary = run_loop(
                lm.model,
                [Channel("rl", 1.0, practice.batches(talks), practice.loss, tokens=lambda b: b.rows.num_tokens)],
                _plan(settings),
                run,
                evaluate=practice.look,
                should_stop=practice.should_stop,
                progress=as_stage(progress),
            )
            kept = practice.take_back(summary["stopped"]) if summary["stopped"] else summary["steps"]
            looks = [first, *summary["evaluations"]]
            with registry.draft(
                "lora",
                parents=parents,
                config=resolved,
                seed=settings.seed,
                inputs={"base": lm.hash},
                manifold=config.manifold.in_use,
            ) as draft:
                lora.save_adapter(lm, draft.folder, shape)
                write_jsonl(draft.folder / METRICS, looks)
                draft.metrics = {
                    "training": summary,
                    "before": first,
                    "kept_step": kept,
                    "guards": story(looks, settings),
                    "prompts": len(talks),
                }
                draft.notes = {"base": lm.name, "pointer": lm.pointer}
        finally:
            lora.detach(lm)
    registry.audit("train", draft.published.ref, base=lm.name)
    shutil.rmtree(run, ignore_errors=True)
    return draft.published


def _plan(settings: RlConfig) -> Plan:
    return Plan(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        clip_norm=settings.clip_norm,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
    )


class Practice:
    """Answers of the policy as it is: batches to learn from, and looks at what becomes of it."""

    def __init__(
        self,
        lm: LanguageModel,
        settings: RlConfig,
        system: str | None,
        scorer: Scorer,
        audit: Scorer,
        run: Path,
        manifold: Manifold = MANIFOLD,
    ):
        self.lm, self.settings, self.system, self.run = lm, settings, system, run
        self.scorer, self.audit, self.manifold = scorer, audit, manifold
        self.logprobs = LogProbs(lm)

    def play(self, talks: Sequence[Talk], each: int, seed: int) -> Played:
        """`each` episodes a talk, neighbours, of the policy as it is."""
        return play(self.lm, talks, each=each, max_tokens=self.settings.max_tokens, seed=seed, system=self.system)

    def _judged(self, judge: Scorer, played: Played) -> Verdicts:
        return Verdicts.of(judge.score_many(played.pairs), self.manifold)

    # --- learning --------------------------------------------------------------------------------------------------

    def batches(self, talks: Sequence[Talk]) -> Callable[[int], Rollouts | None]:
        """A function of the step: answers of the policy at that step, drawn by seed and step alone, and their worth."""
        settings = self.settings
        order = Order(len(talks), settings.batch_prompts, settings.seed)

        def batch_at(step: int) -> Rollouts | None:
            seed = int(np.random.SeedSequence([settings.seed, step]).generate_state(1)[0])
            played = self.play([talks[i] for i in order.batch(step)], settings.answers, seed)
            verdicts = self._judged(self.scorer, played)
            gate = may_be_learnt(verdicts, settings)
            return self._lesson(step, played, verdicts, gate) if gate.any() else None

        return batch_at

    def _lesson(self, step: int, played: Played, verdicts: Verdicts, gate: np.ndarray) -> Rollouts | None:
        """What a step learns of so many answers `[n]`; None where there is nothing."""
        settings, lengths, finished = self.settings, played.lengths, played.finished
        told, weights = {"tokens": lengths.mean(), "finished": finished.mean()}, verdicts.weights
        if settings.conflicts != "sum":
            gram = self.dimension_gram(played.rows, self.scale.standing(verdicts), gate, finished)
            weights = conflicts.combine(settings.conflicts, gram, weights, seed=[settings.seed, step])
            weights = weights / weights.sum()  # so that doubt, length and distance cost what they did
            told["opposed"] = (gram[np.triu_indices(len(gram), 1)] < 0).mean()
        reward = self.scale.reward(verdicts, lengths, settings, weights).astype(np.float32)
        told["reward"] = reward.mean()
        places = np.arange(len(reward)).reshape(-1, settings.answers)
        asked = len(places)
        if settings.method == "dpo":
            doubt = self.scale.doubt(verdicts)
            places = best_and_worst(*(each[places] for each in (reward, doubt, gate, finished)))
            if not len(places):
                return None
            told["pairs"] = len(places)
        learnt = [row for place in places.reshape(-1) for row in played.rows[place]]
        with lora.without_adapter(self.lm):
            reference = reference_logprobs(self.logprobs, learnt)
        return Rollouts(
            self.logprobs.collate(learnt),
            mx.array(reference).reshape(*places.shape, -1).sum(axis=-1),
            mx.array(reward[places]),
            mx.array(gate[places]),
            mx.array(finished[places]),
            asked=asked,
            told={name: mx.array(float(value)) for name, value in told.items()},
        )

    def dimension_gram(
        self, rows: Sequence[list[Row]], standing: np.ndarray, gate: np.ndarray, finished: np.ndarray
    ) -> np.ndarray:
        """Products of the steps that each dimension alone would take, float64 `[K, K]` (`science.md` 3.5).

        A step is linear in its lessons, `g_i = mean_j lesson_ij grad log p(answer_j)`: the gradient of each answer is
        made once, whatever the number of dimensions, and kept as its count-sketch. The cosines err by a standard
        deviation of at most 2 %; that touches the weights of the dimensions alone, never the gradient that is applied.
        Measured on the bundled student, 32 answers, 78 000 weights in the adapter: 1.5 s, a gradient a dimension 2.9 s;
        cosines off by 0.016 at most, the steps that came of them at a cosine of 0.9995 or more to the exact ones. A
        sketch takes some 50 ns a weight and answer.

        Args:
            rows: of each of `n` answers (or conversations), those to a prompt neighbours.
            standing: of each dimension `[n, K]`; gate, finished `[n]`.
        """

        def logp(answered: list[Row]) -> mx.array:
            return self.logprobs(self.logprobs.collate(answered)).sum()

        slope = nn.value_and_grad(self.lm.model, logp)
        sketched = np.stack([sketch(dict(tree_flatten(slope(answered)[1]))) for answered in rows])
        allowed, ended = (mx.array(each).reshape(-1, self.settings.answers) for each in (gate, finished))
        lessons = [
            lesson(mx.array(each.astype(np.float32)).reshape(ended.shape), allowed, ended) for each in standing.T
        ]
        steps = np.array(mx.stack(lessons), np.float64).reshape(len(lessons), -1) @ sketched / len(rows)
        return steps @ steps.T

    def loss(self, batch: Rollouts) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss of a batch by `rl.method`, with what a step reports."""
        logp = self.logprobs(batch.rows).reshape(*batch.reward.shape, -1).sum(axis=-1)
        if self.settings.method == "dpo":
            loss, gained = dpo(logp, batch, self.settings.beta)
        else:
            loss, gained = rloo(logp, batch, self.settings.kl_weight)
        return loss, {**batch.told, "gained": gained.mean()}

    # --- looking ---------------------------------------------------------------------------------------------------

    def first_look(self, talks: Sequence[Talk]) -> Look:
        """The base's own answers to `probes` prompts: they set the scale, and what the guards compare with."""
        settings = self.settings
        self.each = -(-settings.probes // len(talks))
        chosen = np.random.default_rng(settings.seed).permutation(len(talks))[: -(-settings.probes // self.each)]
        self.probes = [talks[i] for i in sorted(chosen)]
        self.first_played = self.play(self.probes, self.each, settings.seed)
        verdicts = self._judged(self.scorer, self.first_played)
        self.scale = Scale.of(verdicts, self.first_played.lengths)
        self.most_doubt = float(np.quantile(self.scale.doubt(verdicts), 0.99))
        self.first = {"step": 0, **self._describe(self.first_played, verdicts), "kl": 0.0}
        return self.first

    def head_directions(self) -> mx.array | None:
        """What the output layer may read (`rl.head_rank`), found in the base's own answers; None where it is free."""
        rank = min(self.settings.head_rank, self.settings.rank)
        return strongest_directions(self.logprobs, self.first_played.every_row, rank) if rank else None

    def look(self, step: int) -> Look:
        """The policy's answers to the same prompts, drawn with the same seed."""
        played = self.play(self.probes, self.each, self.settings.seed)
        verdicts = self._judged(self.scorer, played)
        return {**self._describe(played, verdicts), "kl": self.divergence(played)}

    def _describe(self, played: Played, verdicts: Verdicts) -> Look:
        audited = self._judged(self.audit, played)
        return {
            "reward": verdicts.scalar,
            "audit": audited.scalar,
            "tokens": float(played.lengths.mean()),
            "distinct2": distinct2(played.tokens),
            "strange": float((self.scale.doubt(verdicts) > self.most_doubt).mean()),
            "unfinished": float((~played.finished).mean()),
            **dict(zip(verdicts.names, verdicts.value.mean(axis=0).tolist(), strict=True)),
        }

    def divergence(self, played: Played) -> float:
        """KL(policy || base) of a whole episode in nats, >= 0, estimated from answers of the policy.

        Token by token `exp(d) - 1 - d` with `d = log p_base - log p`, which is never negative and varies far less than
        `-d` (Schulman 2020, "k3"); summed over all that was answered.
        """
        rows = played.every_row
        total, order = 0.0, by_prompt(rows)
        for start in range(0, len(order), 32):
            batch = self.logprobs.collate([rows[i] for i in order[start : start + 32]])
            policy = self.logprobs.per_token(batch, gradient=False)
            mx.eval(policy)
            with lora.without_adapter(self.lm):
                base = self.logprobs.per_token(batch, gradient=False)
                mx.eval(base)
            total += k3(policy, base).sum().item()
        return total / len(played.rows)

    def should_stop(self, looks: Sequence[Look]) -> str | None:
        """What the guards say of the newest look; keeps the adapter when they say nothing."""
        looks = [self.first, *looks]
        reasons = complaints(looks, self.settings)
        if not reasons and apart(looks) == 0:
            keep(self.lm.model, self.run, looks[-1]["step"])
        return "; ".join(reasons.values()) or None

    def take_back(self, reason: str) -> int:
        """Give the model the adapter that was kept last, and say from which step it is."""
        step = take_back(self.lm.model, self.run)
        if step is None:
            raise TrainingError(
                f"a guard stopped the run and there is nothing good to keep: {reason}. Lower rl.learning_rate, look "
                f"more often (rl.eval_every), or examine the reward model. What was measured is in {self.run}"
            )
        return step


def may_be_learnt(verdicts: Verdicts, settings: RlConfig) -> np.ndarray:
    """How much of each answer may be learnt, `[n]` in [0, 1]: by its safety, nothing of an attack on its judge."""
    limits = {"low": settings.safety_low, "high": settings.safety_high}
    return np.array(losses.safety_gate(mx.array(verdicts.safety), **limits)) * ~verdicts.attacks


def rloo(logp: mx.array, batch: Rollouts, kl_weight: float) -> tuple[mx.array, mx.array]:
    """The loss, and by how many nats the policy likes each answer better than the base does.

    The distance from the base is part of the reward: as a term of the loss it would have another gradient. An answer
    that may not be learnt from is not reinforced; pushing away from it is allowed, unless no answer of the batch may be
    learnt from: then there is no step (`science.md` 3.4).

    Args:
        logp: log-probabilities of the answers under the policy, float32 `[B, k]`; the only thing with a gradient.
        batch: the rest; its rows are not read.
        kl_weight: `c_KL`.

    Returns: a scalar, and `[B, k]`.
    """
    gained = mx.stop_gradient(logp) - batch.reference
    return -(lesson(batch.reward - kl_weight * gained, batch.gate, batch.finished) * logp).mean(), gained


def lesson(reward: mx.array, gate: mx.array, finished: mx.array) -> mx.array:
    """How much likelier each answer should become, `[B, k]`, from its reward, gate and whether it came to an end."""
    advantage = losses.rloo_advantage(unfinished_last(reward, finished))
    return mx.where(advantage > 0, gate * advantage, advantage)


def dpo(logp: mx.array, batch: Rollouts, beta: float) -> tuple[mx.array, mx.array]:
    """DPO's loss on the best and the worst answer to each prompt, and by how many nats the policy likes each better.

    The mean is over all prompts that were answered: one whose answers could not be told apart teaches nothing, as in
    RLOO, and leaves the others as strong as they are.

    Args:
        logp: log-probabilities under the policy, float32 `[B, 2]`, the better answer first; has the gradient.
        batch: the rest; its rows are not read.
        beta: `rl.beta`.

    Returns: a scalar, and `[B, 2]`.
    """
    gained = logp - batch.reference
    loss = batch.gate[:, 0] * losses.dpo(gained[:, 0] - gained[:, 1], beta=beta)
    return loss.sum() / batch.asked, mx.stop_gradient(gained)


def best_and_worst(reward: np.ndarray, doubt: np.ndarray, gate: np.ndarray, finished: np.ndarray) -> np.ndarray:
    """The best and the worst answer to each prompt, as places in the flattened `[B * k]`: int `[P, 2]`, P <= B.

    A prompt is left out where the two are as good, where the judge cannot tell them apart (their rewards differ by no
    more than the standard deviation of that difference; that one was cut off needs no judge), and where the best one
    must not be reinforced.

    Args, all `[B, k]`:
        reward: `R` without its term of distance.
        doubt: the judge's standard deviation, in the unit of `R`.
        gate: how much of an answer may be learnt.
        finished: whether it came to an end.
    """
    worth = np.array(unfinished_last(mx.array(reward), mx.array(finished)))
    prompt, best, worst = np.arange(len(worth)), worth.argmax(axis=1), worth.argmin(axis=1)
    noise = np.hypot(doubt[prompt, best], doubt[prompt, worst]) * finished[prompt, worst]
    clear = worth[prompt, best] - worth[prompt, worst] > noise
    learnable = gate[prompt, best] > 0
    return (prompt[:, None] * worth.shape[1] + np.stack([best, worst], axis=1))[clear & learnable]


def unfinished_last(reward: mx.array, finished: mx.array) -> mx.array:
    """Rewards `[B, k]` in which an answer that was cut off lies `WORSE` below the worst of its siblings that ended.

    Where none of them ended all are alike, and nothing is learnt.
    """
    worst = mx.where(finished, reward, mx.inf).min(axis=1, keepdims=True)
    worst = mx.where(mx.isinf(worst), 0.0, worst)
    return mx.where(finished, reward, worst - WORSE)


def k3(policy: mx.array, base: mx.array) -> mx.array:
    """`exp(d) - 1 - d` with `d = base - policy`, of log-probabilities `[N]` of tokens that the policy drew."""
    d = mx.minimum(base - policy, 20.0)  # a look must stay a number: beyond, the guard has long spoken
    return mx.exp(d) - 1 - d
