"""Sums over ranks: of a loss's terms in the forward pass, of replicated parameters' gradients after the backward."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


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


def complete_gradients(chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> None:
    """Make every gradient of one model replica that of the single process. Once, after the last backward, without DDP.

    With Megatron's DDP, `finalize_model_grads` does the same. The gradients are `main_grad` where there is one, else
    `grad`; all are sums, no average:

    - over CP, all of them: each rank saw its own video tokens, and its part of the text's gradient;
    - over PP, those with `pipeline_parallel` (the timestep's embedder): each stage and chunk used its own copy;
    - over TP, those with `sequence_parallel`: replicated parameters that saw this rank's tokens or heads only.
    """
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters() if _gradient(p) is not None]
    _sum_in_place([_gradient(p) for _, p in named], groups.cp)
    copies: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named:
        if getattr(parameter, "pipeline_parallel", False):
            copies.setdefault(name, []).append(_gradient(parameter))
    for first, *others in copies.values():
        for other in others:
            first.add_(other)
    _sum_in_place([first for first, *_ in copies.values()], groups.pp)
    for first, *others in copies.values():
        for other in others:
            other.copy_(first)
    _sum_in_place([_gradient(p) for _, p in named if getattr(p, "sequence_parallel", False)], groups.tp)


def _gradient(parameter: torch.Tensor) -> Any:
    main_grad = getattr(parameter, "main_grad", None)
    return main_grad if main_grad is not None else parameter.grad


def _sum_in_place(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    if group.size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])  # one collective instead of one per tensor
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
        for tensor, total in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(total.view_as(tensor))
