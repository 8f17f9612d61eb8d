"""Section `collectives`: what the layouts exchange for one block, on the ranks of this run; two GPUs or more."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from benchmarks.gpu.bench import TYPE, Bench, Row, skipped, timed
from benchmarks.gpu.models import config_of
from benchmarks.gpu.sizes import tokens
from megatron_sage.parallel.sequence import TokenShard


def collectives(bench: Bench) -> Iterator[Row]:
    """Bus bandwidth at the block's sizes; the floor is the same operation's at `host_bytes` from each rank."""
    group, ranks = dist.group.WORLD, bench.groups.world_size
    if ranks == 1:
        yield skipped("collectives", "one rank: torchrun --nproc-per-node 2 or more")
        return
    for operation in _OPERATIONS:
        large = bench.sizes.host_bytes // TYPE.itemsize // ranks * ranks
        seconds, size = _measure(bench, operation, large, group)
        best = size / sorted(seconds)[len(seconds) // 2]
        yield timed(f"{operation}, large", seconds, size / best, "itself", bytes=size, gb_per_second=best / 1e9)
        for name, elements in _sizes(bench, operation, ranks).items():
            if bench.late():
                yield skipped(f"{operation}, {name}", "the time given by --minutes is over")
                continue
            seconds, size = _measure(bench, operation, elements, group)
            achieved = size / sorted(seconds)[len(seconds) // 2]
            of = "bytes / bandwidth of the large one"
            yield timed(f"{operation}, {name}", seconds, size / best, of, bytes=size, gb_per_second=achieved / 1e9)


def _sizes(bench: Bench, operation: str, ranks: int) -> dict[str, int]:
    """Elements of a rank's own tensor."""
    config, found = config_of(bench, 1), {}
    for name, grid in bench.sizes.grids.items():
        local = TokenShard(tokens(grid), ranks, 0).local
        if operation == "all-to-all":  # Ulysses: queries, keys and values of this rank's tokens
            found[f"q, k, v over context, {name}"] = _even(local * 3 * config.hidden_size, ranks)
        else:  # sequence parallelism: this rank's tokens to all, and the ranks' sums back
            found[f"the stream over tensor, {name}"] = local * config.hidden_size
    return found


def _even(elements: int, ranks: int) -> int:
    return -(-elements // ranks) * ranks


def _measure(bench: Bench, operation: str, elements: int, group: dist.ProcessGroup) -> tuple[list[float], float]:
    """Seconds, and bytes that leave this rank."""
    ranks = group.size()
    run = _OPERATIONS[operation](bench.random(elements), group)
    seconds = bench.seconds(run)
    # All ranks get the slowest one's: a collective has ended when it has ended everywhere.
    slowest = torch.tensor(seconds, dtype=torch.float64, device=bench.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    parts = ranks - 1 if operation != "all-to-all" else (ranks - 1) / ranks
    return slowest.tolist(), float(elements * TYPE.itemsize * parts)


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    received = torch.empty_like(x)
    return lambda: dist.all_to_all_single(received, x, group=group)


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    whole = x.new_empty(group.size() * x.numel())
    return lambda: dist.all_gather_into_tensor(whole, x, group=group)


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
    whole, mine = x.repeat(group.size()), torch.empty_like(x)
    return lambda: dist.reduce_scatter_tensor(mine, whole, op=dist.ReduceOp.SUM, group=group)


_OPERATIONS = {"all-to-all": _all_to_all, "all-gather": _all_gather, "reduce-scatter": _reduce_scatter}
