"""The worker pool itself: results, errors, hangs."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.pool import RemoteTracebackError, WorkerPool, run_on_ranks


def rank_plus_sum(offset: int) -> tuple[int, int, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total, group=dist.group.WORLD)
    return dist.get_rank(), int(total), os.getpid()


def fail_on_one_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} cannot do this")
    dist.barrier(group=dist.group.WORLD)


def wait_on_one_rank(seconds: float) -> int:
    if dist.get_rank() == 0:
        time.sleep(seconds)
    return dist.get_rank()


def initialize_layout(**layout: int) -> dict[str, Any]:
    from megatron_sage.parallel.groups import initialize

    groups = initialize(**layout)
    return {
        "tp": (groups.tp_rank, groups.tp_size),
        "dp": (groups.dp_rank, groups.dp_size),
        "rank": groups.rank,
        "world": groups.world_size,
        "draw": float(torch.rand(())),
    }


def test_results_come_in_rank_order_from_reused_workers() -> None:
    first = run_on_ranks(2, "tests.parallel.test_pool:rank_plus_sum", offset=10)
    assert [result[:2] for result in first] == [(0, 21), (1, 21)]
    again = run_on_ranks(2, "tests.parallel.test_pool:rank_plus_sum", offset=0)
    assert [result[2] for result in again] == [result[2] for result in first]


def test_an_exception_is_raised_again_with_the_workers_traceback() -> None:
    with pytest.raises(ValueError, match="rank 1 cannot do this") as caught:
        run_on_ranks(2, "tests.parallel.test_pool:fail_on_one_rank", rank=1)
    assert isinstance(caught.value.__cause__, RemoteTracebackError)
    assert "fail_on_one_rank" in str(caught.value.__cause__)
    assert len(run_on_ranks(2, "tests.parallel.test_pool:rank_plus_sum", offset=0)) == 2


def test_a_hang_ends_and_the_next_job_gets_new_workers() -> None:
    pool = WorkerPool()  # the shared one stays warm for the other tests
    try:
        before = pool.run(2, "tests.parallel.test_pool:rank_plus_sum", {"offset": 0}, 120)
        with pytest.raises(TimeoutError, match=r"ranks \[0\] gave no answer in 1 s"):
            pool.run(2, "tests.parallel.test_pool:wait_on_one_rank", {"seconds": 60}, 1)
        after = pool.run(2, "tests.parallel.test_pool:rank_plus_sum", {"offset": 0}, 120)
        assert not {result[2] for result in before} & {result[2] for result in after}
    finally:
        pool.close()


def test_more_ranks_than_the_pool_has_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        run_on_ranks(9, "tests.parallel.test_pool:rank_plus_sum", offset=0)


def test_groups_of_a_layout() -> None:
    ranks = run_on_ranks(4, "tests.parallel.test_pool:initialize_layout", tensor=2, seed=3)
    assert [rank["tp"] for rank in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [rank["dp"] for rank in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [(rank["rank"], rank["world"]) for rank in ranks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert len({rank["draw"] for rank in ranks}) == 1


def test_a_layout_that_does_not_divide_the_world_prints_the_equation() -> None:
    with pytest.raises(ValueError, match=r"world size 2 is not a multiple of .* = 1 \* 1 \* 3 = 3"):
        run_on_ranks(2, "tests.parallel.test_pool:initialize_layout", pipeline=3)
