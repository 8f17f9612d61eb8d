"""A reference's weights in host memory: the forwards equal a resident copy's bit for bit, two blocks on the device."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron_sage.anchor import Anchor
from megatron_sage.errors import UserError
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.groups import initialize
from tests.model.parity import Case, build_stage
from tests.parallel.pool import run_on_ranks

LAYERS = 5


def build(tensor: int = 1, pipeline: int = 1, virtual: int | None = None) -> tuple[Any, list[HunyuanVideoDiT]]:
    groups = initialize(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    return groups, build_stage(Case(layers=LAYERS), groups, sequence_parallel=True, virtual_pipeline=virtual)


def disturb(chunks: list[HunyuanVideoDiT], seed: int = 0, only_trained: bool = True) -> None:
    """Other weights, the same on the replicas of a shard."""
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad or not only_trained:
                    generator = torch.Generator().manual_seed(seed + len(name) + sum(map(ord, name)))
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def block_outputs(chunks: list[HunyuanVideoDiT], times: int = 1) -> list[torch.Tensor]:
    """What parameters the blocks and the rest compute with: a forward of each block on its own weights' sums.

    Blocks are called through their hooks with a forward that reads every parameter.
    """
    found = []
    for _ in range(times):
        for chunk in chunks:
            for block in chunk.transformer_blocks.values():
                found.append(block(None, None, None, None))
            found.append(torch.cat([p.data.flatten() for n, p in chunk.named_parameters() if "blocks" not in n]))
    return found


@contextmanager
def reading_blocks(chunks: list[HunyuanVideoDiT], watch: Any = None) -> Iterator[None]:
    """The blocks' forwards return a copy of all their parameters, as they are then."""
    for chunk in chunks:
        for block in chunk.transformer_blocks.values():

            def forward(*args: Any, block: Any = block) -> torch.Tensor:
                if watch is not None:
                    watch()
                return torch.cat([p.data.flatten() for p in block.parameters()])

            block.forward = forward  # type: ignore[method-assign]
    yield
    for chunk in chunks:
        for block in chunk.transformer_blocks.values():
            del block.forward


