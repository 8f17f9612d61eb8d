"""The HunyuanVideo-1.5 diffusion transformer as Megatron modules."""

import megatron_sage.parallel  # noqa: F401  (the CPU backend must be in place before Megatron is imported)
from megatron_sage.model.conditions import TextCondition
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.transformer import HunyuanVideoDiT

__all__ = ["HunyuanVideoConfig", "HunyuanVideoDiT", "TextCondition"]
