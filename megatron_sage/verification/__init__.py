"""Ours against diffusers: inputs, the run of ours, the reference and the comparison."""

from megatron_sage import parallel  # noqa: F401  (prepares the CPU backend before megatron is imported)
