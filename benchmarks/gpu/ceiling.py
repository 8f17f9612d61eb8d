"""Section `ceiling`: what this card does at best in this run. All other floors are made of these numbers."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench, Row, rate, skipped, timed
from benchmarks.gpu.sizes import tokens

FP8_TILE = 16  # edges of an FP8 GEMM are multiples of it
FP8 = torch.float8_e4m3fn


def ceiling(bench: Bench) -> Iterator[Row]:
    """GEMMs of the block's own shapes and a square one in bf16 and FP8; copies in the device and to the host."""
    yield from _gemms(bench)
    yield from _fp8_gemms(bench)
    yield from _copies(bench)


def shapes(bench: Bench) -> dict[str, tuple[int, int, int]]:
    """Rows, columns in, columns out: the linears of a block over the video's tokens, and a square one."""
    from benchmarks.gpu.models import config_of

    config = config_of(bench, 1)
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    found = {}
    for name, grid in bench.sizes.grids.items():
        rows = tokens(grid)
        found |= {
            f"qkv {name}": (rows, hidden, 3 * hidden),
            f"proj {name}": (rows, hidden, hidden),
            f"fc1 {name}": (rows, hidden, inner),
            f"fc2 {name}": (rows, inner, hidden),
        }
    return found | {"square": (bench.sizes.square,) * 3}


def _gemms(bench: Bench) -> Iterator[Row]:
    found: dict[str, tuple[list[float], float, tuple[int, int, int]]] = {}
    for name, (rows, into, out) in shapes(bench).items():
        x, weight = bench.random(rows, into), bench.random(out, into, scale=into**-0.5)
        flops = 2.0 * rows * into * out
        found[name] = bench.seconds(lambda x=x, w=weight: F.linear(x, w)), flops, (rows, into, out)
    bench.ceilings.bf16 = best = max(rate(flops, seconds) for seconds, flops, _ in found.values())
    for name, (seconds, flops, shape) in found.items():
        yield _gemm_row("bf16", name, seconds, flops, best, shape)


def _fp8_gemms(bench: Bench) -> Iterator[Row]:
    """torch._scaled_mm with one scale a tensor, fast accumulation; casting to FP8 is not in the time."""
    found: dict[str, tuple[list[float], float, tuple[int, int, int]]] = {}
    one = torch.ones((), device=bench.device)
    for name, (rows, into, out) in shapes(bench).items():
        padded = -(-rows // FP8_TILE) * FP8_TILE  # as the model pads its tokens
        x, weight = bench.random(padded, into).to(FP8), bench.random(out, into).to(FP8)

        def multiply(x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
            return torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=bench.cuda)

        try:
            multiply()
        except (RuntimeError, NotImplementedError, ValueError) as error:  # a card or a build without FP8
            yield skipped("FP8 GEMMs", f"torch._scaled_mm: {' '.join(str(error).split())[:200]}")
            return
        found[name] = bench.seconds(multiply), 2.0 * padded * into * out, (padded, into, out)
    bench.ceilings.fp8 = best = max(rate(flops, seconds) for seconds, flops, _ in found.values())
    for name, (seconds, flops, shape) in found.items():
        yield _gemm_row("FP8", name, seconds, flops, best, shape)


def _gemm_row(
    kind: str, name: str, seconds: list[float], flops: float, best: float, shape: tuple[int, int, int]
) -> Row:
    of = f"the best {kind} GEMM of this section"
    return timed(
        f"{kind} {name}", seconds, flops / best, of, flops=flops, tflops=rate(flops, seconds) / 1e12, shape=list(shape)
    )


def _copies(bench: Bench) -> Iterator[Row]:
    """Their floor is themselves: they are what others are held against."""
    here = torch.ones(bench.sizes.copy_bytes, dtype=torch.uint8, device=bench.device)
    seconds = bench.seconds(partial(torch.empty_like(here).copy_, here))
    moved = 2.0 * bench.sizes.copy_bytes  # read and written
    bench.ceilings.memory = rate(moved, seconds)
    yield _copy_row("device memory", seconds, moved, "bytes read and written")
    size = bench.sizes.host_bytes
    host = torch.ones(size, dtype=torch.uint8, pin_memory=bench.cuda)
    kind = "pinned" if bench.cuda else "plain copies in host memory: nothing is pinned without CUDA"
    seconds = bench.seconds(lambda: here[:size].copy_(host, non_blocking=True))
    bench.ceilings.to_device = rate(size, seconds)
    yield _copy_row("host to device", seconds, size, kind)
    seconds = bench.seconds(lambda: host.copy_(here[:size], non_blocking=True))
    bench.ceilings.to_host = rate(size, seconds)
    yield _copy_row("device to host", seconds, size, kind)


def _copy_row(name: str, seconds: list[float], size: float, what: str) -> Row:
    speed = rate(size, seconds)
    return timed(name, seconds, size / speed, "itself", bytes=size, gb_per_second=speed / 1e9, what=what)
