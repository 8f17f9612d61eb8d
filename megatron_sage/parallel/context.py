"""Context-parallel joint attention: video tokens split over the CP group, text tokens whole on each of its ranks.

Both backends compute, for this rank's video tokens and for all text tokens, attention over every video and every text
token, by torch's fused kernels and without a mask: padding is cut off before a query or key is made, and put back
only for the collectives, which want equal pieces.

Gradients of the text stream are PARTIAL on each CP rank: their sum over the group is the gradient. Everything between
two attentions is linear in the gradient, so they stay partial from the loss to the text parameters, whose gradients
the sum over DP x CP completes together with those of all others. No collective is spent on the text's gradient.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sage.parallel.kept import instead_of
from megatron_sage.parallel.sequence import TokenShard, pad_tokens

AUTO, ULYSSES, ALLGATHER = "auto", "ulysses", "allgather"


class Heads(NamedTuple):
    """Queries, keys and values, [video tokens | text tokens], [tokens, B, N, D] each.

    Queries may end behind the video's, where nothing reads what the text is answered. `again` gives the three once more
    in the backward pass: the attention kernel need not keep them. None: it does.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    again: Callable[[], Sequence[torch.Tensor]] | None = None


class MakeHeads(Protocol):
    """The fused projections of both streams, [tokens, B, N, 3, D] -> normed and rotated heads.

    `whole`: the video's tokens are all there are, not this rank's: the rotations are those of all positions.
    """

    def __call__(self, video: torch.Tensor, text: torch.Tensor, whole: bool = False) -> Heads: ...


def choose_backend(heads: int, tensor: int, context: int) -> tuple[str, str]:
    """What `auto` takes, and why."""
    if context == 1:
        return ALLGATHER, "context=1: nothing to exchange"
    local = heads // tensor
    if local % context == 0:
        return ULYSSES, f"{heads} heads / tensor {tensor} = {local} heads divide over context {context}"
    return ALLGATHER, f"{heads} heads / tensor {tensor} = {local} heads do not divide over context {context}"


