"""Every sampler is three numbers per step: x' = a x + b v + std z with z ~ N(0, I).

(a, b, std) depend on the schedule and eta alone, are computed once in float64, and everything else (log-probability,
ratio, equalizer, KL) follows from them. Shape suffixes: S tokens of this rank, B batch, C channels, D elements.
"""

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_sage.grpo.schedule import checked_sigmas

SDE_TYPES = ("ode", "dance_grpo", "flow_grpo", "sage_grpo", "cps", "cps_unnormalized")

# The integral of sigma/(1-sigma) diverges at sigma = 1; the paper's implementation stops it at 1 - c (c = 3e-3).
SAGE_CLAMP = 3e-3
# FlowGRPO instead puts sigma_max, the schedule's level of this index, in the place of sigma = 1.
FLOW_SIGMA_MAX_INDEX = 1
# What stands for sigma = 1 where 1 - sigma is divided by: each sampler's own choice, or one of the two for both.
CEILINGS = ("default", "sigma_max", "clamp")


class StepCoefficients(NamedTuple):
    """x' = sample * x + velocity * v + std * z; each a float64 tensor [N] on the CPU."""

    sample: torch.Tensor
    velocity: torch.Tensor
    std: torch.Tensor

    def step(self, index: int) -> tuple[float, float, float]:
        """(a, b, std) of one step as Python floats."""
        return self.sample[index].item(), self.velocity[index].item(), self.std[index].item()

    def trained_steps(self) -> list[int]:
        """Steps that have a log-probability. std = 0 is deterministic: nothing to train on there."""
        return self.std.nonzero().flatten().tolist()


def is_normalized(sde_type: str) -> bool:
    """Whether the log-probability has its constants; the public implementation's cps leaves all of them out."""
    return sde_type != "cps_unnormalized"


def step_coefficients(
    sde_type: str, sigmas: torch.Tensor | Sequence[float], eta: float, ceiling: str = "default"
) -> StepCoefficients:
    """(a, b, std) of every step of a sampler, float64 [N] each, for noise levels ``sigmas`` [N+1].

    ``eta`` scales the noise; 0 gives the ODE for every type. For cps it is the share of the noise that is redrawn,
    from 0 (none) to 1 (all). ``cps_unnormalized`` has the coefficients of cps; its log-probability differs.
    ``ceiling`` (paper, appendix A.2): what flow_grpo and sage_grpo divide by at sigma = 1: ``sigma_max`` (1 -
    sigma_1), ``clamp`` (3e-3), or ``default``, the former for flow_grpo and the latter for sage_grpo.

    Raises ValueError for an unknown ``sde_type``, a bad ``eta`` and levels that do not strictly decrease in [0, 1].
    """
    if ceiling not in CEILINGS:
        raise ValueError(f"ceiling is {ceiling!r}: give one of {', '.join(CEILINGS)}")
    if sde_type not in SDE_TYPES:
        nearest = difflib.get_close_matches(str(sde_type), SDE_TYPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"sde_type is {sde_type!r}: did you mean {nearest!r}? Known: {', '.join(SDE_TYPES)}")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta is {eta}: the noise scale must be finite and not negative")
    levels = checked_sigmas(sigmas)
    if sde_type.startswith("cps"):
        return _cps(levels, eta)
    return _reverse_sde(levels, _variance(sde_type, levels, eta, ceiling))


def _variance(sde_type: str, levels: torch.Tensor, eta: float, ceiling: str) -> torch.Tensor:
    """Variance of the noise that each step of a reverse SDE adds, [N]."""
    start, end = levels[:-1], levels[1:]
    step = start - end
    # Only the first level can be 1. FlowGRPO replaces exactly that one; SAGE stops whatever lies above 1 - c.
    replaced = torch.where(start == 1, levels[FLOW_SIGMA_MAX_INDEX], start)
    clamped = start.clamp(max=1 - SAGE_CLAMP)
    if sde_type == "dance_grpo":
        rate = step
    elif sde_type == "flow_grpo":
        rate = start / (1 - (clamped if ceiling == "clamp" else replaced)) * step
    elif sde_type == "sage_grpo":
        # Exact integral of sigma/(1-sigma) over the step. Where even the clamped start leaves nothing (sigma_{i+1} near
        # or above 1 - c: the first steps of fine or strongly shifted schedules) it is negative and has no root.
        top = replaced if ceiling == "sigma_max" else clamped
        rate = torch.log1p((top - end) / (1 - top)) - step  # log1p: the two terms nearly cancel at small sigma
        rate = rate.clamp(min=0.0)
    else:
        rate = torch.zeros_like(step)
    return eta**2 * rate


def _reverse_sde(levels: torch.Tensor, variance: torch.Tensor) -> StepCoefficients:
    """Euler step of the ODE plus variance/2 times the score, s = -(x + (1-sigma) v)/sigma."""
    start, step = levels[:-1], levels[:-1] - levels[1:]
    pull = variance / (2 * start)
    return StepCoefficients(sample=1 - pull, velocity=-step - pull * (1 - start), std=variance.sqrt())


