"""Reading Megatron distributed checkpoints without trusting them."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_sage.checkpoint import configs
from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.checkpoint.safetensors_io import Spec, check_specs
from megatron_sage.errors import UserError

BACKEND, VERSION = "torch_dist", 1
MANIFEST = "manifest.json"  # every file with its size and checksum; written last
_CHUNK = 1 << 24  # bytes read at once for a checksum
# names of what a run keeps beside the policy's weights
STATE_PREFIXES = ("optimizer.", "anchor.", "ema.", "run.")


def verify_files(path: Path, rank: int = 0, world: int = 1, cure: str = "make or fetch it again") -> None:
    """Sizes of all files and the checksums of this rank's share of them against the manifest; no collectives.

    Raises UserError for the first that is missing, cut off or changed.
    """
    files = read_object(path / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path / MANIFEST}: lists no files; {cure}")
    for name, said in sorted(files.items()):
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing; {cure}")
        if file.stat().st_size != said["bytes"]:
            raise UserError(f"{file}: truncated: {file.stat().st_size} bytes, was {said['bytes']}; {cure}")
    for name, said in sorted(files.items())[rank::world]:
        found = f"{file_checksum(path / name):08x}"
        if found != said["crc32"]:
            raise UserError(f"{path / name}: damaged: checksum {found}, was {said['crc32']}; {cure}")


def file_checksum(file: Path) -> int:
    """CRC-32 of its content."""
    crc = 0
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where the file holds none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; a checkpoint of a run has this file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); restore the file or use another checkpoint") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; restore the file or use another checkpoint")
    return found


class _TableUnpickler(pickle.Unpickler):
    """Reads DCP's table of contents, a pickle, and refuses to build anything but what such a table is made of."""

    ALLOWED: ClassVar[dict[str, set[str]]] = {
        "torch": {"Size", "dtype", "device"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Called by pickle for every name in the file."""
        found = super().find_class(module, name) if name in self.ALLOWED.get(module, ()) else None
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's table contains")
        return found


class TableReader(CachedMetadataFileSystemReader):
    """DCP's reader, but for the table of contents, which it unpickles whatever is in it."""

    _table: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """The table; UserError where it is none."""
        if self._table is None:
            path = Path(self.path) / ".metadata"
            try:
                with path.open("rb") as file:
                    table = _TableUnpickler(file).load()
                assert isinstance(table, Metadata)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; a Megatron checkpoint has this file") from error
            except (
                EOFError,
                pickle.UnpicklingError,
                AttributeError,
                ImportError,
                IndexError,
                AssertionError,
                TypeError,
                ValueError,
                KeyError,
                UnicodeDecodeError,
                MemoryError,
            ) as error:
                raise UserError(f"{path}: unreadable ({error}); restore the file or use another checkpoint") from error
            self._table = table
        return self._table


class MegatronDirectory:
    """The tensors of a Megatron distributed checkpoint; metadata is read and checked on construction, data on demand.

    `specs`: name -> Spec of the whole tensor; a run's state beside the weights is left out. Raises UserError for what
    is not a complete checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        _check_format(directory)
        self._reader = TableReader(directory)
        metadata = self._reader.read_metadata()
        self._check_files(metadata.storage_data)
        self._screen_objects(metadata)
        self.specs = {
            name: Spec(entry.properties.dtype, tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(STATE_PREFIXES)
        }

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError for the first missing, unexpected or misshaped tensor."""
        check_specs(self.specs, expected, lambda name: self.directory)

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """This rank's share of the files against the manifest, where there is one: Megatron's own tools make none."""
        if (self.directory / MANIFEST).is_file():
            verify_files(self.directory, rank, world)

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

    def _screen_objects(self, metadata: Metadata) -> None:
        """Objects that are no tensors are unpickled by DCP as they are: only plain ones pass."""
        common = self.directory / "common.pt"
        if common.is_file():
            screen(common, str(common))
        for index, info in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
                continue
            with (self.directory / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = io.BytesIO(file.read(info.length))
            screen(content, f"{self.directory / info.relative_path}: object {index.fqn!r}")

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
    checkpoint.verify()
    return checkpoint, config, keymap


def screen(file: Path | BinaryIO, name: str) -> Any:
    """What a file of torch.save holds if it is plain data; UserError where it would run code or is broken."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken zip or pickle raises; said, not swallowed
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: not plain data, or damaged ({reason}); use another checkpoint") from error


def _check_format(directory: Path) -> None:
    path = directory / "metadata.json"
    try:
        described = json.loads(path.read_text())
        backend = described.get("sharded_backend")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a Megatron checkpoint has this file") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the metadata of a Megatron checkpoint ({error})") from error
    if backend != BACKEND:
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
