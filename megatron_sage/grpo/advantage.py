"""Group-relative advantages, and what becomes of rewards that are not numbers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

# Equal rewards computed in float32 differ by rounding; dividing by that residue turns it into full-size advantages.
STD_FLOOR = 1e-4
STD_EPSILON = 1e-8


class GroupAdvantages(NamedTuple):
    """Advantages of one iteration and the counts that must be logged with them."""

    advantages: torch.Tensor  # float64 [groups, G], always finite; 0 where mask is False
    mask: torch.Tensor  # bool [groups, G]; False: no gradient from this sample, the KL terms included
    nonfinite: int  # samples whose reward is nan or infinite
    zero_std_groups: int  # groups whose rewards are all equal (std below the floor): no signal
    dropped_groups: int  # groups with fewer than two finite rewards


def group_advantages(rewards: torch.Tensor | np.ndarray | Sequence[Sequence[float]]) -> GroupAdvantages:
    """A = (R - mean) / (std + 1e-8) in each row of ``rewards`` [groups, G], std with ddof = 1, in float64.

    A reward that is nan, infinite or None is never turned into a number: the sample leaves its group's statistics and
    gets no gradient. A group with fewer than two finite rewards is dropped. A std below 1e-4 max(1, |mean|) counts as
    zero: the whole group gets advantage 0. Raises ValueError unless ``rewards`` is two-dimensional.
    """
    values = _as_float64(rewards)
    finite = values.isfinite()
    kept = finite.sum(dim=1, keepdim=True)
    usable = kept >= 2
    safe = torch.where(finite, values, 0.0)
    # Divided by the largest magnitude above 1, so that squares of huge rewards do not overflow.
    scale = safe.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    safe = safe / scale
    mean = safe.sum(dim=1, keepdim=True) / kept.clamp(min=1)
    centred = torch.where(finite, safe - mean, 0.0)
    std = (centred.square().sum(dim=1, keepdim=True) / (kept - 1).clamp(min=1)).sqrt()
    flat = usable & (std < STD_FLOOR * torch.maximum(1 / scale, mean.abs()))
    mask = finite & usable
    advantages = torch.where(mask & ~flat, centred / (std + STD_EPSILON / scale), 0.0)
    return GroupAdvantages(
        advantages=advantages,
        mask=mask,
        nonfinite=int((~finite).sum()),
        zero_std_groups=int(flat.sum()),
        dropped_groups=int((~usable).sum()),
    )


def _as_float64(rewards: Any) -> torch.Tensor:
    """``rewards`` as a detached float64 CPU tensor [groups, G]; None becomes nan."""
    if isinstance(rewards, torch.Tensor):
        values = rewards.detach().to("cpu", torch.float64)
    else:
        try:
            values = torch.from_numpy(np.array(rewards, dtype=np.float64))
        except (TypeError, ValueError):
            raise ValueError("rewards must be numbers in rows of equal length, [groups, group_size]") from None
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(f"rewards have shape {list(values.shape)}: give [groups, group_size]")
    return values


class NonFiniteGuard:
    """Says when to stop: more than ``fraction`` of the samples non-finite in ``patience`` iterations running."""

    def __init__(self, patience: int = 3, fraction: float = 0.5) -> None:
        if patience < 1 or not 0 <= fraction < 1:
            raise ValueError(f"patience {patience}, fraction {fraction}: need patience >= 1 and 0 <= fraction < 1")
        self.patience = patience
        self.fraction = fraction
        self.bad_iterations = 0

    def update(self, nonfinite: int, total: int) -> bool:
        """Count one iteration (over all data replicas); True when training should save and stop."""
        if not 0 <= nonfinite <= total or total < 1:
            raise ValueError(f"{nonfinite} non-finite rewards of {total}: need 0 <= nonfinite <= total, total >= 1")
        self.bad_iterations = self.bad_iterations + 1 if nonfinite > self.fraction * total else 0
        return self.bad_iterations >= self.patience

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"bad_iterations": self.bad_iterations}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a saved count."""
        self.bad_iterations = int(state["bad_iterations"])
