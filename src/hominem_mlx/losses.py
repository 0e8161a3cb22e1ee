"""Losses as pure functions: arrays in, one value per example out. Nothing is averaged, weighted or logged in here."""

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
    if delta.ndim != 1:
        raise ValueError(f"delta must be [B], got shape {delta.shape}")
    logit = beta * delta
    return target * mx.logaddexp(0.0, -logit) + (1 - target) * mx.logaddexp(0.0, logit)


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
