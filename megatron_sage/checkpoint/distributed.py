"""The weights of a model that is spread over ranks: loading, saving, exporting and gathering them. All ranks call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from megatron_sage.checkpoint.saving import save
from megatron_sage.checkpoint.staging import on_all_ranks, staged_directory
from megatron_sage.checkpoint.torch_dist import MegatronDirectory, first_failure
from megatron_sage.model.lora import merging
from megatron_sage.model.lora_targets import is_adapter
from megatron_sage.model.stages import owner
from megatron_sage.model.transformer import HunyuanVideoDiT

Chunks = HunyuanVideoDiT | Sequence[HunyuanVideoDiT]  # this rank's part of the model, as `build_chunks` makes it


def as_chunks(model: Chunks) -> Sequence[HunyuanVideoDiT]:
    """A model that is one chunk may stand for the list of it."""
    return [model] if isinstance(model, HunyuanVideoDiT) else model


def key_map(model: Chunks) -> KeyMap:
    """The key map of the model's own configuration."""
    return KeyMap.from_config(_diffusers_config(model))


def _diffusers_config(model: Chunks) -> dict[str, Any]:
    return as_chunks(model)[0].config.to_diffusers()


def load_weights(model: Chunks, directory: Path | str) -> None:
    """Loads a Megatron checkpoint, saved at any layout, into the model's parameters (cast to their dtype).

    Each rank reads its slices only. Raises UserError for an incomplete checkpoint or one of another model.
    """
    directory = Path(directory)
    with on_all_ranks():
        checkpoint = MegatronDirectory(directory)
        checkpoint.check(key_map(model).shapes("ours"))
        checkpoint.verify(dist.get_rank(), dist.get_world_size())
    try:
        # The sharded tensors share the parameters' memory: loading is in place.
        dist_checkpointing.load(_sharded_state_dict(model), str(directory))
    except CheckpointException as failure:
        raise first_failure(directory, failure) from failure


def _sharded_state_dict(model: Chunks) -> dict[str, Any]:
    """By chunk: two chunks of a rank have copies of the timestep's embedder under one name. Without adapters."""
    return {
        str(number): {name: shard for name, shard in chunk.sharded_state_dict().items() if not is_adapter(name)}
        for number, chunk in enumerate(as_chunks(model))
    }


def save_weights(model: Chunks, directory: Path | str) -> None:
    """Saves the weights as a Megatron checkpoint with its config.json in a new directory."""
    with staged_directory(Path(directory)) as staging:
        save(_sharded_state_dict(model), staging)
        if dist.get_rank() == 0:
            configs.write_config(staging, _diffusers_config(model))


def load_hf_weights(model: Chunks, hf_directory: Path | str) -> None:
    """Loads a diffusers transformer directory (or the root above it); each rank reads its slices only."""
    chunks, keymap = as_chunks(model), key_map(model)
    rank, size = chunks[0].tp_group.rank(), chunks[0].tp_group.size()
    with on_all_ranks(), torch.no_grad():
        files, _, _ = open_hf(Path(hf_directory))
        files.check(keymap.shapes("diffusers"))
        copies: dict[str, list[Tensor]] = {}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                copies.setdefault(name, []).append(parameter)
        for binding in keymap.bindings:
            if binding.ours[0] not in copies:
                continue  # of another pipeline stage
            bounds = binding.slice_bounds(rank, size)
            parts = [files.read(name, bounds) for name in binding.diffusers]
            for name, tensor in zip(binding.ours, binding.convert(parts, "diffusers", "ours"), strict=True):
                for parameter in copies[name]:
                    parameter.copy_(tensor)


