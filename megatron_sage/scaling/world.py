"""One torch.distributed world for several layouts, one after the other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_sage.parallel.device import backend


@contextmanager
def one_world(timeout_seconds: int = 3600) -> Iterator[None]:
    """The world of torchrun's environment; `groups.shutdown` inside the block ends Megatron's groups and leaves it."""
    if dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # see parallel.groups
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend(), timeout=timedelta(seconds=timeout_seconds))
    try:
        yield
    finally:
        dist.destroy_process_group()
