"""PPO's formulas on padded batches: tensors (B, T) of completion tokens, `mask_B_T` bool, True on tokens that count.

Nothing under a False of the mask, NaN included, changes any result. Each formula names its source; tests/test_ppo.py
holds each to a loop in float64.
"""

import torch

# keeps whitening finite where all values are alike (openai/lm-human-preferences)
WHITEN_EPSILON = 1e-8


def masked(values_B_T: torch.Tensor, mask_B_T: torch.Tensor) -> torch.Tensor:
    """The values, 0 where the mask is False."""
    return values_B_T.masked_fill(~mask_B_T, 0.0)


def masked_mean(values_B_T: torch.Tensor, mask_B_T: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that count; 0 when there is none."""
    return masked(values_B_T, mask_B_T).sum() / mask_B_T.sum().clamp(min=1)


def masked_variance(values_B_T: torch.Tensor, mask_B_T: torch.Tensor) -> torch.Tensor:
    """Population variance over the tokens that count."""
    return masked_mean((values_B_T - masked_mean(values_B_T, mask_B_T)) ** 2, mask_B_T)


def whiten(values_B_T: torch.Tensor, mask_B_T: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    """Values over their standard deviation, 0 where masked; with `shift_mean` also less their mean.

    Mean and (population) variance are over the tokens that count of the whole batch (Huang et al. 2024).
    """
    mean = masked_mean(values_B_T, mask_B_T)
    white = (values_B_T - mean) * torch.rsqrt(masked_variance(values_B_T, mask_B_T) + WHITEN_EPSILON)
    return masked(white if shift_mean else white + mean, mask_B_T)


def kl_estimates(logps_B_T: torch.Tensor, reference_B_T: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimates of KL(policy || reference) from tokens the policy drew (Schulman 2020, "Approximating KL divergence").

    "k1", log pi / pi_ref: unbiased, negative where the reference likes the token more. "k3", r - 1 - log r with
    r = pi_ref / pi: unbiased and never negative. Raises ValueError for another name.
    """
    difference = logps_B_T - reference_B_T
    if estimator == "k1":
        return difference
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator {estimator!r}, valid: k1, k3")


def token_rewards(
    scores_B: torch.Tensor, kl_B_T: torch.Tensor | None, mask_B_T: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """-kl_coef KL at every token, and the completion's score at its last one (Ziegler et al. 2019, section 2, eq. 2).

    A completion's tokens are its first columns; one without any token gets nothing.
    """
    rewards_B_T = torch.zeros(mask_B_T.shape, dtype=scores_B.dtype, device=scores_B.device)
    if kl_B_T is not None:
        rewards_B_T = rewards_B_T - kl_coef * masked(kl_B_T, mask_B_T)
    lengths_B = mask_B_T.sum(1)
    last_B_1 = (lengths_B - 1).clamp(min=0)[:, None]
    return rewards_B_T.scatter_add(1, last_B_1, (scores_B * (lengths_B > 0))[:, None])


def advantages_and_returns(
    rewards_B_T: torch.Tensor, values_B_T: torch.Tensor, mask_B_T: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16) and returns A + V, both (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}. A completion ends after its last token,
    also one that was cut: its value after that is 0.
    """
    values_B_T, rewards_B_T = masked(values_B_T, mask_B_T), masked(rewards_B_T, mask_B_T)
    advantage_B = next_B = torch.zeros_like(values_B_T[:, 0])
    columns = []
    for t in reversed(range(values_B_T.shape[1])):
        delta_B = rewards_B_T[:, t] + gamma * next_B - values_B_T[:, t]
        advantage_B = (delta_B + gamma * lam * advantage_B).masked_fill(~mask_B_T[:, t], 0.0)
        next_B = values_B_T[:, t]
        columns.append(advantage_B)
    advantages_B_T = torch.stack(columns[::-1], dim=1)
    return advantages_B_T, advantages_B_T + values_B_T


def sampler_weights(difference_B_T: torch.Tensor, mask_B_T: torch.Tensor, correction: str, cap: float) -> torch.Tensor:
    """Weight of each token's policy term, (B, T), from log pi_trainer - log pi_sampler; 0 where masked.

    `correction` is `[rollout] correction`: the ratio of the token, or of the whole sequence, is cut at `cap`
    ("..._truncate") or counts nothing above it ("..._mask"); "none" weighs every token 1. ValueError for another.
    """
    level, _, kind = correction.partition("_")
    if correction == "none":
        return mask_B_T.to(difference_B_T.dtype)
    if level not in ("token", "sequence") or kind not in ("truncate", "mask"):
        raise ValueError(f"rollout.correction {correction!r} is none that ppo knows")
    log_weights = masked(difference_B_T, mask_B_T)
    if level == "sequence":
        log_weights = log_weights.sum(1, keepdim=True).expand_as(mask_B_T)
    weights = log_weights.exp()
    weights = weights.clamp(max=cap) if kind == "truncate" else weights.masked_fill(weights > cap, 0.0)
    return masked(weights, mask_B_T)


def policy_terms(
    logps_B_T: torch.Tensor, old_B_T: torch.Tensor, advantages_B_T: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r, 1 +- cliprange) A) with r = pi / pi_old, and where the clipped one was taken (B, T) bool.

    Schulman et al. 2017, arXiv 1707.06347, eq. 7. Where it is taken the policy has no gradient.
    """
    ratio = (logps_B_T - old_B_T).exp()
    plain = -advantages_B_T * ratio
    clipped = -advantages_B_T * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), clipped > plain


def value_terms(
    values_B_T: torch.Tensor, old_B_T: torch.Tensor, returns_B_T: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """max((V - R)^2, (V_old + clip(V - V_old, +- cliprange) - R)^2) / 2, and where the clipped one was taken.

    Not in the PPO paper: from openai/baselines, kept by Ziegler et al. 2019 and all after them.
    """
    plain = (values_B_T - returns_B_T) ** 2
    bounded = old_B_T + (values_B_T - old_B_T).clamp(-cliprange, cliprange)
    clipped = (bounded - returns_B_T) ** 2
    return torch.maximum(plain, clipped) / 2, clipped > plain


def explained_variance(values_B_T: torch.Tensor, returns_B_T: torch.Tensor, mask_B_T: torch.Tensor) -> torch.Tensor:
    """1 - Var(R - V) / Var(R): 1 for a perfect value model, 0 for a constant, NaN where the returns do not vary."""
    variance = masked_variance(returns_B_T, mask_B_T)
    unexplained = masked_variance(returns_B_T - values_B_T, mask_B_T)
    return torch.where(variance > 0, 1 - unexplained / variance, torch.nan)
