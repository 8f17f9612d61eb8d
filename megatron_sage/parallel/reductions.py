"""Sums over ranks: of a loss's terms in the forward pass, of replicated parameters' gradients after the backward."""

from typing import Any

import torch
import torch.distributed as dist


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone()  # the collective works in place, the caller's partial sum stays intact
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_outputs[0], None


def sum_over_shards(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum `x` over the ranks that share the tokens; the gradient passes through unchanged.

    Every rank computes the same loss from the same sum, so the gradient of its own terms is already whole: an
    all-reduce in the backward pass, which is what a differentiable all-reduce does, would count it once per rank.
    """
    return x if group.size() == 1 else _SumOverShards.apply(x, group)


def allreduce_replicated_gradients(model: torch.nn.Module, tp_group: dist.ProcessGroup) -> None:
    """Complete the gradients of the parameters that are replicated over TP but saw only this rank's tokens or heads.

    These carry `sequence_parallel = True`; their gradients (`main_grad` where a DDP buffer owns it, else `grad`) become
    the SUM over TP, as in Megatron's `finalize_model_grads`. Call it once after the last backward, without DDP.
    """
    if tp_group.size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        main_grad = getattr(parameter, "main_grad", None)
        grad = main_grad if main_grad is not None else parameter.grad
        if grad is not None and getattr(parameter, "sequence_parallel", False):
            by_dtype.setdefault(grad.dtype, []).append(grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])  # one collective instead of one per tensor
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=tp_group)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
