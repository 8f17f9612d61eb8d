"""Queries, keys and values of both streams, made of the fused projections and, for the backward pass, made again."""

from typing import Any

import torch

from megatron_sage.model.elementwise import Kernels
from megatron_sage.parallel.context import Heads

Tensors = tuple[torch.Tensor, ...]


class JointHeads:
    """A `parallel.context.MakeHeads`: RMSNorm of queries and keys, rotation of the video's, video and text end to end.

    With `rebuild` the attention kernel's queries, keys and values are not kept: the backward pass makes them once more
    from the projections, which it needs anyway. That is 3 tensors of a token's width less, for a norm and a rotation.
    """

    def __init__(
        self,
        ops: Kernels,
        weights: Tensors,
        eps: float,
        rotations: tuple[torch.Tensor, torch.Tensor],
        last: bool,
        rebuild: bool,
    ) -> None:
        """`weights`: of the norms of the video's q and k, and of the text's; `rotations`: of this rank's video tokens
        and of all. `last`: the last block has no use for what the text asks, so the text has no queries.
        """
        self.ops, self.weights, self.eps, self.rotations = ops, weights, eps, rotations
        self.last, self.rebuild = last, rebuild

    def __call__(self, video: torch.Tensor, text: torch.Tensor, whole: bool = False) -> Heads:
        """Projections [tokens, B, N, 3, D]."""
        inputs = (video, text, torch.view_as_real(self.rotations[whole]), *self.weights)
        if not (self.rebuild and torch.is_grad_enabled()):
            q, k, v = _Join.apply(self, None, *inputs)
            return Heads(q, k, v)
        kept = _MadeAgain(self, tuple(x.detach() for x in inputs))
        q, k, v = _Join.apply(self, kept, *inputs)
        return Heads(q, k, v, kept)

    def make(self, video: torch.Tensor, text: torch.Tensor, rotation: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        """Queries, keys and values; norm and rotation in fp32, rounded once."""
        tokens, split = video.shape[0] + text.shape[0], video.shape[0]
        made = [
            video.new_empty(split if self.last and kind == 0 else tokens, *text.shape[1:3], text.shape[4])
            for kind in range(3)
        ]
        for kind in (0, 1):
            made[kind][:split] = self.ops.head_norm(video[..., kind, :], weights[kind], rotation, self.eps)
            if made[kind].shape[0] > split:
                made[kind][split:] = self.ops.head_norm(text[..., kind, :], weights[2 + kind], None, self.eps)
        made[2][:split], made[2][split:] = video[..., 2, :], text[..., 2, :]
        return tuple(made)

    def gradients(self, inputs: Tensors, grads: Tensors) -> tuple[torch.Tensor | None, ...]:
        """Of the projections, of nothing for the rotation, of the four weights."""
        video, text, rotation, *weights = inputs
        split = video.shape[0]
        of_video, of_text = torch.empty_like(video), torch.empty_like(text)
        of_weights: list[torch.Tensor | None] = [None] * 4
        for kind in (0, 1):
            asked = grads[kind].shape[0] > split
            of_video[..., kind, :], of_weights[kind] = self.ops.head_norm_backward(
                video[..., kind, :], weights[kind], rotation, self.eps, grads[kind][:split]
            )
            if asked:
                of_text[..., kind, :], of_weights[2 + kind] = self.ops.head_norm_backward(
                    text[..., kind, :], weights[2 + kind], None, self.eps, grads[kind][split:]
                )
            else:
                of_text[..., kind, :] = 0
        of_video[..., 2, :], of_text[..., 2, :] = grads[2][:split], grads[2][split:]
        return of_video, of_text, None, *of_weights


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maker: JointHeads, kept: "_MadeAgain | None", *inputs: torch.Tensor) -> Tensors:
        ctx.maker, ctx.kept = maker, kept
        ctx.save_for_backward(*inputs)
        return maker.make(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.kept is not None:
            ctx.kept.tensors = None  # the kernel's backward, which comes first, was their only reader
        return None, None, *ctx.maker.gradients(ctx.saved_tensors, grads)


class _MadeAgain:
    """Queries, keys and values between the kernel's forward and its backward: their inputs, and how to make them.

    Nothing is communicated in that: no rank waits for another.
    """

    def __init__(self, maker: JointHeads, inputs: Tensors) -> None:
        self.maker, self.inputs = maker, inputs
        self.tensors: Tensors | None = None

    def __call__(self) -> Tensors:
        """All three, when the kernel's backward asks for the first."""
        if self.tensors is None:
            with torch.no_grad():
                self.tensors = self.maker.make(*self.inputs)
        return self.tensors
