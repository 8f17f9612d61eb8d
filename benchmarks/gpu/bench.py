"""What every section is given: the device, its sizes, a clock, the ceilings of this run, and how rows are written."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import common
from benchmarks.gpu.sizes import Sizes
from megatron_sage.parallel.groups import Groups

Row = dict[str, Any]
Section = Callable[["Bench"], Iterator[Row]]
USABLE = 0.85  # of the free memory: what a case may need by formula
LEAST, MOST = 3, 20  # repeats of one number
TYPE = torch.bfloat16


@dataclass
class Ceilings:
    """The best that this card did in this run, operations or bytes a second; None: not measured."""

    bf16: float | None = None
    fp8: float | None = None
    memory: float | None = None
    to_device: float | None = None
    to_host: float | None = None

    def get(self, name: str) -> float:
        """RuntimeError where the section `ceiling` did not come so far."""
        value = getattr(self, name)
        if value is None:
            raise RuntimeError(f"no ceiling {name!r}: the section `ceiling` did not measure it")
        return float(value)


@dataclass
class Bench:
    """One run of the benchmark on this rank."""

    sizes: Sizes
    groups: Groups
    device: torch.device
    deadline: float = float("inf")
    """Of `time.monotonic()`: nothing is begun after it."""
    ceilings: Ceilings = field(default_factory=Ceilings)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def agreed(self, value: float) -> float:
        """The smallest of all ranks' values: a decision from which collectives follow must be one decision."""
        if self.groups.world_size == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=dist.group.WORLD)
        return float(found)

    def late(self) -> bool:
        """Whether the time is over, on any rank."""
        return self.agreed(self.deadline - time.monotonic()) <= 0

    def obstacle(self, need: float, memory: str = "device") -> str | None:
        """Why a case that needs `need` bytes cannot be run now, or None. All ranks call."""
        if self.late():
            return "the time given by --minutes is over"
        free = self.agreed(self.free() if memory == "device" else host_free())
        if need > USABLE * free:
            have = f"{USABLE:g} of the free is {USABLE * free / 1e9:.1f} GB"
            return f"needs {need / 1e9:.1f} GB of {memory} memory by formula, {have}"
        return None

    def free(self) -> float:
        """Bytes of the device that are not in use; what torch's allocator keeps for itself is given back first."""
        if not self.cuda:
            return host_free()
        gc.collect()  # modules refer to one another in circles
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])

    def seconds(self, function: Callable[[], Any], setup: Callable[[], Any] = lambda: None) -> list[float]:
        """Of each repeat, `setup` not counted; two runs before warm up and say how often it can be repeated."""
        self._once(function, setup)
        first = self._once(function, setup)
        count = int(self.agreed(min(MOST, max(LEAST, self.sizes.seconds / max(first, 1e-9)))))
        return [self._once(function, setup) for _ in range(count)]

    def _once(self, function: Callable[[], Any], setup: Callable[[], Any]) -> float:
        setup()
        self.synchronize()
        if not self.cuda:
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def in_turn(self, sides: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
        """Seconds of sides that are compared with each other: common.in_turn, a few repeats where sizes are small."""
        return common.in_turn(sides, repeats if self.sizes.seconds else 2, self.synchronize)

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = TYPE) -> torch.Tensor:
        """Normal: a GPU multiplies zeros faster than numbers."""
        return torch.randn(*shape, device=self.device).mul_(scale).to(dtype)

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """Allocated at most beside what was allocated before; None without a GPU."""
        if not self.cuda:
            function()
            return None
        self.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - base


def host_free() -> float:
    """Bytes of host memory that are free."""
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def timed(name: str, seconds: list[float], floor: float, of: str, **details: Any) -> Row:
    """A row: milliseconds next to the floor's. `floor` in seconds, `of`: what cannot be faster."""
    measured = statistics.median(seconds)
    return {
        "name": name,
        "ms": 1e3 * measured,
        "ms_min": 1e3 * min(seconds),
        "ms_max": 1e3 * max(seconds),
        "floor_ms": 1e3 * floor,
        "floor": of,
        "times_floor": measured / floor,
        **details,
    }


def skipped(name: str, why: str) -> Row:
    """A row of what was not measured."""
    return {"name": name, "skipped": why}


def failed(name: str, error: BaseException) -> Row:
    """A row of what broke; the run ends with status 1."""
    return {"name": name, "error": one_line(error)}


def one_line(error: BaseException, length: int = 300) -> str:
    """Type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length].rstrip(": ")


def rate(work: float, seconds: list[float]) -> float:
    """Per second, by the median."""
    return work / statistics.median(seconds)
