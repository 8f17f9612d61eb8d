"""Runs that are watched, on the ranks of the pool."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.training import world
from tests.training.stops import patched


@contextlib.contextmanager
def slow(rank: int, phase: str, seconds: float) -> Iterator[None]:
    """Every forward of one rank in one phase takes longer, before its first collective."""
    from megatron_sage.rollout.policy import Network

    def around(original: Any, network: Any, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank and network.control.phase == phase:
            time.sleep(seconds)
        return original(network, *args, **kwargs)

    with patched(Network, "forward", around):
        yield


def run(arguments: list[str], processes: int, rank: int = 0, phase: str = "", seconds: float = 0.0) -> None:
    """Train with a slow rank."""
    with slow(rank, phase, seconds):
        world.train_job(arguments, processes)


def counted(arguments: list[str]) -> dict[str, Any]:
    """One rank: what torch counts in the second iteration, phase by phase, beside what performance.jsonl says."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from megatron_sage.config import load_config
    from megatron_sage.monitoring.monitor import Monitor

    counts: dict[str, int] = {}
    # torch counts the attention of GPUs; its kernel for the CPU makes the same products
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        forward: lambda q, k, v, *rest, **other: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *rest, **other: sdpa_backward_flop_count(grad, q, k, v),
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)

    def entered(original: Any, monitor: Any) -> Any:
        original(monitor)
        clock, control, state = monitor.control.on_enter, monitor.control, {"last": ("", 0)}

        def enter(phase: str) -> None:
            name, before = state["last"]
            if control.iteration == 1:
                counts[name] = counts.get(name, 0) + counter.get_total_flops() - before
            state["last"] = phase, counter.get_total_flops()
            clock(phase)

        control.on_enter = enter
        return monitor

    with patched(Monitor, "__enter__", entered), counter:
        world.train_job(arguments, 1)
    directory = Path(load_config(None, arguments).output_dir)
    rows = [json.loads(line) for line in (directory / "performance.jsonl").read_text().splitlines()]
    return {"counts": counts, "row": rows[1]}
