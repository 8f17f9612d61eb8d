"""Checkpoints compared on held-out prompts: videos from the same noise, scores, tables, a gallery, blind ratings."""
