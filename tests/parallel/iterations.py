"""Whole RL iterations on the ranks of a layout, and everything they computed, put together on rank 0."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

MODEL = {  # 16 heads, 5 blocks: heads divide over TP x CP = 16, blocks over no pipeline
    "num_attention_heads": 16,
    "attention_head_dim": 8,
    "num_layers": 5,
    "rope_axes_dim": (2, 4, 2),
}


def settings(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """15 video tokens; texts of 6, 9 and 3 words; three iterations of one update, four samples of two prompts each."""
    from tests.training import world

    base = {
        "grpo.updates_per_rollout": 1,
        "sampler.num_steps": 2,
        "training.iterations": 3,
        "kl.anchor_interval": 1,
        "reward.function": "tests.training.world:SteadyReward",
        "kl.schedule": "fixed",
        "optimizer.grad_clip": 0.01,  # below the norm: clipping is at work
        # Adam divides by the root of the second moment: without a floor above the rounding of the smallest gradients
        # it turns their noise into steps of full size, in the single process as on any layout
        "optimizer.eps": 1e-5,
    }
    return world.settings(root, name, **(base | changes))


def prepare(arguments: list[str], processes: int, kind: Any = None) -> Any:
    """A Trainer (or a subclass) with everything around it, on this rank."""
    from megatron_sage.config import load_config, validate
    from megatron_sage.data.prompts import read_rows
    from megatron_sage.engine import build_engine, encode_prompts, initialize_groups, load_codec, prepare_embeddings
    from megatron_sage.reporting.progress import Reporter
    from megatron_sage.rewards.build import build_reward
    from megatron_sage.training.optimizer import build_optimizer, wrap
    from megatron_sage.training.trainer import Trainer

    config = load_config(None, arguments)
    validate(config, processes)
    torch.set_num_threads(1)
    rows, groups = read_rows(config.data.prompts), initialize_groups(config)
    prepare_embeddings(config, groups, rows)
    engine = build_engine(config, groups)
    ddp = wrap(engine.chunks, engine.groups, config.optimizer.distributed)
    optimizer = build_optimizer(config, ddp, engine.dtype)
    prompts = encode_prompts(config, engine, rows)
    codec, reward = load_codec(config), build_reward(config.reward)
    return (kind or Trainer)(engine, ddp, optimizer, prompts, codec, reward, Reporter(False))


def job(arguments: list[str], processes: int) -> dict[str, Any] | None:
    """Train; on rank 0: initial latents, log-probabilities, metrics, first gradients, change of the weights."""
    import torch.distributed as dist

    from megatron_sage.checkpoint.distributed import gather_named
    from megatron_sage.parallel.sequence import gather
    from megatron_sage.training.trainer import Trainer

    found: dict[str, Any] = {"latents": {}, "log_prob": {}, "decoded": 0}

    class Recorder(Trainer):
        """Writes down what an iteration computes."""

        def _roll_out(self) -> Any:
            trajectories, row = super()._roll_out()
            engine = self.engine
            for trajectory in trajectories if self.iteration == 0 else []:
                logp = torch.stack([trajectory.log_prob_B[i] for i in self.table.trained_steps])
                for column, sample in enumerate(trajectory.samples):
                    found["log_prob"][trajectory.group, sample] = logp[:, column].numpy()
                if engine.groups.is_first_stage:
                    whole = gather(trajectory.latents_SBC[0], engine.shape.shard, engine.token_group)
                    for column, sample in enumerate(trajectory.samples):
                        found["latents"][trajectory.group, sample] = whole[:, column].numpy()
            return trajectories, row

        def _step(self, statistics: Any) -> list[float]:
            if self.optimizer_steps == 0:
                found["gradients"] = whole(self.engine.chunks, "grad")
            return super()._step(statistics)

    def whole(chunks: Any, which: Any) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in gather_named(chunks, which) if value is not None}

    trainer = prepare(arguments, processes, Recorder)
    engine, config = trainer.engine, trainer.engine.config
    decode = trainer.codec.decode

    def counted(latents: torch.Tensor) -> Any:
        found["decoded"] += 1
        return decode(latents)

    trainer.codec.decode = counted
    before = whole(engine.chunks, "param")
    found["rows"] = [trainer.run_iteration()[0] for _ in range(config.training.iterations)]
    after = whole(engine.chunks, "param")
    found["change"] = {name: after[name] - before[name] for name in after}
    found["parameters"] = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        every, {key: found[key] for key in ("latents", "log_prob", "decoded")}, group=dist.group.WORLD
    )
    found["decoded"] = [other["decoded"] for other in every]
    for key in ("latents", "log_prob"):
        found[key] = {}
        for rank, other in enumerate(every):
            for place, value in other[key].items():
                # every rank that has it has the same bits
                assert np.array_equal(found[key].setdefault(place, value), value), (key, place, rank)
    return found if engine.groups.rank == 0 else None
