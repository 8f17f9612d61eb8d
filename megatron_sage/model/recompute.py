"""Activation recompute: keep a function's inputs, run it again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint

from megatron_sage.model.config import HunyuanVideoConfig


def run(recompute: bool, function: Callable[..., Any], *args: torch.Tensor) -> Any:
    """`function(*args)`, through Megatron's activation checkpoint where `recompute` is set and a gradient is wanted.

    Whatever the gradient has to reach must be among `args` or a module's parameter: the closure holds constants only.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, False, *args)
    return function(*args)


def selective_modules(config: HunyuanVideoConfig) -> frozenset[str]:
    """What selective recompute covers, in Megatron's words: layernorm, mlp, core_attn; nothing in other modes."""
    return frozenset(config.recompute_modules or () if config.recompute_granularity == "selective" else ())
