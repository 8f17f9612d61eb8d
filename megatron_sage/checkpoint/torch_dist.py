"""Megatron distributed checkpoints, written in this process and tensor by tensor.

Megatron-core's own save strategy hands the data to forked worker processes: seconds for each save, and a copy of
every tensor. The strategy here writes the same format (`torch_dist` version 1, which Megatron's loader reads) from the
calling process and asks for each tensor only when its turn comes, so that a conversion holds one tensor at a time.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_sage.checkpoint import configs
from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.checkpoint.safetensors_io import Spec, check_specs
from megatron_sage.errors import UserError

Producer = Callable[[str], Tensor]


class StreamingWriter(FileSystemWriter):
    """One file a rank, written item by item. The parent keeps every tensor of a file alive until the file is closed."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's items; see `StorageWriter.write_data`."""
        name = f"{plan.storage_data.prefix}0.distcp"
        with (Path(self.path) / name).open("wb") as file:
            results = [_write_item(file, name, item, planner) for item in plan.items]
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _write_item(file: BinaryIO, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    offset = file.tell()
    data: Any = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        file.write(data.getbuffer())
    else:
        tensor = data.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage behind a view
        torch.save(tensor, file)
    length = file.tell() - offset
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))


class _LazyPlanner(MCoreSavePlanner):
    """Takes the data of sharded tensors from `produce(key)` instead of from the state dict."""

    def __init__(self, produce: Producer | None) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._produce = produce

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._produce(index.fqn) if self._produce else super().lookup_object(index)


class InProcessSave(SaveShardedStrategy):
    """Megatron save strategy without worker processes.

    `produce`: gives the data of a key when it is written; the sharded tensors may then be on the meta device.
    """

    def __init__(self, produce: Producer | None = None) -> None:
        super().__init__("torch_dist", 1)
        self._produce = produce

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Sharded objects (optimizer scalars, random states) are written with the tensors."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Writes the main replicas of this rank. All ranks call."""
        by_key: dict[str, list[ShardedBase]] = {}
        for item in nested_values(sharded_state_dict):
            if is_main_replica(item.replica_id):
                key = item.unique_key if isinstance(item, ShardedObject) else item.key
                by_key.setdefault(key, []).append(item)
        dcp.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=StreamingWriter(checkpoint_dir),
            planner=_LazyPlanner(self._produce),
        )


def save(sharded_state_dict: dict[str, Any], directory: Path, produce: Producer | None = None) -> None:
    """`megatron.core.dist_checkpointing.save` through `InProcessSave`, into an existing directory. All ranks call.

    Use it for any sharded state dict, an optimizer's included. Raises UserError with the first rank's failure.
    """
    try:
        dist_checkpointing.save(sharded_state_dict, str(directory), InProcessSave(produce))
    except CheckpointException as failure:
        raise first_failure(directory, failure) from failure


def lazy_tensor(key: str, spec: Spec) -> ShardedTensor:
    """A whole tensor without data, for `save(..., produce=...)`."""
    return ShardedTensor.from_rank_offsets(key, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))


class MegatronDirectory:
    """The tensors of a Megatron distributed checkpoint; metadata is read and checked on construction, data on demand.

    `specs`: name -> Spec of the whole tensor; optimizer state (`optimizer.*`) is left out. Raises UserError for what is
    not a complete checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        _check_format(directory)
        self._reader = CachedMetadataFileSystemReader(directory)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
            raise UserError(f"{directory / '.metadata'}: unreadable ({error})") from error
        self._check_files(metadata.storage_data)
        self.specs = {
            name: Spec(entry.properties.dtype, tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError for the first missing, unexpected or misshaped tensor."""
        check_specs(self.specs, expected, lambda name: self.directory)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole tensors in their stored dtype; no collectives."""
        tensors = {name: torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype) for name in names}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load(tensors, storage_reader=self._reader, no_dist=True)
            except CheckpointException as failure:
                raise first_failure(self.directory, failure) from failure
        return tensors

    def _check_files(self, storage_data: dict[Any, Any]) -> None:
        ends: dict[str, tuple[int, str]] = {}
        for index, info in storage_data.items():
            last = (info.offset + info.length, index.fqn)
            ends[info.relative_path] = max(ends.get(info.relative_path, last), last)
        for name, (end, key) in ends.items():
            path = self.directory / name
            if not path.is_file():
                raise UserError(f"{path}: missing; it holds {key!r} among others")
            if path.stat().st_size < end:
                size = path.stat().st_size
                raise UserError(f"{path}: truncated: tensor {key!r} ends at byte {end}, the file has {size}")


def open_megatron(source: Path) -> tuple[MegatronDirectory, dict[str, Any], KeyMap]:
    """Opens and checks a Megatron checkpoint directory with its config.json."""
    config = configs.read_config(source, configs.DIFFUSERS_CLASS)
    keymap = KeyMap.from_config(configs.complete(config, source / "config.json"))
    checkpoint = MegatronDirectory(source)
    checkpoint.check(keymap.shapes("ours"))
    return checkpoint, config, keymap


def _check_format(directory: Path) -> None:
    path = directory / "metadata.json"
    try:
        described = json.loads(path.read_text())
        backend = described.get("sharded_backend")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a Megatron checkpoint has this file") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the metadata of a Megatron checkpoint ({error})") from error
    if backend != "torch_dist":
        raise UserError(f"{path}: sharded_backend is {backend!r}; only 'torch_dist' checkpoints are read")


def first_failure(directory: Path, failure: CheckpointException) -> BaseException:
    """What to raise for a collective checkpoint operation that failed: the first failing rank's error in one line.

    An interruption stays one.
    """
    rank, (error, _) = min(failure.failures.items())
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return error
    first_line = str(error).splitlines()[0] if str(error) else ""
    return UserError(f"{directory}: rank {rank}: {type(error).__name__}: {first_line}")
