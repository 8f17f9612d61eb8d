"""The SAGE-GRPO loss of (micro-batch, denoising step) pairs, from the policy's velocity.

Everything a rank knows of a video is a shard of its tokens, so each quantity is a local sum of squares, summed once
over the ranks that share the tokens; the loss is then the same number on each of them. Shapes: S tokens, B samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sage.config import Config
from megatron_sage.config.schema import position_references
from megatron_sage.grpo.objective import policy_loss
from megatron_sage.grpo.sde import step_mean
from megatron_sage.grpo.trust_region import gaussian_kl_from_error, step_kl_log_prob, term_weights
from megatron_sage.parallel.groups import Groups
from megatron_sage.parallel.pipeline import share_from_last
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import VideoShape
from megatron_sage.rollout.transitions import StepTable, shard_error, transition_log_prob


@dataclass(frozen=True)
class PairStatistics:
    """Detached numbers of one (micro-batch, step) pair; sums run over its trained samples."""

    sums: torch.Tensor  # [7]: samples, loss, policy loss, position KL, velocity KL, initial KL, clipped
    ratio_sum: torch.Tensor
    ratio_min: torch.Tensor
    ratio_max: torch.Tensor


class Objective:
    """The loss function of a run: constants of the method, the steps of the iteration, and the present lambda."""

    def __init__(
        self, config: Config, shape: VideoShape, token_group: dist.ProcessGroup | None, counts: bool = True
    ) -> None:
        """`counts`: whether this rank counts its pairs: of the context-parallel ranks that share them, one does."""
        self.config, self.shape, self.token_group, self.counts = config, shape, token_group, counts
        kl = config.kl
        self.position_weight, self.velocity_weight = term_weights(kl.strategy, kl.position_weight, kl.velocity_weight)
        self.references = position_references(kl)
        self.initial_weight = kl.initial_weight if "initial" in self.references else 0.0
        self.weight = 0.0  # lambda

    def use(self, table: StepTable, scales: list[float]) -> None:
        """The numbers of each step, and its gradient scale, from now on."""
        self.table, self.scales = table, scales

    def divergence(self, position: Any, velocity: Any, initial: Any) -> Any:
        """What lambda multiplies: the weighted sum of the KL terms, tensors or numbers."""
        weighted = self.position_weight * position + self.velocity_weight * velocity
        return weighted + self.initial_weight * initial if self.initial_weight else weighted

    def __call__(
        self, v_SBC: torch.Tensor, batch: Sequence[tuple[MicroTrajectory, int]]
    ) -> tuple[torch.Tensor, torch.Tensor, list[PairStatistics]]:
        """(sum of the loss over the trained samples, their number as int32, statistics of each pair).

        `v_SBC` are the velocities of the (micro-batch, step) pairs of `batch`, side by side. A sum, not a mean:
        Megatron divides the gradients by the number of samples summed over DP x CP. The ranks of a CP group have the
        same pairs, and their gradients, each of its own tokens, add up to one loss: one rank counts.
        """
        parts = v_SBC.split([len(trajectory.samples) for trajectory, _ in batch], dim=1)
        found = [self._pair(part, trajectory, step) for part, (trajectory, step) in zip(parts, batch, strict=True)]
        kept = sum(trajectory.trained_B.sum() for trajectory, _ in batch if trajectory.trained_B is not None)
        count = torch.as_tensor(kept) if self.counts else torch.zeros_like(torch.as_tensor(kept))
        loss = torch.stack([loss for loss, _ in found]).sum()
        return loss, count.to(torch.int32), [statistics for _, statistics in found]

    def _pair(self, v_SBC: torch.Tensor, trajectory: MicroTrajectory, step: int) -> tuple[torch.Tensor, PairStatistics]:
        grpo, table = self.config.grpo, self.table
        assert trajectory.advantage_B is not None and trajectory.trained_B is not None
        mean_SBC = step_mean(trajectory.latents_SBC[step], v_SBC, table.a[step], table.b[step])
        next_SBC, std = trajectory.latents_SBC[step + 1], table.std[step]
        new_B = transition_log_prob(next_SBC, mean_SBC, std, self.shape, self.token_group, table.normalized)
        old_B = trajectory.log_prob_B[step]
        policy = policy_loss(new_B, old_B, trajectory.advantage_B, grpo.clip_range, grpo.advantage_clip)
        position_B, velocity_B, initial_B = self._divergences(v_SBC, new_B, trajectory, step)
        divergence_B = self.divergence(position_B, velocity_B, initial_B)
        total_B = policy.loss * self.scales[step] + self.weight * divergence_B
        # where, not a product: 0 * nan is nan, and a dropped sample must not reach the gradient
        kept = trajectory.trained_B
        measured = [policy.loss, position_B, velocity_B, initial_B, policy.clipped]
        terms = torch.stack([torch.ones_like(new_B), total_B, *measured])
        sums = torch.where(kept, terms, torch.zeros_like(terms)).sum(dim=1)
        ratio = policy.ratio
        statistics = PairStatistics(
            sums.detach(),
            torch.where(kept, ratio, 0.0).sum(),
            torch.where(kept, ratio, torch.inf).min(),
            torch.where(kept, ratio, -torch.inf).max(),
        )
        return sums[1], statistics

    def _divergences(
        self, v_SBC: torch.Tensor, new_B: torch.Tensor, trajectory: MicroTrajectory, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """KL against the position reference, the rollout's policy and the initial model beside it, each [B].

        0 where the strategy has no such term; the initial model's is measured without a weight too, outside the graph.
        """
        position_B = velocity_B = initial_B = torch.zeros_like(new_B)
        if self.position_weight:
            position_B = self._closed_form(v_SBC, trajectory.reference_SBC["position"][step], step)
        if "initial" in self.references:
            v = v_SBC if self.initial_weight else v_SBC.detach()
            initial_B = self._closed_form(v, trajectory.reference_SBC["initial"][step], step)
        if self.velocity_weight and self.config.kl.step_kl == "closed_form":
            velocity_B = self._closed_form(v_SBC, trajectory.velocity_SBC[step], step)
        elif self.velocity_weight:
            velocity_B = step_kl_log_prob(trajectory.log_prob_B[step], new_B)
            if not self.table.normalized:  # put back what the log-probability left out, so that it is a KL again
                velocity_B = velocity_B / (2 * self.table.std[step] ** 2)
        return position_B, velocity_B, initial_B

    def _closed_form(self, v_SBC: torch.Tensor, reference_SBC: torch.Tensor, step: int) -> torch.Tensor:
        error_B = shard_error(v_SBC, reference_SBC, self.shape, self.token_group)
        return gaussian_kl_from_error(error_B, self.shape.elements, self.table.b[step], self.table.std[step])


def share_statistics(
    statistics: list[PairStatistics], pairs: int, groups: Groups, device: torch.device
) -> list[PairStatistics]:
    """The last pipeline stage's statistics of `pairs` pairs on every stage: one broadcast over PP."""
    if groups.pp_size == 1:
        return statistics
    table = torch.empty(pairs, 10, dtype=torch.float64, device=device)
    if groups.is_last_stage:
        rows = [torch.cat([s.sums, torch.stack([s.ratio_sum, s.ratio_min, s.ratio_max])]) for s in statistics]
        table.copy_(torch.stack(rows))
    share_from_last(table, groups.pp)
    return [PairStatistics(row[:7], row[7], row[8], row[9]) for row in table]


