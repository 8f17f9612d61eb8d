"""One step of a sampler on this rank's shard: the table of its numbers, its noise and its log-probability."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sage.grpo.sde import StepCoefficients, log_prob_from_error, squared_error_sum
from megatron_sage.parallel import noise
from megatron_sage.parallel.reductions import sum_over_shards
from megatron_sage.rollout.policy import VideoShape


@dataclass(frozen=True)
class StepTable:
    """The schedule and the three numbers of each step, as Python floats: they are exact float64 and never on a GPU."""

    sigmas: tuple[float, ...]  # N + 1
    a: tuple[float, ...]
    b: tuple[float, ...]
    std: tuple[float, ...]
    normalized: bool = True  # False: log-probabilities without their constants (cps_unnormalized)

    @classmethod
    def build(cls, sigmas: torch.Tensor, coefficients: StepCoefficients, normalized: bool = True) -> "StepTable":
        """From `shifted_sigmas` and `step_coefficients`."""
        a, b, std = (tuple(column.tolist()) for column in coefficients)
        return cls(tuple(sigmas.tolist()), a, b, std, normalized)

    @property
    def trained_steps(self) -> list[int]:
        """The steps with a log-probability: those with noise."""
        return [i for i, std in enumerate(self.std) if std > 0]

    @property
    def kept_latents(self) -> set[int]:
        """Latents that a rollout keeps: both ends of every trained step, and the finished video."""
        return {len(self.std)} | {j for i in self.trained_steps for j in (i, i + 1)}


def shard_error(
    x_SBC: torch.Tensor, y_SBC: torch.Tensor, shape: VideoShape, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Sum of (x - y)^2 over a whole video, float64 [B]: this rank's real tokens, then the ranks that share them.

    `group` is the process group over which the tokens are split (CP, TP x CP under sequence parallelism), or None when
    every rank holds all of them. Padding tokens sit at the end of a shard and are cut off before they count.
    """
    valid = shape.shard.valid
    error_B = squared_error_sum(x_SBC[:valid], y_SBC[:valid])
    return error_B if group is None else sum_over_shards(error_B, group)


def transition_log_prob(
    x_next_SBC: torch.Tensor,
    mean_SBC: torch.Tensor,
    std: float,
    shape: VideoShape,
    group: dist.ProcessGroup | None,
    normalized: bool = True,
) -> torch.Tensor:
    """log N(x'; mean, std^2), the mean over the D elements of each video, float64 [B]."""
    return log_prob_from_error(shard_error(x_next_SBC, mean_SBC, shape, group), shape.elements, std, normalized)


def step_noise(
    shape: VideoShape, samples: list[int], seed: int, stream: int, group: int, step: int, device: torch.device
) -> torch.Tensor:
    """This rank's tokens of the noise of one step, float32 [S, B, C]."""
    whole = noise.token_noise(shape.shard.num_tokens, shape.channels, samples, seed, stream, group, step)
    mine = shape.shard.shard(whole)
    if device.type == "cuda":  # from pageable memory the copy would wait for all that was launched before it
        mine = mine.pin_memory()
    return mine.to(device, non_blocking=True)
