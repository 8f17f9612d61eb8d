"""Whether the gradients of an update can be used."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel


def all_finite(norm: float, chunks: Sequence[DistributedDataParallel], device: torch.device) -> bool:
    """Whether the gradient's norm and every element of every rank's buffers are finite. All ranks call.

    The norm alone does not tell: of a parameter that is replicated over TP it reads one copy, and a value that went
    wrong on one rank after the gradients were summed is in no other rank's norm. Ranks that decide differently would
    be two models, so they agree: the maximum of "something is wrong" over the world.
    """
    buffers = [buffer.grad_data for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    # both ends: nan is both of them, and no sum of finite numbers can overflow (a norm reads as much and takes ten
    # times as long on a CPU)
    ends = [end.float() for data in buffers if data.numel() for end in data.aminmax()]
    bad = torch.tensor(not math.isfinite(norm), device=device)
    if ends:
        bad = bad | ~torch.stack(ends).isfinite().all()
    flag = bad.to(torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    return not int(flag)
