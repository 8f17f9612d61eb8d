"""One process as one rank of a large world: tensors without data, collectives without partners.

What has to give way for that, and why:
* torch's `fake` process group answers every collective at once. Megatron would make gloo groups beside its own, which
  no partner would ever join: it is told not to.
* `FakeTensorMode` computes shapes only. Where the program looks at a number (a count, a norm, a flag), `Numbers`
  (or, for whole arrays, `_ones`) answers: 1.0 for a float, 0 for a whole number, True for a truth value; with these the
  checks for nan, for replicas that differ and for stop signals pass, and an update is made.
* Noise is drawn by numpy: it would be real, and slow, so it becomes an empty tensor.
* An anchor adds its bits up in a thread, where no mode is active: its sum is 0.
* RMSNorm is one kernel on a GPU and keeps its input; torch's CPU path would keep fp32 copies.
* `Module.to` would swap parameters for new ones, which torch cannot do with these; they get new data instead.
* Objects are not pickled into tensors: every partner of a gather gives what this rank gave.
* Weights are not loaded, adapters not drawn, videos not decoded, rewards made up.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_sage import anchor, engine
from megatron_sage.errors import UserError
from megatron_sage.model import lora
from megatron_sage.model.rope import rotary_table
from megatron_sage.parallel import groups, noise

from megatron.core import parallel_state  # isort: skip

MAX_RANKS = 1024
_ANSWERS: dict[bool, Any] = {True: 1.0, False: 0}


class Numbers(TorchDispatchMode):
    """Answers where a tensor without data is asked for its value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else _ANSWERS[args[0].dtype.is_floating_point]
        if func.namespace == "c10d" and func.name().endswith("coalesced_"):
            # FakeTensorMode knows the plain collectives only: the group is asked with other tensors
            least = min(x.numel() for arg in args if isinstance(arg, list) for x in arg)
            with _disable_current_modes():
                small = [
                    [torch.zeros(x.numel() // least) for x in arg[:1]] if isinstance(arg, list) else arg for arg in args
                ]
                return func(*small, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_world(rank: int, size: int) -> None:
    """Raises UserError for a rank that does not exist."""
    if not 1 <= size <= MAX_RANKS:
        raise UserError(f"--gpus {size}: a dry run takes 1 to {MAX_RANKS}")
    if not 0 <= rank < size:
        raise UserError(f"--rank {rank}: must be >= 0 and < {size}, the number of GPUs")


@contextmanager
def fake_world(rank: int, size: int, transformer: dict[str, Any]) -> Iterator[None]:
    """Inside: this process is rank `rank` of `size`, and every tensor is without data. First: `check_world`.

    Raises UserError where the process has a world already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("--dry-run: this process is part of a run already; start it alone, not under torchrun")

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with ExitStack() as stack:
            for target, name, new in _replacements(transformer):
                stack.enter_context(patch.object(target, name, new))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(Numbers())
            yield
    finally:
        rotary_table.cache_clear()  # the tables are without data
        groups.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()


def _replacements(transformer: dict[str, Any]) -> list[tuple[Any, str, Callable[..., Any]]]:
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    return [
        (parallel_state, "initialize_model_parallel", without_gloo),
        (engine, "load_weights", lambda chunks, directory: None),
        (engine, "read_transformer_config", lambda directory: transformer),
        (noise, "token_noise", _no_noise),
        (lora, "_initial_a", _no_values),
        (anchor.Anchor, "_kept_sum", lambda self, copied: 0),
        (torch.nn.Module, "_apply", _apply_in_place),
        (dist, "all_gather_object", _own_object),
        (torch.Tensor, "numpy", _ones),
    ]


def _no_noise(num_tokens: int, channels: int, samples: list[int], *indices: int) -> torch.Tensor:
    return torch.empty(num_tokens, len(samples), channels)


def _no_values(settings: Any, into: int, *others: Any) -> torch.Tensor:
    return torch.empty(settings.rank, into)


def _apply_in_place(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    for child in self.children() if recurse else ():
        child._apply(function)
    for parameter in self._parameters.values():
        if parameter is not None:
            parameter.data = function(parameter.data)
    self._buffers.update({name: x if x is None else function(x) for name, x in self._buffers.items()})
    return self


def _own_object(found: list[Any], mine: Any, group: Any = None) -> None:
    found[:] = [mine] * len(found)


def _ones(self: torch.Tensor, **options: Any) -> np.ndarray:
    return np.ones(self.shape, str(self.dtype).removeprefix("torch."))
