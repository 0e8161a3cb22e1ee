"""The dual-channel recipe: memories by SFT, values by soft DPO or a loss of its family, one adapter.

    L = w_s * CE(memories) + w_p * mean over pairs of  gate * intensity * [soft DPO + alpha * NLL(chosen) / tokens]

plus, where there are single thumbs, their KTO loss as a part of the preference channel (`thumbs.py`); and, where asked
for, an anchor: w_a * |h - h_base|^2 / |h_base|^2 on replies that are no memories, which keeps
memories from changing everything else.
With `preference_weight = 0` it is plain SFT, with `memory_weight = 0` plain DPO. The base is frozen and is the
reference: its log-probabilities are computed once, before the adapter is attached.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from hominem_mlx import losses
from hominem_mlx.config import Config, DualConfig
from hominem_mlx.errors import TrainingError
from hominem_mlx.files import lock, read_jsonl, sha256_json, write_jsonl
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.policy.memories import Memories, MemoryBatch, gate, learnable
from hominem_mlx.policy.thumbs import Thumbs, learnable_thumbs
from hominem_mlx.records import Preference, SftPair, Thumb, Turn
from hominem_mlx.storage.registry import Artifact, Registry
from hominem_mlx.training import blend
from hominem_mlx.training.kept import keep, take_back
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.loop import METRICS, Channel, Look, Plan, as_stage
from hominem_mlx.training.loop import train as run_loop
from hominem_mlx.training.rows import Order, Row, Rows, Said, spoken, to_row
from hominem_mlx.training.sketch import Sketches, sketch, write_sketches

Progress = Callable[[dict[str, Any]], None]
RECIPE = 2  # goes up when the same settings make another adapter, so that no run goes on by another recipe
UNLEARN_GATE = 0.1  # `science.md` 3.4: unsafe texts drive at most a tenth of what a safe pair does
HEAD_GAIN = 16.0  # found on the bundled student: words are then weighed as fast as the other layers learn facts


@dataclass(frozen=True)
class PairBatch:
    """`n` pairs over `r` different replies, and what the loss needs of each.

    chosen, rejected: int `[n]`, numbers of rows. Of each row, float32 `[r]`: reference. Of each pair, float32 `[n]`:
    target, weight (gate * intensity), margin (of the scores, 1 where there are none). unlearn: bool `[n]`, pairs whose
    two sides are both to become less likely.
    """

    rows: Rows
    reference: mx.array
    chosen: mx.array
    rejected: mx.array
    target: mx.array
    weight: mx.array
    margin: mx.array
    unlearn: mx.array


@dataclass(frozen=True)
class AnchorBatch:
    """`n` replies that memories must leave alone, and the base's final hidden states there, float32 `[N, D]`."""

    rows: Rows
    base: mx.array


