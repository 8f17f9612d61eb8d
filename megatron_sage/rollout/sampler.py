"""The denoising loop. Every sampler is x' = a x + b v + std z, so there is one loop for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron_sage.grpo.sde import StepCoefficients, log_prob_from_error, squared_error_sum, step_mean, step_sample
from megatron_sage.parallel import noise
from megatron_sage.parallel.pipeline import Occupancy, Task, execute, plan_slots, share_from_last
from megatron_sage.parallel.reductions import sum_over_shards
from megatron_sage.rollout.buffer import Kept, MicroTrajectory
from megatron_sage.rollout.policy import Network, Prompt, VideoShape


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

    `group` is the process group over which the tokens are split (CP, TP x CP under sequence parallelism), or None when
    every rank holds all of them. Padding tokens sit at the end of a shard and are cut off before they count.
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


@dataclass(frozen=True)
class Flight:
    """One micro-batch on its way: samples of one group, whose number in the run fixes their noise."""

    group: int
    samples: list[int]
    prompt: Prompt


class _Denoising:
    """The work of a rollout: see `parallel.pipeline.Work`. The last stage takes the steps, the first gets the latents.

    Both hold the latents they need and no other stage holds any. The step's noise is drawn on the last stage alone.
    """

    def __init__(
        self,
        network: Network,
        table: StepTable,
        trajectories: list[MicroTrajectory],
        whole_way: bool,
        keep_velocity: bool,
        noise_of: Callable[[MicroTrajectory, int], torch.Tensor],
        token_group: dist.ProcessGroup | None,
        on_step: Callable[[], None],
    ) -> None:
        self.network, self.table, self.trajectories, self.on_step = network, table, trajectories, on_step
        self.whole_way, self.keep_velocity = whole_way, keep_velocity
        self.noise_of, self.token_group = noise_of, token_group
        self.velocities: dict[int, list[torch.Tensor]] = {}
        self.present: list[torch.Tensor] = []  # of each flight: the latents where it is now
        for trajectory in trajectories:
            x_SBC = torch.empty(0)
            if network.starts or network.ends:
                x_SBC = self._stored(trajectory, 0, noise_of(trajectory, noise.INITIAL))
            self.present.append(x_SBC)

    def forward(self, task: Task, packed: torch.Tensor | None) -> torch.Tensor:
        trajectory = self.trajectories[task.flight]
        out = self.network.forward(
            task.chunk,
            self.present[task.flight],
            self.table.sigmas[task.step],
            trajectory.prompt,
            task.branch,
            len(trajectory.samples),
            packed,
        )
        complete = task.branch == self.network.branches - 1
        if self.network.ends and task.chunk == self.network.num_chunks - 1:
            self.velocities.setdefault(task.flight, []).append(out)
            if complete:
                self._step(task, self.network.guided(self.velocities.pop(task.flight)))
        if complete and task.chunk == self.network.num_chunks - 1:
            self.on_step()
        return out

    def _step(self, task: Task, v_SBC: torch.Tensor) -> None:
        trajectory, i = self.trajectories[task.flight], task.step
        mean_SBC, std = step_mean(self.present[task.flight], v_SBC, self.table.a[i], self.table.b[i]), self.table.std[i]
        if std == 0:
            self.present[task.flight] = self._stored(trajectory, i + 1, mean_SBC)
            return
        x_SBC = step_sample(mean_SBC, std, self.noise_of(trajectory, i))
        x_SBC = self._stored(trajectory, i + 1, x_SBC)
        if self.whole_way:
            trajectory.log_prob_B[i] = transition_log_prob(x_SBC, mean_SBC, std, self.network.shape, self.token_group)
        if self.keep_velocity:
            trajectory.velocity_SBC[i] = v_SBC
        self.present[task.flight] = x_SBC

    def _stored(self, trajectory: MicroTrajectory, step: int, x_SBC: torch.Tensor) -> torch.Tensor:
        """The latents as they will be read back: what is scored, and what the next step starts from."""
        x_SBC = trajectory.latents_SBC.rounded(x_SBC)
        if self.whole_way:
            trajectory.latents_SBC[step] = x_SBC
        return x_SBC

    def packed_like(self, task: Task) -> torch.Tensor:
        trajectory = self.trajectories[task.flight]
        return self.network.packed_like(trajectory.prompt, task.branch, len(trajectory.samples))

    def _goes_on(self, task: Task) -> bool:
        return task.branch == self.network.branches - 1 and task.step + 1 < len(self.table.std)

    def result(self, task: Task) -> torch.Tensor | None:
        return self.present[task.flight] if self._goes_on(task) else None

    def result_like(self, task: Task) -> torch.Tensor | None:
        return torch.empty_like(self.present[task.flight]) if self._goes_on(task) else None

    def receive(self, task: Task, result: torch.Tensor) -> None:
        self.present[task.flight] = self._stored(self.trajectories[task.flight], task.step + 1, result)


@torch.no_grad()
def rollout(
    network: Network,
    table: StepTable,
    flights: Sequence[Flight],
    *,
    seed: int,
    token_group: dist.ProcessGroup | None,
    keep_velocity: bool = False,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[list[MicroTrajectory], Occupancy]:
    """Denoise all flights, each from its own noise, and keep this rank's shard of the way.

    Args:
        keep_velocity: keep the policy's velocities too.
        dtype: of the stored latents; they are rounded before they are scored.
        offload: let latents and velocities wait in host memory.

    Returns:
        A trajectory for each flight, and what this rank did in which slot. The log-probabilities are the last stage's
        and shared with the others; latents are on the first and on the last.
    """
    trajectories = [
        MicroTrajectory(
            f.group,
            f.samples,
            f.prompt,
            latents_SBC=Kept(dtype, offload),
            velocity_SBC=Kept(offload=offload),
            reference_SBC=Kept(offload=offload),
        )
        for f in flights
    ]
    noise_of = partial(_noise, network.shape, seed, noise.ROLLOUT, network.device)
    work = _Denoising(network, table, trajectories, True, keep_velocity, noise_of, token_group, on_step)
    occupancy = _run(work, len(flights), len(table.std), chained=True)
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
) -> list[torch.Tensor]:
    """Only the finished latents, [S, B, C] on every stage: validation and `sample`."""
    trajectories = [MicroTrajectory(f.group, f.samples, f.prompt) for f in flights]
    noise_of = partial(_noise, network.shape, seed, stream, network.device)
    work = _Denoising(network, table, trajectories, False, False, noise_of, None, on_step)
    _run(work, len(flights), len(table.std), chained=True)
    return [_on_every_stage(network, x_SBC, f) for x_SBC, f in zip(work.present, flights, strict=True)]


@torch.no_grad()
def final_latents(network: Network, table: StepTable, trajectory: MicroTrajectory) -> torch.Tensor:
    """The finished videos' latents, [S, B, C] on every stage."""
    x_SBC = trajectory.latents_SBC[len(table.std)] if network.ends else torch.empty(0)
    return _on_every_stage(network, x_SBC, trajectory)


