"""The denoising loop. Every sampler is x' = a x + b v + std z, so there is one loop for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron_sage.model.precision import Quantisation
from megatron_sage.parallel import noise
from megatron_sage.parallel.pipeline import Occupancy, share_from_last
from megatron_sage.rollout.buffer import Kept, MicroTrajectory
from megatron_sage.rollout.passes import Denoising, Recording, References, run
from megatron_sage.rollout.policy import Network, Prompt, VideoShape
from megatron_sage.rollout.transitions import StepTable, shard_error, step_noise, transition_log_prob

__all__ = [
    "Flight",
    "StepTable",
    "final_latents",
    "reference_velocities",
    "rollout",
    "sample_latents",
    "shard_error",
    "step_noise",
    "transition_log_prob",
]


@dataclass(frozen=True)
class Flight:
    """One micro-batch on its way: samples of one group, whose number in the run fixes their noise."""

    group: int
    samples: list[int]
    prompt: Prompt


@torch.no_grad()
def rollout(
    network: Network,
    table: StepTable,
    flights: Sequence[Flight],
    *,
    seed: int,
    token_group: dist.ProcessGroup | None,
    keep_velocity: bool = False,
    conditional: bool = False,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[MicroTrajectory], Occupancy]:
    """Denoise all flights, each from its own noise, and keep this rank's shard of what is trained on.

    All ranks of the run call: where one of them has got a stop signal they raise Stopped together.

    Args:
        keep_velocity: keep the policy's velocities too.
        conditional: log-probabilities (and velocities) of the conditional branch alone, whatever the guidance that
            the steps are taken with.
        dtype: of the stored latents; they are rounded before they are scored.
        offload: let latents and velocities wait in host memory.

    Returns:
        A trajectory for each flight, and what this rank did in which slot. The log-probabilities are the last stage's
        and shared with the others; latents are on the first and on the last, around trained steps and at the end.
    """
    trajectories = [
        MicroTrajectory(
            f.group,
            f.samples,
            f.prompt,
            latents_SBC=Kept(dtype, offload),
            velocity_SBC=Kept(offload=offload),
        )
        for f in flights
    ]
    noise_of = partial(_noise, network.shape, seed, noise.ROLLOUT, network.device)
    work = Recording(network, table, trajectories, noise_of, on_step, token_group, keep_velocity, conditional)
    occupancy = run(work, len(table.std), chained=True)
    network.control.end_phase()
    _share_log_probs(network, table, trajectories)
    return trajectories, occupancy


@torch.no_grad()
def sample_latents(
    network: Network,
    table: StepTable,
    flights: Sequence[Flight],
    *,
    seed: int,
    stream: int,
    on_step: Callable[[], None] = lambda: None,
    noise_of: Callable[[MicroTrajectory, int], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Only the finished latents, [S, B, C] on every stage: validation and `sample`.

    `noise_of`: this rank's tokens of the noise of a flight's step, [S, B, C]; in place of `seed` and `stream`.
    """
    trajectories = [MicroTrajectory(f.group, f.samples, f.prompt) for f in flights]
    noise_of = noise_of or partial(_noise, network.shape, seed, stream, network.device)
    work = Denoising(network, table, trajectories, noise_of, on_step)
    run(work, len(table.std), chained=True)
    return [_on_every_stage(network, x_SBC, f) for x_SBC, f in zip(work.present, flights, strict=True)]


@torch.no_grad()
def final_latents(network: Network, table: StepTable, trajectory: MicroTrajectory) -> torch.Tensor:
    """The finished videos' latents, [S, B, C] on every stage."""
    x_SBC = trajectory.latents_SBC[len(table.std)] if network.ends else torch.empty(0)
    return _on_every_stage(network, x_SBC, trajectory)


@torch.no_grad()
def reference_velocities(
    network: Network,
    table: StepTable,
    trajectories: Sequence[MicroTrajectory],
    pairs: Sequence[tuple[int, int]] | None = None,
    name: str = "position",
) -> Occupancy:
    """Fill in `reference_SBC[name]`, a reference's velocities, at the same micro-batch shape as the rollout.

    `pairs`: (number of the trajectory, step); None: every trained step of every trajectory. Whatever their order, they
    are taken step by step, where trajectories of one prompt share its embedded text.
    """
    for trajectory in trajectories:
        trajectory.reference_SBC.setdefault(name, Kept(offload=trajectory.velocity_SBC.offload))
    if pairs is None:
        pairs = [(number, step) for step in table.trained_steps for number in range(len(trajectories))]
    ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    work = References(network, table, [(trajectories[number], step) for number, step in ordered], name)
    with Quantisation(network.chunks).other_weights():
        occupancy = run(work, 1, chained=False)
    network.control.end_phase()
    return occupancy


def _noise(
    shape: VideoShape, seed: int, stream: int, device: torch.device, trajectory: MicroTrajectory, step: int
) -> torch.Tensor:
    return step_noise(shape, trajectory.samples, seed, stream, trajectory.group, step, device)


def _on_every_stage(network: Network, x_SBC: torch.Tensor, flight: Flight | MicroTrajectory) -> torch.Tensor:
    if network.group is None or network.group.size() == 1:
        return x_SBC
    if not network.ends:
        size = (network.shape.shard.local, len(flight.samples), network.shape.channels)
        x_SBC = torch.empty(size, device=network.device)
    return share_from_last(x_SBC, network.group)


def _share_log_probs(network: Network, table: StepTable, trajectories: list[MicroTrajectory]) -> None:
    """The last stage owns the log-probabilities: one broadcast of [flights, trained steps, B] over PP."""
    steps = table.trained_steps
    if network.group is None or network.group.size() == 1 or not trajectories or not steps:
        return
    size = (len(trajectories), len(steps), len(trajectories[0].samples))
    if network.ends:
        owned = torch.stack([torch.stack([t.log_prob_B[i] for i in steps]) for t in trajectories])
    else:
        owned = torch.empty(size, dtype=torch.float64, device=network.device)
    share_from_last(owned, network.group)
    for trajectory, rows in zip(trajectories, owned, strict=True):
        trajectory.log_prob_B = dict(zip(steps, rows, strict=True))