def train(
    registry: Registry,
    pairs: Artifact,
    config: Config,
    *,
    lm: LanguageModel,
    on_top_of: Artifact | None = None,
    look: Callable[[LanguageModel], dict[str, float]] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Train an adapter on a pairs dataset and publish it; a killed run goes on from its last checkpoint.

    Args:
        pairs: a `dataset` with preferences.train.jsonl, preferences.valid.jsonl and memory.jsonl.
        config: `config.dual` and `config.student.system` shape the adapter and are part of its identity.
        lm: the base, without an adapter; it is handed back without one.
        on_top_of: an adapter that stays as it is under the new one. The two together are what speaks, and the base with
            this one is the reference.
        look: what else to measure every `dual.eval_every` steps and before the first, by name; the model comes with the
            adapter on and must be left as it is. It is only noted: what is kept, and when to stop, hang on held-out
            pairs alone.

    Returns: the `lora` artifact, with all looks in its metrics.jsonl. Not yet `current`: that is for whoever judged it.
    Raises: TrainingError when there is nothing to learn from, or when the loss stops being finite.
    """
    settings = config.dual
    preferences = read_jsonl(pairs.file("preferences.train.jsonl"), Preference, unique=None, may_be_empty=True)
    validation = read_jsonl(pairs.file("preferences.valid.jsonl"), Preference, unique=None, may_be_empty=True)
    memories = read_jsonl(pairs.file("memory.jsonl"), SftPair, unique=None, may_be_empty=True)
    anchors = []
    if settings.anchor_weight and (pairs.folder / "anchors.jsonl").exists():
        anchors = read_jsonl(pairs.file("anchors.jsonl"), SftPair, unique=None, may_be_empty=True)
    thumbs = []
    if settings.thumb_weight and (pairs.folder / "thumbs.jsonl").exists():
        thumbs = read_jsonl(pairs.file("thumbs.jsonl"), Thumb, unique=None, may_be_empty=True)
    identity = {"base": lm.hash, "system": config.student.system, "recipe": RECIPE}
    resolved: dict[str, Any] = {"dual": settings.model_dump(mode="json"), **identity}
    parents = [pairs, *(each for each in (on_top_of, registry.at(lm.folder)) if each)]
    run = registry.home / "runs" / f"dual-{sha256_json([*(parent.hash for parent in parents), resolved])[:16]}"
    under = on_top_of.folder if on_top_of else None
    with (
        lock(registry.home / "locks" / f"{run.name}.lock", f"training {run.name}", wait=False),
        lora.loaded(lm, under),
    ):
        material = Material(lm, settings, config.student.system, progress)
        preferences, held_back = material.spoken(preferences), material.spoken(validation)
        memories, anchors = material.spoken(memories), material.spoken(anchors)
        channels = material.channels(preferences, memories, anchors, material.spoken(thumbs))
        shape = lora.Shape(settings.rank, settings.scale, settings.dropout, settings.num_layers, settings.kind)
        validate = material.validation(held_back)
        keys = material.targets(channels)
        directions = material.head_directions()
        lora.attach(lm, shape, seed=settings.seed, keys=keys, on_top=on_top_of is not None)
        if directions is not None:
            lora.aim_head(lm, directions)
        before = look(lm) if look else {}

        def measure(step: int) -> dict[str, float]:
            return {**(validate(step) if validate else {}), **(look(lm) if look else {})}

        summary = run_loop(
            lm.model,
            channels,
            material.plan(preferences, memories),
            run,
            evaluate=measure if validate or look else None,
            should_stop=material.watch(run),
            progress=as_stage(progress),
        )
        kept_step = (take_back(lm.model, run) if settings.keep == "best" else None) or summary["steps"]
        with registry.draft(
            "lora", parents=parents, config=resolved, seed=settings.seed, inputs={"base": lm.hash}
        ) as draft:
            lora.save_adapter(lm, draft.folder, shape)
            if sketches := material.sketches(validation):
                write_sketches(sketches, draft.folder)
            if looks := [{"step": 0, **before}] * bool(before) + summary["evaluations"]:
                write_jsonl(draft.folder / METRICS, looks)
            draft.metrics = {"training": summary, "before": before, "kept_step": kept_step, **material.counts}
            draft.notes = {"base": lm.name, "pointer": lm.pointer}
    registry.audit("train", draft.published.ref, base=lm.name)
    shutil.rmtree(run, ignore_errors=True)
    return draft.published


class Material:
    """Rows, references, gates and weights, ready to be cut into batches. Everything here is computed once."""

    def __init__(self, lm: LanguageModel, settings: DualConfig, system: str | None, progress: Progress | None):
        self.lm, self.settings, self.system, self.progress = lm, settings, system, progress
        self.logprobs = LogProbs(lm, checkpoint=settings.checkpoint)
        self.adapters_below = len(lm.adapters)  # the new one is not on yet
        self.valued_rows: list[Row] = []  # replies of pairs and thumbs
        self.counts: dict[str, Any] = {"checkpointed": self.logprobs.checkpoints} if settings.checkpoint else {}

    def channels(
        self,
        preferences: Sequence[Preference],
        memories: Sequence[SftPair],
        anchors: Sequence[SftPair] = (),
        thumbs: Sequence[Thumb] = (),
    ) -> list[Channel]:
        """The terms of the loss; a channel without rows has weight 0 and says so in the counts."""
        settings = self.settings
        pairs, gates = self.gated(preferences)
        kept, confidence = learnable(memories, safety_low=settings.safety_low, safety_high=settings.safety_high)
        unsafe = self.unlearnt(preferences)
        self.counts |= {
            "preferences": {
                "given": len(preferences),
                "refused_by_gate": len(preferences) - len(pairs) - len(unsafe),
                "unlearnt": len(unsafe),
            },
            "memories": {"given": len(memories), "refused_by_gate": len(memories) - len(kept)},
        }
        judged, worth = learnable_thumbs(thumbs, safety_low=settings.safety_low, safety_high=settings.safety_high)
        if thumbs:
            self.counts["thumbs"] = {"given": len(thumbs), "refused_by_gate": len(thumbs) - len(judged)}
        learnt = (len(kept), len(pairs) + len(unsafe))
        weights = [settings.memory_weight * bool(learnt[0]), settings.preference_weight * bool(learnt[1])]
        if settings.ideal_memories or settings.ideal_pairs:
            weights = blend.availability(weights, learnt, (settings.ideal_memories, settings.ideal_pairs))
        if judged and settings.loss == "simpo":
            raise TrainingError(
                f"dual.loss = simpo has a beta of tokens, and the {len(judged)} single thumbs need one of replies: "
                "take another dual.loss, or leave thumbs out with dual.thumb_weight = 0"
            )
        thumb_weight = settings.thumb_weight * bool(judged)
        if weights[1]:  # few thumbs have their turn often: one counts like a pair, and all no more than all pairs
            thumb_weight *= weights[1] * min(1.0, len(judged) / learnt[1])
        else:  # without pairs thumbs are the preference channel
            weights[1] = thumb_weight = settings.preference_weight * thumb_weight
        if sum(weights) == 0:
            raise TrainingError(
                "there is nothing to learn from: no memory, no preference pair and no thumb is left "
                f"({self.counts}); look at the data with `hominem data stats` or change the weights"
            )
        self.counts["weights"] = {"memory": weights[0], "preference": weights[1]}
        self.num_memories, self.num_pairs = (rows * bool(weight) for rows, weight in zip(learnt, weights))
        self.num_thumbs = len(judged) * bool(thumb_weight)
        may_move: dict[str, Callable[[str], bool]] = {
            "linear": lambda name: not lora.is_head(name),
            "head": lora.is_head,
            "all": lambda name: True,
        }
        memory, preference = may_move[settings.memory_targets], may_move[settings.preference_targets]
        rows = [
            self._row(lesson.instruction, lesson.response, lesson.history or (), name=f"memory {lesson.id}")
            for lesson in kept
        ]
        lessons = Memories(self.logprobs, rows, confidence, batch=settings.batch_memories, seed=settings.seed + 1)
        channels = [
            Channel("memory", weights[0], lessons.batch_at, lessons.loss, memory, tokens=_tokens),
            Channel(
                "preference",
                weights[1],
                self._pair_batches(pairs, gates, unsafe),
                self._pair_loss,
                preference,
                tokens=_tokens,
            ),
        ]
        if thumb_weight:
            verdicts = self._thumbs(judged, worth)
            if self.num_pairs:
                term = Channel(
                    "thumb", thumb_weight, verdicts.batch_at, verdicts.loss, preference, "preference", tokens=_tokens
                )
                channels.append(term)
            else:
                channels[1] = Channel(
                    "preference", thumb_weight, verdicts.batch_at, verdicts.loss, preference, tokens=_tokens
                )
            self.valued_rows = [*self.valued_rows, *verdicts.rows]
        if settings.anchor_weight and weights[0]:
            said = {(pair.prompt, reply) for pair in pairs for reply in (pair.chosen, pair.rejected)}
            said |= {(anchor.instruction, anchor.response) for anchor in anchors}
            if said:
                batches = self._anchor_batches(sorted(said))
                held = settings.anchor_weight * weights[0] / settings.memory_weight  # availability counts for both
                channels.append(
                    Channel("anchor", held, batches, self._anchor_loss, memory, follows="memory", tokens=_tokens)
                )
        return channels

    def targets(self, channels: Sequence[Channel]) -> list[str]:
        """The layers that get an adapter: those some channel with rows may move."""
        wanted = {
            kind
            for channel, kind in zip(channels, (self.settings.memory_targets, self.settings.preference_targets))
            if channel.weight
        }
        return lora.targets(self.lm, linear=bool(wanted & {"linear", "all"}), head=bool(wanted & {"head", "all"}))

    def head_directions(self) -> mx.array | None:
        """`strongest_directions` of replies of pairs and thumbs; None without any, and where the head is free."""
        if not (self.settings.head_rank and self.valued_rows):
            return None
        return strongest_directions(self.logprobs, self.valued_rows, min(self.settings.head_rank, self.settings.rank))

    def gated(self, preferences: Sequence[Preference]) -> tuple[list[Preference], np.ndarray]:
        """Pairs that may be learnt from and their gates `[n]` in (0, 1]; swapped where that is allowed (3.4)."""
        settings, pairs, gates = self.settings, [], []
        for pair in preferences:
            gate = self._gate(pair.safety_score)
            if gate == 0 and settings.allow_swap and pair.safety_score < -0.5:
                pair = swap(pair)
                gate = 0.5 * (pair.safety_score >= settings.safety_high)
            if gate > 0:
                pairs.append(pair)
                gates.append(gate)
        return pairs, np.array(gates, np.float32)

    def unlearnt(self, preferences: Sequence[Preference]) -> list[Preference]:
        """Pairs with both sides unsafe, where those are to become less likely (3.4)."""
        if self.settings.unsafe_pairs == "drop":
            return []
        limit = self.settings.safety_low
        return [pair for pair in preferences if max(pair.safety_score, pair.rejected_safety_score) < limit]

    def plan(self, preferences: Sequence[Preference], memories: Sequence[SftPair]) -> Plan:
        """As many steps as the longer channel needs for its epochs; the other one goes round again."""
        settings, weights = self.settings, self.counts["weights"]
        batches = {
            "memory": -(-self.num_memories // settings.batch_memories),
            "preference": max(-(-self.num_pairs // settings.batch_pairs), -(-self.num_thumbs // settings.batch_thumbs)),
        }
        steps = settings.epochs * max(batches.values())
        if settings.blend == "alternate":  # a channel has its share of the steps only
            total = sum(weights.values())
            steps = max(round(settings.epochs * n * total / weights[name]) for name, n in batches.items() if n)
        return Plan(
            steps=steps,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
            eval_every=settings.eval_every,
            save_every=settings.save_every,
            blend=settings.blend,
            seed=settings.seed,
            compile=settings.compile,
        )

    # --- rows ------------------------------------------------------------------------------------------------------

    def spoken(self, rows: Sequence[Said]) -> list[Said]:
        """Those in whose every reply something is said; the others are left out and counted."""
        kept = spoken(self.lm, rows)
        self._count("all_thoughts", len(rows) - len(kept))
        return kept

    def _row(self, prompt: str, response: str, history: Sequence[Turn] = (), *, name: str) -> Row:
        longest = self.settings.max_tokens
        row, lost = to_row(
            self.lm, prompt, response, history=history, system=self.system, max_tokens=longest, name=name
        )
        self._count("cut_responses", lost > 0)
        self._count("thoughts_left_out", self.lm.spoken(response) != response)
        return row

    def _count(self, name: str, number: int) -> None:
        if number:
            self.counts[name] = self.counts.get(name, 0) + number

    def _gate(self, safety: float) -> float:
        return gate(safety, low=self.settings.safety_low, high=self.settings.safety_high)

    def _references(self, rows: list[Row], stage: str) -> np.ndarray:
        report = self.progress
        tell = (lambda done: report({"stage": stage, "done": done, "total": len(rows)})) if report else None
        return np.array(reference_logprobs(self.logprobs, rows, progress=tell), np.float32)

    def _replies(self, pairs: Sequence[Preference]) -> tuple[list[Row], np.ndarray]:
        """The different replies of these pairs, and the places of chosen and rejected ones among them, `[2, n]`."""
        sides = {(pair.prompt, reply): pair.id for pair in pairs for reply in (pair.chosen, pair.rejected)}
        rows = [self._row(*side, name=f"pair {pair}") for side, pair in sides.items()]
        places = {side: place for place, side in enumerate(sides)}
        both = [places[pair.prompt, reply] for pair in pairs for reply in (pair.chosen, pair.rejected)]
        return rows, np.array(both, int).reshape(-1, 2).T

    def _pair_batches(
        self, pairs: list[Preference], gates: np.ndarray, unsafe: list[Preference]
    ) -> Callable[[int], PairBatch]:
        unlearn = np.arange(len(pairs) + len(unsafe)) >= len(pairs)
        pairs, gates = [*pairs, *unsafe], np.append(gates, [np.float32(UNLEARN_GATE)] * len(unsafe))
        rows, (chosen, rejected) = self._replies(pairs)
        self.valued_rows = rows
        reference = self._references(rows, "reference") if pairs else np.zeros(0, np.float32)
        intensity = np.array([pair.reward_intensity for pair in pairs], np.float32)
        mean = float(intensity.mean()) if pairs else 1.0
        weight = gates * np.array(losses.intensity_weight(mx.array(intensity), mean=mean))
        weight = np.where(unlearn, np.minimum(weight, np.float32(UNLEARN_GATE)), weight)
        target = np.array([pair.target for pair in pairs], np.float32)
        margin = self._margins(pairs)
        if self.settings.loss == "wpo" and pairs:  # weights of mean 1 keep what the learning rate means
            lengths = np.array([len(row.response) for row in rows], np.float32)
            likely = losses.wpo_weight(*(mx.array((reference / lengths)[side]) for side in (chosen, rejected)))
            self.usual_likelihood = max(likely.mean().item(), 1e-30)
        # a prompt's pairs come together: they share replies, and each reply is computed once a step
        order = Order(len(pairs), self.settings.batch_pairs, self.settings.seed, groups=[pair.prompt for pair in pairs])

        def batch_at(step: int) -> PairBatch:
            index = order.batch(step)
            replies, places = np.unique([chosen[index], rejected[index]], return_inverse=True)
            places = places.reshape(2, -1)  # numpy 2.0 keeps the shape, others do not
            return PairBatch(
                self.logprobs.collate([rows[i] for i in replies]),
                mx.array(reference[replies]),
                mx.array(places[0]),
                mx.array(places[1]),
                mx.array(target[index]),
                mx.array(weight[index]),
                mx.array(margin[index]),
                mx.array(unlearn[index]),
            )

        return batch_at

    def _margins(self, pairs: Sequence[Preference]) -> np.ndarray:
        """By how much the scores of each pair differ, `[n]`; 1 where that is not known: plain DPO."""
        known = [pair.score_margin or 0.0 for pair in pairs]
        if self.settings.loss == "odpo":
            self.counts["pairs_without_score_margin"] = sum(margin <= 0 for margin in known)
            if pairs and max(known) <= 0:
                raise TrainingError(
                    f"dual.loss = odpo needs score_margin, and none of {len(pairs)} preference pairs has one above 0: "
                    "make pairs from labels (`hominem data pair`), or take dual.loss = dpo"
                )
        return np.array([margin if margin > 0 else 1.0 for margin in known], np.float32)

    def _thumbs(self, judged: Sequence[Thumb], worth: np.ndarray) -> Thumbs:
        settings = self.settings
        return Thumbs(
            self.logprobs,
            [self._row(thumb.prompt, thumb.response, name=f"thumb {thumb.id}") for thumb in judged],
            np.array([thumb.good for thumb in judged]),
            worth,
            references=lambda rows: self._references(rows, "thumbs reference"),
            max_tokens=settings.max_tokens,
            beta=settings.beta,
            batch=settings.batch_thumbs,
            seed=settings.seed + 3,
        )

    def _anchor_batches(self, said: Sequence[tuple[str, str]]) -> Callable[[int], AnchorBatch]:
        rows = [self._row(*side, name="a reply that the anchor holds") for side in said]
        order = Order(len(rows), self.settings.batch_anchors, self.settings.seed + 2)

        def batch_at(step: int) -> AnchorBatch:
            batch = self.logprobs.collate([rows[i] for i in order.batch(step)])
            with lora.without_adapter(self.lm, keep=self.adapters_below):
                base = self.logprobs.hidden(batch).astype(mx.float32)
                mx.eval(base)
            return AnchorBatch(batch, base)

        return batch_at

    # --- losses ----------------------------------------------------------------------------------------------------

    def _anchor_loss(self, batch: AnchorBatch) -> tuple[mx.array, dict[str, mx.array]]:
        """How far the final hidden states have moved: mean of |h - h_base|^2 over mean of |h_base|^2.

        Not a divergence of the words: an adapter on the output layer reads directions that the base's words hang on
        but little, and memories would move those for nothing.
        """
        moved = mx.square(self.logprobs.hidden(batch.rows).astype(mx.float32) - batch.base).mean()
        return moved / mx.square(batch.base).mean(), {}

    def _pair_loss(self, batch: PairBatch) -> tuple[mx.array, dict[str, mx.array]]:
        settings, n = self.settings, batch.target.shape[0]
        logp = self.logprobs(batch.rows)
        gained = logp - batch.reference
        won, lost = gained[batch.chosen], gained[batch.rejected]
        lengths = batch.rows.lengths[batch.chosen]
        per_pair = self._preferred(batch, logp, won, lost)
        per_pair = per_pair + settings.nll_weight * losses.nll(logp[batch.chosen], lengths)
        learnt = mx.logical_not(batch.unlearn)
        if settings.unsafe_pairs == "npo":
            # by beta / 2: at the reference each side then has the slope that DPO has there
            away = settings.beta / 2 * (losses.npo(won, beta=settings.beta) + losses.npo(lost, beta=settings.beta))
            per_pair = mx.where(learnt, per_pair, away)
        # over n, not over the sum of weights: a batch of trivial pairs must not move as far as a decisive one
        loss = (batch.weight * per_pair).sum() / n
        count = mx.maximum(learnt.sum(), 1)
        return loss, {
            "accuracy": (learnt * (won > lost)).sum() / count,
            "displacement": (learnt * won / lengths).sum() / count,
        }

    def _preferred(self, batch: PairBatch, logp: mx.array, won: mx.array, lost: mx.array) -> mx.array:
        """The loss that `dual.loss` names, of each pair, `[n]`.

        Args:
            logp: of each row; won, lost: what chosen and rejected replies gained on the reference, `[n]`.
        """
        settings, delta = self.settings, won - lost
        beta, target = settings.beta, batch.target
        lengths = batch.rows.lengths
        if settings.loss == "ipo":
            return losses.ipo(delta, beta=beta, target=target)
        if settings.loss == "dpop":
            return losses.dpop(won, lost, beta=beta, penalty=settings.dpop_lambda, target=target)
        if settings.loss == "odpo":
            return losses.odpo(delta, batch.margin, beta=beta, alpha=settings.odpo_alpha, target=target)
        if settings.loss == "rdpo":
            extra = lengths[batch.chosen] - lengths[batch.rejected]
            return losses.rdpo(delta, extra, beta=beta, alpha=settings.rdpo_alpha, target=target)
        chosen, rejected = ((logp / lengths)[side] for side in (batch.chosen, batch.rejected))
        if settings.loss == "simpo":
            return losses.simpo(chosen - rejected, beta=beta, gamma=settings.simpo_gamma, target=target)
        per_pair = losses.dpo(delta, beta=beta, target=target)
        if settings.loss == "wpo":
            per_pair = losses.wpo_weight(chosen, rejected) / self.usual_likelihood * per_pair
        return per_pair

    # --- looking ---------------------------------------------------------------------------------------------------

    def validation(self, preferences: Sequence[Preference]) -> Callable[[int], dict[str, float]] | None:
        """A function of the step that measures held-back pairs: accuracy of the implicit reward, displacement."""
        unsafe = self.unlearnt(preferences)
        preferences = [pair for pair in preferences if pair not in unsafe]
        if not preferences:
            return None
        rows, (chosen, rejected) = self._replies(preferences)
        lengths = np.array([len(rows[place].response) for place in chosen])
        before = self._references(rows, "validation reference")

        def evaluate(step: int) -> dict[str, float]:
            gained = np.array(reference_logprobs(self.logprobs, rows)) - before
            delta = gained[chosen] - gained[rejected]
            displacement = (gained[chosen] / lengths).mean()
            return {"valid_accuracy": float((delta > 0).mean()), "valid_displacement": float(displacement)}

        return evaluate

    def sketches(self, preferences: Sequence[Preference]) -> Sketches | None:
        """Sketched gradients of the margins of `sketch_pairs` held-back pairs, from all over the file, or None.

        Args:
            preferences: the whole file, since a sketch names its pair by the line.
        """
        kept = {id(pair) for pair in spoken(self.lm, preferences)}
        lines = np.array([line for line, pair in enumerate(preferences) if id(pair) in kept], int)
        count = min(self.settings.sketch_pairs, len(lines))
        if not count:
            return None
        picked = lines[np.arange(count) * len(lines) // count]
        rows, sides = self._replies([preferences[place] for place in picked.tolist()])
        with lora.without_adapter(self.lm, keep=self.adapters_below):
            reference = self._references(rows, "sketch reference")

        def margin(pair: int) -> mx.array:
            both = self.logprobs.collate([rows[place] for place in sides[:, pair]])
            gained = self.logprobs(both) - mx.array(reference[sides[:, pair]])
            return self.settings.beta * (gained[0] - gained[1])

        margins, gradients = np.zeros(count, np.float32), []
        for pair in range(count):
            value, tree = nn.value_and_grad(self.lm.model, margin)(pair)
            margins[pair] = value.item()
            gradients.append(sketch(dict(tree_flatten(tree))))
            if self.progress:
                self.progress({"stage": "sketching", "done": pair + 1, "total": count})
        return Sketches(np.stack(gradients), margins, picked)

    def watch(self, run: Path) -> Callable[[Sequence[Look]], str | None]:
        """A function of the looks so far that tells why to stop now, or None; it keeps the best adapter if asked to.

        Chosen replies that became much less likely than they were (likelihood displacement) are always a reason, and
        such an adapter is never kept as the best; where there is no other, it is what the run ends with. Where no
        preferences are learnt, or none are held back, no look is better than another: `dual.keep` and `dual.patience`
        then change nothing.
        """
        settings = self.settings

        def should_stop(looks: Sequence[Look]) -> str | None:
            newest, limit = looks[-1], settings.max_displacement
            if "valid_accuracy" not in newest:
                return None
            if limit and newest["valid_displacement"] < -limit:
                return f"chosen replies lost {-newest['valid_displacement']:.2f} nats a token (limit {limit})"
            if not (self.num_pairs or self.num_thumbs):
                return None
            best = best_look(looks)
            if best is newest and settings.keep == "best":
                keep(self.lm.model, run, newest["step"])
            since = sum(each["step"] > best["step"] for each in looks)
            if settings.patience and since >= settings.patience:
                return f"{since} looks without a better one than that of step {best['step']}"
            return None

        return should_stop


def best_look(looks: Sequence[Look]) -> Look:
    """The look with most held-out pairs in order; of equals, the one whose chosen replies gained most; then the first.

    Order is what is learnt, but of few pairs it moves in jumps, so ties are common. They are not broken by the loss on
    those pairs: that also falls when both replies become less likely and only the rejected one does so faster, which
    is how preference learning goes wrong (Razin et al. 2024, arXiv 2410.08847). What chosen replies gained tells the
    two apart.
    """
    return max(looks, key=lambda look: (look["valid_accuracy"], look["valid_displacement"]))


def _tokens(batch: PairBatch | MemoryBatch | AnchorBatch) -> int:
    return batch.rows.num_tokens


def strongest_directions(logprobs: LogProbs, rows: Sequence[Row], rank: int) -> mx.array:
    """Principal directions (not centred) of what the output layer reads in replies, `[rank, D]` float32.

    The first is near the mean: an adapter that reads it weighs words, whatever was said before, and can be learnt
    from few pairs. Scaled so that a reading is `HEAD_GAIN` in the root mean square. After Paischer et al. 2024, EVA
    (arXiv 2410.07170), who start every LoRA from its inputs' principal directions.
    """
    rows = sorted(rows, key=lambda row: row.num_tokens)[:: max(1, len(rows) // 128)]
    parts = [logprobs.hidden(logprobs.collate(rows[i : i + 16])) for i in range(0, len(rows), 16)]
    hidden = np.concatenate([np.array(part.astype(mx.float32)) for part in parts])
    _, strength, axes = np.linalg.svd(hidden, full_matrices=False)
    return mx.array(HEAD_GAIN * len(hidden) ** 0.5 * axes[:rank] / strength[:rank, None])


def swap(pair: Preference) -> Preference:
    """The pair turned around; doing it twice gives the pair back."""
    return pair.model_copy(
        update={
            "chosen": pair.rejected,
            "rejected": pair.chosen,
            "chosen_id": pair.rejected_id,
            "rejected_id": pair.chosen_id,
            "chosen_score": pair.rejected_score,
            "rejected_score": pair.chosen_score,
            "score_margin": -pair.score_margin if pair.score_margin is not None else None,
            "safety_score": pair.rejected_safety_score,
            "rejected_safety_score": pair.safety_score,
        }
    )
