"""Rollouts: the denoising loop of the policy and what it leaves behind for training."""
