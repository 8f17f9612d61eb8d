"""The denoising loop. Every sampler is x' = a x + b v + std z, so there is one loop for all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sage.grpo.sde import StepCoefficients, log_prob_from_error, squared_error_sum, step_mean, step_sample
from megatron_sage.parallel import noise
from megatron_sage.parallel.reductions import sum_over_shards
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import Prompt, VideoShape

Velocity = Callable[[torch.Tensor, float, Prompt], torch.Tensor]  # (x_SBC, sigma, prompt) -> v_SBC


@dataclass(frozen=True)
class StepTable:
    """The schedule and the three numbers of each step, as Python floats: they are exact float64 and never on a GPU."""

    sigmas: tuple[float, ...]  # N + 1
    a: tuple[float, ...]
    b: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def build(cls, sigmas: torch.Tensor, coefficients: StepCoefficients) -> "StepTable":
        """From `shifted_sigmas` and `step_coefficients`."""
        columns = (sigmas, coefficients.sample, coefficients.velocity, coefficients.std)
        return cls(*(tuple(column.tolist()) for column in columns))

    @property
    def trained_steps(self) -> list[int]:
        """The steps with a log-probability: those with noise."""
        return [i for i, std in enumerate(self.std) if std > 0]


def shard_error(
    x_SBC: torch.Tensor, y_SBC: torch.Tensor, shape: VideoShape, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Sum of (x - y)^2 over a whole video, float64 [B]: this rank's real tokens, then the ranks that share them.

    `group` is the process group over which the tokens are split (TP under sequence parallelism), or None when every
    rank holds all of them. Padding tokens sit at the end of a shard and are cut off before they count.
    """
    valid = shape.shard.valid
    error_B = squared_error_sum(x_SBC[:valid], y_SBC[:valid])
    return error_B if group is None else sum_over_shards(error_B, group)


def transition_log_prob(
    x_next_SBC: torch.Tensor, mean_SBC: torch.Tensor, std: float, shape: VideoShape, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """log N(x'; mean, std^2), the mean over the D elements of each video, float64 [B]."""
    return log_prob_from_error(shard_error(x_next_SBC, mean_SBC, shape, group), shape.elements, std)


def step_noise(
    shape: VideoShape, samples: list[int], seed: int, stream: int, group: int, step: int, device: torch.device
) -> torch.Tensor:
    """This rank's tokens of the noise of one step, float32 [S, B, C]."""
    whole = noise.token_noise(shape.shard.num_tokens, shape.channels, samples, seed, stream, group, step)
    return shape.shard.shard(whole).to(device)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    table: StepTable,
    prompt: Prompt,
    shape: VideoShape,
    samples: list[int],
    *,
    seed: int,
    group: int,
    token_group: dist.ProcessGroup | None,
    device: torch.device,
    keep_velocity: bool = False,
    stream: int = noise.ROLLOUT,
    on_step: Callable[[], None] = lambda: None,
) -> MicroTrajectory:
    """Denoise `samples` of one group from their own noise and keep this rank's shard of the way.

    `group` is the number of the group in the run; with (seed, sample, step) it fixes every bit of noise.
    """
    x_SBC = step_noise(shape, samples, seed, stream, group, noise.INITIAL, device)
    latents, velocities, log_probs = [x_SBC], {}, {}
    for i, std in enumerate(table.std):
        v_SBC = velocity(x_SBC, table.sigmas[i], prompt)
        mean_SBC = step_mean(x_SBC, v_SBC, table.a[i], table.b[i])
        if std > 0:
            z_SBC = step_noise(shape, samples, seed, stream, group, i, device)
            x_SBC = step_sample(mean_SBC, std, z_SBC)
            log_probs[i] = transition_log_prob(x_SBC, mean_SBC, std, shape, token_group)
            if keep_velocity:
                velocities[i] = v_SBC
        else:
            x_SBC = mean_SBC
        latents.append(x_SBC)
        on_step()
    return MicroTrajectory(group, samples, prompt, latents, log_probs, velocities)


@torch.no_grad()
def reference_velocities(velocity: Velocity, table: StepTable, trajectory: MicroTrajectory) -> None:
    """Fill in the reference's velocity at every trained step, at the same micro-batch shape as the rollout."""
    for i in table.trained_steps:
        x_SBC = trajectory.latents_SBC[i]
        trajectory.reference_SBC[i] = velocity(x_SBC, table.sigmas[i], trajectory.prompt)


@torch.no_grad()
def sample_latents(
    velocity: Velocity,
    table: StepTable,
    prompt: Prompt,
    shape: VideoShape,
    samples: list[int],
    *,
    seed: int,
    group: int,
    stream: int,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Only the finished latents, [S, B, C] on this rank: validation and `sample`."""
    x_SBC = step_noise(shape, samples, seed, stream, group, noise.INITIAL, device)
    for i, std in enumerate(table.std):
        mean_SBC = step_mean(x_SBC, velocity(x_SBC, table.sigmas[i], prompt), table.a[i], table.b[i])
        z_SBC = step_noise(shape, samples, seed, stream, group, i, device) if std > 0 else None
        x_SBC = step_sample(mean_SBC, std, z_SBC)
        on_step()
    return x_SBC
