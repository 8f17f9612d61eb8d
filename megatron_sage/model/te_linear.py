"""The blocks' linears by Transformer Engine, in FP8. Not verified on GPU.

Written against megatron-core 0.16.1 and read against Transformer Engine 2.11. Imported only where both can be used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
from megatron.core.fp8_utils import get_fp8_context
from transformer_engine.pytorch import fp8_autocast
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from megatron_sage.model.precision import DELAYED, QuantisedLinear, padded

_DIRECTIONS = (("forward", "scaling_fwd"), ("backward", "scaling_bwd"))


class _TransformerEngineLinear(QuantisedLinear):
    """What column- and row-parallel linears have in common."""

    disable_parameter_transpose_cache: bool  # Megatron's word for: do not keep the quantised weight
    fp8_meta: dict[str, Any]
    fp8_meta_tensors_initialized: bool

    @contextmanager
    def gemm(self) -> Iterator[None]:
        # The outer autocast has no FP8 and a depth of 1: what leaves the inner one does then not roll the histories,
        # which Transformer Engine would do at every exit with gradients. Nor may a backward pass: the first module of
        # an autocast would, and asks this method whether it is that one.
        with fp8_autocast(enabled=False), get_fp8_context(self.config):
            FP8GlobalStateManager.is_first_fp8_module()
            yield

    @property
    def cache(self) -> bool:
        return not self.disable_parameter_transpose_cache

    @cache.setter
    def cache(self, keep: bool) -> None:
        self.disable_parameter_transpose_cache = not keep

    def scaling(self) -> dict[str, torch.Tensor]:
        if self.config.fp8_recipe != DELAYED:
            return {}
        if not self.fp8_meta_tensors_initialized:
            with self.gemm():
                self.init_fp8_metadata()  # type: ignore[attr-defined]
        return {
            f"{direction}.{part}": getattr(self.fp8_meta[key], part)
            for direction, key in _DIRECTIONS
            for part in ("scale", "amax_history")
        }

    @staticmethod
    def roll(layers: Sequence[Any]) -> None:
        for forward in (True, False):
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=forward)

    def _get_weight_and_bias_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is multiplied; autograd cuts the padding off the gradient."""
        weight, bias = super()._get_weight_and_bias_tensors()  # type: ignore[misc]
        if not self.runs_fp8 or self.calibrating:
            return weight, bias
        more_out, more_in = (padded(size, self.config.fp8_alignment) - size for size in weight.shape)
        if more_out or more_in:
            weight = F.pad(weight, (0, more_in, 0, more_out))
            bias = None if bias is None else F.pad(bias, (0, more_out))
        return weight, bias


class Fp8ColumnParallelLinear(_TransformerEngineLinear, TEColumnParallelLinear):
    """Output features divided over TP."""


class Fp8RowParallelLinear(_TransformerEngineLinear, TERowParallelLinear):
    """Input features divided over TP."""
