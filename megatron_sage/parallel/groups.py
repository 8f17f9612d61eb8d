"""Process groups: torch.distributed, Megatron's parallel_state and random-state tracker, set up and torn down."""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_sage.parallel.device import backend

_started_here = False
_replica: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Groups:
    """The process groups that this rank belongs to, and its place in them."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    replica: dist.ProcessGroup
    """All ranks of this model replica, TP x CP x PP; the owner of a group of samples."""
    collection: ProcessGroupCollection
    world_size: int
    rank: int

    @property
    def tp_size(self) -> int:
        """Ranks that share one copy of the weights' shards."""
        return self.tp.size()

    @property
    def tp_rank(self) -> int:
        """Position in the tensor-parallel group."""
        return self.tp.rank()

    @property
    def cp_size(self) -> int:
        """Ranks that share the tokens."""
        return self.cp.size()

    @property
    def cp_rank(self) -> int:
        """Position in the context-parallel group."""
        return self.cp.rank()

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return self.pp.size()

    @property
    def pp_rank(self) -> int:
        """Which pipeline stage this is."""
        return self.pp.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the velocity, and with it the loss and the log-probabilities."""
        return self.pp_rank == self.pp_size - 1

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.dp.size()

    @property
    def dp_rank(self) -> int:
        """Which data-parallel replica this is."""
        return self.dp.rank()


def initialize(
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    seed: int = 0,
    timeout_seconds: int = 1800,
    virtual_pipeline: int | None = None,
    hierarchical_context: list[int] | None = None,
) -> Groups:
    """Create all process groups, or return them where the same layout is already set up.

    Under torchrun (RANK and WORLD_SIZE set) the world comes from the environment, otherwise it is this process alone,
    with an in-memory store: no port is opened, so two runs on one machine cannot clash. Afterwards torch's and
    Megatron's random states follow from `seed` alone and are equal on all data-parallel replicas.

    Raises:
        ValueError: the world size is no multiple of tensor * context * pipeline, or another layout is active.
    """
    global _replica
    _start_world(timeout_seconds)
    world = dist.get_world_size()
    per_replica = tensor * context * pipeline
    if min(tensor, context, pipeline) < 1 or world % per_replica:
        raise ValueError(
            f"world size {world} is not a multiple of tensor * context * pipeline = "
            f"{tensor} * {context} * {pipeline} = {per_replica}: change the number of processes or the layout"
        )
    if parallel_state.model_parallel_is_initialized():
        _require_same_layout(tensor, context, pipeline, virtual_pipeline or 1)
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if (virtual_pipeline or 1) > 1 else None,
            context_parallel_size=context,
            hierarchical_context_parallel_sizes=hierarchical_context,
            distributed_timeout_minutes=max(1, timeout_seconds // 60),
        )
    if _replica is None:
        _replica = _replica_group(tensor, context, pipeline)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        tp=collection.tp,
        cp=collection.cp,
        pp=collection.pp,
        dp=collection.dp,
        replica=_replica,
        collection=collection,
        world_size=world,
        rank=dist.get_rank(),
    )


def _replica_group(tensor: int, context: int, pipeline: int) -> dist.ProcessGroup:
    """One group per replica, made by all ranks; Megatron, whose rank order is tp, cp, dp, pp, has no such group."""
    ranks = np.arange(dist.get_world_size()).reshape(pipeline, -1, context, tensor)
    members = [ranks[:, replica].flatten().tolist() for replica in range(ranks.shape[1])]
    group, _ = dist.new_subgroups_by_enumeration(members)
    return group


def shutdown() -> None:
    """Destroy Megatron's groups, and torch's where `initialize` made them. Safe to call twice."""
    global _started_here, _replica
    _replica = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if _started_here and dist.is_initialized():
        dist.destroy_process_group()
    _started_here = False
    # Models and optimizers refer to groups in circles; until those are collected each gloo group keeps a thread that
    # wakes up a hundred times a second. A process that makes many worlds, one after the other, drowns in them.
    gc.collect()


def _start_world(timeout_seconds: int) -> None:
    global _started_here
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_seconds)
    if torch.cuda.is_available():
        # Megatron overlaps collectives with GEMMs and relies on one hardware queue for their order
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    _started_here = True


def _require_same_layout(tensor: int, context: int, pipeline: int, virtual: int) -> None:
    active = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )
    if active != (tensor, context, pipeline, virtual):
        raise ValueError(
            f"layout (tensor, context, pipeline, virtual) = {(tensor, context, pipeline, virtual)} was asked for while "
            f"{active} is active: call shutdown() first"
        )
