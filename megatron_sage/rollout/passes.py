"""What a task of the pipeline means: a step of a rollout, or a reference's velocity. See `parallel.pipeline.Work`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_sage.grpo.sde import step_mean, step_sample
from megatron_sage.parallel import noise
from megatron_sage.parallel.pipeline import Occupancy, Task, execute, plan_slots
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import EmbeddedTexts, Network
from megatron_sage.rollout.transitions import StepTable, transition_log_prob


class ForwardPass(ABC):
    """Forwards of both branches of a micro-batch; what is done with their velocities is the subclass's part."""

    reads_reference = False

    def __init__(self, network: Network, table: StepTable, trajectories: Sequence[MicroTrajectory]) -> None:
        """`trajectories`: of each flight of the plan."""
        self.network, self.table, self.trajectories = network, table, trajectories
        self.texts = EmbeddedTexts()
        self._branches: dict[tuple[int, int], list[torch.Tensor]] = {}

    @abstractmethod
    def inputs(self, task: Task) -> tuple[torch.Tensor | None, int]:
        """(latents, read where the task starts; number of the denoising step)."""

    @abstractmethod
    def finish(self, task: Task, velocities: list[torch.Tensor]) -> None:
        """Of all branches, on the last stage."""

    def forward(self, task: Task, packed: torch.Tensor | None) -> torch.Tensor:
        if not self.network.control.micro_step(self.reads_reference):
            return self.packed_like(task).zero_()  # the schedule goes on, what it computes will be dropped
        trajectory = self.trajectories[task.flight]
        x_SBC, step = self.inputs(task)
        sigma, prompt = self.table.sigmas[step], trajectory.prompt
        out = self.network.forward(task.chunk, x_SBC, sigma, prompt, task.branch, packed, texts=self.texts)
        if self.network.ends and task.chunk == self.network.num_chunks - 1:
            velocities = self._branches.setdefault((task.flight, task.step), [])
            velocities.append(out)
            if self.complete(task):
                self.finish(task, self._branches.pop((task.flight, task.step)))
        return out

    def complete(self, task: Task) -> bool:
        """Whether it is the last forward that a velocity needs of this rank's chunks."""
        return task.branch == self.network.branches - 1 and task.chunk == self.network.num_chunks - 1

    def packed_like(self, task: Task) -> torch.Tensor:
        trajectory = self.trajectories[task.flight]
        return self.network.packed_like(trajectory.prompt, task.branch, len(trajectory.samples))

    def result(self, task: Task) -> torch.Tensor | None:
        return None

    def result_like(self, task: Task) -> torch.Tensor | None:
        return None

    def receive(self, task: Task, result: torch.Tensor) -> None:
        raise AssertionError("nothing is sent back in this pass")


class Denoising(ForwardPass):
    """A rollout. The last stage takes the steps, the first gets the latents.

    Both hold the latents they need and no other stage holds any. The step's noise is drawn on the last stage alone.
    """

    def __init__(
        self,
        network: Network,
        table: StepTable,
        trajectories: Sequence[MicroTrajectory],
        noise_of: Callable[[MicroTrajectory, int], torch.Tensor],
        on_step: Callable[[], None],
    ) -> None:
        super().__init__(network, table, trajectories)
        self.noise_of, self.on_step = noise_of, on_step
        self.present: list[torch.Tensor] = []  # of each flight: the latents where it is now
        for trajectory in trajectories:
            x_SBC = torch.empty(0)
            if network.starts or network.ends:
                x_SBC = self.stored(trajectory, 0, noise_of(trajectory, noise.INITIAL))
            self.present.append(x_SBC)

    def inputs(self, task: Task) -> tuple[torch.Tensor | None, int]:
        return self.present[task.flight], task.step

    def forward(self, task: Task, packed: torch.Tensor | None) -> torch.Tensor:
        out = super().forward(task, packed)
        if self.complete(task):
            self.on_step()
        return out

    def finish(self, task: Task, velocities: list[torch.Tensor]) -> None:
        trajectory, i = self.trajectories[task.flight], task.step
        x_SBC, std, v_SBC = self.present[task.flight], self.table.std[i], self.network.guided(velocities)
        next_SBC = step_mean(x_SBC, v_SBC, self.table.a[i], self.table.b[i])
        if std > 0:
            next_SBC = step_sample(next_SBC, std, self.noise_of(trajectory, i))
        next_SBC = self.stored(trajectory, i + 1, next_SBC)
        if std > 0:
            self.score(trajectory, i, x_SBC, next_SBC, v_SBC, velocities)
        self.present[task.flight] = next_SBC

    def stored(self, trajectory: MicroTrajectory, step: int, x_SBC: torch.Tensor) -> torch.Tensor:
        """The latents as they will be read back: what is scored, and what the next step starts from."""
        return x_SBC

    def score(
        self,
        trajectory: MicroTrajectory,
        step: int,
        x_SBC: torch.Tensor,
        next_SBC: torch.Tensor,
        v_SBC: torch.Tensor,
        velocities: list[torch.Tensor],
    ) -> None:
        """A step with noise has been taken."""

    def result(self, task: Task) -> torch.Tensor | None:
        return self.present[task.flight] if self._goes_on(task) else None

    def result_like(self, task: Task) -> torch.Tensor | None:
        return torch.empty_like(self.present[task.flight]) if self._goes_on(task) else None

    def receive(self, task: Task, result: torch.Tensor) -> None:
        self.present[task.flight] = self.stored(self.trajectories[task.flight], task.step + 1, result)

    def _goes_on(self, task: Task) -> bool:
        return task.branch == self.network.branches - 1 and task.step + 1 < len(self.table.std)


