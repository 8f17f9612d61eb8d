"""metrics.jsonl, and a picture of the machine and versions of a run."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("megatron-core", "torch", "diffusers", "transformers", "safetensors", "numpy")


class MetricsLog:
    """One JSON object an iteration; written by rank 0 alone."""

    def __init__(self, directory: Path, active: bool, keep_below: int = 0) -> None:
        """`keep_below`: lines of iterations before this one stay (a resumed run), later ones go."""
        self._file = directory / "metrics.jsonl" if active else None
        if self._file is None:
            return
        kept = self._file.read_text().splitlines() if self._file.exists() else []
        kept = [line for line in kept if line and json.loads(line)["iteration"] < keep_below]
        self._file.write_text("".join(line + "\n" for line in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append one iteration."""
        if self._file is not None:
            with self._file.open("a") as out:
                out.write(json.dumps(row) + "\n")


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
