"""Rewards that take long or never come back."""

import os
import time
from pathlib import Path

import numpy as np

from tests.training.world import BrightnessReward


def run_directory() -> Path:
    """Of the only run that has a status."""
    import gc

    from megatron_sage.training.status import Status

    return next(item.path.parent for item in gc.get_objects() if type(item) is Status)


class SlowReward(BrightnessReward):
    """Says that it has begun, and takes five seconds."""

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        (run_directory() / f"in_reward_{os.getpid()}").touch()
        for _ in range(50):
            time.sleep(0.1)  # a signal interrupts one of them
        return super().__call__(videos, prompts, fps)


class HangingReward(BrightnessReward):
    """Never comes back on rank 1; in a test's worker it gives up once it has been reported."""

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        import torch.distributed as dist

        while dist.get_rank() == 1:
            time.sleep(0.1)
            if os.environ.get("ENDS_WHEN_REPORTED") and (run_directory() / "stalls" / "rank_1.txt").exists():
                raise RuntimeError("reported")
        return super().__call__(videos, prompts, fps)
