"""Counted communication: every collective that runs inside a block, by operation and process group, in bytes."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sage.parallel.control import DESCRIPTION
from megatron_sage.parallel.groups import Groups


def _bytes(tensors: torch.Tensor | Sequence[Any]) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_bytes(tensor) for tensor in tensors)


# c10d's operator -> our name, and where its payload is: the whole tensor, put together from or spread over the ranks
_OPERATIONS: dict[str, tuple[str, Callable[[Sequence[Any]], int]]] = {
    "allreduce_": ("all_reduce", lambda args: _bytes(args[0])),
    "allreduce_coalesced_": ("all_reduce", lambda args: _bytes(args[0])),
    "broadcast_": ("broadcast", lambda args: _bytes(args[0])),
    "_allgather_base_": ("all_gather", lambda args: _bytes(args[0])),
    "allgather_": ("all_gather", lambda args: _bytes(args[0])),
    "_reduce_scatter_base_": ("reduce_scatter", lambda args: _bytes(args[1])),
    "allgather_into_tensor_coalesced_": ("all_gather", lambda args: _bytes(args[0])),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", lambda args: _bytes(args[1])),
    "reduce_scatter_": ("reduce_scatter", lambda args: _bytes(args[1])),
    "alltoall_base_": ("all_to_all", lambda args: _bytes(args[1])),
    "alltoall_": ("all_to_all", lambda args: _bytes(args[1])),
    "send": ("send", lambda args: _bytes(args[0])),
}
_NOT_COUNTED = ("recv_", "barrier")  # a message is counted where it is sent


class CollectiveCounter(TorchDispatchMode):
    """Inside the block, on this rank: `bytes[operation, group]` and `calls[operation, group]`.

    Bytes are the payload, whatever algorithm moves it: of an all-gather the gathered tensor, of a reduce-scatter and
    an all-to-all the input, of an all-reduce, a broadcast and a send the tensor. Groups of one rank count nothing.
    The backward pass of a CPU model runs in the calling thread and is counted too; on a GPU autograd has its own.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.control = 0  # agreements on a stop: an int32 over gloo each, of no payload; not among the bytes
        collection = groups.collection
        named = {
            "world": dist.group.WORLD,
            "replica": groups.replica,
            "dist_opt": getattr(collection, "intra_dist_opt", None),
            "dp_cp": collection.dp_cp,
            "tp_cp": collection.tp_cp,
            "mp": collection.mp,
            "dp": groups.dp,
            "pp": groups.pp,
            "cp": groups.cp,
            "tp": groups.tp,
        }
        self._names = {group.group_name: name for name, group in named.items() if group is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.name().removeprefix("c10d::") if func.namespace == "c10d" else ""
        if operation in _OPERATIONS:
            self._count(operation, args)
        elif operation and operation not in _NOT_COUNTED:
            raise NotImplementedError(f"collective {func.name()}: say in _OPERATIONS where its payload is")
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Sequence[Any]) -> None:
        handle = next(arg for arg in args if isinstance(arg, torch.ScriptObject))  # the group comes first
        group = dist.ProcessGroup.unbox(handle)
        if group.size() == 1:
            return
        if group.group_desc == DESCRIPTION:
            self.control += 1
            return
        name, payload = _OPERATIONS[operation]
        key = name, self._names.get(group.group_name, group.group_name)
        self.bytes[key] += payload(args)
        self.calls[key] += 1


def wire_bytes(operation: str, payload: int, ranks: int) -> float:
    """What a rank sends at least for a payload over `ranks` ranks, by a ring or directly."""
    share = {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0, "send": 1.0}
    return payload * share.get(operation, (ranks - 1) / ranks)