def _cps(levels: torch.Tensor, eta: float) -> StepCoefficients:
    """Coefficients-preserving sampling: x' = (1-sigma') x0_hat + r eps_hat + std z with r^2 + std^2 = sigma'^2."""
    if eta > 1:
        raise ValueError(f"eta is {eta}: cps redraws the share sin(eta pi/2) of the noise, so eta must be in [0, 1]")
    start, end = levels[:-1], levels[1:]
    std = end * math.sin(eta * math.pi / 2)
    # r = sqrt(sigma'^2 - std^2), written as a cosine: rounding can make the difference negative at eta = 1.
    kept = end * math.cos(eta * math.pi / 2)
    return StepCoefficients(sample=(1 - end) + kept, velocity=(1 - start) * kept - start * (1 - end), std=std)


def step_mean(x: torch.Tensor, velocity: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """Mean of the next sample, a x + b v, in float32 or better, same shape as ``x``."""
    return a * at_least_float32(x) + b * at_least_float32(velocity)


def step_sample(mean: torch.Tensor, std: float, noise: torch.Tensor | None) -> torch.Tensor:
    """Next sample, mean + std z, in the precision of ``mean``; ``noise`` is not read (and may be None) when std is 0.

    Store what comes back uncast: a bf16 copy scored later is another transition than the one that was drawn, and
    its ratio is biased to one side of 1.
    """
    if std == 0:
        return mean
    if noise is None or noise.shape != mean.shape:
        got = None if noise is None else list(noise.shape)
        raise ValueError(f"noise has shape {got}: a step with std {std} needs {list(mean.shape)}")
    return mean + std * noise.to(mean.dtype)


def squared_error_sum(
    x: torch.Tensor, y: torch.Tensor, batch_dim: int = -2, token_mask_S: torch.Tensor | None = None
) -> torch.Tensor:
    """Per-sample sum of (x - y)^2 over this rank's elements, float64 [B], differentiable.

    The default ``batch_dim`` fits [S, B, C] and [B, D]. ``token_mask_S`` (bool, over dimension 0) leaves padding tokens
    out; their values may be anything, nan included. Sums are float64 so that a log-probability does not depend on how
    the tokens are split over ranks.
    """
    if x.shape != y.shape:
        raise ValueError(f"shapes {list(x.shape)} and {list(y.shape)} differ: both must be the same tokens")
    difference = at_least_float32(x) - at_least_float32(y)
    if token_mask_S is not None:
        _check_mask(token_mask_S, x, batch_dim)
        # where, not a product: 0 * nan is nan.
        mask = token_mask_S.reshape(-1, *[1] * (x.dim() - 1))
        difference = torch.where(mask, difference, torch.zeros_like(difference))
    others = [d for d in range(x.dim()) if d != batch_dim % x.dim()]
    return difference.square().sum(others, dtype=torch.float64)


def log_prob_from_error(sum_sq_B: torch.Tensor, count: int, std: float, normalized: bool = True) -> torch.Tensor:
    """Mean over ``count`` elements of the Gaussian log-density, [B], from the summed squared error of the whole sample.

    A MEAN, not a sum: the clip range of 1e-4 is per element. With the tokens split over ranks, pass the all-reduced
    sum and the number of elements of the whole sample. ``normalized=False`` (cps_unnormalized) leaves every constant
    out, 1/(2 std^2) included: minus the mean squared error.
    """
    if not std > 0:
        raise ValueError(
            f"std is {std}: a step without noise has no log-probability; train steps with std above 0 only"
        )
    if count < 1:
        raise ValueError(f"count is {count}: a log-probability needs at least one element")
    if not normalized:
        return -sum_sq_B / count
    return -sum_sq_B / (2 * std**2 * count) - math.log(std) - 0.5 * math.log(2 * math.pi)


def log_prob_sum(
    x_next: torch.Tensor,
    mean: torch.Tensor,
    std: float,
    batch_dim: int = -2,
    token_mask_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-sample SUM of the Gaussian log-density over this rank's elements, [B]: add ranks, then divide by all D."""
    count = element_count(x_next, batch_dim, token_mask_S)
    if count == 0:  # a rank that holds padding only
        return squared_error_sum(x_next, mean, batch_dim, token_mask_S)
    return count * log_prob(x_next, mean, std, batch_dim, token_mask_S)


def log_prob(
    x_next: torch.Tensor,
    mean: torch.Tensor,
    std: float,
    batch_dim: int = -2,
    token_mask_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-sample MEAN of the Gaussian log-density of ``x_next`` under N(mean, std^2), float64 [B]."""
    error_B = squared_error_sum(x_next, mean, batch_dim, token_mask_S)
    return log_prob_from_error(error_B, element_count(x_next, batch_dim, token_mask_S), std)


def element_count(x: torch.Tensor, batch_dim: int = -2, token_mask_S: torch.Tensor | None = None) -> int:
    """Elements of one sample in ``x``, padding tokens left out."""
    count = x.numel() // x.shape[batch_dim]
    if token_mask_S is None:
        return count
    _check_mask(token_mask_S, x, batch_dim)
    return count // x.shape[0] * int(token_mask_S.sum())


def _check_mask(token_mask_S: torch.Tensor, x: torch.Tensor, batch_dim: int) -> None:
    """ValueError unless the mask is bool, one entry for each token, and dimension 0 is not the batch."""
    if token_mask_S.dtype != torch.bool or token_mask_S.shape != x.shape[:1] or batch_dim % x.dim() == 0:
        raise ValueError(
            f"token mask is {token_mask_S.dtype} {list(token_mask_S.shape)} for values {list(x.shape)} with batch"
            f" dimension {batch_dim}: it must be bool over dimension 0, which must hold tokens"
        )


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself in float32 or float64, a float32 copy of anything smaller."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
