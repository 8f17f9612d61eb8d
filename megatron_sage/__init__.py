"""SAGE-GRPO alignment of HunyuanVideo-1.5 on Megatron-core."""

__version__ = "0.1.0"
