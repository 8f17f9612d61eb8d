"""Models with FP8 linears that quantise nothing, or that write down what they are given; on any layout."""

from typing import Any

import torch

from megatron_sage.model import config as model_config
from megatron_sage.model.precision import Quantisation
from megatron_sage.parallel.groups import Groups, initialize
from tests.fp8_emulation import EmulatedColumn, EmulatedRow, emulated
from tests.model.parity import Case, Run, build, measure, run_samples

# 15 video tokens, 8 and 3 text tokens, hidden 48: a rank of two has 24 of its features, one of three 16
ODD = Case(grid=(1, 3, 5), heads=6, head_dim=8, qwen=(5, 3), byt5=(3, 0), image=3)


class _Exact:
    """All of an FP8 linear, padding included, but the casts."""

    def weights(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight_OI.float(), weight_OI.float()

    def _tokens(self, direction: str, place: int, x_TC: torch.Tensor, contracted: int) -> torch.Tensor:
        return x_TC.float()


class ExactColumn(_Exact, EmulatedColumn): ...


class ExactRow(_Exact, EmulatedRow): ...


SEEN: list[tuple[str, int, int]] = []  # direction, rows given to a GEMM, rows that are not zero


class _Spy:
    def rows(self, direction: str, place: int, x_TC: torch.Tensor) -> torch.Tensor:
        SEEN.append((direction, x_TC.shape[0], int(x_TC.ne(0).any(dim=1).sum())))
        return super().rows(direction, place, x_TC)  # type: ignore[misc]


class SpyColumn(_Spy, EmulatedColumn): ...


class SpyRow(_Spy, EmulatedRow): ...


def fp8(recipe: str, **options: Any) -> dict[str, Any]:
    """Options of `parity.build`."""
    return {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"} | options


def parity(case: Case, path: str, recipe: str, layout: dict[str, int], **options: Any) -> Any:
    """Errors against diffusers in fp32 with all padding and no cast."""
    with emulated(ExactColumn, ExactRow):
        return measure(initialize(**layout), case, path, **fp8(recipe, **options))


def rows_of_gemms(case: Case, recipe: str, layout: dict[str, int], **options: Any) -> list[tuple[str, int, int]]:
    """What the GEMMs of one forward and backward were given on this rank."""
    SEEN.clear()
    with emulated(SpyColumn, SpyRow):
        run_samples(build(case, initialize(**layout), **fp8(recipe, **options)), case)
    return list(SEEN)


def with_alignment(multiple: int, case: Case, groups: Groups, recipe: str) -> Run:
    """A run where tokens and features are padded to other multiples, of a model whose MLP makes 1000 of a zero."""
    before = dict(model_config.FP8_ALIGNMENT)
    model_config.FP8_ALIGNMENT[recipe] = multiple
    try:
        with emulated():
            model = build(case, groups, **fp8(recipe))
            _bias_that_tokens_take_back(model)
            if recipe == "delayed":
                calibrate(model, case, groups)
            return run_samples(model, case)
    finally:
        model_config.FP8_ALIGNMENT.update(before)


@torch.no_grad()
def _bias_that_tokens_take_back(model: Any) -> None:
    """Every token enters the MLPs as ones (scale -1, shift 1), so that the first feature of all is 1000 - 1000."""
    hidden = model.config.hidden_size
    for block in model.transformer_blocks.values():
        for norm, mlp in ((block.norm1, block.ff), (block.norm1_context, block.ff_context)):
            norm.linear.weight[3 * hidden : 5 * hidden] = 0
            norm.linear.bias[3 * hidden : 4 * hidden] = 1
            norm.linear.bias[4 * hidden : 5 * hidden] = -1
            mlp.linear_fc1.weight[0] = -1000 / hidden
            mlp.linear_fc1.bias[0] = 1000


def calibrate(model: Any, case: Case, groups: Groups) -> None:
    """Scales from a forward and backward."""
    quantisation = Quantisation([model])
    quantisation.calibrate(lambda: run_samples(model, case), groups.replica)
    quantisation.calibrate_gradients(lambda: run_samples(model, case), groups.replica)
    model.zero_grad()
