"""Losses as pure functions: arrays in, one value per example out. Nothing is averaged, weighted or logged in here.

`target` is everywhere the probability that `chosen` really is better, `[B]` or a number in [0.5, 1]; at 1 each formula
is the one of its paper. The setting `dual.loss` chooses among those of pairs.
"""

import mlx.core as mx


def dpo(delta: mx.array, *, beta: float, target: mx.array | float = 1.0) -> mx.array:
    """Direct preference loss with soft targets, one value per pair.

    Args:
        delta: `(logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)`, sums over response tokens, float32 `[B]`.
        beta: inverse temperature, > 0.
        target: probability that `chosen` really is better, `[B]` or a number in [0.5, 1].

    Returns: `[B]`; log 2 where the policy equals the reference. Its minimum lies at `delta = logit(target) / beta`.
    Source: Rafailov et al. 2023, eq. 7 (arXiv 2305.18290); soft targets: Mitchell 2023, cDPO.
    """
    return _logistic(beta * _per_pair(delta), target)


def ipo(delta: mx.array, *, beta: float, target: mx.array | float = 1.0) -> mx.array:
    """Identity preference loss `(delta - 1/(2 beta))^2`: a margin to reach, not to exceed.

    Args:
        delta, beta, target: as in `dpo`. A target below 1 is the mean over who is better, `chosen` or `rejected`.

    Returns: `[B]`, >= 0, nats squared; `1 / (4 beta^2)` at the reference. Its minimum lies at
    `delta = (2 target - 1) / (2 beta)`.
    Source: Azar et al. 2023, eq. 17, their tau is beta (arXiv 2310.12036).
    """
    goal = 1 / (2 * beta)
    return target * mx.square(_per_pair(delta) - goal) + (1 - target) * mx.square(delta + goal)


def simpo(margin: mx.array, *, beta: float, gamma: float, target: mx.array | float = 1.0) -> mx.array:
    """Simple preference loss `-log sig(beta * margin - gamma)`: log-probabilities per token, no reference.

    Args:
        margin: `logp_chosen / tokens_chosen - logp_rejected / tokens_rejected`, nats a token, float32 `[B]`.
        beta: > 0; per token, so larger than that of `dpo`: the paper takes 2 to 2.5.
        gamma: the margin that is asked for, in units of `beta * margin`, >= 0; the paper takes 0.3 to 1.6.
        target: see the head of this file; the minimum lies at `margin = (logit(target) + gamma) / beta`.

    Returns: `[B]`, > 0. Source: Meng et al. 2024, eq. 6 (arXiv 2405.14734).
    """
    return _logistic(beta * _per_pair(margin) - gamma, target)


def dpop(
    gained_chosen: mx.array, gained_rejected: mx.array, *, beta: float, penalty: float, target: mx.array | float = 1.0
) -> mx.array:
    """DPO-positive `-log sig(beta * (delta - penalty * max(0, -gained_chosen)))`: what was chosen must stay likely.

    Args:
        gained_chosen, gained_rejected: `logp - ref` of each side, sums over response tokens, float32 `[B]`;
            `delta` is their difference.
        beta: as in `dpo`.
        penalty: lambda of the paper, >= 0; it takes 50. 0 is DPO.
        target: a target below 1 mixes in the loss of the pair turned round. What the chosen reply has lost counts
            against both, or a pair learnt beyond its target would be rewarded for losing more.

    Returns: `[B]`; log 2 at the reference. Source: Pal et al. 2024, eq. 3 (arXiv 2402.13228).
    """
    delta = _per_pair(gained_chosen) - gained_rejected
    lost = penalty * mx.maximum(0.0, -gained_chosen)
    forward, backward = mx.logaddexp(0.0, -beta * (delta - lost)), mx.logaddexp(0.0, beta * (delta + lost))
    return target * forward + (1 - target) * backward


