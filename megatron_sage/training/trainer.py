"""One iteration of SAGE-GRPO: rollout, rewards, advantages, reference velocities, updates."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.config.schema import lambda_max
from megatron_sage.data.prompts import PromptCursor
from megatron_sage.engine import Engine, iteration_steps
from megatron_sage.grpo.advantage import group_advantages
from megatron_sage.grpo.order import pair_order, split_updates
from megatron_sage.grpo.trust_region import LambdaController
from megatron_sage.parallel.control import Stopped
from megatron_sage.parallel.pipeline import Occupancy, bubble_fraction
from megatron_sage.reporting.progress import Reporter
from megatron_sage.rewards.composite import WATCH, weighted
from megatron_sage.rewards.protocol import Reward
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import Prompt
from megatron_sage.rollout.sampler import Flight, rollout
from megatron_sage.training import random_state
from megatron_sage.training.ema import Ema
from megatron_sage.training.gradients import all_finite
from megatron_sage.training.guards import RunGuard
from megatron_sage.training.loss import Objective, PairStatistics, summarise
from megatron_sage.training.noise_floor import NoiseFloor, measure, replayed_pairs
from megatron_sage.training.optimizer import Optimizers
from megatron_sage.training.precision import calibrate, calibrate_gradients
from megatron_sage.training.reference import Reference
from megatron_sage.training.replay import Replay
from megatron_sage.training.scoring_queue import build_scoring

LATENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """The state of a run and the iteration that advances it."""

    def __init__(
        self,
        engine: Engine,
        ddp: list[DistributedDataParallel],
        optimizer: Optimizers,
        prompts: Sequence[Prompt],
        codec: VideoCodec,
        reward: Reward,
        reporter: Reporter,
    ) -> None:
        config, kl = engine.config, engine.config.kl
        self.engine, self.optimizer = engine, optimizer
        self.prompts, self.codec, self.reward, self.reporter = prompts, codec, reward, reporter
        self.objective = Objective(config, engine.shape, engine.token_group, counts=engine.groups.cp_rank == 0)
        self.replay = Replay(engine, ddp, optimizer, self.objective)
        self.reference = Reference(engine)
        decay = config.optimizer.ema_decay
        self.ema = None if decay is None else Ema(engine.chunks, decay, config.optimizer.ema_device == "host")
        self.controller = LambdaController(
            kl.schedule, kl.lambda_min, lambda_max(kl), kl.warmup_steps, kl.window, kl.target, kl.gain, kl.feedback
        )
        self.guard = RunGuard(config.optimizer.max_nonfinite)
        self.cursor = PromptCursor(len(prompts), config.grpo.prompts_per_iteration, config.seed)
        self.iteration = 0
        self.optimizer_steps = 0
        self.noise_floor: NoiseFloor | None = None  # measured in the first iteration of every process
        self._seconds: dict[str, float] = {}
        self.flown: list[Prompt] = []  # the prompt of each micro-batch of the last rollout, on this replica
        self._skipped = 0  # updates of the iteration whose gradients were not finite
        self.schedule = Occupancy()  # of the last rollout, on this rank
        self.scoring = build_scoring(engine, codec, reward)
        self._choose_steps()

    def run_iteration(self) -> tuple[dict[str, Any], str | None]:
        """Metrics of one iteration, and why the run should save and stop, if it should.

        Raises Stopped, on all ranks, where a signal stops the run before the first optimizer step: the trainer is then
        in the state in which the iteration began.
        """
        control = self.engine.control
        control.begin(self.iteration)
        # all that an iteration changes before its first optimizer step
        cursor, guard, generators = self.cursor.state_dict(), self.guard.state_dict(), random_state.sharded()
        try:
            row, bad_rewards = self._iteration()
        except Stopped:
            self.cursor.load_state_dict(cursor)
            self.guard.load_state_dict(guard)
            random_state.restore(generators.data)
            raise
        control.begin(self.iteration)
        reward = self.engine.config.reward
        return row, self.guard.reason_to_stop(bad_rewards, reward.url or reward.function)

    def _iteration(self) -> tuple[dict[str, Any], bool]:
        begin = time.perf_counter()
        self._seconds = {}
        self._choose_steps()
        calibrate(self.engine, self.prompts)
        trajectories, pipeline = self._roll_out()
        rewards, row, stop = self._score(trajectories)
        row |= pipeline
        self._assign_advantages(trajectories, rewards, row)
        self._reference_pass(trajectories)
        self.reference.used = self.reference.checksums
        row |= self._update(trajectories)
        self.iteration += 1
        row |= {f"seconds/{name}": round(value, 4) for name, value in self._seconds.items()}
        row["seconds/total"] = round(time.perf_counter() - begin, 4)
        return row, stop

    def _choose_steps(self) -> None:
        """The numbers of the iteration's steps: which of them draw noise may change with sampler.sde_window."""
        self.table, scales = iteration_steps(self.engine.config, self.iteration)
        self.objective.use(self.table, scales)

    @contextmanager
    def _phase(self, name: str, total: int) -> Iterator[Any]:
        begin = time.perf_counter()
        self.engine.control.enter(name)
        with self.reporter.bar(f"{self.iteration:>4} {name}", total) as tick:
            yield tick
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin  # a rollout may have parts

    def _my_groups(self) -> list[tuple[int, int]]:
        """(number of the group in the run, prompt) of this replica's groups: every dp_size-th of the iteration."""
        indices = self.cursor.take()
        first = self.iteration * len(indices)
        groups = [(first + position, prompt) for position, prompt in enumerate(indices)]
        return groups[self.engine.groups.dp_rank :: self.engine.groups.dp_size]

    def _roll_out(self) -> tuple[list[MicroTrajectory], dict[str, Any]]:
        """This replica's trajectories and how busy the pipeline was.

        All micro-batches are on the way at once, or those of `reward.overlap_groups` groups, while the videos of the
        parts before are scored elsewhere.
        """
        config, engine = self.engine.config, self.engine
        size, count = config.sampler.micro_batch, config.grpo.group_size
        flights = [
            Flight(group, list(range(start, start + size)), self.prompts[prompt])
            for group, prompt in self._my_groups()
            for start in range(0, count, size)
        ]
        self.flown = [flight.prompt for flight in flights]
        engine.eval()
        self.scoring.begin()
        groups = config.reward.overlap_groups
        part = len(flights) if groups is None else groups * (count // size)
        trajectories: list[MicroTrajectory] = []
        self.schedule = Occupancy()
        for begin in range(0, len(flights), part):
            found, occupancy = self._roll_out_part(flights[begin : begin + part])
            self.schedule.follow(occupancy, len(trajectories))
            trajectories += found
            self.scoring.send(self.table, found, self._phase)
        return trajectories, {"rollout/bubble_fraction": bubble_fraction(self.schedule, engine.groups.pp)}

    def _roll_out_part(self, flights: list[Flight]) -> tuple[list[MicroTrajectory], Occupancy]:
        config, engine = self.engine.config, self.engine
        with self._phase("rollout", len(flights) * config.sampler.num_steps) as tick:
            return rollout(
                engine.rollout_network(),
                self.table,
                flights,
                seed=config.seed,
                token_group=engine.token_group,
                keep_velocity=self.objective.velocity_weight > 0 and config.kl.step_kl == "closed_form",
                conditional=config.grpo.cfg_in_training == "distilled",
                dtype=LATENT_DTYPES[config.sampler.latent_dtype],
                offload=config.sampler.offload_trajectories,
                on_step=tick,
            )

    def _score(self, trajectories: list[MicroTrajectory]) -> tuple[np.ndarray, dict[str, Any], bool]:
        """Rewards [groups of this replica, G], their metrics over all replicas, and the stop rule."""
        config = self.engine.config
        scores = self.scoring.collect(self.table, trajectories, self._phase)
        if scores.lost is None:  # a local reward is called within the phase of decoding
            self._seconds |= {"decode": scores.decode_seconds, "reward": scores.reward_seconds}
        rewards = weighted(scores.dimensions, config.reward.weights)
        table = [rewards, *(scores.dimensions[name] for name in self.reward.dimensions)]
        every = self._over_replicas(torch.from_numpy(np.stack(table if scores.lost is None else [*table, scores.lost])))
        finite = np.isfinite(every[0])
        kept = every[:, finite]
        row: dict[str, Any] = {"reward/nonfinite": int((~finite).sum())}
        if scores.lost is not None:  # videos of which a remote reward said nothing; they are among the non-finite
            row["reward/lost"] = int(every[-1].sum())
        if finite.any():
            row |= {"reward/mean": float(kept[0].mean()), "reward/std": float(kept[0].std())}
            for name, values in zip(self.reward.dimensions, kept[1 : len(table)], strict=True):
                key = name if name.startswith(WATCH) else f"reward/{name}"
                row[key] = float(values.mean())  # a watched one is nan where it did not score a video: it says so
        stop = self.guard.update(int((~finite).sum()), finite.size)
        row["reward/bad_iterations"] = self.guard.bad_iterations  # in a row; the third one stops the run
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
        device, trained = self.engine.device, found.mask.numpy()  # on the host: no device is waited for
        for number, trajectory in enumerate(trajectories):
            group, samples = number // per_group, trajectory.samples
            trajectory.advantage_B = found.advantages[group, samples].to(device, non_blocking=True)
            everything = bool(trained[group, samples].all())
            trajectory.keep(found.mask[group, samples].to(device, non_blocking=True), everything)
        clamped = int((found.advantages.abs() > self.engine.config.grpo.advantage_clip).sum())
        counts = torch.tensor([found.zero_std_groups, found.dropped_groups, clamped], device=self.engine.device)
        dist.all_reduce(counts, group=self.engine.groups.dp)  # each replica has groups of its own: the sum over DP
        names = ("reward/zero_std_groups", "reward/dropped_groups", "reward/clamped_advantages")
        row |= dict(zip(names, counts.tolist(), strict=True))

    def _reference_pass(self, trajectories: list[MicroTrajectory]) -> None:
        """The reference's velocities at every trained step, where they belong to the rollout phase."""
        if not self.reference.kinds or self.engine.config.kl.phase == "training":
            self._seconds["reference"] = 0.0
            return
        with self._phase("reference", 1) as tick:
            self.reference.velocities(self.table, trajectories)
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
        self._skipped = 0
        weight = self.objective.weight = self.controller.value
        if self.noise_floor is None:
            self._measure_noise_floor(trajectories)
        with self._phase("train", len(order)) as tick:
            for number, pairs in enumerate(updates):
                self.engine.control.enter("train")
                self.objective.weight = self.controller.value
                with self.reference.during(self.table, trajectories, pairs):
                    found = self.replay.gradients(trajectories, pairs, tick)
                statistics += found
                if number == 0:
                    first = found
                norms += self._step(found)
        row = summarise(statistics, first, self.engine.groups.dp, "initial" in self.reference.kinds)
        lr = self.optimizer.param_groups[0]["lr"]
        mean_norm = sum(norms) / len(norms) if norms else 0.0
        row |= {"lambda": weight, "grad_norm": mean_norm, "lr": lr, "optimizer_steps": self.optimizer_steps}
        return row | {"updates/skipped": self._skipped}

    def _measure_noise_floor(self, trajectories: list[MicroTrajectory]) -> None:
        """Replay part of the rollout through the training path before anything is learnt; nothing is kept of it."""
        config, groups = self.engine.config, self.engine.groups
        stages = groups.pp_size if self.engine.model_config.virtual_pipeline_model_parallel_size else 1
        pairs = replayed_pairs(len(trajectories), self.table.trained_steps, config.grpo.replay_batch, stages)
        with self._phase("noise floor", len(pairs)) as tick:
            with self.reference.during(self.table, trajectories, pairs):
                with self.engine.quantisation.histories_kept():
                    found = self.replay.gradients(trajectories, pairs, tick)
                calibrate_gradients(self.engine, lambda: self.replay.gradients(trajectories, pairs, lambda count: None))
            self.replay.clear()
        floor = measure(config, self.iteration, self.table.sigmas, pairs, found, groups)
        if floor is None:  # no sample with a finite reward: the next iteration measures it
            return
        self.noise_floor = floor
        if groups.rank == 0:
            floor.write(Path(config.output_dir))
        self.reporter.line(floor.line())
        floor.check(config.grpo.allow_clip_below_floor)

    def _step(self, statistics: list[PairStatistics]) -> list[float]:
        """One optimizer step, then lambda and anchor; its gradient norm.

        Nothing happens where every sample was dropped, nor where a gradient is not finite: weights, moments, counters,
        lambda and anchor stay, only the skipped updates are counted.
        """
        self.engine.control.enter("optimizer")
        sums = torch.stack([s.sums for s in statistics]).sum(dim=0).double()
        dist.all_reduce(sums, group=self.engine.groups.dp)
        count, _, _, position, velocity, initial, _ = sums.tolist()
        if count == 0:
            return []  # a step on zero gradients would still move the weights by momentum and decay
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        finite = all_finite(norm, self.replay.ddp, self.engine.device)
        self.guard.updated(finite)
        if not finite:  # a step would write nan into every weight, through the clipping if by no other way
            self._skipped += 1
            self.replay.clear()
            return []
        self.engine.control.hold = True  # there is no whole state again until the iteration has ended
        settings = self.engine.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (self.optimizer_steps + 1) / max(1, settings.warmup_steps))
        self.reference.before_step()
        self.optimizer.step_prepared(norm)
        self.engine.quantisation.after_update()
        self.optimizer_steps += 1
        if self.engine.config.kl.strategy != "none":
            self.controller.update(self.objective.divergence(position, velocity, initial) / count)
        self.reference.after_step(self.optimizer_steps)
        if self.ema is not None:
            self.ema.after_step()
        return [norm]
