"""Files of one line an iteration (metrics.jsonl, references.jsonl); a picture of the machine and versions of a run."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_sage.errors import UserError

PACKAGES = ("megatron-core", "torch", "diffusers", "transformers", "safetensors", "numpy")


class MetricsLog:
    """One JSON object an iteration; written by rank 0 alone."""

    def __init__(self, file: Path, active: bool, keep_below: int = 0) -> None:
        """`keep_below`: lines of iterations before this one stay (a resumed run), later ones go."""
        self._file = file if active else None
        if self._file is None:
            return
        lines = self._file.read_text().split("\n")[:-1] if self._file.exists() else []
        # by a name of its own first: a run that is killed now must not lose its history. What follows the last end of
        # line was torn by a kill, and is of an iteration that is done again.
        kept = [line for line in lines if json.loads(line)["iteration"] < keep_below]
        fresh = self._file.with_suffix(".tmp")
        fresh.write_text("".join(line + "\n" for line in kept))
        fresh.replace(self._file)

    def write(self, row: dict[str, Any]) -> None:
        """Append one iteration."""
        if self._file is not None:
            try:
                with self._file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
            except OSError as error:
                raise UserError(
                    f"{self._file}: cannot be written: {error.strerror}; the newest checkpoint stays"
                ) from error


def environment(world_size: int) -> dict[str, Any]:
    """Machine and versions."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "processes": world_size,
        "threads_per_process": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }
