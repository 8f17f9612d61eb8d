"""`megatron-sage study`: a grid of small RL runs over shared seeds, and what it says about the paper's claims."""
