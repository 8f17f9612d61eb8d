"""What is between the GEMMs and attention, as functions that keep their inputs only, in fp32 inside.

autograd would keep what every step in between gives out: of a block in bf16 a third more, most of it in fp32. Here the
backward passes are written out and make what they need again from the inputs, which the block keeps anyway. A function
and its backward are plain functions of tensors, so that `torch.compile` can make one kernel of each (`kernels`).

Shapes: S tokens, B samples, N heads, D channels of a head. Modulations are [B, H] or, where all samples have one
timestep, [1, H].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

EPS = 1e-6  # of the blocks' LayerNorms, which have no parameters
Tensors = tuple[torch.Tensor, ...]


class Kernels(NamedTuple):
    """Functions and their backwards; see the functions of the same names."""

    modulated: Callable[..., torch.Tensor]
    modulated_backward: Callable[..., Tensors]
    gated_modulated: Callable[..., Tensors]
    gated_modulated_backward: Callable[..., Tensors]
    gated: Callable[..., torch.Tensor]
    gated_backward: Callable[..., Tensors]
    head_norm: Callable[..., torch.Tensor]
    head_norm_backward: Callable[..., Tensors]


@functools.lru_cache(maxsize=2)
def kernels(compiled: bool = False) -> Kernels:
    """torch's kernels one after the other, or those that `torch.compile` fuses."""
    plain = Kernels(
        _modulated,
        _modulated_backward,
        _gated_modulated,
        _gated_modulated_backward,
        _gated,
        _gated_backward,
        functools.partial(_head_norm, turn=_rotated_complex),
        functools.partial(_head_norm_backward, turn=_rotated_complex),
    )
    if not compiled:
        return plain
    real = plain._replace(
        head_norm=functools.partial(_head_norm, turn=_rotated),
        head_norm_backward=functools.partial(_head_norm_backward, turn=_rotated),
    )
    # texts and clips of any length: one kernel for all of them, not one for each
    fused: list[Any] = [torch.compile(function, dynamic=True) for function in real]
    return Kernels(*fused)


def modulated_norm(ops: Kernels, x_SBH: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LN(x) * (1 + scale) + shift, eps 1e-6; in fp32, rounded once.

    bf16 in between (LN's output and 1 + scale are rounded, as in diffusers) adds 5 to 10 % to the error of the whole
    bf16 model; the official code, under autocast, has fp32 here.
    """
    return _Modulated.apply(ops, x_SBH, shift, scale)


def gated_modulated_norm(
    ops: Kernels, x_SBH: torch.Tensor, branch_SBH: torch.Tensor, gate: torch.Tensor, shift: Any, scale: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, LN(y) * (1 + scale) + shift) of y = x + branch * gate, rounded before it is normed; y is not kept."""
    return _GatedModulated.apply(ops, x_SBH, branch_SBH, gate, shift, scale)


def gated_residual(
    ops: Kernels, x_SBH: torch.Tensor, branch_SBH: torch.Tensor, bias_H: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """x + (branch + bias) * gate."""
    return _Gated.apply(ops, x_SBH, branch_SBH, bias_H, gate)


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Kernels, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.ops = ops
        ctx.save_for_backward(*inputs)
        return ops.modulated(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.ops.modulated_backward(*ctx.saved_tensors, *grads)


class _GatedModulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Kernels, *inputs: torch.Tensor) -> Tensors:
        ctx.ops = ops
        ctx.save_for_backward(*inputs)
        return ops.gated_modulated(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.ops.gated_modulated_backward(*ctx.saved_tensors, *grads)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Kernels, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.ops = ops
        ctx.save_for_backward(*inputs)
        return ops.gated(x, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, grads[0], *ctx.ops.gated_backward(*ctx.saved_tensors, *grads)


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return torch.addcmul(shift.float(), normed, 1 + scale.float()).to(x.dtype)


def _modulated_backward(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """Gradients of x, shift and scale."""
    dx, dshift, dscale = _wide_backward(x, shift, scale, grad)
    return dx.to(x.dtype), dshift, dscale


def _wide_backward(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """The same with x's in fp32."""
    wide, grad, size = x.float(), grad.float(), x.shape[-1:]
    normed, mean, rstd = torch.native_layer_norm(wide, size, None, None, EPS)
    inner = grad * (1 + scale.float())
    only_input = [True, False, False]
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(inner, wide, size, mean, rstd, None, None, only_input)
    return dx, _summed(grad, shift), _summed(grad * normed, scale)


def _gated_modulated(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> Tensors:
    y = torch.addcmul(x, branch, gate)
    return y, _modulated(y, shift, scale)


def _gated_modulated_backward(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    grad_y: torch.Tensor,
    grad_normed: torch.Tensor,
) -> Tensors:
    dx, dshift, dscale = _wide_backward(torch.addcmul(x, branch, gate), shift, scale, grad_normed)
    dx = dx + grad_y.float()
    return dx.to(x.dtype), (dx * gate.float()).to(x.dtype), _summed(dx * branch.float(), gate), dshift, dscale


def _gated(x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x, branch + bias, gate)


def _gated_backward(branch: torch.Tensor, bias: torch.Tensor, gate: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """Gradients of branch, bias and gate; x's is `grad` itself."""
    wide = grad.float()
    inner = wide * gate.float()
    return inner.to(grad.dtype), _summed(inner, bias), _summed(wide * (branch + bias).float(), gate)


def _summed(grad_SBH: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Over what was broadcast: all tokens, and the samples where they share a row."""
    over = (0, 1) if like.dim() == 1 or like.shape[0] == 1 else (0,)
    return grad_SBH.sum(dim=over, dtype=torch.float32).reshape(like.shape).to(like.dtype)


def _head_norm(
    x: torch.Tensor, weight: torch.Tensor, rotation: torch.Tensor | None, eps: float, turn: Any
) -> torch.Tensor:
    """RMSNorm over a head's channels, then the rotation; [S, B, N, D] fp32."""
    normed = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return normed if rotation is None else turn(normed, rotation, 1)


def _head_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    rotation: torch.Tensor | None,
    eps: float,
    grad: torch.Tensor,
    turn: Any,
) -> Tensors:
    """Gradients of x (fp32) and of the weight."""
    wide, grad = x.float(), grad.float()
    if rotation is not None:
        grad = turn(grad, rotation, -1)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = wide * rstd
    dweight = (grad * normed).sum(dim=(0, 1, 2))
    inner = grad * weight.float()
    dx = rstd * (inner - normed * (inner * normed).mean(dim=-1, keepdim=True))
    return dx, dweight.to(weight.dtype)


def _rotated_complex(x: torch.Tensor, rotation: torch.Tensor, sign: int) -> torch.Tensor:
    """Interleaved channel pairs (2i, 2i+1) of [S, B, N, D] fp32 times (cos, sin) [S, D/2, 2], or its inverse."""
    pairs, turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))), torch.view_as_complex(rotation)
    turned = turned if sign > 0 else turned.conj()
    return torch.view_as_real(pairs * turned[:, None, None]).flatten(-2)


def _rotated(x: torch.Tensor, rotation: torch.Tensor, sign: int) -> torch.Tensor:
    """The same in real numbers: the compiler fuses no complex ones."""
    parts = rotation[:, None, None]
    cos, sin = parts[..., 0], parts[..., 1] * sign
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
