"""Collective checks on the ranks of the pool, with a rank that is slow or gets wrong sums."""

import time
from typing import Any

from tests.training.stops import patched


def check(seconds: float, fault: str = "", rank: int = -1, **layout: int) -> list[tuple[str, str, str]]:
    """(name, status, detail) of each finding on this rank."""
    import torch.distributed as dist

    from megatron_sage.diagnosis import collectives
    from megatron_sage.parallel.groups import initialize

    groups = initialize(**layout)

    def slow(original: Any, matrix: Any) -> Any:
        if dist.get_rank() == rank:
            time.sleep(0.05)
        return original(matrix)

    def wrong(original: Any, group: Any) -> bool:
        if dist.get_rank() != rank or group is not groups.dp:
            return original(group)
        with patched(dist, "all_reduce", lambda reduce, x, **rest: (reduce(x, **rest), x[7].add_(1))):
            return original(group)

    name, around = {"slow": ("_local_work", slow), "wrong": ("_sum", wrong)}.get(fault, ("_local_work", None))
    if around is None:
        return [(f.name, f.status, f.detail) for f in collectives.collective_findings(groups, seconds)]
    with patched(collectives, name, around):
        return [(f.name, f.status, f.detail) for f in collectives.collective_findings(groups, seconds)]
