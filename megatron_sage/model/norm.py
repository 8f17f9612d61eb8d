"""Norms and adaLN-Zero modulation."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.elementwise import kernels, modulated_norm


class HeadRMSNorm(torch.nn.Module):
    """The weight of an RMSNorm over the channels of a head, one for all heads; `elementwise.head_norm` reads it.

    The weight is replicated over TP while each rank norms its own heads only, so its gradient is partial on every rank,
    with and without sequence parallelism. Megatron completes it because of the attribute (sequence parallel) or because
    the module's name contains `q_layernorm` or `k_layernorm` (otherwise).
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(head_dim))
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]


class Modulation(NamedTuple):
    """What adaLN-Zero gives one stream of one block, each [B, H]."""

    shift_attn: torch.Tensor
    scale_attn: torch.Tensor
    gate_attn: torch.Tensor
    shift_mlp: torch.Tensor
    scale_mlp: torch.Tensor
    gate_mlp: torch.Tensor


class AdaModulation(MegatronModule):
    """Linear(SiLU(temb)) -> six [B, H] (diffusers: AdaLayerNormZero). A third of all weights, so column-parallel.

    Gradients of its input are partial on each rank; the model sums them once for all of its blocks.
    """

    def __init__(self, config: HunyuanVideoConfig, linear: ModuleSpec, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        # the input [B, H] is no sequence: sequence parallelism would all-gather it over the batch
        self.linear = build_module(
            linear,
            config.hidden_size,
            6 * config.hidden_size,
            config=without_sequence_parallel(config),
            init_method=torch.nn.init.zeros_,  # "Zero": a new block starts as the identity
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            disable_grad_reduce=True,
            tp_group=pg_collection.tp,
        )

    def forward(self, silu_temb_BH: torch.Tensor) -> torch.Tensor:
        """This rank's part of all six, [B, 6H/TP]; `silu_temb_BH` is SiLU(temb), computed once for all blocks."""
        return self.linear(silu_temb_BH)[0]


def for_samples(rows: torch.Tensor, batch: int, dim: int = 0) -> torch.Tensor:
    """Rows that equal parts of a batch share -> one for each sample; a single row stays, it is broadcast."""
    number = rows.shape[dim]
    if number in (1, batch):
        return rows
    size = [-1] * (rows.dim() + 1)
    size[dim + 1] = batch // number
    return rows.unsqueeze(dim + 1).expand(size).flatten(dim, dim + 1)


def modulations(
    silu_temb_BH: torch.Tensor,
    streams: Sequence[AdaModulation],
    group: dist.ProcessGroup,
    sequence_parallel: bool,
    batch: int,
) -> list[Modulation]:
    """Of both streams of a block, by one all-gather over `group` (TP): a call costs more than these few bytes.

    `batch`: samples; `silu_temb_BH` has as many rows as there are timesteps, and so has what is computed and sent.
    With sequence parallelism each rank modulates its own tokens, so the gradient of the gathered result is partial and
    must be reduce-scattered; without, it is whole on every rank and is only split.
    """
    local = [stream(silu_temb_BH) for stream in streams]
    if group.size() > 1:
        gather = (
            all_gather_last_dim_from_tensor_parallel_region
            if sequence_parallel
            else gather_from_tensor_model_parallel_region
        )
        # [B, ranks, streams, 6H/TP]: the ranks' parts of one stream lie apart
        whole = gather(torch.cat(local, dim=-1), group=group).unflatten(-1, (group.size(), len(local), -1))
        local = [whole[:, :, number].flatten(1) for number in range(len(local))]
    return [Modulation(*for_samples(whole, batch).chunk(6, dim=-1)) for whole in local]


class AdaLayerNormOut(MegatronModule):
    """The final norm: LN modulated by Linear(SiLU(temb)) -> scale, shift (diffusers: AdaLayerNormContinuous)."""

    def __init__(self, config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.ops = kernels(config.compile_elementwise)
        self.linear = torch.nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, x_SBH: torch.Tensor, silu_temb_BH: torch.Tensor) -> torch.Tensor:
        """`x_SBH`: this rank's tokens."""
        scale_shift = self.linear(silu_temb_BH)
        if self.config.sequence_parallel:
            # every rank modulates other tokens: summing the gradient here makes the linear's and temb's gradient whole
            scale_shift = copy_to_tensor_model_parallel_region(scale_shift, group=self.tp_group)
        scale, shift = for_samples(scale_shift, x_SBH.shape[1]).chunk(2, dim=-1)
        return modulated_norm(self.ops, x_SBH, shift, scale)


def without_sequence_parallel(config: HunyuanVideoConfig) -> HunyuanVideoConfig:
    """A shallow copy for layers whose input is no sequence."""
    plain = copy.copy(config)
    plain.sequence_parallel = False
    return plain
