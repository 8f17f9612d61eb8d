"""FP8 linears on any machine, for tests: numbers are cast to float8 by the recipe's scales, products are fp32.

They obey the hooks that Transformer Engine's obey (`model.precision.QuantisedLinear`), refuse the shapes that its
kernels refuse, and show the size of what FP8 does. Not the bits: Transformer Engine's kernels add in another order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_sage.model.precision import FP8_MAX, QuantisedLinear, amax, gradient_format, padded

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TILES = {"blockwise": 128, "mxfp8": 32}


def cast(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """To float8 and back, fp32; what is too large saturates."""
    limit = FP8_MAX[kind]
    return (x.float() * scale).clamp(-limit, limit).to(FORMATS[kind]).float() / scale


def by_tensor(x: torch.Tensor, kind: str) -> torch.Tensor:
    """One scale: what is largest becomes the largest number of the format."""
    return cast(x, FP8_MAX[kind] / amax(x).clamp_min(1e-30), kind)


def by_tile(x_RC: torch.Tensor, rows: int, columns: int, kind: str) -> torch.Tensor:
    """A power of two as the scale of each tile of rows x columns."""
    R, C = x_RC.shape
    x = F.pad(x_RC.float(), (0, -C % columns, 0, -R % rows))
    tiles = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [R / rows, rows, C / columns, columns]
    largest = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-30)
    scale = torch.exp2(torch.floor(torch.log2(FP8_MAX[kind] / largest)))
    return cast(tiles, scale, kind).flatten(2, 3).flatten(0, 1)[:R, :C]


def quantise(x_RC: torch.Tensor, recipe: str, contracted: int, kind: str, weight: bool = False) -> torch.Tensor:
    """For a product that sums over dimension `contracted`; recipes without history."""
    if recipe == "tensorwise":
        return by_tensor(x_RC, kind)
    tile = TILES[recipe]
    if recipe == "blockwise" and weight:
        return by_tile(x_RC, tile, tile, kind)
    return by_tile(x_RC, *((1, tile) if contracted == 1 else (tile, 1)), kind)


class _Gemm(torch.autograd.Function):
    """y = x w^T with all three products in FP8."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, layer: "_Emulated") -> torch.Tensor:
        forward, ctx.backward_weight = layer.weights(weight_OI)
        ctx.layer, ctx.dtypes = layer, (x_TI.dtype, weight_OI.dtype)
        ctx.save_for_backward(layer.columns("forward", 0, x_TI))
        return (layer.rows("forward", 0, x_TI) @ forward.t()).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        layer, (x_TI,) = ctx.layer, ctx.saved_tensors
        grad_x = layer.rows("backward", 0, grads[0]) @ ctx.backward_weight
        grad_weight = layer.columns("backward", 0, grads[0]).t() @ x_TI
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None


class _Emulated(QuantisedLinear):
    """What column- and row-parallel linears have in common."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep, self.kept = True, None
        self.casts = 0  # of the weight
        self.recipe = str(self.config.fp8_recipe)
        self.kinds = {"forward": "e4m3", "backward": gradient_format(self.config)}
        length = self.config.fp8_amax_history_len
        self.delayed = {
            f"{direction}.{part}": torch.ones(size) if part == "scale" else torch.zeros(length, size)
            for direction, size in (("forward", 3), ("backward", 2))
            for part in ("scale", "amax_history")
        }

    @property
    def cache(self) -> bool:
        return self.keep

    @cache.setter
    def cache(self, keep: bool) -> None:
        self.keep = keep

    def scaling(self) -> dict[str, torch.Tensor]:
        return self.delayed if self.recipe == "delayed" else {}

    @contextmanager
    def gemm(self) -> Iterator[None]:
        plain, self._forward_impl = self._forward_impl, self._fp8
        try:
            yield
        finally:
            self._forward_impl = plain
        self.is_first_microbatch = False  # whatever the cache does: so does Megatron

    def _fp8(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> torch.Tensor:
        multiple = self.config.fp8_alignment
        self.check(input, multiple)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        out_features = weight.shape[0]
        more = [padded(size, multiple) - size for size in weight.shape]
        weight = F.pad(weight, (0, more[1], 0, more[0]))
        out = _Gemm.apply(input.flatten(0, 1), weight, self).unflatten(0, input.shape[:2])[..., :out_features]
        # contiguous: Megatron's all-reduce of anything else sums a copy and hands on what it was given
        return out.contiguous() if bias is None else out + bias

    @staticmethod
    def check(x: torch.Tensor, multiple: int) -> None:
        """Transformer Engine's kernels would refuse."""
        assert x.shape[:-1].numel() % multiple == 0 and x.shape[-1] % multiple == 0, f"{tuple(x.shape)}: {multiple}"

    def weights(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The quantised weight, for the product with inputs and for the one with gradients."""
        if self.keep and self.kept is not None and not self.is_first_microbatch:
            return self.kept
        self.casts += 1
        if self.recipe == "delayed":
            both = (self._by_history("forward", 1, weight_OI),) * 2
        else:
            both = tuple(quantise(weight_OI, self.recipe, axis, "e4m3", weight=True) for axis in (1, 0))
        if self.keep:
            self.kept = both
        return both

    def rows(self, direction: str, place: int, x_TC: torch.Tensor) -> torch.Tensor:
        """For a product over the features."""
        return self._tokens(direction, place, x_TC, 1)

    def columns(self, direction: str, place: int, x_TC: torch.Tensor) -> torch.Tensor:
        """For a product over the tokens."""
        return self._tokens(direction, place, x_TC, 0)

    def _tokens(self, direction: str, place: int, x_TC: torch.Tensor, contracted: int) -> torch.Tensor:
        if self.recipe == "delayed":
            return self._by_history(direction, place, x_TC)
        return quantise(x_TC, self.recipe, contracted, self.kinds[direction])

    def _by_history(self, direction: str, place: int, x: torch.Tensor) -> torch.Tensor:
        newest = self.delayed[f"{direction}.amax_history"][0]
        newest[place] = torch.maximum(newest[place], amax(x.detach()))
        return cast(x, self.delayed[f"{direction}.scale"][place].clone(), self.kinds[direction])

    @staticmethod
    def roll(layers: Sequence["_Emulated"]) -> None:
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        for direction in ("forward", "backward"):
            newest = torch.stack([layer.delayed[f"{direction}.amax_history"][0] for layer in layers])
            dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=group)
            for layer, row in zip(layers, newest, strict=True):
                scale, history = (layer.delayed[f"{direction}.{part}"] for part in ("scale", "amax_history"))
                history[0] = row
                largest = history.amax(dim=0)
                scale.copy_(torch.where(largest > 0, FP8_MAX[layer.kinds[direction]] / largest, scale))
                history.copy_(history.roll(-1, 0))
                history[0] = 0


class EmulatedColumn(_Emulated, ColumnParallelLinear):
    """Output features divided over TP."""


class EmulatedRow(_Emulated, RowParallelLinear):
    """Input features divided over TP."""


@contextmanager
def emulated(column: type = EmulatedColumn, row: type = EmulatedRow) -> Iterator[None]:
    """Inside, `precision.fp8` means these linears, and is not refused for want of a GPU."""
    from megatron_sage.config import state_rules
    from megatron_sage.model import specs

    before = specs.fp8_linears, state_rules.fp8_obstacle
    specs.fp8_linears, state_rules.fp8_obstacle = lambda: (column, row), lambda recipe: None
    try:
        yield
    finally:
        specs.fp8_linears, state_rules.fp8_obstacle = before
