"""The clipped policy loss."""

from typing import NamedTuple

import torch


class PolicyLoss(NamedTuple):
    """Per-sample loss and what is logged about it, each [B]."""

    loss: torch.Tensor  # differentiable
    ratio: torch.Tensor  # detached, pi_new / pi_old per element
    clipped: torch.Tensor  # bool: the clip is active, so this sample's gradient is zero


def policy_loss(
    log_prob_new: torch.Tensor,
    log_prob_old: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    advantage_clip: float = 5.0,
) -> PolicyLoss:
    """max(-A ratio, -A clip(ratio, 1-c, 1+c)) with ratio = exp(logp_new - logp_old), for each sample [B].

    Log-probabilities are means over the latent elements in float32 or better, which is why ``clip_range`` is as small
    as 1e-4. Advantages are clamped to +-``advantage_clip``. No gradient flows into ``log_prob_old`` or ``advantages``.
    Multiply by the step's gradient scale and average over samples outside.
    """
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range is {clip_range}: it must be between 0 and 1 (1e-4 for mean log-probabilities)")
    if not advantage_clip > 0:
        raise ValueError(f"advantage_clip is {advantage_clip}: it must be above 0")
    shapes = [list(t.shape) for t in (log_prob_new, log_prob_old, advantages)]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ValueError(f"log_prob_new, log_prob_old and advantages have shapes {shapes}: they must agree")
    for name, value in (("log_prob_new", log_prob_new), ("log_prob_old", log_prob_old)):
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {value.dtype}: below float32 its rounding is larger than the clip range")
    advantage = advantages.detach().to(log_prob_new.dtype).clamp(-advantage_clip, advantage_clip)
    ratio = (log_prob_new - log_prob_old.detach()).exp()
    free = -advantage * ratio
    held = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(loss=torch.maximum(free, held), ratio=ratio.detach(), clipped=(held > free).detach())
