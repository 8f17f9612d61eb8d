"""Norms and adaLN-Zero modulation."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megatron_sage.model.config import HunyuanVideoConfig


class HeadRMSNorm(torch.nn.Module):
    """RMSNorm over the channels of a head, one weight for all heads.

    The weight is replicated over TP while each rank norms its own heads only, so its gradient is partial on every rank,
    with and without sequence parallelism. Megatron completes it because of the attribute (sequence parallel) or because
    the module's name contains `q_layernorm` or `k_layernorm` (otherwise).
    """

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(head_dim))
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, x_SBND: torch.Tensor) -> torch.Tensor:
        """Same shape; statistics in fp32."""
        return F.rms_norm(x_SBND, self.weight.shape, self.weight, self.eps)


def modulated_layer_norm(x_SBH: torch.Tensor, shift_BH: torch.Tensor, scale_BH: torch.Tensor) -> torch.Tensor:
    """LN(x) * (1 + scale) + shift, the LayerNorm without parameters, eps 1e-6; in fp32, rounded once.

    bf16 in between (LN's output and 1 + scale are rounded, as in diffusers) adds 5 to 10 % to the error of the whole
    bf16 model; the official code, under autocast, has fp32 here.
    """
    if x_SBH.dtype is torch.float32:
        return _modulate(x_SBH, shift_BH, scale_BH)
    return _InFloat32.apply(x_SBH, shift_BH, scale_BH)


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class _InFloat32(torch.autograd.Function):
    """Keeps the half-precision inputs only and computes the fp32 ones again: they would double a block's memory."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return _modulate(*(x.float() for x in inputs)).to(inputs[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _modulate(*(x.float() for x in leaves))
        return torch.autograd.grad(out, leaves, grads[0].float())


class Modulation(NamedTuple):
    """What adaLN-Zero gives one stream of one block, each [B, H]."""

    shift_attn: torch.Tensor
    scale_attn: torch.Tensor
    gate_attn: torch.Tensor
    shift_mlp: torch.Tensor
    scale_mlp: torch.Tensor
    gate_mlp: torch.Tensor


class AdaModulation(MegatronModule):
    """Linear(SiLU(temb)) -> six [B, H] (diffusers: AdaLayerNormZero). A third of all weights, so column-parallel."""

    def __init__(self, config: HunyuanVideoConfig, linear: ModuleSpec, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
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
            tp_group=pg_collection.tp,
        )

    def forward(self, silu_temb_BH: torch.Tensor) -> Modulation:
        """`silu_temb_BH` is SiLU(temb), computed once for all blocks."""
        local, _ = self.linear(silu_temb_BH)
        # With sequence parallelism each rank modulates its own tokens, so the gradient of the gathered result is
        # partial and must be reduce-scattered; without, it is whole on every rank and is only split.
        gather = (
            all_gather_last_dim_from_tensor_parallel_region
            if self.config.sequence_parallel
            else gather_from_tensor_model_parallel_region
        )
        return Modulation(*gather(local, group=self.tp_group).chunk(6, dim=-1))


class AdaLayerNormOut(MegatronModule):
    """The final norm: LN modulated by Linear(SiLU(temb)) -> scale, shift (diffusers: AdaLayerNormContinuous)."""

    def __init__(self, config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.linear = torch.nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, x_SBH: torch.Tensor, silu_temb_BH: torch.Tensor) -> torch.Tensor:
        """`x_SBH`: this rank's tokens."""
        scale_shift = self.linear(silu_temb_BH)
        if self.config.sequence_parallel:
            # every rank modulates other tokens: summing the gradient here makes the linear's and temb's gradient whole
            scale_shift = copy_to_tensor_model_parallel_region(scale_shift, group=self.tp_group)
        scale, shift = scale_shift.chunk(2, dim=-1)
        return modulated_layer_norm(x_SBH, shift, scale)


def without_sequence_parallel(config: HunyuanVideoConfig) -> HunyuanVideoConfig:
    """A shallow copy for layers whose input is no sequence."""
    plain = copy.copy(config)
    plain.sequence_parallel = False
    return plain
