"""One iteration of SAGE-GRPO: rollout, rewards, advantages, reference velocities, updates."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sage.anchor import HostAnchor
from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.data.prompts import PromptCursor
from megatron_sage.engine import Engine, step_table
from megatron_sage.errors import UserError
from megatron_sage.grpo.advantage import NonFiniteGuard, group_advantages
from megatron_sage.grpo.equalizer import gradient_scales
from megatron_sage.grpo.order import pair_order, split_updates
from megatron_sage.grpo.trust_region import LambdaController
from megatron_sage.parallel.pipeline import Occupancy, bubble_fraction
from megatron_sage.reporting.progress import Reporter
from megatron_sage.rewards.composite import weighted
from megatron_sage.rewards.protocol import Reward
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import Prompt
from megatron_sage.rollout.sampler import Flight, final_latents, reference_velocities, rollout
from megatron_sage.rollout.scoring import score
from megatron_sage.training.loss import Objective, PairStatistics, share_statistics, summarise

LATENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """The state of a run and the iteration that advances it."""

    def __init__(
        self,
        engine: Engine,
        ddp: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        prompts: list[Prompt],
        codec: VideoCodec,
        reward: Reward,
        reporter: Reporter,
    ) -> None:
        config = engine.config
        self.engine, self.ddp, self.optimizer = engine, ddp, optimizer
        self.prompts, self.codec, self.reward, self.reporter = prompts, codec, reward, reporter
        sampler, kl = config.sampler, config.kl
        self.table, coefficients = step_table(sampler.sde_type, sampler.num_steps, sampler.shift, sampler.eta)
        scales = gradient_scales(coefficients).tolist()
        counts = engine.groups.cp_rank == 0
        self.objective = Objective(config, self.table, scales, engine.shape, engine.token_group, counts)
        self.anchor = HostAnchor(engine.chunks) if kl.strategy != "none" else None
        self.controller = LambdaController(
            kl.schedule, kl.lambda_min, kl.lambda_max, kl.warmup_steps, kl.window, kl.target, kl.gain, kl.feedback
        )
        self.guard = NonFiniteGuard()
        self.cursor = PromptCursor(len(prompts), config.grpo.prompts_per_iteration, config.seed)
        self.iteration = 0
        self.optimizer_steps = 0
        self._seconds: dict[str, float] = {}
        self.schedule = Occupancy()  # of the last rollout, on this rank

    def run_iteration(self) -> tuple[dict[str, Any], bool]:
        """Metrics of one iteration, and whether too many rewards were non-finite for too long."""
        begin = time.perf_counter()
        self._seconds = {}
        trajectories, pipeline = self._roll_out()
        rewards, row, stop = self._score(trajectories)
        row |= pipeline
        self._assign_advantages(trajectories, rewards, row)
        self._reference_pass(trajectories)
        row |= self._update(trajectories)
        self.iteration += 1
        row |= {f"seconds/{name}": round(value, 4) for name, value in self._seconds.items()}
        row["seconds/total"] = round(time.perf_counter() - begin, 4)
        return row, stop

    @contextmanager
    def _phase(self, name: str, total: int) -> Iterator[Any]:
        begin = time.perf_counter()
        with self.reporter.bar(f"{self.iteration:>4} {name}", total) as tick:
            yield tick
        self._seconds[name] = time.perf_counter() - begin

    def _my_groups(self) -> list[tuple[int, int]]:
        """(number of the group in the run, prompt) of this replica's groups: every dp_size-th of the iteration."""
        indices = self.cursor.take()
        first = self.iteration * len(indices)
        groups = [(first + position, prompt) for position, prompt in enumerate(indices)]
        return groups[self.engine.groups.dp_rank :: self.engine.groups.dp_size]

    def _roll_out(self) -> tuple[list[MicroTrajectory], dict[str, Any]]:
        """This replica's trajectories, all micro-batches on the way at once, and how busy the pipeline was."""
        config, engine = self.engine.config, self.engine
        size, count = config.sampler.micro_batch, config.grpo.group_size
        flights = [
            Flight(group, list(range(start, start + size)), self.prompts[prompt])
            for group, prompt in self._my_groups()
            for start in range(0, count, size)
        ]
        engine.eval()
        with self._phase("rollout", len(flights) * config.sampler.num_steps) as tick:
            trajectories, self.schedule = rollout(
                engine.network(),
                self.table,
                flights,
                seed=config.seed,
                token_group=engine.token_group,
                keep_velocity=config.kl.strategy != "none" and config.kl.step_kl == "closed_form",
                dtype=LATENT_DTYPES[config.sampler.latent_dtype],
                offload=config.sampler.offload_trajectories,
                on_step=tick,
            )
        return trajectories, {"rollout/bubble_fraction": bubble_fraction(self.schedule, engine.groups.pp)}

    def _score(self, trajectories: list[MicroTrajectory]) -> tuple[np.ndarray, dict[str, Any], bool]:
        """Rewards [groups of this replica, G], their metrics over all replicas, and the stop rule."""
        config, engine = self.engine.config, self.engine
        texts = [t.prompt.text for t in trajectories for _ in t.samples]
        with self._phase("decode", math.ceil(len(texts) / engine.groups.replica.size())) as tick:
            scores = score(
                [final_latents(engine.network(), self.table, t) for t in trajectories],
                texts,
                engine.shape,
                self.codec,
                self.reward,
                config.video.fps,
                engine.token_group,
                engine.groups.replica,
                tick,
            )
        self._seconds |= {"decode": scores.decode_seconds, "reward": scores.reward_seconds}
        rewards = weighted(scores.dimensions, config.reward.weights)
        table = np.stack([rewards, *(scores.dimensions[name] for name in self.reward.dimensions)])
        every = self._over_replicas(torch.from_numpy(table))
        finite = np.isfinite(every[0])
        kept = every[:, finite]
        row: dict[str, Any] = {"reward/nonfinite": int((~finite).sum())}
        if finite.any():
            row |= {"reward/mean": float(kept[0].mean()), "reward/std": float(kept[0].std())}
            row |= {f"reward/{name}": float(v.mean()) for name, v in zip(self.reward.dimensions, kept[1:], strict=True)}
        stop = self.guard.update(int((~finite).sum()), finite.size)
        return rewards.reshape(-1, config.grpo.group_size), row, stop

    def _over_replicas(self, columns: torch.Tensor) -> np.ndarray:
        """[rows, n] of every replica side by side, gathered over DP: all replicas score the same number of videos."""
        group = self.engine.groups.dp
        mine = columns.to(self.engine.device)
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
        return torch.cat(parts, dim=1).cpu().numpy()

    def _assign_advantages(self, trajectories: list[MicroTrajectory], rewards: np.ndarray, row: dict[str, Any]) -> None:
        found = group_advantages(torch.from_numpy(rewards))
        per_group = self.engine.config.grpo.group_size // self.engine.config.sampler.micro_batch
        for number, trajectory in enumerate(trajectories):
            group, samples = number // per_group, trajectory.samples
            trajectory.advantage_B = found.advantages[group, samples].to(self.engine.device)
            trajectory.keep(found.mask[group, samples].to(self.engine.device))
        counts = torch.tensor([found.zero_std_groups, found.dropped_groups], device=self.engine.device)
        dist.all_reduce(counts, group=self.engine.groups.dp)
        row |= dict(zip(("reward/zero_std_groups", "reward/dropped_groups"), counts.tolist(), strict=True))

    def _reference_pass(self, trajectories: list[MicroTrajectory]) -> None:
        """The anchor's velocities at every trained step, with the rollout's micro-batches."""
        if self.anchor is None:
            self._seconds["reference"] = 0.0
            return
        with self._phase("reference", 1) as tick, self.anchor.swapped_in(self.engine.chunks):
            reference_velocities(self.engine.network(), self.table, trajectories)
            tick()

    def _update(self, trajectories: list[MicroTrajectory]) -> dict[str, Any]:
        """Visit every (micro-batch, trained step) pair once, in `updates_per_rollout` optimizer steps."""
        config = self.engine.config
        order = pair_order(
            len(trajectories),
            self.table.trained_steps,
            config.seed,
            self.iteration,
            config.grpo.timestep_permutation,
        )
        updates = split_updates(order, config.grpo.updates_per_rollout)
        statistics: list[PairStatistics] = []
        norms: list[float] = []
        weight = self.controller.value
        with self._phase("train", len(order)) as tick:
            for number, pairs in enumerate(updates):
                self.objective.weight = self.controller.value
                found = self._accumulate(trajectories, pairs, tick)
                statistics += found
                if number == 0:
                    first = found
                norms += self._step(found)
        row = summarise(statistics, first, self.engine.groups.dp)
        lr = self.optimizer.param_groups[0]["lr"]
        mean_norm = sum(norms) / len(norms) if norms else 0.0
        return row | {"lambda": weight, "grad_norm": mean_norm, "lr": lr, "optimizer_steps": self.optimizer_steps}

    def _accumulate(
        self, trajectories: list[MicroTrajectory], pairs: list[tuple[int, int]], tick: Any
    ) -> list[PairStatistics]:
        """Forward and backward of one optimizer step's pairs through Megatron's schedule."""
        engine, groups = self.engine, self.engine.groups
        engine.train()
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        network, settings = engine.network(), engine.model_config
        # one size for all micro-batches of the update: that of its longest text
        length = max(network.all_packed_tokens(trajectories[number].prompt) for number, _ in pairs)

        def forward_step(
            iterator: Iterator[tuple[int, int]], model: DistributedDataParallel
        ) -> tuple[torch.Tensor, Any]:
            number, step = next(iterator)
            trajectory, chunk = trajectories[number], model.module
            x_SBC = trajectory.latents_SBC[step] if chunk.pre_process else None
            sigma, batch = self.table.sigmas[step], len(trajectory.samples)
            out = network.train_forward(model, chunk.vp_stage, x_SBC, sigma, trajectory.prompt, batch, length)
            if chunk.vp_stage == network.num_chunks - 1:
                tick()
            return out, partial(self.objective, trajectory=trajectory, step=step)

        interleaved = settings.virtual_pipeline_model_parallel_size
        iterators = [iter(pairs) for _ in self.ddp]
        statistics = get_forward_backward_func(groups.pp_size, interleaved)(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.ddp,
            num_microbatches=len(pairs),
            # Megatron divides by these again: what a stage sends is `length` tokens
            seq_length=length * groups.cp_size * (groups.tp_size if settings.sequence_parallel else 1),
            micro_batch_size=engine.config.sampler.micro_batch,
            forward_only=False,
        )
        return share_statistics(statistics, len(pairs), groups, engine.device)

    def _step(self, statistics: list[PairStatistics]) -> list[float]:
        """One optimizer step, then lambda and anchor; nothing happens where every sample was dropped."""
        sums = torch.stack([s.sums for s in statistics]).sum(dim=0).double()
        dist.all_reduce(sums, group=self.engine.groups.dp)
        count, _, _, position, velocity, _ = sums.tolist()
        if count == 0:
            return []  # a step on zero gradients would still move the weights by momentum and decay
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):  # before the step: clipping by it would write nan into every weight
            raise UserError(
                f"optimizer step {self.optimizer_steps + 1}: gradient norm is {norm}: lower optimizer.lr; the weights "
                "are still those of the step before, the newest checkpoint can be resumed"
            )
        settings = self.engine.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (self.optimizer_steps + 1) / max(1, settings.warmup_steps))
        self.optimizer.step()
        self.optimizer_steps += 1
        kl = self.engine.config.kl
        if kl.strategy != "none":
            self.controller.update((kl.position_weight * position + kl.velocity_weight * velocity) / count)
        if self.anchor is not None and self.optimizer_steps % kl.anchor_interval == 0:
            self.anchor.refresh(self.engine.chunks)
        return [norm]
