"""Attention cores on GPUs. NOT VERIFIED ON GPU: written on a machine without one.

With one GPU the cores run at CP = 1; with several, in processes of one GPU each over NCCL, against attention in one
process.
"""

import os
import socket
from typing import Any

import pytest
import torch

from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.parallel.context import AllGatherAttention, UlyssesAttention, WholeAttention
from megatron_sage.parallel.sequence import TokenShard
from tests.parallel.test_context import fused, plain_heads

pytestmark = pytest.mark.gpu
VIDEO, TEXT, BATCH, HEADS, DIM = 1000, 24, 2, 16, 128  # 1024 tokens: equal parts for up to 8 ranks
TOLERANCE = 2e-2  # of the norm: bf16


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, BATCH, HEADS, DIM) for tokens in (VIDEO, TEXT) for _ in range(3)]
    return [torch.randn(*shape, generator=generator).cuda().bfloat16() for shape in shapes]


def assert_near(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Relative to the size of what is compared: attention over a thousand tokens is small."""
    assert (mine.float() - theirs.float()).norm() <= TOLERANCE * theirs.float().norm()


def run_core(backend: str) -> None:
    """On this rank: output and gradients against the whole attention."""
    from megatron_sage.model.te_attention import TransformerEngineAttention
    from megatron_sage.parallel.groups import initialize, shutdown

    groups = initialize(context=int(os.environ["WORLD_SIZE"]))
    leaves = [x.requires_grad_() for x in inputs()]
    whole = TokenShard(VIDEO, 1, 0)
    expected_video, expected_text = WholeAttention()(*fused(leaves), whole, plain_heads(False))
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).cuda() for x in (expected_video, expected_text)
    ]
    ((expected_video * weights[0]).sum() + (expected_text * weights[1]).sum()).backward()
    shard = TokenShard(VIDEO, groups.cp_size, groups.cp_rank)
    mine = slice(shard.start, shard.start + shard.valid)
    local = [x.detach()[mine].clone().requires_grad_() for x in leaves[:3]]
    local += [x.detach().clone().requires_grad_() for x in leaves[3:]]
    if backend.startswith("te_"):
        config = HunyuanVideoConfig.from_diffusers(
            {}, context=groups.cp_size, context_backend=backend, dtype=torch.bfloat16
        )
        core: Any = TransformerEngineAttention(config, groups.collection)
    else:
        core = {"ulysses": UlyssesAttention, "allgather": AllGatherAttention}[backend](None, groups.collection)
    video, text = core(*fused(local), shard, plain_heads(False))
    assert_near(video, expected_video[mine])
    assert_near(text, expected_text)
    ((video * weights[0][mine]).sum() + (text * weights[1]).sum() / groups.cp_size).backward()
    for index, leaf in enumerate(local):
        gradient = leaf.grad.float()
        if index >= 3:
            torch.distributed.all_reduce(gradient, group=groups.cp)
        theirs = leaves[index].grad
        assert_near(gradient, theirs[mine] if index < 3 else theirs)
    shutdown()


def _process(rank: int, ranks: int, port: int, backend: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_core(backend)


@pytest.mark.parametrize("backend", ["ulysses", "allgather", "te_p2p", "te_a2a"])
def test_the_core_equals_whole_attention(backend: str) -> None:
    if backend.startswith("te_"):
        pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    ranks = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(ranks, port, backend), nprocs=ranks)