def summarise(
    statistics: list[PairStatistics], first: list[PairStatistics], group: dist.ProcessGroup, with_initial: bool = False
) -> dict[str, float]:
    """Metrics of an iteration, over all pairs of all replicas (`group` = DP); `with_initial`: that KL was measured.

    `first` are the pairs visited before the first optimizer step: there the ratio must be 1 to rounding.
    """
    sums = torch.stack([torch.cat([s.sums, s.ratio_sum[None]]) for s in statistics]).sum(dim=0).double()
    low = torch.stack([s.ratio_min for s in statistics]).min()
    high = torch.stack([s.ratio_max for s in statistics]).max()
    deviation = torch.stack([torch.maximum(1 - s.ratio_min, s.ratio_max - 1) for s in first]).max()
    extremes = torch.stack([-low, high, deviation]).double()
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    count, loss, policy, position, velocity, initial_kl, clipped, ratio = sums.tolist()
    lowest, highest, initial = extremes.tolist()
    if count == 0:
        return {}
    return {
        "loss": loss / count,
        "loss/policy": policy / count,
        "kl/position": position / count,
        "kl/velocity": velocity / count,
        **({"kl/initial": initial_kl / count} if with_initial else {}),
        "ratio/mean": ratio / count,
        "ratio/min": -lowest,
        "ratio/max": highest,
        "clip_fraction": clipped / count,
        "ratio/initial_deviation": initial,
    }
