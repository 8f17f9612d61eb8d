"""Megatron distributed checkpoints, written in this process and tensor by tensor; at once, or beside the training.

Megatron-core's own save strategy hands the data to forked worker processes: seconds for each save, and a copy of
every tensor; its persistent worker waits for ever on a machine without a GPU, and workers outlive a killed parent. The
strategy here writes the same format (`torch_dist` version 1, which Megatron's loader reads) from the calling process or
a thread of it, and asks for each tensor only when its turn comes, so that a conversion holds one tensor at a time.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sage.checkpoint.safetensors_io import Spec
from megatron_sage.checkpoint.staging import on_all_ranks
from megatron_sage.checkpoint.torch_dist import BACKEND, MANIFEST, VERSION, first_failure
from megatron_sage.errors import UserError

Producer = Callable[[str], Tensor]


class _Checked:
    """A file that counts and sums what is written to it: torch.save writes front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.bytes, self.crc32 = file, 0, 0
        self.error: OSError | None = None  # torch.save goes on after it, and then fails with words of its own

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += len(view)
        return len(view)  # the file is buffered: it takes all or raises

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()


class StreamingWriter(FileSystemWriter):
    """One file a rank, written item by item. The parent keeps every tensor of a file alive until the file is closed."""

    def __init__(self, directory: str | Path, snapshot: bool) -> None:
        """`snapshot`: copy everything to host memory in `prepare_write_data`; the originals may change then."""
        super().__init__(directory)
        self.snapshot = snapshot
        self.name: str | None = None
        self.crc32 = self.bytes = 0
        self._items: list[tuple[WriteItem, Any]] = []
        self._planner: SavePlanner | None = None

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """The last call of Megatron's planning: what this rank has to write."""
        self.name = f"{plan.storage_data.prefix}0.distcp"
        self._planner = planner
        self._items = [(item, _copied(planner.resolve_data(item)) if self.snapshot else None) for item in plan.items]

    def write(self) -> list[WriteResult]:
        """Write this rank's file and wait until the disk has it."""
        assert self.name is not None
        results = []
        with (Path(self.path) / self.name).open("wb") as file:
            checked = _Checked(file)
            while self._items:
                item, data = self._items.pop(0)
                if not self.snapshot:
                    data = self._planner.resolve_data(item)  # type: ignore[union-attr]
                try:
                    results.append(_write_item(checked, self.name, item, data))
                except RuntimeError as failure:
                    raise checked.error or failure from failure
            file.flush()
            os.fsync(file.fileno())
        self.crc32, self.bytes = checked.crc32, checked.bytes
        return results


def _copied(data: Any) -> Any:
    return data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data


def _write_item(file: _Checked, name: str, item: WriteItem, data: Any) -> WriteResult:
    offset = file.tell()
    if item.type == WriteItemType.BYTE_IO:
        file.write(data.getbuffer())
    else:
        tensor = data.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage behind a view
        torch.save(tensor, file)  # type: ignore[arg-type]  # it needs write, flush and tell
    length = file.tell() - offset
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))


class _LazyPlanner(MCoreSavePlanner):
    """Takes the data of sharded tensors from `produce(key)` instead of from the state dict."""

    def __init__(self, produce: Producer | None) -> None:
        super().__init__(
            dedup_replicated_tensors=False, flatten_state_dict=False, can_run_decentralized_global_plan=False
        )
        self._produce = produce

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._produce(index.fqn) if self._produce else super().lookup_object(index)


