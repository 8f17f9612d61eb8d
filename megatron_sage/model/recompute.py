"""Activation recompute: keep a function's inputs, run it again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from megatron.core.tensor_parallel import checkpoint

from megatron_sage.model.config import HunyuanVideoConfig


def run(recompute: bool, function: Callable[..., Any], *args: torch.Tensor) -> Any:
    """`function(*args)`, through Megatron's activation checkpoint where `recompute` is set and a gradient is wanted.

    Whatever the gradient has to reach must be among `args` or a module's parameter: the closure holds constants only.

    Megatron's checkpoint gives parameters no gradient, and says nothing, where no input wants one: so it is with the
    first block of a frozen model that has adapters. There torch's non-reentrant one does the same. It restores no
    random state of Megatron's tracker, of which nothing in this model, without dropout, draws.
    """
    if not recompute or not torch.is_grad_enabled():
        return function(*args)
    if not any(argument.requires_grad for argument in args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(function, False, *args)


def selective_modules(config: HunyuanVideoConfig) -> frozenset[str]:
    """What selective recompute covers, in Megatron's words: mlp, core_attn; nothing in other modes.

    Megatron's `layernorm` is accepted and adds nothing: norms keep their inputs only, in every mode.
    """
    return frozenset(config.recompute_modules or () if config.recompute_granularity == "selective" else ())
