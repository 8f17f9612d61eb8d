"""A Hugging Face transformer directory as a whole, in the diffusers or the official layout: config and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sage.checkpoint import configs
from megatron_sage.checkpoint.keymap import Binding, KeyMap, Layout
from megatron_sage.checkpoint.safetensors_io import SafetensorsDirectory, Spec, file_names, plan_files, write_index
from megatron_sage.errors import UserError

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


def open_hf(source: Path, layout: Layout = "diffusers") -> tuple[SafetensorsDirectory, dict[str, Any], KeyMap]:
    """Opens and checks a Hugging Face directory: its tensors, its config as a diffusers config, its key map."""
    directory = configs.transformer_directory(source)
    origin = directory / "config.json"
    official = layout == "official"
    config = configs.read_config(directory, configs.OFFICIAL_CLASS if official else configs.DIFFUSERS_CLASS)
    if not official:
        configs.complete(config, origin)  # a bad size is reported before a file is opened
    files = SafetensorsDirectory(directory)
    if official:
        shapes = {name: spec.shape for name, spec in files.specs.items()}
        config = configs.official_to_diffusers(config, shapes, origin)
    keymap = KeyMap.from_config(configs.complete(config, origin))
    files.check(keymap.shapes(layout))
    _check_fusable(keymap, files, layout)
    return files, config, keymap


@dataclass(frozen=True)
class HfFile:
    """One safetensors file to be written."""

    name: str
    bindings: tuple[Binding, ...]
    specs: dict[str, Spec]  # in the order of writing


def plan_hf_files(
    keymap: KeyMap, dtypes: dict[Binding, torch.dtype], layout: Layout, max_shard_bytes: int
) -> list[HfFile]:
    """The files of at most `max_shard_bytes` that hold all tensors of `layout`; a binding stays in one file."""
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    bindings = sorted(keymap.bindings, key=lambda b: -dtypes[b].itemsize)
    specs = [{name: Spec(dtypes[b], b.shape_in(layout)) for name in b.names(layout)} for b in bindings]
    runs = plan_files([sum(spec.nbytes for spec in group.values()) for group in specs], max_shard_bytes)
    return [
        HfFile(name, tuple(bindings[i] for i in run), {k: v for i in run for k, v in specs[i].items()})
        for name, run in zip(file_names(len(runs)), runs, strict=True)
    ]


def write_hf_metadata(directory: Path, files: Sequence[HfFile], config: dict[str, Any], layout: Layout) -> None:
    """Index (of several files) and config.json; `config` is the diffusers config."""
    write_index(directory, [file.specs for file in files])
    if layout == "official":
        config = configs.diffusers_to_official(config)
    configs.write_config(directory, config)


def _check_fusable(keymap: KeyMap, files: SafetensorsDirectory, layout: Layout) -> None:
    """Tensors that become one must have one dtype: converting one of them would be a silent cast."""
    for binding in keymap.bindings:
        names = binding.names(layout)
        for name in names:
            dtype, first = files.specs[name].dtype, files.specs[names[0]].dtype
            if dtype != first:
                raise UserError(f"{files.file_of(name)}: tensor {name!r} is {dtype}, but {names[0]!r} is {first}")