class Saving:
    """One checkpoint on its way into an existing, empty directory. All ranks make one, and call `complete`.

    Planning, which needs the other ranks, is done on construction; writing needs none of them; `complete` does again.
    A failure of any rank is a UserError of every rank; the directory is then the caller's to remove.
    """

    def __init__(
        self,
        sharded_state_dict: dict[str, Any],
        directory: Path,
        produce: Producer | None = None,
        background: bool = False,
    ) -> None:
        """`produce`: gives the data of a key when it is written; the sharded tensors may then be on the meta device.

        `background`: copy all data to host memory and write them in a thread.
        """
        self.directory, self.background = directory, background
        sharded, common = save_preprocess(sharded_state_dict)
        self._on_disk(lambda: _write_common(common, directory) if dist.get_rank() == 0 else None)
        self._writer = StreamingWriter(directory, snapshot=background)
        try:
            (_, self._metadata, _), *_ = save_state_dict_async_plan(
                mcore_to_pyt_state_dict(_main_replicas(sharded), False),
                self._writer,  # type: ignore[arg-type]
                planner=_LazyPlanner(produce),
            )
        except CheckpointException as failure:
            raise first_failure(directory, failure) from failure
        self._written: ThreadFuture[list[WriteResult]] | None = None
        if background:
            worker = ThreadPoolExecutor(1, "checkpoint")
            self._written = worker.submit(self._writer.write)
            worker.shutdown(wait=False)

    def write_text(self, name: str, text: str) -> None:
        """A further file of the checkpoint, written by rank 0. All ranks call, before `complete`."""
        self._on_disk(lambda: (self.directory / name).write_text(text) if dist.get_rank() == 0 else None)

    def done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._written is not None and self._written.done()

    def complete(self) -> None:
        """Wait for all ranks' files, then write the tables that make a checkpoint of them."""
        results: list[WriteResult] = []

        def write() -> None:
            results.extend(self._written.result() if self._written is not None else self._writer.write())

        self._on_disk(write)
        mine = (results, self._writer.name, self._writer.bytes, self._writer.crc32)
        world = dist.get_world_size()
        everyone: list[Any] = [None] * world if dist.get_rank() == 0 else []
        dist.gather_object(mine, everyone or None, dst=0, group=dist.group.WORLD)
        self._on_disk(lambda: self._write_tables(everyone) if everyone else None)

    def _on_disk(self, work: Callable[[], object]) -> None:
        with on_all_ranks():
            try:
                work()
            except OSError as error:
                raise UserError(f"{self.directory}: the checkpoint cannot be written: {error.strerror}") from error

    def _write_tables(self, everyone: list[Any]) -> None:
        self._writer.finish(self._metadata, [results for results, *_ in everyone])
        save_config(CheckpointingConfig(BACKEND, VERSION), str(self.directory))
        files = {name: {"bytes": size, "crc32": f"{crc:08x}"} for _, name, size, crc in everyone}
        for path in sorted(self.directory.iterdir()):
            if path.name not in files:
                with path.open("rb") as file:
                    content = file.read()
                    os.fsync(file.fileno())
                files[path.name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        with (self.directory / MANIFEST).open("w") as out:
            json.dump({"files": files}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())


def _write_common(common: dict[str, Any], directory: Path) -> None:
    """Megatron's file for what is not sharded; through Python, whose error names a full disk, unlike torch's."""
    content = io.BytesIO()
    torch.save(common, content)
    (directory / COMMON_STATE_FNAME).write_bytes(content.getbuffer())


def _main_replicas(sharded_state_dict: dict[str, Any]) -> dict[str, list[ShardedBase]]:
    """What this rank writes: of tensors that several ranks hold, one rank's."""
    by_key: dict[str, list[ShardedBase]] = {}
    for item in nested_values(sharded_state_dict):
        if is_main_replica(item.replica_id):
            key = item.unique_key if isinstance(item, ShardedObject) else item.key
            by_key.setdefault(key, []).append(item)
    return by_key


def save(sharded_state_dict: dict[str, Any], directory: Path, produce: Producer | None = None) -> None:
    """A whole Megatron checkpoint into an existing, empty directory. All ranks call.

    Use it for any sharded state dict, an optimizer's included. Raises UserError with the first rank's failure.
    """
    Saving(sharded_state_dict, directory, produce).complete()


def lazy_tensor(key: str, spec: Spec) -> ShardedTensor:
    """A whole tensor without data, for `save(..., produce=...)`."""
    return ShardedTensor.from_rank_offsets(key, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
