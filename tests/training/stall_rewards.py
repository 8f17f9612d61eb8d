"""Rewards that take long or never come back. TEST_RUN is the directory of the run."""

import os
import time
from pathlib import Path

import numpy as np

from tests.training.world import BrightnessReward


class SlowReward(BrightnessReward):
    """Says that it has begun, and takes five seconds."""

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        Path(os.environ["TEST_RUN"], f"in_reward_{os.getpid()}").touch()
        for _ in range(50):
            time.sleep(0.1)  # a signal interrupts one of them
        return super().__call__(videos, prompts, fps)


class HangingReward(BrightnessReward):
    """Never comes back on rank 1; in a test's worker it does, once it has been reported."""

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        import torch.distributed as dist

        while dist.get_rank() == 1:
            time.sleep(0.1)
            if "TEST_RUN" in os.environ and Path(os.environ["TEST_RUN"], "stalls", "rank_1.txt").exists():
                break
        return super().__call__(videos, prompts, fps)
