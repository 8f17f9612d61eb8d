"""Checkpoints: Megatron distributed checkpoints, and Hugging Face and official files in and out."""

from megatron_sage import parallel  # noqa: F401  (prepares the CPU backend before megatron is imported)
