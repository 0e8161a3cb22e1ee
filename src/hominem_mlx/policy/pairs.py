"""The preference channel: of two replies one is to become likelier than the other.

    L = mean over pairs of  gate * intensity * [soft DPO + alpha * NLL(chosen) / tokens]

or another loss of DPO's family (`dual.loss`). Which pairs may be learnt from, and how far, is `science.md` 3.4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hominem_mlx import losses
from hominem_mlx.config import DualConfig
from hominem_mlx.errors import TrainingError
from hominem_mlx.policy.memories import gate
from hominem_mlx.records import Preference
from hominem_mlx.training.logprobs import LogProbs
from hominem_mlx.training.rows import Order, Parts, Row, Rows

UNLEARN_GATE = 0.1  # `science.md` 3.4: unsafe texts drive at most a tenth of what a safe pair does


@dataclass(frozen=True)
class PairBatch:
    """`n` pairs over `r` different replies, and what the loss needs of each.

    chosen, rejected: int `[n]`, numbers of rows. Of each row, float32 `[r]`: reference. Of each pair, float32 `[n]`:
    target, weight (gate * intensity), margin (of the scores, 1 where there are none). unlearn: bool `[n]`, pairs whose
    two sides are both to become less likely. learnt: how many pairs of the whole batch are not, times this part's share
    of that batch, so that means over parts are those of the batch.
    """

    rows: Rows
    reference: mx.array
    chosen: mx.array
    rejected: mx.array
    target: mx.array
    weight: mx.array
    margin: mx.array
    unlearn: mx.array
    learnt: float


class Pairs:
    """Pairs, ready to be cut into batches once they `begin`.

    Args:
        pairs: to be learnt from, then those to be unlearnt.
        gates: how far each of the former may be learnt, float32.
        rows: the different replies of all.
        sides: the places of chosen and rejected ones among them, int `[2, n]`.
        parts: what `batch_at` counts.

    Attributes:
        without_margin: number of pairs whose scores do not differ or are not known.
    """

    measures = ("accuracy", "displacement")  # what `loss` tells beside the loss, by name

    def __init__(
        self,
        logprobs: LogProbs,
        settings: DualConfig,
        pairs: Sequence[Preference],
        gates: np.ndarray,
        rows: Sequence[Row],
        sides: np.ndarray,
        parts: Parts,
    ):
        self.logprobs, self.settings, self.parts = logprobs, settings, parts
        self.rows, self.sides = rows, sides
        # a prompt's pairs come together: they share replies, and each reply is computed once a step
        prompts = [pair.prompt for pair in pairs]
        self.order = Order(len(pairs), settings.batch_pairs, settings.seed, groups=prompts)
        self.unlearn = np.arange(len(pairs)) >= len(gates)
        self.target = np.array([pair.target for pair in pairs], np.float32)
        intensity = np.array([pair.reward_intensity for pair in pairs], np.float32)
        mean = float(intensity.mean()) if pairs else 1.0
        gates = np.append(gates, np.full(self.unlearn.sum(), UNLEARN_GATE, np.float32))
        weight = gates * np.array(losses.intensity_weight(mx.array(intensity), mean=mean))
        self.weight = np.where(self.unlearn, np.minimum(weight, np.float32(UNLEARN_GATE)), weight)
        margin = np.array([pair.score_margin or 0.0 for pair in pairs])
        self.margin = np.where(margin > 0, margin, 1.0).astype(np.float32)  # 1 makes plain DPO of odpo
        self.without_margin = int((margin <= 0).sum())
        if settings.loss == "odpo" and 0 < len(pairs) == self.without_margin:
            raise TrainingError(
                f"dual.loss = odpo needs score_margin, and none of {len(pairs)} preference pairs has one above 0: "
                "make pairs from labels (`hominem data pair`), or take dual.loss = dpo"
            )

    def begin(self, references: Callable[[Sequence[Row]], np.ndarray]) -> None:
        """Read all replies under the reference."""
        self.reference = references(self.rows) if self.rows else np.zeros(0, np.float32)
        if self.settings.loss == "wpo" and self.rows:  # weights of mean 1 keep what the learning rate means
            lengths = np.array([len(row.response) for row in self.rows], np.float32)
            likely = losses.wpo_weight(*(mx.array((self.reference / lengths)[side]) for side in self.sides))
            self.usual_likelihood = max(likely.mean().item(), 1e-30)

    def batch_at(self, place: int) -> PairBatch | None:
        """The part of a batch at that place, None where it is empty; epochs go round for ever."""
        whole, index = self.order.batch(self.parts.step(place)), self.parts.at(self.order, place)
        if not len(index):
            return None
        replies, places = np.unique(self.sides[:, index], return_inverse=True)
        chosen, rejected = places.reshape(2, -1)  # numpy 2.0 keeps the shape, others do not
        return PairBatch(
            self.logprobs.collate([self.rows[i] for i in replies]),
            mx.array(self.reference[replies]),
            mx.array(chosen),
            mx.array(rejected),
            mx.array(self.target[index]),
            mx.array(self.weight[index]),
            mx.array(self.margin[index]),
            mx.array(self.unlearn[index]),
            max(1, int((~self.unlearn[whole]).sum())) * (len(index) / len(whole)),
        )

    def loss(self, batch: PairBatch) -> tuple[mx.array, dict[str, mx.array]]:
        """Weighted mean of what `dual.loss` and `dual.unsafe_pairs` name: over n, not over the sum of weights.

        A batch of trivial pairs must not move as far as a decisive one.
        """
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
        loss = (batch.weight * per_pair).sum() / n
        return loss, {
            "accuracy": (learnt * (won > lost)).sum() / batch.learnt,
            "displacement": (learnt * won / lengths).sum() / batch.learnt,
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

    def size(self, batch: PairBatch) -> float:
        """Pairs, which the loss is a mean over."""
        return batch.target.size


def gated(preferences: Sequence[Preference], settings: DualConfig) -> tuple[list[Preference], np.ndarray]:
    """Pairs that may be learnt from and their gates `[n]` in (0, 1]; swapped where that is allowed."""
    pairs, gates = [], []
    for pair in preferences:
        open_by = gate(pair.safety_score, low=settings.safety_low, high=settings.safety_high)
        if open_by == 0 and settings.allow_swap and pair.safety_score < -0.5:
            pair = swap(pair)
            open_by = 0.5 * (pair.safety_score >= settings.safety_high)
        if open_by > 0:
            pairs.append(pair)
            gates.append(open_by)
    return pairs, np.array(gates, np.float32)


def unlearnt(preferences: Sequence[Preference], settings: DualConfig) -> list[Preference]:
    """Pairs with both sides unsafe, where those are to become less likely."""
    if settings.unsafe_pairs == "drop":
        return []
    limit = settings.safety_low
    return [pair for pair in preferences if max(pair.safety_score, pair.rejected_safety_score) < limit]


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
