"""A rollout and a reference pass wait for nothing. NOT VERIFIED ON GPU: written without one, skipped where none is.

One GPU. PyTorch raises where the host would wait (`torch.cuda.set_sync_debug_mode`), which it can only know of a GPU;
`tests/training/test_counts.py` counts the same on CPU, for whole iterations.
"""

from collections.abc import Iterator

import pytest
import torch

from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import step_coefficients
from megatron_sage.model import HunyuanVideoConfig, HunyuanVideoDiT, TextCondition
from megatron_sage.parallel.groups import Groups, initialize, shutdown
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.rollout.policy import Network, Prompt, VideoShape
from megatron_sage.rollout.sampler import Flight, reference_velocities, rollout
from megatron_sage.rollout.transitions import StepTable

pytestmark = pytest.mark.gpu
GRID = (3, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[Groups]:
    yield initialize()
    shutdown()


def passes(groups: Groups, device: torch.device, steps: int, strict: bool) -> None:
    """Two flights of two samples; with `strict` every wait raises, but for those of a first call, which warms up."""
    config = HunyuanVideoConfig.from_diffusers({"num_layers": 2, "num_refiner_layers": 1}, dtype=torch.bfloat16)
    chunk = HunyuanVideoDiT(config, groups.collection).eval()
    shape = VideoShape(GRID, config.out_channels, TokenShard(GRID[0] * GRID[1] * GRID[2], 1, 0))

    def text(words: int) -> TextCondition:
        sizes = ((words, config.text_embed_dim), (0, config.text_embed_2_dim), (0, config.image_embed_dim))
        return TextCondition(*(torch.randn(1, *size, device=device, dtype=torch.bfloat16) for size in sizes))

    network = Network([chunk], shape, 6.0, device)
    sigmas = shifted_sigmas(steps, 5.0)
    table = StepTable.build(sigmas, step_coefficients("sage_grpo", sigmas, 0.5))
    flights = [Flight(0, [0, 1], Prompt("a", text(7), text(1))), Flight(0, [2, 3], Prompt("b", text(9), text(1)))]

    def once() -> None:
        trajectories, _ = rollout(network, table, flights, seed=0, token_group=None)
        reference_velocities(network, table, trajectories)

    once()
    if strict:
        torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        if strict:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("steps", [2, 5])
def test_no_step_waits_for_the_gpu(groups: Groups, steps: int) -> None:
    passes(groups, torch.device("cuda"), steps, strict=True)


def test_the_check_can_fail(groups: Groups) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
