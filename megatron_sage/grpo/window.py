"""Training a window of the steps: inside it the SDE draws noise, outside every step runs as ode (MixGRPO)."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sage.grpo.schedule import checked_sigmas
from megatron_sage.grpo.sde import StepCoefficients

STRATEGIES = ("fixed", "random", "progressive")


def window_steps(
    trained: Sequence[int],
    size: int,
    stride: int = 1,
    strategy: str = "progressive",
    start: int = 0,
    interval: int = 1,
    seed: int = 0,
    iteration: int = 0,
) -> list[int]:
    """The steps of an iteration's window: ``size`` neighbours among ``trained`` (the steps with noise).

    Args:
        stride: distance of two positions of the window, counted like ``start`` in steps with noise.
        strategy: ``fixed`` stays at ``start``; ``random`` draws one of the positions start, start + stride, ... anew
            for each iteration, a function of (seed, iteration) alone; ``progressive`` goes through them in order,
            one every ``interval`` iterations, and begins again after the last.

    The last position is moved back so that the window is always whole and every step from ``start`` on has its turn
    (as long as stride <= size).
    """
    count = len(trained)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}: give one of {', '.join(STRATEGIES)}")
    if not (1 <= size <= count and 0 <= start <= count - size):
        raise ValueError(
            f"size {size}, start {start}: the window must lie within the {count} steps with noise,"
            f" so 1 <= size <= {count} and start <= {max(count - size, 0)}"
        )
    if stride < 1 or interval < 1 or iteration < 0 or seed < 0:
        raise ValueError(
            f"stride {stride}, interval {interval}, iteration {iteration}, seed {seed}: the first two must be at least"
            " 1, the others not negative"
        )
    last = count - size
    places = sorted({*range(start, last + 1, stride), last})
    if strategy == "fixed":
        place = start
    elif strategy == "random":
        place = places[int(np.random.default_rng([seed, iteration, 1]).integers(len(places)))]
    else:
        place = places[iteration // interval % len(places)]
    return list(trained[place : place + size])


def windowed(
    coefficients: StepCoefficients, sigmas: torch.Tensor | Sequence[float], steps: Sequence[int]
) -> StepCoefficients:
    """``coefficients`` at ``steps``, the ode's (1, sigma' - sigma, 0) everywhere else, float64 [N] each."""
    levels = checked_sigmas(sigmas)
    for step in steps:
        if not 0 <= step < len(levels) - 1:
            raise ValueError(f"step {step} is none of the {len(levels) - 1} steps of the schedule")
    inside = torch.zeros(len(levels) - 1, dtype=torch.bool)
    inside[list(steps)] = True
    ode = (torch.ones_like(levels[1:]), levels.diff(), torch.zeros_like(levels[1:]))
    return StepCoefficients(*(torch.where(inside, x, y) for x, y in zip(coefficients, ode, strict=True)))
