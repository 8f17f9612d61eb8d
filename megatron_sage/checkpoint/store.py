"""The checkpoints of a run: a directory of whole ones, each with a name only when it is complete.

A checkpoint is written as `.iteration_NNNNNN.partial` and renamed: whatever is killed, and whenever, what can be seen
is whole. What is read is checked against the sizes and checksums of its manifest first.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sage.checkpoint.saving import Saving
from megatron_sage.checkpoint.staging import on_all_ranks
from megatron_sage.checkpoint.torch_dist import MegatronDirectory, read_object, verify_files
from megatron_sage.errors import UserError

PREFIX = "iteration_"


def newest(directory: Path) -> Path | None:
    """The complete checkpoint of the latest iteration."""
    found = complete(directory)
    return found[-1] if found else None


def complete(directory: Path) -> list[Path]:
    """All complete checkpoints, the oldest first."""
    return sorted(path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())


class CheckpointStore:
    """Saves, thins out and opens the checkpoints of one run. All ranks call every method."""

    def __init__(
        self, directory: Path, keep_last: int | None = None, keep_every: int | None = None, background: bool = False
    ) -> None:
        """`keep_last` newest ones stay (None: all), and those of every `keep_every`-th iteration; see `save`."""
        self.directory, self.keep_last, self.keep_every, self.background = directory, keep_last, keep_every, background
        self._pending: tuple[int, Saving] | None = None
        if dist.get_rank() == 0 and directory.is_dir():
            for stale in directory.glob(f".{PREFIX}*"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
        dist.barrier(group=dist.group.WORLD)

    def path(self, iteration: int) -> Path:
        """Of one iteration's checkpoint."""
        return self.directory / f"{PREFIX}{iteration:06d}"

    def save(self, iteration: int, sharded: dict[str, Any], texts: Mapping[str, str]) -> None:
        """Write a checkpoint of sharded tensors and text files; in the background it is complete after `finish`.

        Raises UserError on every rank where one of them could not write; nothing of it stays then, older checkpoints
        do. An iteration that is saved already is left as it is: a run that goes on from a checkpoint only makes
        later ones.
        """
        self.finish()
        if self._agreed(self.path(iteration).is_dir()):
            return
        partial = self.directory / f".{PREFIX}{iteration:06d}.partial"
        with on_all_ranks():
            if dist.get_rank() == 0:
                try:
                    partial.mkdir(parents=True)
                except OSError as error:
                    raise UserError(f"{self.directory}: cannot write here ({error.strerror})") from error
        try:
            saving = Saving(sharded, partial, background=self.background)
            for name, text in texts.items():
                saving.write_text(name, text)
        except BaseException:
            self._discard(partial)
            raise
        self._pending = iteration, saving
        if not self.background:
            self.finish()

    def poll(self) -> None:
        """Complete a background save if all ranks have written their parts; does not wait."""
        if self._pending is not None and self._agreed(self._pending[1].done()):
            self.finish()

    def finish(self) -> None:
        """Wait for a background save and complete it."""
        if self._pending is None:
            return
        (iteration, saving), self._pending = self._pending, None
        try:
            saving.complete()
        except BaseException:
            self._discard(saving.directory)
            raise
        with on_all_ranks():  # rank 0 works, and the others must learn how it went
            if dist.get_rank() == 0:
                try:
                    saving.directory.rename(self.path(iteration))
                    _sync(self.directory)
                    self._thin_out()
                except OSError as error:
                    raise UserError(f"{self.directory}: cannot be changed ({error.strerror})") from error

    def _thin_out(self) -> None:
        if self.keep_last is None:
            return
        for path in complete(self.directory)[: -self.keep_last]:
            if self.keep_every and int(path.name.removeprefix(PREFIX)) % self.keep_every == 0:
                continue
            doomed = path.rename(path.with_name(f".{path.name}.deleted"))  # never to be seen half there
            shutil.rmtree(doomed)

    def _discard(self, partial: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)

    @staticmethod
    def _agreed(here: bool) -> bool:
        """Whether it is so on every rank (MIN over WORLD)."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        flag = torch.tensor([int(here)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=dist.group.WORLD)
        return bool(flag.item())


def opened(path: Path) -> tuple[MegatronDirectory, dict[str, Any]]:
    """A checkpoint whose every byte has been checked, and its plain state. All ranks call.

    Each rank reads its share of the files. Raises UserError, on all ranks, for whatever is missing, cut off or changed,
    and for files that would run code.
    """
    with on_all_ranks():
        others = [other.name for other in complete(path.parent) if other != path]
        cure = f"delete or restore {path.name}" + (f" (then {others[-1]} is the newest)" if others else "")
        verify_files(path, dist.get_rank(), dist.get_world_size(), cure)
    with on_all_ranks():
        directory = MegatronDirectory(path)
        plain = read_object(path / "state.json")
    return directory, plain


def _sync(directory: Path) -> None:
    """Until the disk knows the names in it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
