"""The weights of a model that is spread over ranks: loading, saving, exporting and gathering them. All ranks call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sage.checkpoint import configs
from megatron_sage.checkpoint.hf import DEFAULT_MAX_SHARD_BYTES, open_hf, plan_hf_files, write_hf_metadata
from megatron_sage.checkpoint.keymap import Binding, KeyMap
from megatron_sage.checkpoint.safetensors_io import SafetensorsWriter
from megatron_sage.checkpoint.staging import on_all_ranks, staged_directory
from megatron_sage.checkpoint.torch_dist import MegatronDirectory, first_failure, save
from megatron_sage.model.transformer import HunyuanVideoDiT


def key_map(model: HunyuanVideoDiT) -> KeyMap:
    """The key map of the model's own configuration."""
    return KeyMap.from_config(model.config.to_diffusers())


def load_weights(model: HunyuanVideoDiT, directory: Path | str) -> None:
    """Loads a Megatron checkpoint, saved at any layout, into the model's parameters (cast to their dtype).

    Each rank reads its slices only. Raises UserError for an incomplete checkpoint or one of another model.
    """
    directory = Path(directory)
    with on_all_ranks():
        MegatronDirectory(directory).check(key_map(model).shapes("ours"))
    try:
        # The sharded tensors share the parameters' memory: loading is in place.
        dist_checkpointing.load(model.sharded_state_dict(), str(directory))
    except CheckpointException as failure:
        raise first_failure(directory, failure) from failure


def save_weights(model: HunyuanVideoDiT, directory: Path | str) -> None:
    """Saves the weights as a Megatron checkpoint with its config.json in a new directory."""
    with staged_directory(Path(directory)) as staging:
        save(model.sharded_state_dict(), staging)
        if dist.get_rank() == 0:
            configs.write_config(staging, model.config.to_diffusers())


def load_hf_weights(model: HunyuanVideoDiT, hf_directory: Path | str) -> None:
    """Loads a diffusers transformer directory (or the root above it); each rank reads its slices only."""
    rank, size = model.tp_group.rank(), model.tp_group.size()
    keymap = key_map(model)
    with on_all_ranks(), torch.no_grad():
        files, _, _ = open_hf(Path(hf_directory))
        files.check(keymap.shapes("diffusers"))
        parameters = dict(model.named_parameters())
        for binding in keymap.bindings:
            bounds = binding.slice_bounds(rank, size)
            parts = [files.read(name, bounds) for name in binding.diffusers]
            for name, tensor in zip(binding.ours, binding.convert(parts, "diffusers", "ours"), strict=True):
                parameters[name].copy_(tensor)


def export_hf(
    model: HunyuanVideoDiT,
    directory: Path | str,
    config: dict[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Writes the weights, in the parameters' dtype, as a new directory that diffusers' `from_pretrained` loads.

    Gathered tensor by tensor to rank 0. `config`: the diffusers config.json to write (default: the model's own).
    """
    parameters = dict(model.named_parameters())
    keymap = key_map(model)
    dtypes = {binding: parameters[binding.ours[0]].dtype for binding in keymap.bindings}
    files = plan_hf_files(keymap, dtypes, "diffusers", max_shard_bytes)
    with staged_directory(Path(directory)) as staging:
        for file in files:
            if dist.get_rank() != 0:
                for binding in file.bindings:
                    _gather(model, binding, [parameters[name].detach() for name in binding.ours])
                continue
            with SafetensorsWriter(staging / file.name, file.specs) as writer:
                for binding in file.bindings:
                    whole = _gather(model, binding, [parameters[name].detach() for name in binding.ours])
                    for name, tensor in zip(binding.diffusers, whole or (), strict=True):
                        writer.write(name, tensor)
        if dist.get_rank() == 0:
            write_hf_metadata(staging, files, config or model.config.to_diffusers(), "diffusers")


def gather_named(model: HunyuanVideoDiT, which: Literal["param", "grad"]) -> Iterator[tuple[str, Tensor | None]]:
    """Yields (diffusers name, whole float32 tensor on rank 0, None elsewhere) for every diffusers parameter.

    "grad": `main_grad` where Megatron's DDP keeps one, else `grad`; zeros where there is neither. The gradients must
    already be reduced (`finalize_model_grads` or `allreduce_replicated_gradients`).
    """
    parameters = dict(model.named_parameters())
    for binding in key_map(model).bindings:
        local = [_value(parameters[name], which).float() for name in binding.ours]
        whole = _gather(model, binding, local)
        for index, name in enumerate(binding.diffusers):
            yield name, whole[index] if whole else None


def _value(parameter: Tensor, which: Literal["param", "grad"]) -> Tensor:
    if which == "param":
        return parameter.detach()
    main_grad = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if main_grad is None else main_grad
    return torch.zeros_like(parameter) if gradient is None else gradient.detach()


def _gather(model: HunyuanVideoDiT, binding: Binding, local: list[Tensor]) -> tuple[Tensor, ...] | None:
    """The whole diffusers tensors on rank 0, None elsewhere; `local`: this rank's slices of our tensors."""
    group, rank = model.tp_group, dist.get_rank()
    members = dist.get_process_group_ranks(group)
    if 0 not in members:
        return None  # another replica of the same weights
    if binding.split_dim is not None and group.size() > 1:
        local = [_gather_slices(tensor, binding.split_dim, group) for tensor in local]
    return binding.convert(local, "ours", "diffusers") if rank == 0 else None


def _gather_slices(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The slices of all ranks on rank 0; this rank's own elsewhere."""
    tensor = tensor.contiguous()
    slices = [torch.empty_like(tensor) for _ in range(group.size())] if dist.get_rank() == 0 else None
    dist.gather(tensor, slices, dst=0, group=group)
    return torch.cat(slices, dim=dim) if slices else tensor
