"""status.json in a run's directory: what a launcher reads, for torchrun does not pass exit statuses on."""

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "status.json"
RUNNING, DONE, LEFT, FAILED = "running", "finished", "stopped", "failed"


class Status:
    """The file, as this rank writes it."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.path, self.rank = directory / FILE, rank

    def write(self, state: str, **fields: Any) -> None:
        """Replace the file in one step: a reader sees the old or the new one. Rank 0, or the rank that fails."""
        content = {"state": state, "signal": None, "iteration": None, "reason": None, "exit_code": None}
        content |= fields | {"rank": self.rank, "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        partial = self.path.with_name(f".{FILE}.{self.rank}")
        partial.write_text(json.dumps(content) + "\n")
        os.replace(partial, self.path)

    def fail(self, **fields: Any) -> None:
        """`failed`, unless another rank has said so before: what follows a failure is not its reason."""
        if read_status(self.path.parent).get("state") != FAILED:
            self.write(FAILED, **fields)


def read_status(directory: Path) -> dict[str, Any]:
    """The content; empty where there is none."""
    path = directory / FILE
    return json.loads(path.read_text()) if path.exists() else {}
