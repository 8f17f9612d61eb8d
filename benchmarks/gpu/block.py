"""Section `block`: double-stream blocks of the real width, against the measured ceiling and the formulas of memory."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.bench import Bench, Row, failed, one_line, skipped, timed
from benchmarks.gpu.models import Chain, Grid, chain_bytes, chain_flops, config_of, place_of, random_dit
from megatron_sage.model.elementwise import Kernels, kernels
from megatron_sage.planning.sizes import total_parameters
from megatron_sage.planning.workspace import backward_workspace

RECOMPUTE = ("none", "selective", "full")
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}


def block(bench: Bench) -> Iterator[Row]:
    """Forward, and forward with backward at each recompute; then torch.compile; then FP8."""
    for recompute in RECOMPUTE:
        for grid_name, grid in bench.sizes.grids.items():
            for blocks in bench.sizes.blocks:
                yield from _case(bench, f"{grid_name}, {blocks} block(s)", grid, blocks, recompute)
    for grid_name, grid in list(bench.sizes.grids.items())[: bench.sizes.compiled]:
        yield from _compiled(bench, grid_name, grid)
    for grid_name, grid in bench.sizes.grids.items():
        yield from _fp8(bench, grid_name, grid)


def _case(bench: Bench, name: str, grid: Grid, blocks: int, recompute: str) -> Iterator[Row]:
    training = f"{name}, forward + backward, recompute {recompute}"
    if why := bench.obstacle(need(bench, grid, blocks, recompute)):
        yield skipped(training, why)
        return
    try:
        chain = Chain(bench, random_dit(bench, blocks + 1, recompute=recompute), grid, blocks)
        if recompute == "none":
            yield forward_row(bench, f"{name}, forward", chain)
        yield training_row(bench, training, chain)
    except torch.OutOfMemoryError as error:  # the formula was too small: say so, and go on with smaller cases
        yield failed(training, error)


def need(bench: Bench, grid: Grid, blocks: int, recompute: str) -> float:
    """Bytes of a case, by formula: model and its gradients, what the forward keeps, what a backward needs beside."""
    return 2.0 * model_bytes(bench, blocks + 1) + analytic_peak(bench, grid, blocks, recompute)


def model_bytes(bench: Bench, blocks: int) -> float:
    """Of the parameters of a whole model."""
    config = config_of(bench, blocks)
    return float(total_parameters(config) * config.params_dtype.itemsize)


def analytic_peak(bench: Bench, grid: Grid, blocks: int, recompute: str) -> float:
    """Bytes beside the model and its gradients at the peak of a backward."""
    place = place_of(config_of(bench, blocks + 1, recompute=recompute), grid)
    return chain_bytes(bench, place, blocks) + backward_workspace(place, bench.sizes.text)


def forward_row(bench: Bench, name: str, chain: Chain, **details: Any) -> Row:
    """Without gradient."""
    flops = chain.flops().forward.total
    seconds = bench.seconds(chain.forward)
    return _row(bench, name, seconds, flops, flops, **details)


def training_row(bench: Bench, name: str, chain: Chain, memory: bool = True, **details: Any) -> Row:
    """MFU counts what the gradient needs; HFU also what is computed again."""
    flops = chain.flops()
    model = flops.forward.total + flops.backward.total
    seconds = bench.seconds(chain.forward_backward)
    row = _row(bench, name, seconds, model, model + flops.again.total, **details)
    if not memory:
        return row
    row |= {"kept_bytes": chain.kept_bytes(), "kept_bytes_formula": chain.kept_formula()}
    peak = bench.peak_bytes(chain.forward_backward)
    if peak is None:
        return row | {"peak_bytes": "not known without CUDA"}
    formula = analytic_peak(bench, chain.grid, chain.blocks, chain.recompute)
    return row | {"peak_bytes": peak, "peak_bytes_formula": formula, "peak_over_formula": peak / formula}


def _row(bench: Bench, name: str, seconds: list[float], model: float, hardware: float, **details: Any) -> Row:
    best = bench.ceilings.get("bf16")
    row = timed(name, seconds, model / best, "FLOPs of the model / best bf16 GEMM", flops=model, **details)
    achieved = model / (row["ms"] / 1e3)
    return row | {"tflops": achieved / 1e12, "mfu": achieved / best, "hfu": achieved * hardware / model / best}


def _compiled(bench: Bench, grid_name: str, grid: Grid) -> Iterator[Row]:
    """One block as it is, in turn with its elementwise functions compiled, and with the block compiled as a whole."""
    name = f"{grid_name}, 1 block(s), torch.compile"
    if why := bench.obstacle(need(bench, grid, 1, "none")):
        yield skipped(name, why)
        return
    chain = Chain(bench, random_dit(bench, 2), grid, 1)
    flops = chain.flops()
    model = {"forward": flops.forward.total, "forward + backward": flops.forward.total + flops.backward.total}
    for which, prepare in (("of the elementwise functions", _elementwise), ("of the block", _whole)):
        if prepare is _whole and not bench.sizes.compile_block:
            yield skipped(f"{name} {which}", "at small sizes: tracing takes 20 s")
            continue
        torch._dynamo.reset()
        active, said = prepare(bench, chain)
        for what, function in (("forward", chain.forward), ("forward + backward", chain.forward_backward)):
            case = f"{name} {which}, {what}"
            if bench.late():
                yield skipped(case, "the time given by --minutes is over")
                continue
            torch._dynamo.utils.counters.clear()
            try:
                seconds = bench.in_turn({"plain": function, "compiled": partial(_within, active, function)})
            except Exception as error:  # whatever the compiler says is the result of this row
                yield skipped(case, f"torch.compile failed: {one_line(error)}") | _breaks()
                continue
            row = _row(bench, case, seconds["compiled"], model[what], model[what], **said, **_breaks())
            yield row | {"over_plain": common.ratio(seconds["compiled"], seconds["plain"])["median"]}
    torch._dynamo.reset()


def _breaks() -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for reason, count in torch._dynamo.utils.counters["graph_break"].items():
        reasons[" ".join(str(reason).split())[:160]] += count
    return {"graph_breaks": sum(reasons.values()), "graph_break_reasons": [text for text, _ in reasons.most_common(3)]}


Active = Callable[[], AbstractContextManager[None]]  # inside, the compiled functions are in use


def _within(active: Active, function: Callable[[], None]) -> None:
    with active():
        function()


def _compiler(bench: Bench) -> Callable[..., Any]:
    """torch.compile; without a GPU only its tracing: generated CPU code takes a minute to build and says nothing."""
    return partial(torch.compile, backend="inductor" if bench.cuda else "eager", dynamic=False)


def _elementwise(bench: Bench, chain: Chain) -> tuple[Active, dict[str, Any]]:
    """What model/elementwise.py offers; without a GPU only traced, as `_compiler` does."""
    plain = kernels()
    compiled = kernels(compiled=True) if bench.cuda else Kernels(*map(_compiler(bench), plain))
    owners = [m for module in chain.modules for m in module.modules() if isinstance(getattr(m, "ops", None), Kernels)]

    @contextmanager
    def active() -> Iterator[None]:
        for owner in owners:
            owner.ops = compiled
        try:
            yield
        finally:
            for owner in owners:
                owner.ops = plain

    return active, {"compiled": list(Kernels._fields), "modules": len(owners)}


def _whole(bench: Bench, chain: Chain) -> tuple[Active, dict[str, Any]]:
    compiled = [_compiler(bench)(module) for module in chain.modules]

    @contextmanager
    def active() -> Iterator[None]:
        chain.compiled = compiled
        try:
            yield
        finally:
            chain.compiled = None

    return active, {"compiled": ["DoubleStreamBlock"]}


def _fp8(bench: Bench, grid_name: str, grid: Grid) -> Iterator[Row]:
    """By Transformer Engine where it is; and always the bound that the measured ceilings give."""
    yield fp8_bound(bench, grid_name, grid)
    name = f"{grid_name}, 1 block(s), FP8 by Transformer Engine"
    if why := fp8_obstacle(bench) or bench.obstacle(need(bench, grid, 1, "none")):
        yield skipped(name, why)
        return
    chain = Chain(bench, random_dit(bench, 2, **FP8), grid, 1)
    yield forward_row(bench, f"{name}, forward", chain)
    yield training_row(bench, f"{name}, forward + backward", chain, memory=False)


def fp8_obstacle(bench: Bench) -> str | None:
    """Why Transformer Engine's FP8 cannot run here, or None."""
    if not bench.cuda:
        return "no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "the package transformer-engine is not installed"
    from megatron_sage.config.state_rules import fp8_obstacle

    return fp8_obstacle(FP8["fp8_recipe"])


def fp8_bound(bench: Bench, grid_name: str, grid: Grid) -> Row:
    """Not measured: a forward whose token GEMMs run at the FP8 ceiling, attention and the rest at bf16's."""
    name = f"{grid_name}, 1 block(s), FP8 bound, forward"
    if bench.ceilings.fp8 is None:
        return skipped(name, "no FP8 ceiling: torch._scaled_mm does not run here")
    flops = chain_flops(bench, grid, 1).forward
    fp8, bf16 = bench.ceilings.fp8, bench.ceilings.get("bf16")
    bound = flops.blocks / fp8 + (flops.attention + flops.rest) / bf16
    return {
        "name": name,
        "floor_ms": 1e3 * bound,
        "floor": "a bound from the section `ceiling`, nothing measured: token GEMMs at FP8's, all else at bf16's",
        "flops": flops.total,
        "over_bf16_floor": bound / (flops.total / bf16),
    }
