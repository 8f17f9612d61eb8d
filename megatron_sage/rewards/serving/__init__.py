"""A reward in processes of its own, behind HTTP: `megatron-sage serve-rewards`."""
