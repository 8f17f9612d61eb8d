"""The training run: engine, optimizer, one iteration of SAGE-GRPO, evaluation, state."""
