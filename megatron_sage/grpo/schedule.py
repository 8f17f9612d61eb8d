"""The noise schedule of a rectified flow: sigma falls from 1 (noise) to 0 (data)."""

import math
import operator
from collections.abc import Sequence

import torch


def shifted_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    """Noise levels sigma_0 = 1 > ... > sigma_N = 0 of ``num_steps`` steps, float64 [N+1].

    ``s_i = 1 - i/N`` and ``sigma_i = k s_i / (1 + (k-1) s_i)`` with shift ``k`` (diffusers'
    FlowMatchEulerDiscreteScheduler, static shift). Step i goes from sigma_i to sigma_{i+1}.

    Raises ValueError for num_steps < 1, shift <= 0 and shifts at which float64 levels coincide.
    """
    try:
        steps = operator.index(num_steps)
    except TypeError:
        raise ValueError(f"num_steps is {num_steps!r}: give a whole number of at least 1") from None
    if steps < 1:
        raise ValueError(f"num_steps is {steps}: a schedule needs at least 1 step")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift is {shift}: give a finite number above 0 (1 leaves the steps even, 5 suits 480p)")
    done = torch.arange(steps + 1, dtype=torch.float64)
    left = steps - done
    # s = left/N put into the formula and multiplied by N: no subtraction, so both ends are exact for every shift.
    sigmas = shift * left / (done + shift * left)
    if not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"shift is {shift}: with num_steps {steps} neighbouring levels coincide; bring it near 1")
    return sigmas


def checked_sigmas(sigmas: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """``sigmas`` as a float64 CPU tensor [N+1]; ValueError unless finite, in [0, 1] and strictly decreasing."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    if levels.dim() != 1 or levels.numel() < 2:
        raise ValueError(f"sigmas have shape {list(levels.shape)}: give a list of at least 2 noise levels")
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        bad = levels[~((levels >= 0) & (levels <= 1))][0].item()
        raise ValueError(f"sigmas contain {bad}: every noise level must be in [0, 1]")
    rising = (levels.diff() >= 0).nonzero()
    if len(rising):
        i = int(rising[0])
        raise ValueError(
            f"sigmas[{i}] = {levels[i].item()} and sigmas[{i + 1}] = {levels[i + 1].item()}:"
            " noise levels must strictly decrease"
        )
    return levels
