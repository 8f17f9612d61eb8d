"""heartbeat.json: rank 0's sign of life, for who looks from outside (`megatron-sage status`)."""

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `status` reads the file without the seconds that importing torch takes
    from megatron_sage.parallel.control import Control

FILE = "heartbeat.json"
INTERVAL = 5.0  # seconds between two writes: a run's directory may be on a shared file system


class Heartbeat:
    """Written by the watchdog's thread: it goes on while the main thread computes or waits."""

    def __init__(self, directory: Path) -> None:
        self.path, self._total, self._moved, self._written = directory / FILE, -1, 0.0, 0.0

    def beat(self, control: "Control") -> None:
        """Write the place where the main thread is and since when. A full disk is not this thread's to report."""
        now = time.time()
        if control.total != self._total:
            self._total, self._moved = control.total, now
        if now - self._written < INTERVAL:
            return
        self._written = now
        content = {
            "time": now,
            "moved": self._moved,  # when the last phase or micro-step began
            "phase": control.phase,
            "iteration": control.iteration,
            "step": control.step,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        partial = self.path.with_name(f".{FILE}.tmp")
        try:
            partial.write_text(json.dumps(content) + "\n")
            os.replace(partial, self.path)
        except OSError:
            return  # the run itself says it, at its next line of metrics