def export_hf(
    model: Chunks,
    directory: Path | str,
    config: dict[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Writes the weights, in the parameters' dtype, as a new directory that diffusers' `from_pretrained` loads.

    Gathered tensor by tensor to rank 0; adapters are merged in. `config`: the diffusers config.json to write (default:
    the model's own).
    """
    keymap = key_map(model)
    gatherer = Gatherer(model, merging(as_chunks(model)))
    dtype = as_chunks(model)[0].config.params_dtype
    dtypes = dict.fromkeys(keymap.bindings, dtype)
    files = plan_hf_files(keymap, dtypes, "diffusers", max_shard_bytes)
    with staged_directory(Path(directory)) as staging:
        for file in files:
            if dist.get_rank() != 0:
                for binding in file.bindings:
                    gatherer.gather(binding, dtype)
                continue
            with SafetensorsWriter(staging / file.name, file.specs) as writer:
                for binding in file.bindings:
                    whole = gatherer.gather(binding, dtype)
                    for name, tensor in zip(binding.diffusers, whole or (), strict=True):
                        writer.write(name, tensor)
        if dist.get_rank() == 0:
            write_hf_metadata(staging, files, config or _diffusers_config(model), "diffusers")


def gather_named(model: Chunks, which: Literal["param", "grad"]) -> Iterator[tuple[str, Tensor | None]]:
    """Yields (diffusers name, whole float32 tensor on rank 0, None elsewhere) for every diffusers parameter.

    "grad": `main_grad` where Megatron's DDP keeps one, else `grad`; zeros where there is neither. The gradients must
    already be reduced (`finalize_model_grads` or `complete_gradients`).
    """
    gatherer = Gatherer(model, lambda parameter: tensor_of(parameter, which).float())
    for binding in key_map(model).bindings:
        whole = gatherer.gather(binding, torch.float32)
        for index, name in enumerate(binding.diffusers):
            yield name, whole[index] if whole else None


def tensor_of(parameter: Tensor, which: Literal["param", "grad"]) -> Tensor:
    """Its value, or its gradient as `gather_named` means it."""
    if which == "param":
        return parameter.detach()
    main_grad = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if main_grad is None else main_grad
    return torch.zeros_like(parameter) if gradient is None else gradient.detach()


class Gatherer:
    """Brings one binding's tensors together on rank 0: over TP inside the stage that owns it, then over PP to rank 0.

    Only the replica of rank 0 takes part (of CP and DP ranks the first ones); the others hold the same.
    """

    def __init__(self, model: Chunks, value: Callable[[Tensor], Tensor]) -> None:
        chunks = as_chunks(model)
        self.value, self.stages = value, chunks[0].config.stage_blocks
        self.tp, self.pp = chunks[0].tp_group, chunks[0].pp_group
        self.parameters: dict[str, Tensor] = {}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                self.parameters.setdefault(name, parameter)
        places = chunks[0].pg_collection
        self.takes_part = places.dp_cp.rank() == 0

    def gather(self, binding: Binding, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The whole diffusers tensors on rank 0, None elsewhere. All ranks call, in the order of the bindings."""
        stage = owner(binding.ours[0], self.stages)
        if not self.takes_part:
            return None
        whole: list[Tensor] | None = None
        if self.pp.rank() == stage:
            whole = [self.value(self.parameters[name]) for name in binding.ours]
            if binding.split_dim is not None and self.tp.size() > 1:
                whole = [_gather_slices(tensor, binding.split_dim, self.tp) for tensor in whole]
        if self.tp.rank() != 0:
            return None
        if stage != 0:
            whole = self._to_first_stage(whole, binding, stage, dtype)
        return binding.convert(whole, "ours", "diffusers") if whole is not None and dist.get_rank() == 0 else None

    def _to_first_stage(
        self, whole: list[Tensor] | None, binding: Binding, stage: int, dtype: torch.dtype
    ) -> list[Tensor] | None:
        if whole is not None:
            for tensor in whole:
                dist.send(tensor.contiguous(), group_dst=0, group=self.pp)
            return None
        if self.pp.rank() != 0:
            return None
        size, where = binding.shape_in("ours"), next(iter(self.parameters.values())).device
        received = [torch.empty(size, dtype=dtype, device=where) for _ in binding.ours]
        for tensor in received:
            dist.recv(tensor, group_src=stage, group=self.pp)
        return received


def _gather_slices(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The slices of all ranks on the group's first rank; this rank's own elsewhere."""
    tensor = tensor.contiguous()
    slices = [torch.empty_like(tensor) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(tensor, slices, group_dst=0, group=group)
    return torch.cat(slices, dim=dim) if slices else tensor