def odpo(
    delta: mx.array, score_margin: mx.array, *, beta: float, alpha: float, target: mx.array | float = 1.0
) -> mx.array:
    """DPO with an offset `-log sig(beta * delta - alpha * log(score_margin))`: more is asked where scores differ more.

    Args:
        delta, beta, target: as in `dpo`.
        score_margin: `R_chosen - R_rejected`, > 0, `[B]`; 1 is plain DPO, below 1 less is asked for than there.
        alpha: strength of the offset, >= 0.

    Returns: `[B]`. Its minimum lies at `delta = (logit(target) + alpha * log(score_margin)) / beta`.
    Source: Amini et al. 2024, with f = log (arXiv 2402.10571).
    """
    return _logistic(beta * _per_pair(delta) - alpha * mx.log(score_margin), target)


def rdpo(
    delta: mx.array, extra_tokens: mx.array, *, beta: float, alpha: float, target: mx.array | float = 1.0
) -> mx.array:
    """Length-regularised DPO `-log sig(beta * delta + alpha * extra_tokens)`: length explains a part of the preference.

    What length explains the policy need not learn: a longer chosen reply pulls less, a shorter one more. It is DPO for
    the reward `r - alpha * tokens`, whence the sign.

    Args:
        delta, beta, target: as in `dpo`.
        extra_tokens: tokens of the chosen reply minus tokens of the rejected one, `[B]`.
        alpha: reward a token, >= 0. 0 is DPO.

    Returns: `[B]`. Its minimum lies at `delta = (logit(target) - alpha * extra_tokens) / beta`.
    Source: Park et al. 2024 (arXiv 2403.19159).
    """
    return _logistic(beta * _per_pair(delta) + alpha * extra_tokens, target)


def wpo_weight(per_token_chosen: mx.array, per_token_rejected: mx.array) -> mx.array:
    """How likely the policy would have said both replies itself: old pairs it would never say count less.

    Args:
        per_token_chosen, per_token_rejected: `logp / tokens` of each side under the policy as it is now, `[B]`.

    Returns: `[B]` in (0, 1], the product of both length-normalised probabilities; no gradient goes through it.
    Source: Zhou et al. 2024 (arXiv 2406.11827), without the alignment by position.
    """
    return mx.stop_gradient(mx.exp(per_token_chosen + per_token_rejected))


def npo(gained: mx.array, *, beta: float) -> mx.array:
    """Negative preference loss `(2 / beta) * log(1 + (p / p_ref)^beta)`: unlearns a reply, with a bounded pull.

    Negated likelihood would have no minimum; this one falls to 0 as the reply becomes unlikely.

    Args:
        gained: `logp - ref`, sum over response tokens, float32 `[B]`.
        beta: as in `dpo`.

    Returns: `[B]`, > 0; its derivative is `2 * sig(beta * gained)`, in (0, 2) and 1 at the reference.
    Source: Zhang et al. 2024, eq. 3 (arXiv 2404.05868).
    """
    return (2 / beta) * mx.logaddexp(0.0, beta * _per_pair(gained))


def kto(gained: mx.array, good: mx.array, baseline: mx.array, *, beta: float) -> mx.array:
    """Loss of single verdicts: good replies `1 - sig(beta * (gained - z0))`, bad ones `1 - sig(beta * (z0 - gained))`.

    Args:
        gained: `logp - ref`, sum over response tokens, float32 `[B]`.
        good: bool `[B]`, whether the reply was liked.
        baseline: z0 of the paper, a number, from `kto_baseline`; no gradient goes through it.
        beta: as in `dpo`.

    Returns: `[B]` in (0, 1), a half where `gained` is the baseline. The pull is at most `beta / 4`, there, and falls to
    0 as a reply gains or loses more, in either direction: what cannot be learnt is given up.
    Source: Ethayarajh et al. 2024, eq. 8 (arXiv 2402.01306), without its weights of good and bad.
    """
    sign = mx.where(good, 1.0, -1.0)
    return mx.sigmoid(beta * sign * (mx.stop_gradient(baseline) - _per_pair(gained)))


