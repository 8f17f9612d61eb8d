"""Adapters of a model that is spread over ranks: gathered, and written as the file that diffusers loads.

All ranks call. A whole model's adapters are small (rank 64 on the four image projections of the 8.3 B model: 57 M
numbers), so rank 0 holds them all before it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_sage.checkpoint.distributed import Gatherer, tensor_of
from megatron_sage.checkpoint.keymap import Binding
from megatron_sage.checkpoint.rules import Rule
from megatron_sage.checkpoint.staging import staged_directory
from megatron_sage.model.lora_targets import LINEARS, AdapterSettings, child_name, diffusers_path, linear_sizes
from megatron_sage.model.transformer import HunyuanVideoDiT

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."  # the component of a pipeline that a key belongs to: diffusers' default
METADATA_KEY = "lora_adapter_metadata"  # diffusers reads PEFT's LoraConfig there: without it alpha would be the rank


def adapter_bindings(chunks: Sequence[HunyuanVideoDiT]) -> list[Binding]:
    """Every adapter matrix of the whole model: our name, diffusers' name, whole shape, and how TP cuts it."""
    config, settings = chunks[0].config, chunks[0].lora
    last = config.num_layers - 1
    return [
        binding
        for index in range(config.num_layers)
        for path, targets in settings.in_block(index == last)
        for target in targets
        for binding in _bindings(index, path, target, config, settings)
    ]


def _bindings(index: int, path: str, target: str, config: Any, settings: AdapterSettings) -> Iterator[Binding]:
    into, out = linear_sizes(target, config.hidden_size, config.ffn_hidden_size)
    block = f"transformer_blocks.{index}."
    ours = f"{block}lora.{child_name(path)}.{child_name(target)}."
    theirs = f"{block}{diffusers_path(target)}."
    cuts_rows = LINEARS[path].split == "rows"
    for name, shape, split_dim in (
        ("lora_A.weight", (settings.rank, into), None if cuts_rows else 1),
        ("lora_B.weight", (out, settings.rank), 0 if cuts_rows else None),
    ):
        yield Binding(
            ours=(ours + name,),
            diffusers=(theirs + name,),
            official=(),
            shape=shape,
            head_dim=config.kv_channels,
            split_dim=split_dim,
            ours_rule=Rule.IDENTITY,
            official_rule=Rule.IDENTITY,
        )


def gather_adapters(
    chunks: Sequence[HunyuanVideoDiT], which: Literal["param", "grad"], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor | None]]:
    """Yields (diffusers name, whole tensor on rank 0, None elsewhere) for every adapter matrix; see `gather_named`."""
    gatherer = Gatherer(chunks, lambda parameter: tensor_of(parameter, which).to(dtype))
    for binding in adapter_bindings(chunks):
        whole = gatherer.gather(binding, dtype)
        yield binding.diffusers[0], whole[0] if whole else None


def export_adapters(chunks: Sequence[HunyuanVideoDiT], directory: Path | str) -> None:
    """Writes a new directory for `load_lora_adapter(directory, use_safetensors=True)` of diffusers' transformer.

    One file in the parameters' dtype, alpha and rank in its metadata. Raises UserError where the directory exists and
    is not empty.
    """
    with staged_directory(Path(directory)) as staging:
        found = dict(gather_adapters(chunks, "param", chunks[0].config.params_dtype))
        if dist.get_rank() == 0:
            tensors = {PREFIX + name: value.cpu().contiguous() for name, value in found.items() if value is not None}
            save_file(tensors, staging / FILE, metadata=_metadata(chunks[0].lora, list(found)))


def _metadata(settings: AdapterSettings, names: list[str]) -> dict[str, str]:
    """Arguments of PEFT's LoraConfig; targets by their full names, for the text refiner has a to_q as well."""
    modules = sorted({name.split(".lora_")[0] for name in names})
    config = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": modules}
    prefixed = {PREFIX + key: value for key, value in config.items()}
    return {"format": "pt", METADATA_KEY: json.dumps(prefixed, indent=1, sort_keys=True)}
