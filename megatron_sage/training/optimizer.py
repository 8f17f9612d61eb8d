"""AdamW through Megatron's optimizer, gradients through Megatron's DistributedDataParallel."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_sage.config import Config
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.groups import Groups


def wrap(chunks: list[HunyuanVideoDiT], groups: Groups) -> list[DistributedDataParallel]:
    """This rank's chunks with their gradient buffers.

    `calculate_per_token_loss` makes the loss a plain sum over pairs on each rank: Megatron then divides the summed
    gradients once by the number of pairs, itself summed over DP x CP. Averages of averages would be wrong as soon as
    replicas drop different numbers of samples (non-finite rewards).
    """
    config = chunks[0].config  # one object for all chunks
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = finalize_model_grads
    return [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
            ),
            module=chunk,
            pg_collection=groups.collection,
        )
        for chunk in chunks
    ]


def build_optimizer(config: Config, chunks: list[DistributedDataParallel], dtype: torch.dtype) -> MegatronOptimizer:
    """Megatron's optimizer: fp32, or bf16 weights with fp32 masters; global gradient-norm clipping."""
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.grad_clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=False,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        # Megatron's wd_mult = 0 of biases and norms only takes effect through its scheduler, which is not used here.
        group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
    return optimizer
