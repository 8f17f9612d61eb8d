"""Section `attention`: every kernel that there is, at the block's own sizes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench, Row, failed, one_line, skipped, timed
from benchmarks.gpu.models import Grid, config_of
from benchmarks.gpu.sizes import tokens
from megatron_sage.errors import UserError
from megatron_sage.planning.flops import FUSED_BACKWARD

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SCORE_BYTES = 12  # of one score where they are all kept: fp32 before and behind the softmax, and a gradient


def attention(bench: Bench) -> Iterator[Row]:
    """Forward and backward over video and text tokens; the backward's model FLOPs are twice the forward's."""
    for name, grid in bench.sizes.grids.items():
        length = tokens(grid) + bench.sizes.text
        for backend in (*BACKENDS, "what torch chooses", "Transformer Engine"):
            yield from _backend(bench, f"{name}, {backend}", backend, grid, length)


def _backend(bench: Bench, name: str, backend: str, grid: Grid, length: int) -> Iterator[Row]:
    config = config_of(bench, 1)
    heads, channels = config.num_attention_heads, config.kv_channels or 0
    need = 16.0 * length * config.hidden_size * config.params_dtype.itemsize
    if backend == "math":
        need += heads * float(length) ** 2 * SCORE_BYTES
    if why := bench.obstacle(need):
        yield skipped(name, why)
        return
    q, k, v = (bench.random(length, 1, heads, channels).requires_grad_() for _ in range(3))
    gradient = bench.random(length, 1, heads * channels)
    try:
        kernel = _kernel(bench, backend)
        out = kernel(q, k, v)
        torch.autograd.grad(out, (q, k, v), gradient)  # some kernels refuse only here
    except torch.OutOfMemoryError as error:
        yield failed(name, error)
        return
    except (RuntimeError, UserError, ModuleNotFoundError) as error:  # a kernel that does not take this machine or size
        yield skipped(name, one_line(error))
        return
    best = bench.ceilings.get("bf16")
    forward = 4.0 * length**2 * config.hidden_size
    with torch.no_grad():
        seconds = bench.seconds(lambda: kernel(q, k, v))
    yield _row(f"{name}, forward", seconds, forward, forward, best)
    out = kernel(q, k, v)
    seconds = bench.seconds(partial(torch.autograd.grad, out, (q, k, v), gradient, retain_graph=True))
    yield _row(f"{name}, backward", seconds, 2 * forward, FUSED_BACKWARD * forward, best)


def _row(name: str, seconds: list[float], model: float, hardware: float, best: float) -> Row:
    row = timed(name, seconds, model / best, "FLOPs of the model / best bf16 GEMM", flops=model)
    achieved = model / (row["ms"] / 1e3)
    return row | {"tflops": achieved / 1e12, "mfu": achieved / best, "hfu": achieved * hardware / model / best}


def _kernel(bench: Bench, backend: str) -> Kernel:
    """[S, B, N, D] three times -> [S, B, N * D], as `parallel.context.attend` has them."""
    if backend == "Transformer Engine":
        return _transformer_engine(bench)
    chosen = BACKENDS.get(backend)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
        if chosen is None:
            out = F.scaled_dot_product_attention(*heads)
        else:
            with sdpa_kernel(chosen):
                out = F.scaled_dot_product_attention(*heads)
        return out.permute(2, 0, 1, 3).flatten(2)

    return kernel


def _transformer_engine(bench: Bench) -> Any:
    from megatron_sage.model.te_attention import TransformerEngineAttention, te_core

    config = config_of(bench, 1, context_backend="te_p2p")
    te_core(config)  # UserError where a GPU or the package is missing
    return TransformerEngineAttention(config, bench.groups.collection).kernel
