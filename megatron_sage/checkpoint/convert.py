"""Conversion between Hugging Face layouts (diffusers, official) and Megatron distributed checkpoints.

Both directions are one loop over the bindings of the key map, one tensor in memory at a time, whole or spread over the
ranks of torchrun. The stored dtype is kept. Output appears complete or not at all.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch import Tensor

from megatron_sage.checkpoint import configs
from megatron_sage.checkpoint.hf import DEFAULT_MAX_SHARD_BYTES, HfFile, open_hf, plan_hf_files, write_hf_metadata
from megatron_sage.checkpoint.keymap import Binding, Layout
from megatron_sage.checkpoint.progress import byte_progress
from megatron_sage.checkpoint.safetensors_io import SafetensorsWriter, Spec, plan_files
from megatron_sage.checkpoint.saving import lazy_tensor, save
from megatron_sage.checkpoint.staging import on_all_ranks, process_group, staged_directory
from megatron_sage.checkpoint.torch_dist import MegatronDirectory, open_megatron
from megatron_sage.errors import UserError

READ_BATCH_BYTES = 128 * 2**20


def hf_to_megatron(source: Path | str, target: Path | str) -> None:
    """A diffusers transformer directory (or the root above it) -> a new Megatron checkpoint directory."""
    _to_megatron(Path(source), Path(target), "diffusers")


def official_to_megatron(source: Path | str, target: Path | str) -> None:
    """An official transformer directory -> a new Megatron checkpoint directory."""
    _to_megatron(Path(source), Path(target), "official")


def megatron_to_hf(source: Path | str, target: Path | str, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> None:
    """A Megatron checkpoint directory -> a new directory that diffusers' `from_pretrained` loads."""
    _from_megatron(Path(source), Path(target), "diffusers", max_shard_bytes)


def megatron_to_official(
    source: Path | str, target: Path | str, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
) -> None:
    """A Megatron checkpoint directory -> a new directory in the official layout."""
    _from_megatron(Path(source), Path(target), "official", max_shard_bytes)


def _to_megatron(source: Path, target: Path, layout: Layout) -> None:
    with process_group():
        with on_all_ranks():
            files, config, keymap = open_hf(source, layout)
        own = _share(keymap.bindings, lambda b: sum(files.specs[name].nbytes for name in b.names(layout)))
        specs = {name: Spec(files.specs[b.names(layout)[0]].dtype, b.shape_in("ours")) for b in own for name in b.ours}
        by_name = {name: b for b in own for name in b.ours}
        total = sum(spec.nbytes for spec in specs.values())
        with staged_directory(target) as staging, _progress(f"{source} -> {target}", total) as advance:

            def produce(name: str) -> Tensor:
                binding = by_name[name]
                tensors = [files.read(part) for part in binding.names(layout)]
                advance(specs[name].nbytes)
                return binding.convert(tensors, layout, "ours")[binding.ours.index(name)]

            save({name: lazy_tensor(name, spec) for name, spec in specs.items()}, staging, produce)
            if dist.get_rank() == 0:
                configs.write_config(staging, config)


def _from_megatron(source: Path, target: Path, layout: Layout, max_shard_bytes: int) -> None:
    with process_group():
        with on_all_ranks():
            checkpoint, config, keymap = open_megatron(source)
        dtypes = {binding: checkpoint.specs[binding.ours[0]].dtype for binding in keymap.bindings}
        files = plan_hf_files(keymap, dtypes, layout, max_shard_bytes)
        mine = range(dist.get_rank(), len(files), dist.get_world_size())
        total = sum(spec.nbytes for index in mine for spec in files[index].specs.values())
        with staged_directory(target) as staging, _progress(f"{source} -> {target}", total) as advance:
            with on_all_ranks():
                for index in mine:
                    _write_file(staging / files[index].name, files[index], checkpoint, layout, advance)
            if dist.get_rank() == 0:
                write_hf_metadata(staging, files, config, layout)


def _write_file(path: Path, plan: HfFile, checkpoint: MegatronDirectory, layout: Layout, advance: Callable) -> None:
    with SafetensorsWriter(path, plan.specs) as writer:
        sizes = [checkpoint.specs[b.ours[0]].nbytes * len(b.ours) for b in plan.bindings]
        for batch in plan_files(sizes, READ_BATCH_BYTES):
            bindings = [plan.bindings[index] for index in batch]
            tensors = checkpoint.read([name for b in bindings for name in b.ours])
            for binding in bindings:
                converted = binding.convert([tensors.pop(name) for name in binding.ours], "ours", layout)
                for name, tensor in zip(binding.names(layout), converted, strict=True):
                    writer.write(name, tensor)
                    advance(tensor.nbytes)


def _share(bindings: Sequence[Binding], size_of: Callable[[Binding], int]) -> list[Binding]:
    """This rank's part of the bindings: contiguous, so that its reads are too, and of about equal bytes."""
    total = sum(size_of(binding) for binding in bindings)
    rank, world, done, own = dist.get_rank(), dist.get_world_size(), 0, []
    for binding in bindings:
        if done * world // max(total, 1) == rank:
            own.append(binding)
        done += size_of(binding)
    return own


def _progress(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return byte_progress(label, total, enabled=dist.get_rank() == 0)


DIRECTIONS: dict[str, Callable[..., None]] = {
    "hf-to-megatron": hf_to_megatron,
    "megatron-to-hf": megatron_to_hf,
    "official-to-megatron": official_to_megatron,
    "megatron-to-official": megatron_to_official,
}


def main(argv: Sequence[str]) -> int:
    """`megatron-sage convert DIRECTION SRC DST`. Returns the exit status; raises UserError with one line."""
    parser = OneLineParser(prog="megatron-sage convert", description=__doc__)
    parser.add_argument("direction", choices=DIRECTIONS)
    parser.add_argument("source", type=Path, metavar="SRC", help="transformer directory, or the root above it")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to create")
    parser.add_argument(
        "--max-shard-bytes", type=_bytes, default=DEFAULT_MAX_SHARD_BYTES, help="of an exported file: 5GB, 500MB, 1234"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed conversion removes its partial output
    export = args.direction.startswith("megatron-to")
    DIRECTIONS[args.direction](
        args.source, args.target, **({"max_shard_bytes": args.max_shard_bytes} if export else {})
    )
    return 0


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as every other error of a user."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message} (see {self.prog} --help)")


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, factor = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    value = int(float(number) * factor)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be positive")
    return value
