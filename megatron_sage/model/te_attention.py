"""Joint attention by Transformer Engine's context-parallel kernels. Not verified on GPU.

Transformer Engine splits ONE sequence over CP in equal parts and would take padding for tokens. Attention without a
mask does not ask in which order the tokens come (positions are in the rotated queries and keys), so no padding is
needed: each rank brings its own video tokens and as many of the text tokens, all of which it has, as make up an equal
part.
"""

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.parallel.context import MakeHeads
from megatron_sage.parallel.sequence import TokenShard, pad_tokens


def te_core(config: HunyuanVideoConfig) -> ModuleSpec:
    """The core for `context_backend` te_p2p, te_a2a or te_a2a+p2p. UserError without a GPU or Transformer Engine."""
    missing = [] if torch.cuda.is_available() else ["a GPU"]
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append("the package transformer-engine")
    if missing:
        raise UserError(
            f"parallel.context_backend={config.context_backend}: needs {' and '.join(missing)}; choose ulysses, "
            "allgather or auto"
        )
    return ModuleSpec(module=TransformerEngineAttention)


def text_slices(shard: TokenShard, text_tokens: int) -> list[tuple[int, int]]:
    """(start, stop) of each CP rank's text tokens, such that every rank has the same number of tokens.

    Raises UserError where that cannot be: the total must divide by 2·CP (Transformer Engine's rule), and no rank may
    have more video tokens than an equal part.
    """
    ranks, total = shard.parts, shard.num_tokens + text_tokens
    cure = "parallel.context_backend=ulysses or allgather takes any number"
    if ranks > 1 and total % (2 * ranks):
        raise UserError(
            f"parallel.context_backend: {shard.num_tokens} video + {text_tokens} text tokens = {total} cannot be "
            f"divided over 2·context = {2 * ranks}; {cure}"
        )
    part, start, slices = total // ranks, 0, []
    for rank in range(ranks):
        missing = part - shard.valid_on(rank)
        if missing < 0:
            raise UserError(
                f"parallel.context_backend: context rank {rank} has {shard.valid_on(rank)} video tokens, an equal part "
                f"of {total} is {part}; {cure}"
            )
        slices.append((start, start + missing))
        start += missing
    return slices


class TransformerEngineAttention(torch.nn.Module):
    """A core like `parallel.context.UlyssesAttention`, around one of Transformer Engine's kernels.

    `kernel(q, k, v)` takes this rank's part [part, B, N, D] of each and returns [part, B, N * D].
    """

    def __init__(
        self, config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection, kernel: Any | None = None
    ) -> None:
        super().__init__()
        self.group = pg_collection.cp
        self.kernel = kernel or _kernel(config, pg_collection)

    def forward(
        self, video: torch.Tensor, text: torch.Tensor, shard: TokenShard, make_heads: MakeHeads
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`video` holds this rank's `shard.valid` tokens, `text` all of them; see `parallel.context.WholeAttention`."""
        slices, valid = text_slices(shard, text.shape[0]), shard.valid
        mine = slice(*slices[self.group.rank()])
        made = make_heads(video, text)
        last = made.q.shape[0] == valid
        # Where nothing reads the text's answer there is no query either, but the kernel wants as many queries as keys:
        # the keys stand in, and what they are answered is dropped.
        text_q = (made.k if last else made.q)[valid:]
        q = torch.cat([made.q[:valid], text_q[mine]])
        k, v = (torch.cat([x[:valid], x[valid:][mine]]) for x in (made.k, made.v))
        out = self.kernel(q, k, v)
        return out[:valid], None if last else collect(out[valid:], slices, self.group)


def collect(mine: torch.Tensor, slices: list[tuple[int, int]], group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' slices of the text, in order, on every rank.

    Backward: gradients of the text are partial on each rank, so a slice's owner gets the sum of all ranks' parts.
    """
    return mine if group.size() == 1 else _Collect.apply(mine, slices, group)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, slices: list[tuple[int, int]], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.slices, ctx.group = slices, group
        longest = max(stop - start for start, stop in slices)
        piece = pad_tokens(mine, longest).contiguous()
        pieces = piece.new_empty(len(slices) * longest, *piece.shape[1:])
        dist.all_gather_into_tensor(pieces, piece, group=group)
        parts = pieces.unflatten(0, (len(slices), longest))
        return torch.cat([part[: stop - start] for part, (start, stop) in zip(parts, slices, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        slices, longest = ctx.slices, max(stop - start for start, stop in ctx.slices)
        pieces = torch.cat([pad_tokens(grad_outputs[0][start:stop], longest) for start, stop in slices])
        mine = pieces.new_empty(longest, *pieces.shape[1:])
        dist.reduce_scatter_tensor(mine, pieces, op=dist.ReduceOp.SUM, group=ctx.group)
        start, stop = slices[ctx.group.rank()]
        return mine[: stop - start], None, None


def _kernel(config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection) -> Any:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    attention = TEDotProductAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.no_mask,
        attention_type="self",
        attention_dropout=0.0,
        cp_comm_type=config.context_backend.removeprefix("te_"),
        pg_collection=pg_collection,
    )

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, None, AttnMaskType.no_mask)

    return kernel
