"""Temporal gradient equalizer: every trained step pulls on the policy with the same strength."""

import torch

from megatron_sage.grpo.sde import StepCoefficients


def norm_factors(coefficients: StepCoefficients, normalized: bool = True) -> torch.Tensor:
    """N_i = |b_i| / std_i, float64 [N], 0 where std is 0.

    d logp / d v = (b/std) z / D at a sample x' = mean + std z, so N_i is exactly the factor by which step i scales the
    gradient that reaches the network. The log-probability without constants (``normalized=False``) has
    d logp / d v = 2 b std z / D, so there N_i = 2 |b_i| std_i: the equalizer must match its own log-probability.
    """
    std = coefficients.std
    trained = std > 0
    if not normalized:
        return 2 * coefficients.velocity.abs() * std
    return torch.where(trained, coefficients.velocity.abs() / torch.where(trained, std, 1.0), 0.0)


def gradient_scales(coefficients: StepCoefficients, normalized: bool = True) -> torch.Tensor:
    """S_i = median(N) / N_i by which the policy loss of step i is multiplied, float64 [N].

    The median is over the trained steps (std above 0), the lower one for an even count. Steps without noise are not
    trained: their scale is 0. The KL terms are not scaled.
    """
    factors = norm_factors(coefficients, normalized)
    trained = coefficients.std > 0
    if not bool(trained.any()):
        return torch.zeros_like(factors)
    median = factors[trained].median()
    scales = median / (factors + 1e-12 * median)
    return torch.where(trained, scales, 0.0)
