"""The training run: optimizer, one iteration of SAGE-GRPO, evaluation, state."""

import megatron_sage.parallel  # noqa: F401  (the CPU backend must be in place before a module here imports Megatron)
