"""Directories of safetensors files in the diffusers naming: reading by slices, writing tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sage.errors import UserError

STEM = "diffusion_pytorch_model"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A mapping keeps each page it ever touched resident; a fresh one every so often bounds that.
REMAP_AFTER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Spec:
    """Dtype and whole shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def check_specs(specs: dict[str, Spec], expected: dict[str, tuple[int, ...]], place: Callable[[str], Path]) -> None:
    """Raises UserError, with `place(name)`, for the first tensor that is missing, unexpected or misshaped."""
    for name in sorted(expected.keys() - specs.keys()):
        raise UserError(f"{place(name)}: tensor {name!r} is missing; config.json describes {len(expected)} tensors")
    for name in sorted(specs.keys() - expected.keys()):
        raise UserError(f"{place(name)}: tensor {name!r} is not part of the model that config.json describes")
    for name, shape in expected.items():
        if specs[name].shape != shape:
            found = list(specs[name].shape)
            raise UserError(f"{place(name)}: tensor {name!r} has shape {found}, config.json says {list(shape)}")


class SafetensorsDirectory:
    """All tensors of a directory, memory mapped; headers are read and checked on construction, data on demand.

    `specs`: tensor name -> Spec. Raises UserError (file and tensor named) for anything that is not a complete set of
    safetensors files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        self._open: tuple[Path, Any] | None = None
        self._bytes_read = 0
        index = directory / f"{STEM}.safetensors.index.json"
        single = directory / f"{STEM}.safetensors"
        if index.is_file():
            self._scan_index(index)
        elif single.is_file():
            self._scan_file(single)
        else:
            found = _other_weights(directory)
            raise UserError(f"{single}: not found, nor {index.name}; only safetensors weights are read{found}")

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError for the first missing, unexpected or misshaped tensor."""
        check_specs(self.specs, expected, lambda name: self._file_of.get(name, self.directory))

    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self._file_of[name]

    def read(self, name: str, bounds: tuple[int, int, int] | None = None) -> Tensor:
        """The tensor, or its (dim, start, stop) slice: a view of the mapped file, so copy what is to be kept."""
        path = self._file_of[name]
        if self._open is None or self._open[0] != path or self._bytes_read > REMAP_AFTER_BYTES:
            self._open, self._bytes_read = (path, open_file(path)), 0
        handle = self._open[1]
        if bounds is None:
            tensor = handle.get_tensor(name)
        else:
            dim, start, stop = bounds
            tensor = handle.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
        self._bytes_read += tensor.nbytes
        return tensor

    def _scan_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            by_file: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                by_file.setdefault(file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors files ({error!r})") from error
        for file, names in sorted(by_file.items()):
            path = self.directory / file
            if not path.is_file():
                raise UserError(f"{path}: missing; {index.name} says it holds {min(names)!r} and {len(names) - 1} more")
            found = self._scan_file(path)
            for name in sorted(names - found):
                raise UserError(f"{path}: does not hold {name!r}, which {index.name} says it does")
            for name in sorted(found - names):
                raise UserError(f"{path}: holds {name!r}, which {index.name} does not list here")

    def _scan_file(self, path: Path) -> set[str]:
        handle = open_file(path)
        names = set(handle.keys())
        for name in names:
            described = handle.get_slice(name)
            dtype = described.get_dtype()
            if dtype not in DTYPES:
                raise UserError(f"{path}: tensor {name!r} is {dtype}; only {', '.join(DTYPES)} are read")
            self.specs[name] = Spec(DTYPES[dtype], tuple(described.get_shape()))
            self._file_of[name] = path
        return names


def plan_files(sizes: Sequence[int], max_bytes: int) -> list[range]:
    """Splits items of the given sizes, in order, into runs of at most `max_bytes` (a larger item gets its own)."""
    starts, size = [0], 0
    for index, item in enumerate(sizes):
        if size and size + item > max_bytes:
            starts.append(index)
            size = 0
        size += item
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def file_names(count: int) -> list[str]:
    """The names that diffusers gives to `count` files."""
    if count == 1:
        return [f"{STEM}.safetensors"]
    return [f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(directory: Path, files: Sequence[dict[str, Spec]]) -> None:
    """The index of several files; nothing for a single one."""
    if len(files) == 1:
        return
    weight_map = {name: file for file, specs in zip(file_names(len(files)), files, strict=True) for name in specs}
    total = sum(spec.nbytes for specs in files for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor; the library's `save_file` wants all of them in memory at once.

    `specs` fixes names, order, dtypes and shapes; `write` must be called in that order. Use as a context manager:
    leaving it with tensors missing is an error.
    """

    def __init__(self, path: Path, specs: dict[str, Spec]) -> None:
        self._path = path
        self._todo = list(specs.items())[::-1]
        names = {dtype: name for name, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": names[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None and self._todo:
            raise ValueError(f"{self._path}: {len(self._todo)} tensors were not written, next {self._todo[-1][0]!r}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor; ValueError if it is not the one announced."""
        expected, spec = self._todo.pop()
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, spec.dtype, spec.shape):
            found = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{self._path}: got {found}, expected {expected} {spec}")
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._file.write(data.numpy().data)


def open_file(path: Path) -> Any:
    """A safetensors file, its header checked; UserError says what is cut off."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {_explain(path) or f'not a safetensors file ({error})'}") from error


def _explain(path: Path) -> str | None:
    """For a truncated file, the first tensor that is cut off; None if the header itself cannot be read."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                return None
            header = json.loads(file.read(length))
        ends = {name: item["data_offsets"][1] + 8 + length for name, item in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    cut = [(end, name) for name, end in ends.items() if end > size]
    if not cut:
        return None
    end, name = min(cut)
    return f"truncated: tensor {name!r} ends at byte {end}, the file has {size}; copy or download it again"


def _other_weights(directory: Path) -> str:
    suffixes = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")
    found = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)
    return f" (found {', '.join(found[:3])})" if found else ""
