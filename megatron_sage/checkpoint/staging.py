"""Work of several ranks on one directory: it appears whole or not at all, and errors reach every rank."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_sage.errors import UserError


def _agree(error: str | None) -> None:
    """Every rank raises the first rank's error, so that none of them waits for the others in a collective."""
    errors = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=dist.group.WORLD)
    for message in errors:
        if message is not None:
            raise UserError(message)


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """Runs a part without collectives; a UserError of one rank is raised on all of them."""
    error = None
    try:
        yield
    except UserError as caught:
        error = str(caught)
    _agree(error)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `target`, renamed to it at the end and removed on any error. All ranks call.

    Raises UserError if `target` exists and is not empty: nothing is ever overwritten.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    staging = target.absolute().parent / f".{target.name}.partial"
    with on_all_ranks():
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target}: exists and is not an empty directory; remove it or choose another")
        if first:
            shutil.rmtree(staging, ignore_errors=True)  # of an earlier run that was killed
            try:
                staging.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{staging.parent}: cannot write here ({error.strerror})") from error
    try:
        yield staging
        _barrier()
        if first:
            staging.rename(target)  # POSIX: replaces an empty directory
        _barrier()
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group=dist.group.WORLD)


@contextmanager
def process_group() -> Iterator[None]:
    """The process group that is there, or torchrun's, or one of a single process; CPU tensors only, so gloo."""
    if dist.is_initialized():
        yield
        return
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