class _References:
    """The work of a reference pass: one forward of each branch for each trained step, in any order."""

    def __init__(self, network: Network, table: StepTable, trajectories: list[MicroTrajectory]) -> None:
        self.network, self.table, self.trajectories = network, table, trajectories
        self.velocities: dict[tuple[int, int], list[torch.Tensor]] = {}

    def forward(self, task: Task, packed: torch.Tensor | None) -> torch.Tensor:
        trajectory, step = self.trajectories[task.flight], self.table.trained_steps[task.step]
        x_SBC = trajectory.latents_SBC[step] if self.network.starts and task.chunk == 0 else None
        sigma, batch = self.table.sigmas[step], len(trajectory.samples)
        out = self.network.forward(task.chunk, x_SBC, sigma, trajectory.prompt, task.branch, batch, packed)
        if self.network.ends and task.chunk == self.network.num_chunks - 1:
            branches = self.velocities.setdefault((task.flight, step), [])
            branches.append(out)
            if len(branches) == self.network.branches:
                trajectory.reference_SBC[step] = self.network.guided(self.velocities.pop((task.flight, step)))
        return out

    def packed_like(self, task: Task) -> torch.Tensor:
        trajectory = self.trajectories[task.flight]
        return self.network.packed_like(trajectory.prompt, task.branch, len(trajectory.samples))

    def result(self, task: Task) -> None:
        return None

    def result_like(self, task: Task) -> None:
        return None

    def receive(self, task: Task, result: torch.Tensor) -> None:
        raise AssertionError("a reference pass sends nothing back")


@torch.no_grad()
def reference_velocities(network: Network, table: StepTable, trajectories: list[MicroTrajectory]) -> Occupancy:
    """Fill in the reference's velocity at every trained step, at the same micro-batch shape as the rollout."""
    work = _References(network, table, trajectories)
    return _run(work, len(trajectories), len(table.trained_steps), chained=False)


def _run(work: "_Denoising | _References", flights: int, steps: int, chained: bool) -> Occupancy:
    network = work.network
    stages = 1 if network.group is None else network.group.size()
    plan = plan_slots(flights, steps, network.branches, stages, network.num_chunks, chained)
    return execute(plan, work, network.group, network.num_chunks)


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
