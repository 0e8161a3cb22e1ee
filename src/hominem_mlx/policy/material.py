"""What the dual-channel recipe learns from: texts become rows, and rows the channels of the training loop."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from hominem_mlx.config import DualConfig
from hominem_mlx.errors import TrainingError
from hominem_mlx.models import lora
from hominem_mlx.models.backbone import LanguageModel
from hominem_mlx.policy.anchor import Anchor, AnchorBatch
from hominem_mlx.policy.memories import Memories, MemoryBatch, learnable
from hominem_mlx.policy.pairs import PairBatch, Pairs, gated, unlearnt
from hominem_mlx.policy.thumbs import ThumbBatch, Thumbs, learnable_thumbs
from hominem_mlx.records import Preference, SftPair, Thumb, Turn
from hominem_mlx.training import blend, footprint
from hominem_mlx.training.budget import Budget, Fit, Lessons, read_at_once, reading
from hominem_mlx.training.costs import AHEAD_HELD, TOTAL, Costs, Picks, shown
from hominem_mlx.training.directions import strongest_directions
from hominem_mlx.training.logprobs import LogProbs, reference_logprobs
from hominem_mlx.training.loop import Channel, Plan
from hominem_mlx.training.parallel import ALONE, Ranks
from hominem_mlx.training.rows import Parts, Row, Said, spoken, to_row

Progress = Callable[[dict[str, Any]], None]
Taught = Memories | Pairs | Thumbs | Anchor
Targets = Literal["linear", "head", "all"]
MAY_MOVE: dict[Targets, Callable[[str], bool]] = {
    "linear": lambda name: not lora.is_head(name),
    "head": lora.is_head,
    "all": lambda name: True,
}


class Material:
    """Rows, references, gates and weights, ready to be cut into batches. Everything here is computed once.

    Args:
        lm: the base, which is also the reference; its adapter is attached when the channels are made.
        system: what every prompt begins with.
        limit: bytes of memory that training may take, inside `budget.memory_limit`; None: it is done as configured,
            whatever it takes.
        ranks: who shares the work.

    Attributes:
        counts: of rows, weights and memory, for METADATA.
        shape, keys: of the adapter to come, as `lora.attach` takes them.
    """

    def __init__(
        self,
        lm: LanguageModel,
        settings: DualConfig,
        system: str | None,
        progress: Progress | None,
        limit: int | None = None,
        ranks: Ranks = ALONE,
    ):
        self.lm, self.settings, self.system, self.progress, self.limit = lm, settings, system, progress, limit
        self.logprobs = LogProbs(lm, checkpoint=settings.checkpoint)
        self.shape = lora.Shape(settings.rank, settings.scale, settings.dropout, settings.num_layers, settings.kind)
        self.parts, self.ranks = Parts(ranks=ranks), ranks
        self.adapters_below = len(lm.adapters)  # the new one is not on yet
        self.counts: dict[str, Any] = {"checkpointed": self.logprobs.checkpoints} if settings.checkpoint else {}

    # --- channels --------------------------------------------------------------------------------------------------

    def channels(
        self,
        preferences: Sequence[Preference],
        memories: Sequence[SftPair],
        anchors: Sequence[SftPair] = (),
        thumbs: Sequence[Thumb] = (),
    ) -> list[Channel]:
        """The terms of the loss; a channel without rows has weight 0 and says so in the counts."""
        settings = self.settings
        safety = {"safety_low": settings.safety_low, "safety_high": settings.safety_high}
        kept, confidence = learnable(memories, **safety)
        safe, gates = gated(preferences, settings)
        unsafe = unlearnt(preferences, settings)
        judged, worth = learnable_thumbs(thumbs, **safety)
        self.counts |= {
            "preferences": {
                "given": len(preferences),
                "refused_by_gate": len(preferences) - len(safe) - len(unsafe),
                "unlearnt": len(unsafe),
            },
            "memories": {"given": len(memories), "refused_by_gate": len(memories) - len(kept)},
        }
        if thumbs:
            self.counts["thumbs"] = {"given": len(thumbs), "refused_by_gate": len(thumbs) - len(judged)}
        memory, preference, thumb = self._weigh(len(kept), len(safe) + len(unsafe), len(judged))

        facts = self._memories(kept, confidence)
        pairs = self._pairs(safe, gates, unsafe)
        verdicts = self._thumbs(judged, worth) if thumb else None
        anchor = self._anchor(safe, anchors) if settings.anchor_weight and memory else None
        self.valued_rows = [*pairs.rows, *(verdicts.rows if verdicts else ())]

        channels: list[Channel] = []
        lessons: list[Lessons] = []
        steps = self.plan().steps

        def teach(name: str, weight: float, taught: Taught, targets: Targets, follows: str = "", **reads: Any) -> None:
            move, size = MAY_MOVE[targets], taught.size
            term = Channel(name, weight, taught.batch_at, taught.loss, move, follows, size, _tokens, taught.measures)
            channels.append(term)
            if weight:
                lessons.append(Lessons(taught.order, taught.rows, steps, targets, **reads))

        teach("memory", memory, facts, settings.memory_targets)
        if self.num_pairs or not verdicts:
            teach("preference", preference, pairs, settings.preference_targets, sides=pairs.sides)
        if verdicts:
            place = ("thumb", "preference") if self.num_pairs else ("preference", "")
            teach(place[0], thumb, verdicts, settings.preference_targets, place[1], beside=verdicts.strange)
        if anchor:
            held = settings.anchor_weight * memory / settings.memory_weight  # availability counts for both
            teach("anchor", held, anchor, settings.memory_targets, "memory", words=False)
        every_row = [row for each in (facts, pairs, verdicts, anchor) if each for row in each.rows]
        every_row += verdicts.strange.values() if verdicts else ()
        self.keys = self._targets(memory, preference)
        self._fit_in(lessons, every_row)
        if self.num_pairs:
            pairs.begin(functools.partial(self.read, stage="reference"))
        if verdicts:
            verdicts.begin(functools.partial(self.read, stage="thumbs reference"))
        return channels

    def head_directions(self) -> mx.array | None:
        """`strongest_directions` of replies of pairs and thumbs; None without any, and where the head is free."""
        if not (self.settings.head_rank and self.valued_rows):
            return None
        rank = min(self.settings.head_rank, self.settings.rank)
        at_once = read_at_once(self.costs, self.valued_rows, self.limit)
        return strongest_directions(self.logprobs, self.valued_rows, rank, batch=at_once)

    def plan(self) -> Plan:
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
            accumulate=self.parts.micro_batches,
            compile=settings.compile,
        )

    def _weigh(self, memories: int, pairs: int, thumbs: int) -> tuple[float, float, float]:
        """The weights of memories, preferences and thumbs, from how many of each may be learnt."""
        settings = self.settings
        weights = [settings.memory_weight * bool(memories), settings.preference_weight * bool(pairs)]
        if settings.ideal_memories or settings.ideal_pairs:
            weights = blend.availability(weights, (memories, pairs), (settings.ideal_memories, settings.ideal_pairs))
        if thumbs and settings.loss == "simpo":
            raise TrainingError(
                f"dual.loss = simpo has a beta of tokens, and the {thumbs} single thumbs need one of replies: "
                "take another dual.loss, or leave thumbs out with dual.thumb_weight = 0"
            )
        thumb = settings.thumb_weight * bool(thumbs)
        if weights[1]:  # few thumbs have their turn often: one counts like a pair, and all no more than all pairs
            thumb *= weights[1] * min(1.0, thumbs / pairs)
        else:  # without pairs thumbs are the preference channel
            weights[1] = thumb = settings.preference_weight * thumb
        if sum(weights) == 0:
            raise TrainingError(
                "there is nothing to learn from: no memory, no preference pair and no thumb is left "
                f"({self.counts}); look at the data with `hominem data stats` or change the weights"
            )
        memory, preference = weights
        self.counts["weights"] = {"memory": memory, "preference": preference}
        self.num_memories, self.num_pairs, self.num_thumbs = (
            number * bool(weight) for number, weight in ((memories, memory), (pairs, preference), (thumbs, thumb))
        )
        return memory, preference, thumb

    def _targets(self, memory: float, preference: float) -> list[str]:
        """The layers that get an adapter: those some channel of that weight may move."""
        kinds = {self.settings.memory_targets} if memory else set()
        kinds |= {self.settings.preference_targets} if preference else set()
        return lora.targets(self.lm, linear=bool(kinds & {"linear", "all"}), head=bool(kinds & {"head", "all"}))

    def _memories(self, kept: Sequence[SftPair], confidence: np.ndarray) -> Memories:
        rows = [
            self._row(each.instruction, each.response, each.history or (), name=f"memory {each.id}") for each in kept
        ]
        order = {"batch": self.settings.batch_memories, "seed": self.settings.seed + 1}
        return Memories(self.logprobs, rows, confidence, self.parts, **order)

    def _pairs(self, safe: Sequence[Preference], gates: np.ndarray, unsafe: Sequence[Preference]) -> Pairs:
        both = [*safe, *unsafe]
        pairs = Pairs(self.logprobs, self.settings, both, gates, *self.replies(both), self.parts)
        if self.settings.loss == "odpo":
            self.counts["pairs_without_score_margin"] = pairs.without_margin
        return pairs

    def _thumbs(self, judged: Sequence[Thumb], worth: np.ndarray) -> Thumbs:
        settings = self.settings
        return Thumbs(
            self.logprobs,
            [self._row(thumb.prompt, thumb.response, name=f"thumb {thumb.id}") for thumb in judged],
            np.array([thumb.good for thumb in judged]),
            worth,
            self.parts,
            max_tokens=settings.max_tokens,
            beta=settings.beta,
            batch=settings.batch_thumbs,
            seed=settings.seed + 3,
        )

    def _anchor(self, pairs: Sequence[Preference], anchors: Sequence[SftPair]) -> Anchor | None:
        """Holds the replies of pairs and those that the dataset names; None where there is none."""
        said = {(pair.prompt, reply) for pair in pairs for reply in (pair.chosen, pair.rejected)}
        said |= {(anchor.instruction, anchor.response) for anchor in anchors}
        rows = [self._row(*side, name="a reply that the anchor holds") for side in sorted(said)]
        order = {"batch": self.settings.batch_anchors, "seed": self.settings.seed + 2}
        return Anchor(self.logprobs, rows, self.parts, **order) if rows else None

    # --- memory ----------------------------------------------------------------------------------------------------

    def _fit_in(self, lessons: Sequence[Lessons], rows: Sequence[Row]) -> None:
        """Work out what training takes; where there is a limit, compute as it asks for, and say so.

        Args:
            rows: all that lessons are made of.

        Raises: TrainingError where nothing fits.
        """
        limit, there, settings, logprobs = self.limit, footprint.there_is(), self.settings, self.logprobs
        gradients = len(lessons) * (2 if settings.blend == "normalised" else 1)
        met, held = self.ranks.size > 1, limit is not None
        self.costs = Costs(logprobs, self.shape, self.keys, gradients=gradients, met=met, held=held)
        budget = Budget(self.costs, lessons, self.ranks)
        configured = Picks(logprobs.logits_bytes, logprobs.checkpoints)
        if limit is None:
            fit = Fit(configured, budget.estimate(configured), None, there)
        else:
            fit = budget.fit(configured, limit, can_checkpoint=not settings.dropout and logprobs.can_checkpoint)
            if not fit.fits:
                raise TrainingError(self._too_little(fit, max(row.num_tokens for row in rows)))
        logprobs.logits_bytes, logprobs.checkpoints = fit.picks.logits_bytes, fit.picks.checkpoints
        self.parts.micro_batches = fit.picks.micro_batches
        if fit.picks.checkpoints:
            self.counts["checkpointed"] = fit.picks.checkpoints
        read = reading(self.costs, rows, read_at_once(self.costs, rows, limit))
        fit = dataclasses.replace(fit, estimate=max(fit.estimate, read, key=TOTAL))
        self.counts["memory"] = {
            "limit_gb": limit / footprint.GB if limit is not None else None,
            "estimate_gb": fit.estimate.in_gb(),
            "as_configured_gb": (fit.before or fit.estimate).total / footprint.GB,
            "picked": vars(fit.picks),
        }
        note = ""
        if limit is not None:
            beyond = fit.estimate.logits * (1 - 1 / AHEAD_HELD)  # which MLX makes in spite of its limit
            mx.set_memory_limit(fit.estimate.total - int(beyond))
            note = fit.told(configured, self.lm.num_layers)
        elif not fit.fits:
            note = f"{fit.estimate} may be needed, and this machine has {shown(there)}: --memory-gb 0 computes it so "
            note += "that it fits"
        if note and self.progress:
            self.progress({"stage": "memory", "done": 1, "total": 1, "note": note})

    def _too_little(self, fit: Fit, longest: int) -> str:
        settings = self.settings
        has = f"{'dual.memory_gb allows' if settings.memory_gb else 'there is'} {shown(fit.limit)}"
        dropout = ", or set dual.dropout to 0, so that blocks can be computed twice" if settings.dropout else ""
        return (
            f"an adapter on {self.lm.name} takes {fit.estimate} of memory at the least, and {has}: give it more, end "
            f"other programs, take a smaller base or a quantised one, or lower dual.max_tokens (the longest row has "
            f"{longest} tokens) or dual.rank ({settings.rank}){dropout}"
        )

    # --- rows ------------------------------------------------------------------------------------------------------

    def spoken(self, records: Sequence[Said]) -> list[Said]:
        """Those in whose every reply something is said; the others are left out and counted."""
        kept = spoken(self.lm, records)
        self._count("all_thoughts", len(records) - len(kept))
        return kept

    def replies(self, pairs: Sequence[Preference]) -> tuple[list[Row], np.ndarray]:
        """The different replies of these pairs, and the places of chosen and rejected ones among them, `[2, n]`."""
        sides = {(pair.prompt, reply): pair.id for pair in pairs for reply in (pair.chosen, pair.rejected)}
        rows = [self._row(*side, name=f"pair {pair}") for side, pair in sides.items()]
        places = {side: place for place, side in enumerate(sides)}
        both = [places[pair.prompt, reply] for pair in pairs for reply in (pair.chosen, pair.rejected)]
        return rows, np.array(both, int).reshape(-1, 2).T

    def read(self, rows: Sequence[Row], stage: str = "", *, ranks: Ranks | None = None) -> np.ndarray:
        """Log-probabilities under the model as it is now, float32 `[n]`.

        Args:
            stage: name under which progress is told, if any.
            ranks: who reads, each a share; all that train unless given.
        """
        report = self.progress if stage else None

        def compute(places: np.ndarray) -> list[float]:
            own = [rows[place] for place in places]
            tell = (lambda done: report({"stage": stage, "done": done, "total": len(own)})) if report else None
            at_once = read_at_once(self.costs, own, self.limit)
            return reference_logprobs(self.logprobs, own, batch=at_once, progress=tell)

        return (ranks or self.ranks).computed(len(rows), compute)

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


def _tokens(batch: MemoryBatch | PairBatch | ThumbBatch | AnchorBatch) -> int:
    return batch.rows.num_tokens