def kto_baseline(gained: mx.array) -> mx.array:
    """z0 of `kto`: how far the policy has left the reference altogether, an estimate of their KL divergence.

    Args:
        gained: `logp - ref` of replies that were given to other prompts, `[M]`, M >= 1.

    Returns: their mean, at least 0; no gradient goes through it.
    """
    return mx.stop_gradient(mx.maximum(_per_pair(gained).mean(), 0.0))


def nll(logp: mx.array, num_tokens: mx.array) -> mx.array:
    """Negative log-likelihood per token of each reply.

    Args:
        logp: sum of log-probabilities over response tokens, float32 `[B]`.
        num_tokens: how many there are, >= 1, `[B]`.

    Returns: `[B]` nats per token, >= 0. Source: the alpha term of Iterative RPO (arXiv 2404.19733).
    """
    return -logp / num_tokens


def safety_gate(safety: mx.array, *, low: float, high: float) -> mx.array:
    """How much of an example may be learnt, from the safety of the text it reinforces.

    Args:
        safety: lower bound of the safety score, in [-1, 1], `[B]`.
        low: at or below, nothing is learnt.
        high: at or above, all of it is; linear between.

    Returns: `[B]` in [0, 1], never falling as safety rises. Source: `science.md` 3.4.
    """
    if not high > low:
        raise ValueError(f"safety gate needs low < high, got {low} and {high}")
    return mx.clip((safety - low) / (high - low), 0.0, 1.0)


def intensity_weight(intensity: mx.array, *, mean: float) -> mx.array:
    """How strongly an example drives learning, relative to a typical one.

    Args:
        intensity: reward intensity in [0, 1], `[B]`. The sign of a lesson never comes from here.
        mean: mean intensity of the calibration set, > 0, so that the learning rate keeps its meaning.

    Returns: `[B]` in [0.25, 4]. Source: `science.md` 3.3.
    """
    return mx.clip(intensity / max(mean, 1e-6), 0.25, 4.0)


def huber(error: mx.array, *, delta: float = 1.0) -> mx.array:
    """Half the square of small errors, the absolute value of large ones less a constant; smooth where they meet.

    Args:
        error: prediction minus label, any shape.
        delta: where one becomes the other, > 0; the slope is never beyond it.

    Returns: the shape of `error`, >= 0. Source: Huber 1964.
    """
    size = mx.abs(error)
    small = mx.minimum(size, delta)
    return 0.5 * mx.square(small) + delta * (size - small)


def bradley_terry(margin: mx.array, *, temperature: float = 1.0) -> mx.array:
    """`-log sig(margin / T)`: that the better of two comes out the better one.

    Args:
        margin: what is said of the better reply minus what is said of the other, any shape.
        temperature: T > 0, in the unit of the margin.

    Returns: the shape of `margin`, > 0; log 2 where the two are alike. Source: Bradley and Terry 1952.
    """
    return mx.logaddexp(0.0, -margin / temperature)


def rloo_advantage(reward: mx.array) -> mx.array:
    """How much better each reply did than the mean of the other replies to its prompt.

    Args:
        reward: `[B, k]`, k >= 2 replies to each of B prompts.

    Returns: `[B, k]`, in the unit of the reward; sums to 0 over a prompt's replies. The other replies make a baseline
        that hangs on nothing of this one, so the gradient of `-advantage * logp` stays unbiased.
    Source: Ahmadian et al. 2024, RLOO (arXiv 2402.14740).
    """
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(f"rewards must be [B, k] with k >= 2, got shape {reward.shape}")
    k = reward.shape[1]
    return (reward - reward.mean(axis=1, keepdims=True)) * (k / (k - 1))


def _logistic(logit: mx.array, target: mx.array | float) -> mx.array:
    """Cross-entropy of `sig(logit)` against `target`, finite for every finite logit."""
    return target * mx.logaddexp(0.0, -logit) + (1 - target) * mx.logaddexp(0.0, logit)


def _per_pair(values: mx.array) -> mx.array:
    if values.ndim != 1:
        raise ValueError(f"one value per example is needed, [B], got shape {values.shape}")
    return values
