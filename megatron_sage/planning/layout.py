"""The model's configuration at a run's layout, without the engine (whose import costs what a plan must not)."""

from typing import Any

import torch

from megatron_sage.config.schema import Config
from megatron_sage.model.config import HunyuanVideoConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_config(config: Config, transformer: dict[str, Any]) -> HunyuanVideoConfig:
    """What `engine.model_config` makes; a test compares them."""
    layout, precision = config.parallel, config.precision
    eight = {} if precision.fp8 == "none" else {"fp8": precision.fp8, "fp8_recipe": precision.fp8_recipe}
    return HunyuanVideoConfig.from_diffusers(
        transformer,
        tensor=layout.tensor,
        sequence_parallel=layout.sequence,
        context=layout.context,
        context_backend=layout.context_backend,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        pipeline_layout=layout.pipeline_layout,
        dtype=DTYPES[precision.dtype],
        recompute=precision.recompute,
        **eight,
    )
