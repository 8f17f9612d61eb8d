"""The state of a run, saved as one Megatron distributed checkpoint: policy, optimizer, anchor, counters.

Anything left out would make a resumed run another run. Tensors are saved as shards under global names, so that each
rank writes what it holds; the rest is plain numbers.
"""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_sage.checkpoint import torch_dist
from megatron_sage.errors import UserError
from megatron_sage.training.trainer import Trainer

PREFIX = "iteration_"


def _sharded_state(trainer: Trainer, loading: bool) -> dict[str, Any]:
    """By chunk: two chunks of a rank have copies of the timestep's embedder under one name."""
    state: dict[str, Any] = {
        "policy": _shards(trainer),
        "optimizer": trainer.optimizer.sharded_state_dict(_shards(trainer), is_loading=loading),
    }
    if trainer.anchor is not None:
        state["anchor"] = _with_data(_shards(trainer), trainer.anchor.state_dict(), "anchor.")
    if trainer.ema is not None:
        state["ema"] = _with_data(_shards(trainer), trainer.ema.state_dict(), "ema.")
    return state


def _shards(trainer: Trainer) -> dict[str, Any]:
    return {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(trainer.engine.chunks)}


def _with_data(shards: dict[str, Any], tensors: dict[str, Any], prefix: str) -> dict[str, ShardedTensor]:
    """The model's shards with other data of the same shape, under names of their own."""
    renamed = {}
    for name, tensor in tensors.items():
        chunk, _, parameter = name.partition(".")
        shard = shards[chunk][parameter]
        shard.key, shard.data, shard.dtype = f"{prefix}{shard.key}", tensor, tensor.dtype
        renamed[name] = shard
    return renamed


def _plain_state(trainer: Trainer) -> dict[str, Any]:
    return {
        "iteration": trainer.iteration,
        "optimizer_steps": trainer.optimizer_steps,
        "controller": trainer.controller.state_dict(),
        "guard": trainer.guard.state_dict(),
        "cursor": trainer.cursor.state_dict(),
        "reference": trainer.reference.kind,
    }


def save(trainer: Trainer, directory: Path) -> Path:
    """Write `iteration_NNNNNN` under `directory`; it gets its name only when it is complete. All ranks call."""
    final = directory / f"{PREFIX}{trainer.iteration:06d}"
    partial = directory / f".{final.name}.partial"
    main = trainer.engine.groups.rank == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=dist.group.WORLD)
    torch_dist.save(_sharded_state(trainer, loading=False) | {"plain": _plain_state(trainer)}, partial)
    dist.barrier(group=dist.group.WORLD)
    if main:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier(group=dist.group.WORLD)
    return final


def newest(directory: Path) -> Path | None:
    """The complete checkpoint of the latest iteration."""
    found = sorted(directory.glob(f"{PREFIX}*"))
    return found[-1] if found else None


def load(trainer: Trainer, directory: Path) -> None:
    """Continue from the newest checkpoint under `directory`. All ranks call."""
    source = newest(directory)
    if source is None:
        raise UserError(f"training.resume=yes: {directory} holds no checkpoint: set it to no for a new run, or to auto")
    plain = dist_checkpointing.load_common_state_dict(str(source))["plain"]
    saved = plain.get("reference", trainer.reference.kind)  # not in checkpoints of the first version
    if saved != trainer.reference.kind:
        raise UserError(
            f"kl.strategy={trainer.engine.config.kl.strategy}: {source} was saved with the position reference "
            f"{saved}, this run's is {trainer.reference.kind}: keep it, or start anew"
        )
    loaded = dist_checkpointing.load(_sharded_state(trainer, loading=True), str(source))
    for number, chunk in enumerate(trainer.engine.chunks):
        chunk.load_state_dict(loaded["policy"][str(number)])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    if trainer.anchor is not None:
        trainer.anchor.load_state_dict(loaded["anchor"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(loaded["ema"])
    trainer.iteration = plain["iteration"]
    trainer.optimizer_steps = plain["optimizer_steps"]
    trainer.controller.load_state_dict(plain["controller"])
    trainer.guard.load_state_dict(plain["guard"])
    trainer.cursor.load_state_dict(plain["cursor"])
