"""Gaussian noise that depends on what it is for, never on who draws it.

Every tensor of noise is drawn whole from (seed, stream, indices) by a counter-based generator on the CPU and then
sliced to the rank's tokens: the same bits at every layout, on every machine, with or without a GPU. A generator
whose state is carried along would give other noise as soon as a rank held other tokens or other samples.
"""

import numpy as np
import torch

ROLLOUT, EVALUATION, SAMPLE = 0, 1, 2  # streams: training never sees the noise that evaluation uses
INITIAL = 2**31  # in the place of a step number: the initial noise


def gaussian(shape: tuple[int, ...], seed: int, stream: int, *indices: int) -> torch.Tensor:
    """Standard normal float32 of `shape` on the CPU, a function of the integers alone (all non-negative)."""
    if min((seed, stream, *indices)) < 0:
        raise ValueError(f"noise: seed, stream and indices must be >= 0, got {(seed, stream, *indices)}")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, *indices])))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def token_noise(
    num_tokens: int, channels: int, samples: list[int], seed: int, stream: int, group: int, step: int
) -> torch.Tensor:
    """Noise of whole videos, float32 [num_tokens, len(samples), channels], one draw for each sample of a group."""
    draws = [gaussian((num_tokens, channels), seed, stream, group, sample, step) for sample in samples]
    return torch.stack(draws, dim=1)