def live_bytes(excluded: set[int]) -> int:
    """Of all tensors' storages, each once; on a CPU host memory must be told apart by hand."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in excluded)


def streamed(sharded: bool, on_device: bool, tensor: int, pipeline: int, virtual: int | None) -> dict[str, Any]:
    groups, chunks = build(tensor, pipeline, virtual)
    with reading_blocks(chunks):
        before = block_outputs(chunks)
        anchor = Anchor(chunks, groups, on_device, sharded)
        pointers = [p.data_ptr() for c in chunks for p in c.parameters()]
        disturb(chunks)
        policy = block_outputs(chunks)
        with anchor.swapped_in():
            inside = block_outputs(chunks, times=3)
        after = block_outputs(chunks)
    moved = [p.data_ptr() for c in chunks for p in c.parameters()] != pointers
    trained = sum(p.nbytes for c in chunks for p in c.parameters() if p.requires_grad)
    return {
        "anchor": all(torch.equal(x, y) for x, y in zip(inside, before * 3, strict=True)),
        "differs": not all(torch.equal(x, y) for x, y in zip(policy, before, strict=True)),
        "back": all(torch.equal(x, y) for x, y in zip(after, policy, strict=True)) and not moved,
        "kept": anchor.kept_bytes,
        "trained": trained,
        "checksum": anchor.checksum,
    }


LAYOUTS = [(1, 1, 1, None), (2, 2, 1, None), (2, 1, 2, 2), (2, 1, 1, None)]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(("ranks", "tensor", "pipeline", "virtual"), LAYOUTS)
def test_blocks_compute_with_the_anchor_and_the_policy_comes_back(
    ranks: int, tensor: int, pipeline: int, virtual: int | None, sharded: bool
) -> None:
    function = "tests.parallel.test_streaming:streamed"
    settings = {"tensor": tensor, "pipeline": pipeline, "virtual": virtual, "on_device": False}
    found = run_on_ranks(ranks, function, sharded=sharded, **settings)
    replicas = ranks // (tensor * pipeline)
    for rank in found:
        assert rank["anchor"] and rank["differs"] and rank["back"]
        slices = replicas if sharded else 1
        # what is trained, cut over the replicas; alignment costs up to 15 bytes a tensor
        assert rank["trained"] / slices <= rank["kept"] <= rank["trained"] / slices * 1.01 + 1024
    assert found[0]["checksum"] == run_on_ranks(1, function, sharded=False, on_device=True, **SINGLE)[0]["checksum"]


SINGLE = {"tensor": 1, "pipeline": 1, "virtual": None}


def peak(on_device: bool) -> dict[str, int]:
    groups, chunks = build()
    anchor = Anchor(chunks, groups, on_device)
    waiting = set() if on_device else {unit.kept.untyped_storage().data_ptr() for unit in anchor._units}
    seen: list[int] = []
    with reading_blocks(chunks, lambda: seen.append(live_bytes(waiting))):
        gc.collect()
        base = live_bytes({unit.kept.untyped_storage().data_ptr() for unit in anchor._units})
        with anchor.swapped_in():
            for _ in range(2):
                for chunk in chunks:
                    for block in chunk.transformer_blocks.values():
                        block(None, None, None, None)
        left = live_bytes(waiting)
    blocks = [unit.bytes for blocks in anchor._blocks for _, unit in blocks]
    return {
        "base": base,
        "peak": max(seen),
        "left": left,
        "block": max(blocks),
        "rest": anchor._rest.bytes,
        "all": sum(blocks) + anchor._rest.bytes,
    }


def test_at_most_two_blocks_are_on_the_device() -> None:
    (found,) = run_on_ranks(1, "tests.parallel.test_streaming:peak", on_device=False)
    added = found["peak"] - found["base"]
    assert abs(added - 2 * found["block"] - found["rest"]) <= 4096  # the counting itself makes a few small tensors
    assert found["left"] <= found["base"] + 4096  # nothing of it stays
    (resident,) = run_on_ranks(1, "tests.parallel.test_streaming:peak", on_device=True)
    assert resident["peak"] - resident["base"] >= resident["all"]


def refreshed(which: str) -> dict[str, Any]:
    groups, chunks = build()
    anchor = Anchor(chunks, groups)
    first = anchor.checksum
    disturb(chunks)
    rank = torch.distributed.get_rank()
    if which == "policy" and rank == 1:
        next(chunks[0].parameters()).data.view(torch.int32).flatten()[0] ^= 1
    anchor.refresh()
    if which == "copy" and rank == 1:
        anchor._pending[1].result()
        sums, _ = anchor._pending
        anchor._units[1].kept[5] ^= 4
        anchor._pending = sums, anchor._worker.submit(anchor._kept_sum, None)
    anchor.finish()
    return {"first": first, "now": anchor.checksum}


def test_a_refresh_is_another_checksum_that_all_replicas_share() -> None:
    found = run_on_ranks(2, "tests.parallel.test_streaming:refreshed", which="")
    assert found[0] == found[1] and found[0]["first"] != found[0]["now"]


@pytest.mark.parametrize(("which", "said"), [("policy", "replicas of this shard"), ("copy", "copy differs")])
def test_one_changed_bit_is_noticed(which: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_on_ranks(2, "tests.parallel.test_streaming:refreshed", which=which)


def interrupted() -> bool:
    groups, chunks = build()
    anchor = Anchor(chunks, groups)
    disturb(chunks)
    before = [p.data.clone() for p in chunks[0].parameters()]

    def fail() -> None:
        raise RuntimeError("out of memory")

    with reading_blocks(chunks, fail), pytest.raises(RuntimeError), anchor.swapped_in():
        chunks[0].transformer_blocks["1"](None, None, None, None)
    return all(torch.equal(p.data, b) for p, b in zip(chunks[0].parameters(), before, strict=True))


def test_an_error_inside_a_block_leaves_the_policy() -> None:
    assert run_on_ranks(1, "tests.parallel.test_streaming:interrupted") == [True]


def exchanged(first: bool, second: bool) -> bool:
    """The state of an anchor, whole or cut, fills another one."""
    groups, chunks = build()
    one = Anchor(chunks, groups, sharded=first)
    checksum = one.checksum
    disturb(chunks)
    other = Anchor(chunks, groups, sharded=second)
    assert other.checksum != checksum
    other.load_state_dict(one.state_dict())
    return other.checksum == checksum


@pytest.mark.parametrize("cut", [(False, True), (True, False)])
def test_state_passes_between_whole_and_cut_anchors(cut: tuple[bool, bool]) -> None:
    function = "tests.parallel.test_streaming:exchanged"
    assert run_on_ranks(2, function, first=cut[0], second=cut[1]) == [True, True]
