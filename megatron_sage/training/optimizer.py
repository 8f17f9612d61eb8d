"""Megatron's optimizers, over gradients in Megatron's DistributedDataParallel: which one, and how it is put together.

Whatever the settings, the result is one Megatron `ChainedOptimizer`: fp32 weights, or bf16 weights with fp32 masters;
clipping by the norm of all gradients; weight decay on matrices only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_sage.checkpoint.megatron_defects import mend
from megatron_sage.config import Config
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.groups import Groups
from megatron_sage.training.muon import Matrix, Muon, matrix_of
from megatron_sage.training.offload import move_to_host

# How optimizers describe their state for a checkpoint: by the model's parameters, so that any layout loads it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def wrap(chunks: list[HunyuanVideoDiT], groups: Groups, distributed: bool = False) -> list[DistributedDataParallel]:
    """This rank's chunks with their gradient buffers; `distributed`: config.optimizer.distributed.

    `calculate_per_token_loss` makes the loss a plain sum over pairs on each rank: Megatron then divides the summed
    gradients once by the number of pairs, itself summed over DP x CP. Averages of averages would be wrong as soon as
    replicas drop different numbers of samples (non-finite rewards).

    With `distributed` gradients are reduce-scattered over DP·CP: of a parameter's `main_grad` only this rank's part is
    the sum. They are not reduced during the backward pass: a training forward may use no text, and a bucket that waits
    for its gradient would wait for ever.
    """
    config = chunks[0].config  # one object for all chunks
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = finalize_model_grads
    return [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed
            ),
            module=chunk,
            pg_collection=groups.collection,
        )
        for chunk in chunks
    ]


def build_optimizer(config: Config, chunks: list[DistributedDataParallel], dtype: torch.dtype) -> "Optimizers":
    """The optimizer of `config.optimizer` over wrapped chunks whose weights are loaded. All ranks call.

    Raises ValueError where `wrap` was not given the same `distributed`.
    """
    settings = config.optimizer
    if chunks[0].ddp_config.use_distributed_optimizer != settings.distributed:
        raise ValueError(f"optimizer.distributed={settings.distributed}: wrap(...) was given another value")
    megatron = _megatron_config(config, dtype)
    muon = _matrices(chunks) if settings.name == "muon" else []
    for parameter, _ in muon:
        parameter.requires_grad = False  # Megatron leaves out what is frozen
    adam = get_megatron_optimizer(megatron, chunks, use_gloo_process_groups=False).chained_optimizers[0]
    for parameter, _ in muon:
        parameter.requires_grad = True
    if settings.offload != "none":
        move_to_host(adam, megatron, deepspeed=settings.offload == "deepspeed")
    mend(adam)
    parts = [adam, _muon(config, megatron, muon, adam, dtype)] if settings.name == "muon" else [adam]
    optimizer = Optimizers(parts)
    for group in optimizer.param_groups:
        # Megatron's wd_mult = 0 of biases and norms only takes effect through its scheduler, which is not used here.
        group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
    return optimizer


class Optimizers(ChainedOptimizer):
    """One optimizer or two, stepped with one gradient norm; saved so that any layout loads them."""

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **options: Any
    ) -> dict[str, Any]:
        """See `MegatronOptimizer.sharded_state_dict`."""
        metadata = _METADATA | (options.pop("metadata", None) or {})
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, metadata=metadata, **options)

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """The norm of all gradients of the model, the same on every rank.

        On a CPU not by Megatron, that is by torch.norm: it adds up 4 million fp32 values with an error of 1e-4, another
        one for each way in which they are split over ranks.
        """
        if torch.cuda.is_available():
            return super().get_grad_norm()
        gradients = [g for part in self.chained_optimizers for g in part.get_main_grads_for_grad_norm()]
        total = torch.zeros((), dtype=torch.float64)
        for gradient in gradients:
            total += gradient.square().sum(dtype=torch.float64)
        # the sum over all ranks that hold other gradients: TP·PP, and DP·CP where the optimizer is distributed
        dist.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return float(total.sqrt())

    @torch.no_grad()
    def step_prepared(self, norm: float) -> None:
        """What is left of `step` behind `prepare_grads` and `get_grad_norm`, which gave `norm`.

        Megatron's `step` does both again: every gradient copied and read once more, one more sum over all ranks.
        """
        for part in self.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
        self.step_with_ready_grads()


def adam_implementation() -> str:
    """Which AdamW Megatron has found: Transformer Engine's or Apex' fused one, else torch's."""
    adam = megatron_optimizer.Adam
    maker = adam.__module__.partition(".")[0]
    return {
        "transformer_engine": "Transformer Engine's FusedAdam",
        "apex": "Apex' FusedAdam",
        "torch": "torch's AdamW",
    }.get(maker, f"{maker}'s {adam.__name__}")


def _megatron_config(config: Config, dtype: torch.dtype) -> OptimizerConfig:
    settings = config.optimizer
    megatron = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.grad_clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.distributed,
    )
    if settings.offload != "none":
        # No fp32 masters on the device and no optimizer for it: `move_to_host` makes both. Set behind the constructor,
        # which would ask Transformer Engine for its version.
        megatron.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        megatron.optimizer_offload_fraction = settings.offload_fraction
    return megatron


def _matrices(chunks: Sequence[DistributedDataParallel]) -> list[tuple[torch.nn.Parameter, Matrix]]:
    """What Muon trains of this rank's chunks."""
    found = []
    for chunk in chunks:
        model = chunk.module
        for name, parameter in model.named_parameters():
            matrix = matrix_of(name, parameter, model.config.num_attention_heads)
            if matrix is not None and parameter.requires_grad:
                found.append((parameter, matrix))
    return found


def _muon(
    config: Config,
    megatron: OptimizerConfig,
    found: list[tuple[torch.nn.Parameter, Matrix]],
    adam: MegatronOptimizer,
    dtype: torch.dtype,
) -> MegatronOptimizer:
    """Muon in the same kind of Megatron optimizer as `adam`, with the groups over which that sums the norm."""
    settings = config.optimizer
    # the keys by which Megatron finds a group again in a checkpoint
    keys = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    inner = Muon(
        [{"params": [parameter for parameter, _ in found], **keys}],
        [matrix for _, matrix in found],
        adam.tp_group,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        steps=settings.muon_steps,
        dtype=dtype,
    )

    def initialize(optimizer: Muon, _: OptimizerConfig | None = None) -> None:
        optimizer.initialize()

    if dtype == torch.bfloat16:
        optimizer = Float16OptimizerWithFloat16Params(inner, megatron, None, initialize)
    else:
        optimizer = FP32Optimizer(inner, megatron, initialize)
    optimizer.grad_stats_parallel_group = adam.get_grad_stats_parallel_group()
    optimizer.tp_group = adam.tp_group
    initialize(inner)
    return optimizer
