"""What every benchmark shares: what machine it ran on, two sides timed in turn, results beside the code.

A time means nothing on another machine and little on this one an hour later. So everything that is compared runs in
one process, in turn within each repeat, and what is reported is the ratio: its median and its spread over the repeats.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PACKAGES = ("torch", "megatron-core", "diffusers", "transformer-engine")


def machine() -> dict[str, Any]:
    """Date, processor, threads, card and versions: what a table is worth nothing without."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {
        "date": str(date.today()),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **found,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def in_turn(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int,
    synchronize: Callable[[], None] = lambda: None,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Seconds of every side in every repeat; all sides run once before (`warm`), and then in turn.

    The order changes from repeat to repeat: what runs first finds other caches.
    """
    for side in sides.values() if warm else ():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            synchronize()
            begin = time.perf_counter()
            sides[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Of two sides' seconds, repeat by repeat: median, smallest and largest."""
    values = [a / b for a, b in zip(of, to, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write(
    name: str, content: Mapping[str, Any], markdown: str, folder: Path | None = None, command: str | None = None
) -> None:
    """`NAME.json` and `NAME.md` beside the benchmarks, or in `folder`; prints the table.

    `command`: module and options that were run; None: NAME.
    """
    folder = folder or HERE
    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    (folder / f"{name}.json").write_text(json.dumps({"machine": where, **content}, indent=1) + "\n")
    said = ", ".join(f"{key} {value}" for key, value in where.items())
    text = f"# {name}\n\n`python -m benchmarks.{command or name}`\n\n{said}\n\n{markdown}"
    (folder / f"{name}.md").write_text(text)
    print(text, flush=True)
