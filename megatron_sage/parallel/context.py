"""Context-parallel joint attention: video tokens split over the CP group, text tokens whole on each of its ranks.

Both backends compute, for this rank's video tokens and for all text tokens, attention over every video and every text
token, by torch's fused kernels and without a mask: padding is cut off before a query or key is made, and put back
only for the collectives, which want equal pieces.

Gradients of the text stream are PARTIAL on each CP rank: their sum over the group is the gradient. Everything between
two attentions is linear in the gradient, so they stay partial from the loss to the text parameters, whose gradients
the sum over DP x CP completes together with those of all others. No collective is spent on the text's gradient.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sage.parallel.sequence import TokenShard, pad_tokens

AUTO, ULYSSES, ALLGATHER = "auto", "ulysses", "allgather"


class Heads(NamedTuple):
    """Queries, keys and values of one stream, [tokens, B, N, D]; no query where nothing reads the answer."""

    q: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor


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

    def forward(self, video: Heads, text: Heads, shard: TokenShard) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(video [S, B, N * D], text [L, B, N * D] or None); `shard` is not looked at."""
        assert video.q is not None
        return _split(attend(_joint_queries(video.q, text.q), *_joint_keys(video, text)), video.q.shape[0], text)


class UlyssesAttention(torch.nn.Module):
    """All tokens of 1/CP of this rank's heads: an all-to-all before attention and one after it.

    Needs heads / TP divisible by CP. Keeps for the backward pass what a rank keeps without CP, divided by CP.
    """

    def __init__(self, config: Any, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(self, video: Heads, text: Heads, shard: TokenShard) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`video` holds this rank's `shard.valid` tokens; see `WholeAttention`."""
        assert video.q is not None
        size, rank = self.group.size(), self.group.rank()
        fused = pad_tokens(torch.stack([video.q, video.k, video.v], dim=-2), shard.local)  # [S_local, B, N, 3, D]
        spread = fused.unflatten(2, (size, -1)).movedim(2, 0)  # the heads of every rank: [CP, S_local, B, N/CP, 3, D]
        whole = exchange(spread, self.group).flatten(0, 1)[: shard.num_tokens]
        mine = slice(rank * whole.shape[2], (rank + 1) * whole.shape[2])
        text_q = None if text.q is None else text.q[:, :, mine]
        q, k, v = whole.unbind(-2)
        if text_q is None:
            q = q.contiguous()  # joined with nothing, it would keep all of `whole` for the backward pass
        ours = Heads(text_q, text.k[:, :, mine], text.v[:, :, mine])
        out = attend(_joint_queries(q, text_q), *_joint_keys(Heads(q, k, v), ours))
        video_out, text_out = _split(out, shard.num_tokens, text)
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

    def forward(self, video: Heads, text: Heads, shard: TokenShard) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`video` holds this rank's `shard.valid` tokens; see `WholeAttention`."""
        assert video.q is not None
        local = pad_tokens(torch.stack([video.k, video.v]), shard.local, dim=1)  # [2, S_local, B, N, D]
        text_kv = torch.stack([text.k, text.v])
        again = _GatherAgain(shard, self.group)
        joint = _GatherTokens.apply(local, text_kv, again)  # [2, S + L, B, N, D]
        with again.instead_of(joint):
            out = attend(_joint_queries(video.q, text.q), joint[0], joint[1])
        out = _BeforeBackward.apply(out, local.detach(), text_kv.detach(), again)
        return _split(out, shard.valid, text)


def attend(q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBND: torch.Tensor) -> torch.Tensor:
    """Full attention by torch's fused kernels: [Sq, B, N, D], [Sk, B, N, D] twice -> [Sq, B, N * D]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBND, v_SBND))
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)


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

    torch's kernel keeps its keys and values. Hooks replace them by their place in the gathered tensor, so that what is
    kept is what this rank held before the gather. The second gather is no business of the hooks: a rank without any
    query may run another kernel, which keeps nothing, and its partners would wait for it for ever. It hangs on the
    output's gradient, which every rank gets.
    """

    def __init__(self, shard: TokenShard, group: dist.ProcessGroup) -> None:
        self.shard, self.group = shard, group
        self.joint: torch.Tensor | None = None

    def gather(self, local: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[2, S_local, ...] of every rank, padding cut off, followed by the text's [2, L, ...]: [2, S + L, ...]."""
        parts = self.shard.parts
        pieces = local.new_empty(parts * 2, *local.shape[1:])  # gloo wants them end to end, not stacked
        dist.all_gather_into_tensor(pieces, local.contiguous(), group=self.group)
        video = pieces.unflatten(0, (parts, 2)).movedim(0, 1).flatten(1, 2)[:, : self.shard.num_tokens]
        return torch.cat([video, text], dim=1)

    def instead_of(self, joint: torch.Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside: what autograd would keep of `joint` is a place in it."""
        address = joint.untyped_storage()._cdata  # of the storage, whichever view; fake tensors have one too

        def pack(x: torch.Tensor) -> Any:
            if x.untyped_storage()._cdata == address:
                return x.shape, x.stride(), x.storage_offset()
            return x.detach()  # the kernel's own output, kept as it is, would keep the graph that keeps it

        def unpack(kept: Any) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            assert self.joint is not None, "the output's gradient comes first"
            return self.joint.as_strided(*kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, local: torch.Tensor, text: torch.Tensor, again: _GatherAgain
    ) -> torch.Tensor:
        ctx.again = again
        ctx.save_for_backward(local, text)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.again.joint = ctx.again.gather(*ctx.saved_tensors)
        return grad_outputs[0], None, None, None


class _GatherTokens(torch.autograd.Function):
    """Backward: the video's gradients are summed over the ranks and scattered, for all queries look at all keys."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, text: torch.Tensor, again: _GatherAgain) -> torch.Tensor:
        ctx.again = again
        return again.gather(local, text)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        again: _GatherAgain = ctx.again
        again.joint, shard, gradient = None, again.shard, grad_outputs[0]
        video, text = gradient[:, : shard.num_tokens], gradient[:, shard.num_tokens :]
        pieces = pad_tokens(video, shard.padded, dim=1).unflatten(1, (shard.parts, shard.local))
        pieces = pieces.movedim(1, 0).flatten(0, 1)
        mine = pieces.new_empty(2, *pieces.shape[1:])
        dist.reduce_scatter_tensor(mine, pieces.contiguous(), op=dist.ReduceOp.SUM, group=again.group)
        return mine, text, None


def _joint_queries(video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    return video if text is None else torch.cat([video, text])


def _joint_keys(video: Heads, text: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([video.k, text.k]), torch.cat([video.v, text.v])


def _split(out: torch.Tensor, num_video: int, text: Heads) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (out, None) if text.q is None else (out[:num_video], out[num_video:])
