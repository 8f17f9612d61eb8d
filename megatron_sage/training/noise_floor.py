"""How far apart rollout and training path are before anything is learnt: the noise floor of the ratio.

The same weights, latents and noise go through both; only the order of the floating-point operations may differ
(batch shape, gradient checkpointing, kernels). A clip range below that difference clips noise.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sage.config import Config
from megatron_sage.errors import UserError
from megatron_sage.parallel.groups import Groups
from megatron_sage.training.loss import PairStatistics


@dataclass(frozen=True)
class NoiseFloor:
    """|logp(training path) - logp(rollout)|, the largest over the replayed samples, and where it was measured."""

    iteration: int
    steps: dict[int, float]  # trained step -> largest difference
    sigmas: dict[int, float]
    clip_range: float
    layout: str
    dtype: str
    fp8: str  # "none", or number format and recipe of the blocks' GEMMs
    guidance_scale: float
    cfg_in_training: str
    micro_batch: int
    replay_batch: int

    @property
    def largest(self) -> float:
        """Over all steps."""
        return max(self.steps.values())

    def line(self) -> str:
        """For the terminal."""
        worst = max(self.steps, key=lambda step: self.steps[step])
        return (
            f"noise floor of the ratio: |Δ logp| <= {self.largest:.2e} (step {worst}, σ {self.sigmas[worst]:.3f}) over "
            f"{len(self.steps)} steps, {self._precision()}, {self.layout}, micro-batch {self.micro_batch} x replay "
            f"{self.replay_batch}; clip range {self.clip_range:.1e}"
        )

    def _precision(self) -> str:
        return self.dtype if self.fp8 == "none" else f"fp8 {self.fp8}"

    def check(self, allowed: bool) -> None:
        """UserError where the clip range lies below the floor, unless it is allowed by name."""
        if self.largest > self.clip_range and not allowed:
            raise UserError(
                f"grpo.clip_range={self.clip_range}: is below the noise floor {self.largest:.2e} of the ratio measured "
                "before the first update, so it would clip rounding; raise it above, use a higher precision or "
                "grpo.replay_batch=1, or set grpo.allow_clip_below_floor=true"
            )

    def write(self, directory: Path) -> None:
        """`noise_floor.json` of a run."""
        directory.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"largest": self.largest}
        (directory / "noise_floor.json").write_text(json.dumps(content, indent=1) + "\n")


def replayed_pairs(trajectories: int, steps: Sequence[int], batch: int, multiple: int) -> list[tuple[int, int]]:
    """All steps of the first micro-batches: enough to fill one training forward.

    `multiple`: the interleaved schedule takes only whole multiples of the pipeline's stages.
    """
    number = max(1, math.ceil(batch / len(steps)))
    while number < trajectories and number * len(steps) % multiple:
        number += 1
    return [(trajectory, step) for trajectory in range(min(number, trajectories)) for step in steps]


def measure(
    config: Config,
    iteration: int,
    sigmas: Sequence[float],
    pairs: Sequence[tuple[int, int]],
    statistics: Sequence[PairStatistics],
    groups: Groups,
) -> NoiseFloor | None:
    """From the ratios of replayed pairs, the largest over the replicas (MAX over DP); None: every sample was dropped.

    The ratios are the same on all ranks of a replica: their log-probabilities are sums over its token shards.
    """
    steps = sorted({step for _, step in pairs})
    largest = torch.full((len(steps),), -1.0, dtype=torch.float64)
    for (_, step), found in zip(pairs, statistics, strict=True):
        if found.sums[0] > 0:
            ratios = torch.stack([found.ratio_min, found.ratio_max]).double().cpu()
            place = steps.index(step)
            largest[place] = torch.maximum(largest[place], ratios.log().abs().max())
    largest = largest.to(statistics[0].sums.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.dp)
    values = largest.tolist()
    if min(values) < 0:
        return None
    sampler, grpo, precision = config.sampler, config.grpo, config.precision
    return NoiseFloor(
        iteration,
        dict(zip(steps, values, strict=True)),
        {step: sigmas[step] for step in steps},
        grpo.clip_range,
        f"TP {groups.tp_size} x CP {groups.cp_size} x PP {groups.pp_size} x DP {groups.dp_size}",
        precision.dtype,
        precision.fp8 if precision.fp8 == "none" else f"{precision.fp8} {precision.fp8_recipe}",
        sampler.guidance_scale,
        grpo.cfg_in_training,
        sampler.micro_batch,
        grpo.replay_batch,
    )