class WholeAttention(torch.nn.Module):
    """One rank holds all tokens: context parallelism of 1."""

    def __init__(self, config: Any = None, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__()

    def forward(
        self, video: torch.Tensor, text: torch.Tensor, shard: TokenShard, make_heads: MakeHeads
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(video [S, B, N * D], text [L, B, N * D] or None) of fused projections [tokens, B, N, 3, D]."""
        return _split(attend(make_heads(video, text)), video.shape[0])


class UlyssesAttention(torch.nn.Module):
    """All tokens of 1/CP of this rank's heads: an all-to-all before attention and one after it.

    Needs heads / TP divisible by CP. The projections are exchanged as they are, in one piece: normed and rotated
    afterwards, they are all that has to be kept for the backward pass.
    """

    def __init__(self, config: Any, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(
        self, video: torch.Tensor, text: torch.Tensor, shard: TokenShard, make_heads: MakeHeads
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`video` holds this rank's `shard.valid` tokens; see `WholeAttention`."""
        size, rank = self.group.size(), self.group.rank()
        fused = pad_tokens(video, shard.local)
        spread = fused.unflatten(2, (size, -1)).movedim(2, 0)  # the heads of every rank: [CP, S_local, B, N/CP, 3, D]
        whole = exchange(spread, self.group).flatten(0, 1)[: shard.num_tokens]
        mine = slice(rank * whole.shape[2], (rank + 1) * whole.shape[2])
        out = attend(make_heads(whole, text[:, :, mine], whole=True))
        video_out, text_out = _split(out, shard.num_tokens)
        # every rank gets its own video tokens and ALL text tokens: one all-to-all serves both streams
        pieces = pad_tokens(video_out, shard.padded).unflatten(0, (size, shard.local))
        if text_out is not None:
            pieces = torch.cat([pieces, text_out.expand(size, *text_out.shape)], dim=1)
        heads = exchange(pieces, self.group).movedim(0, 2).flatten(2)  # [S_local (+ L), B, N * D]
        return heads[: shard.valid], None if text_out is None else heads[shard.local :]


class AllGatherAttention(torch.nn.Module):
    """Keys and values of all tokens on every rank, queries where they are: any number of heads.

    The gathered keys and values are not kept for the backward pass, which gathers them again: kept memory stays
    divided by CP, as with Ulysses.
    """

    def __init__(self, config: Any, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(
        self, video: torch.Tensor, text: torch.Tensor, shard: TokenShard, make_heads: MakeHeads
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`video` holds this rank's `shard.valid` tokens; see `WholeAttention`."""
        heads = make_heads(video, text)
        again = _GatherAgain(shard, self.group, heads)
        joint = _GatherTokens.apply(heads.k, heads.v, again)  # [2, S + L, B, N, D]
        with instead_of([heads.q, joint], again.heads):
            out = attend(Heads(heads.q, joint[0], joint[1]))
        return _split(_BeforeBackward.apply(out, again), shard.valid)


def attend(heads: Heads) -> torch.Tensor:
    """Full attention by torch's fused kernels, [tokens, B, N * D] for the queries there are."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in heads[:3])
    with nullcontext() if heads.again is None else instead_of(heads[:3], heads.again):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.permute(2, 0, 1, 3).flatten(2)


def exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-to-all: piece i of dimension 0 goes to rank i; what comes back is in the order of the senders.

    Its own transpose: the gradient takes the way back.
    """
    return _Exchange.apply(x, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(grad_outputs[0], ctx.group), None


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


class _GatherAgain:
    """The gathered keys and values, dropped after the forward pass and gathered once more for the backward pass.

    torch's kernel keeps its keys and values; `instead_of` puts in their place what this rank held before the gather.
    The second gather is no business of the hooks: a rank without any query may run another kernel, which keeps nothing,
    and its partners would wait for it for ever. It hangs on the output's gradient, which every rank gets.
    """

    def __init__(self, shard: TokenShard, group: dist.ProcessGroup, heads: Heads) -> None:
        self.shard, self.group = shard, group
        mine = [x.detach() for x in heads[:3]]
        self.mine: Callable[[], Sequence[torch.Tensor]] = heads.again or (lambda: mine)
        self.joint: torch.Tensor | None = None

    def gather(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """This rank's keys and values [S_valid + L] -> the video's of every rank, then the text's: [2, S + L]."""
        parts, valid = self.shard.parts, self.shard.valid
        local = pad_tokens(torch.stack([k[:valid], v[:valid]]), self.shard.local, dim=1)
        pieces = local.new_empty(parts * 2, *local.shape[1:])  # gloo wants them end to end, not stacked
        dist.all_gather_into_tensor(pieces, local, group=self.group)
        video = pieces.unflatten(0, (parts, 2)).movedim(0, 1).flatten(1, 2)[:, : self.shard.num_tokens]
        return torch.cat([video, torch.stack([k[valid:], v[valid:]])], dim=1)

    def heads(self) -> list[torch.Tensor]:
        """For the kernel's backward: queries, and all keys and values."""
        assert self.joint is not None, "the output's gradient comes first"
        return [self.mine()[0], self.joint]


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, again: _GatherAgain) -> torch.Tensor:
        ctx.again = again
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        again: _GatherAgain = ctx.again
        with torch.no_grad():
            _, k, v = again.mine()
            again.joint = again.gather(k, v)
        return grad_outputs[0], None


class _GatherTokens(torch.autograd.Function):
    """Backward: the video's gradients are summed over the ranks and scattered, for all queries look at all keys."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, again: _GatherAgain) -> torch.Tensor:
        ctx.again = again
        return again.gather(k, v)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        again: _GatherAgain = ctx.again
        again.joint, shard, gradient = None, again.shard, grad_outputs[0]
        video, text = gradient[:, : shard.num_tokens], gradient[:, shard.num_tokens :]
        pieces = pad_tokens(video, shard.padded, dim=1).unflatten(1, (shard.parts, shard.local))
        pieces = pieces.movedim(1, 0).flatten(0, 1)
        mine = pieces.new_empty(2, *pieces.shape[1:])
        dist.reduce_scatter_tensor(mine, pieces.contiguous(), op=dist.ReduceOp.SUM, group=again.group)
        k, v = torch.cat([mine[:, : shard.valid], text], dim=1)
        return k, v, None


def _split(out: torch.Tensor, num_video: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (out, None) if out.shape[0] == num_video else (out[:num_video], out[num_video:])