class Recording(Denoising):
    """A rollout that keeps what training needs: latents around the trained steps, log-probabilities, velocities."""

    def __init__(
        self,
        network: Network,
        table: StepTable,
        trajectories: Sequence[MicroTrajectory],
        noise_of: Callable[[MicroTrajectory, int], torch.Tensor],
        on_step: Callable[[], None],
        token_group: dist.ProcessGroup | None,
        keep_velocity: bool,
        conditional: bool,
    ) -> None:
        self.token_group, self.keep_velocity, self.conditional = token_group, keep_velocity, conditional
        self.kept_latents = table.kept_latents
        super().__init__(network, table, trajectories, noise_of, on_step)

    def stored(self, trajectory: MicroTrajectory, step: int, x_SBC: torch.Tensor) -> torch.Tensor:
        if step not in self.kept_latents:
            return x_SBC
        x_SBC = trajectory.latents_SBC.rounded(x_SBC)
        trajectory.latents_SBC[step] = x_SBC
        return x_SBC

    def score(
        self,
        trajectory: MicroTrajectory,
        step: int,
        x_SBC: torch.Tensor,
        next_SBC: torch.Tensor,
        v_SBC: torch.Tensor,
        velocities: list[torch.Tensor],
    ) -> None:
        if self.conditional:  # the branch that is trained is the one that is scored, or the ratio would not begin at 1
            v_SBC = velocities[0].float()
        mean_SBC = step_mean(x_SBC, v_SBC, self.table.a[step], self.table.b[step])
        trajectory.log_prob_B[step] = transition_log_prob(
            next_SBC, mean_SBC, self.table.std[step], self.network.shape, self.token_group, self.table.normalized
        )
        if self.keep_velocity:
            trajectory.velocity_SBC[step] = v_SBC


class References(ForwardPass):
    """A reference's velocities at given (trajectory, step) pairs, in any order: each pair is a flight of one step."""

    reads_reference = True

    def __init__(
        self, network: Network, table: StepTable, pairs: Sequence[tuple[MicroTrajectory, int]], name: str
    ) -> None:
        super().__init__(network, table, [trajectory for trajectory, _ in pairs])
        self.steps, self.name = [step for _, step in pairs], name

    def inputs(self, task: Task) -> tuple[torch.Tensor | None, int]:
        step = self.steps[task.flight]
        starts = self.network.starts and task.chunk == 0
        return self.trajectories[task.flight].latents_SBC[step] if starts else None, step

    def finish(self, task: Task, velocities: list[torch.Tensor]) -> None:
        kept = self.trajectories[task.flight].reference_SBC[self.name]
        kept[self.steps[task.flight]] = self.network.guided(velocities)


def run(work: ForwardPass, steps: int, chained: bool) -> Occupancy:
    """All flights of `work` through the pipeline, `steps` steps each."""
    network, flights = work.network, len(work.trajectories)
    stages = 1 if network.group is None else network.group.size()
    plan = plan_slots(flights, steps, network.branches, stages, network.num_chunks, chained)
    return execute(plan, work, network.group, network.num_chunks)
