"""A reward that waits until a test lets it go on."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sage.rewards.shapes import ShapesReward


class GatedReward(ShapesReward):
    """The file `gate` holds the number of calls that pass in one process; without the file, none does.

    `gate`.waiting is there once a call waits.
    """

    def __init__(self, gate: str) -> None:
        self.gate, self.calls = Path(gate), 0

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        while not self.gate.exists() or self.calls >= int(self.gate.read_text()):
            self.gate.with_suffix(".waiting").touch()
            time.sleep(0.1)
        self.calls += 1
        return super().__call__(videos, prompts, fps)
