"""All ranks of a job, before it costs anything: are sums right over every group, how fast, and who is slow.

`torchrun ... -m megatron_sage doctor CONFIG`, at the layout of the run.
"""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_sage.diagnosis.finding import Finding
from megatron_sage.parallel.device import device
from megatron_sage.parallel.groups import Groups

SECTION = "collectives"
SLOW = 1.5  # times the median: what is above is named
ELEMENTS = 4099  # of the checked tensors; a prime: nothing divides by the ranks


def collective_findings(groups: Groups, seconds: float = 10.0) -> list[Finding]:
    """The same findings on every rank; about `seconds` long. All ranks call."""
    hosts = _everywhere(socket.gethostname())
    named = named_groups(groups)
    found = [f for name, group in named.items() for f in _right(name, group, hosts)]
    if all(finding.status == "ok" for finding in found):
        for name, group in named.items():
            found.append(_speed(name, group, 0.6 * seconds / len(named)))
        found += _slowest("compute", _everywhere(_computing(0.1 * seconds)), hosts, "s for the same product")
        found += _slowest("link", _everywhere(_link(0.2 * seconds)), hosts, "s for a message from the rank before it")
    return found


def named_groups(groups: Groups) -> dict[str, Any]:
    """Every group that a run uses and that has more than one rank."""
    collection = groups.collection
    every = {
        "world": dist.group.WORLD,
        "tensor": groups.tp,
        "context": groups.cp,
        "pipeline": groups.pp,
        "data": groups.dp,
        "replica": groups.replica,
        "data·context": collection.dp_cp,
        "tensor·context": collection.tp_cp,
        "tensor·pipeline": collection.mp,
    }
    return {name: group for name, group in every.items() if group is not None and group.size() > 1}


def _everywhere(value: Any) -> list[Any]:
    """Each rank's value, in the order of the ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=dist.group.WORLD)
    return found


def _numbers(rank: int) -> torch.Tensor:
    """Whole numbers below 2^24 that differ from rank to rank: float32 sums of them are exact."""
    return (torch.arange(ELEMENTS, device=device()) % 97 + 1 + rank).float()


def _right(name: str, group: Any, hosts: list[str]) -> Iterator[Finding]:
    """One finding of each operation. A rank that gets something else, or an error, says so; all ranks hear of it."""
    for operation, check in (("all-reduce", _sum), ("all-gather", _gather), ("broadcast", _broadcast)):
        try:
            problem = "" if check(group) else "a wrong result"
        except RuntimeError as error:  # what gloo and NCCL raise: told below, by rank
            problem = " ".join(str(error).split())[:160]
        failed = [(rank, text) for rank, text in enumerate(_everywhere(problem)) if text]
        label = f"{operation} {name}"
        if failed:
            who = ", ".join(f"rank {rank} ({hosts[rank]})" for rank, _ in failed[:4])
            more = f" and {len(failed) - 4} more" if len(failed) > 4 else ""
            cure = "take its node out, or run with NCCL_DEBUG=INFO (NCCL_IB_DISABLE=1 tells whether it is the network)"
            yield Finding(SECTION, label, "failed", f"{failed[0][1]} on {who}{more}; {cure}")
        else:
            yield Finding(SECTION, label, "ok", f"right on groups of {group.size()}")


def _sum(group: Any) -> bool:
    mine = _numbers(group.rank())
    dist.all_reduce(mine, group=group)
    expected = torch.stack([_numbers(rank) for rank in range(group.size())]).sum(dim=0)
    return bool(torch.equal(mine, expected))


def _gather(group: Any) -> bool:
    parts = [torch.empty(ELEMENTS, device=device()) for _ in range(group.size())]
    dist.all_gather(parts, _numbers(group.rank()), group=group)
    return all(torch.equal(part, _numbers(rank)) for rank, part in enumerate(parts))


def _broadcast(group: Any) -> bool:
    last = group.size() - 1
    mine = _numbers(group.rank())
    dist.broadcast(mine, src=dist.get_global_rank(group, last), group=group)
    return bool(torch.equal(mine, _numbers(last)))


def _speed(name: str, group: Any, seconds: float) -> Finding:
    """Bus bandwidth of an all-reduce: what a rank sends, 2 (n - 1) / n of the tensor, a second."""
    size = (64 if torch.cuda.is_available() else 4) * 2**20
    tensor = torch.zeros(size // 4, device=device())
    once = _timed(lambda: dist.all_reduce(tensor, group=group), 2)
    longest = torch.tensor([once], device=device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)  # all ranks must repeat equally often
    repeats = max(1, min(100, int(seconds / max(1e-6, longest.item()))))
    each = max(_everywhere(_timed(lambda: dist.all_reduce(tensor, group=group), repeats)))
    rate = 2 * (group.size() - 1) / group.size() * size / each / 1e9
    detail = f"{rate:.2f} GB/s all-reduce of {size / 2**20:.0f} MiB over {group.size()} ranks, the slowest group"
    return Finding(SECTION, f"bandwidth {name}", "ok", detail)


def _timed(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of one of `repeats`, on this rank."""
    _synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    _synchronize()
    return (time.perf_counter() - begin) / repeats


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _computing(seconds: float) -> float:
    """A rank's own work, without any other: the median of many, so that one disturbance does not count."""
    size = 4096 if torch.cuda.is_available() else 256
    one = torch.ones(size, size, device=device(), dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 1000):
        times.append(_timed(lambda: _local_work(one), 1))
    return sorted(times)[len(times) // 2]


def _local_work(matrix: torch.Tensor) -> torch.Tensor:
    return matrix @ matrix


def _link(seconds: float) -> float:
    """Seconds until a message of the rank before has arrived, all ranks in a ring at once."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    size = (16 if torch.cuda.is_available() else 1) * 2**18
    out, into = torch.zeros(size, device=device()), torch.empty(size, device=device())

    def exchange() -> None:
        operations = [
            dist.P2POp(dist.isend, out, (rank + 1) % ranks, group=dist.group.WORLD),
            dist.P2POp(dist.irecv, into, (rank - 1) % ranks, group=dist.group.WORLD),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    once = max(_everywhere(_timed(exchange, 2)))
    return _timed(exchange, max(1, min(100, int(seconds / max(1e-6, once)))))


def _slowest(what: str, times: list[float], hosts: list[str], unit: str) -> Iterator[Finding]:
    typical, worst = sorted(times)[(len(times) - 1) // 2], max(range(len(times)), key=times.__getitem__)
    detail = f"slowest rank {worst} ({hosts[worst]}): {times[worst]:.2g} {unit}, median {typical:.2g}"
    if times[worst] > SLOW * typical:
        cure = "nvidia-smi -q -d PERFORMANCE,TEMPERATURE there, ibstat for its links; leave it out (--exclude)"
        yield Finding(SECTION, f"slowest {what}", "warning", f"{detail}; every step waits for it: {cure}")
    else:
        yield Finding(SECTION, f"slowest {what}", "ok", detail)
