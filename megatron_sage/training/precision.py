"""Precision of a run: what the settings mean to Megatron, and where the delayed recipe's first scales come from.

fp32 and bf16 are `engine.DTYPES` and Megatron's optimizer (fp32 master weights with bf16). FP8 is `model.precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state

from megatron_sage.config.schema import PrecisionConfig
from megatron_sage.rollout.policy import Prompt
from megatron_sage.rollout.sampler import Flight, rollout

if TYPE_CHECKING:
    from megatron_sage.engine import Engine

HISTORY = 16  # updates whose largest magnitudes decide over a scale of the delayed recipe


def fp8_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of the model's configuration, in Megatron's words; none without FP8."""
    if precision.fp8 == "none":
        return {}
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_first_bf16": precision.fp8_first_bf16,
        "fp8_last_bf16": precision.fp8_last_bf16,
        "fp8_amax_history_len": HISTORY,
        "fp8_amax_compute_algo": "max",
    }


def calibrate(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Delayed: scales of inputs and weights from one micro-batch's rollout in bf16, once a run. All ranks call.

    The first prompt's on every replica, so that what it finds does not depend on the number of replicas.
    """
    if engine.quantisation.calibrated:
        return
    from megatron_sage.engine import iteration_steps

    config = engine.config
    table, _ = iteration_steps(config, 0)
    flights = [Flight(0, list(range(config.sampler.micro_batch)), prompts[0])]
    engine.eval()
    engine.quantisation.calibrate(
        lambda: rollout(engine.rollout_network(), table, flights, seed=config.seed, token_group=engine.token_group),
        _same_layers(),
    )


def calibrate_gradients(engine: Engine, replay: Callable[[], object]) -> None:
    """Delayed: scales of gradients from a replay in bf16 whose gradients are thrown away. All ranks call."""
    engine.quantisation.calibrate_gradients(replay, _same_layers())


def _same_layers() -> Any:
    """The ranks that hold the same layers: Megatron's group for amaxes, TP x CP x DP."""
    return parallel_state.get_amax_reduction_group(with_context_parallel=True)
