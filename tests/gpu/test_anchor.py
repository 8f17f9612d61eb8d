"""References on a GPU. NOT VERIFIED ON GPU: written on a machine without one, skipped loudly where there is none.

One GPU. `tests/parallel/test_streaming.py` shows the same laws on CPU, where a copy is never under way.
"""

from collections.abc import Iterator

import pytest
import torch

from megatron_sage.anchor import Anchor
from megatron_sage.model import HunyuanVideoConfig, HunyuanVideoDiT, TextCondition
from megatron_sage.parallel.groups import Groups, initialize, shutdown

pytestmark = pytest.mark.gpu
LAYERS = 8
GRID = (5, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[Groups]:
    yield initialize()
    shutdown()


@pytest.fixture(scope="module")
def dit(groups: Groups) -> HunyuanVideoDiT:
    """Blocks of the real width."""
    config = HunyuanVideoConfig.from_diffusers({"num_layers": LAYERS, "num_refiner_layers": 1}, dtype=torch.bfloat16)
    return HunyuanVideoDiT(config, groups.collection).eval()


@torch.no_grad()
def forward(dit: HunyuanVideoDiT, times: int = 3) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    text = TextCondition(draw(1, 40, 3584), draw(1, 10, 1472), draw(1, 0, 1152))
    video = draw(GRID[0] * GRID[1] * GRID[2], 1, 65)
    for _ in range(times):
        out = dit(video, torch.full((1,), 500.0, device="cuda"), text, GRID)
    return out


def disturb(dit: HunyuanVideoDiT) -> None:
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter += 0.01 * torch.randn_like(parameter)


def test_streamed_is_resident_bit_for_bit_with_two_blocks_on_the_device(dit: HunyuanVideoDiT, groups: Groups) -> None:
    disturb(dit)  # the modulation begins at zero
    initial = forward(dit)
    streamed = Anchor([dit], groups)
    resident = Anchor([dit], groups, on_device=True)
    assert all(unit.kept.is_pinned() for unit in streamed._units)
    disturb(dit)
    policy = forward(dit)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    forward(dit)
    alone = torch.cuda.max_memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    with streamed.swapped_in():
        found = forward(dit)
    torch.cuda.synchronize()
    block = max(unit.bytes for blocks in streamed._blocks for _, unit in blocks)
    added = torch.cuda.max_memory_allocated() - base - alone
    assert added <= 2 * block + streamed._rest.bytes + 2**24
    assert torch.cuda.memory_allocated() - base <= 2**24
    with resident.swapped_in():
        assert torch.equal(found, forward(dit))
    assert torch.equal(found, initial) and not torch.equal(found, policy) and torch.equal(forward(dit), policy)


def test_a_refresh_does_not_wait(dit: HunyuanVideoDiT, groups: Groups) -> None:
    """Work queued before it is still running when it returns, and it copies what that work leaves."""
    anchor = Anchor([dit], groups)
    first = anchor.checksum
    begin, end = torch.cuda.Event(), torch.cuda.Event()
    begin.record()
    torch.cuda._sleep(2_000_000_000)  # about a second
    disturb(dit)
    end.record()
    anchor.refresh()
    assert not end.query()
    expected = forward(dit)
    anchor.finish()
    assert anchor.checksum != first
    disturb(dit)
    with anchor.swapped_in():
        assert torch.equal(forward(dit), expected)
