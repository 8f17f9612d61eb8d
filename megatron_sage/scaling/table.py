"""Rows of a scaling study, their efficiencies, and scaling.csv."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sage.scaling.cells import WEAK, Cell

MEASURED, PREDICTED, SKIPPED, FAILED = "measured", "predicted", "skipped", "failed"
PHASES = ("rollout", "decode", "reward", "reference", "train", "optimizer")


@dataclass
class Row:
    """What is known of a cell. `numbers`: measured, or predicted where that is all there is."""

    cell: Cell
    status: str
    prompts: int = 0
    videos: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    efficiency: float | None = None


def add_efficiency(rows: Sequence[Row]) -> None:
    """Videos an hour and device over those of the fastest cell with the fewest devices, among rows of one status and
    mode; strong cells of one replica are weak ones as well.
    """
    for status in (MEASURED, PREDICTED):
        for mode in ("strong", WEAK):
            mine = [row for row in rows if row.status == status and row.numbers and _in(row, mode)]
            if not mine:
                continue
            fewest = min(row.cell.gpus for row in mine)
            base = max(_rate(row) for row in mine if row.cell.gpus == fewest)
            for row in mine:
                if row.cell.mode == mode:
                    row.efficiency = _rate(row) / base


def _in(row: Row, mode: str) -> bool:
    return row.cell.mode == mode or (mode == WEAK and row.cell.data == 1)


def _rate(row: Row) -> float:
    return float(row.numbers["videos_per_hour"]) / row.cell.gpus


def flat(row: Row) -> dict[str, Any]:
    """Of scaling.csv; empty where nothing is known."""
    numbers, layout = row.numbers, row.cell.layout
    found: dict[str, Any] = {
        "mode": row.cell.mode,
        "gpus": row.cell.gpus,
        "tensor": layout.tensor,
        "context": layout.context,
        "pipeline": layout.pipeline,
        "data": row.cell.data or "",
        "status": row.status,
        "device": numbers.get("device", ""),
        "prompts": row.prompts or "",
        "videos": row.videos or "",
        "seconds": _digits(numbers.get("seconds")),
    }
    found |= {f"{name}_seconds": _digits(numbers.get("phases", {}).get(name)) for name in PHASES}
    for key in ("tokens_per_second", "videos_per_hour", "model_tflops_per_rank", "mfu", "hfu"):
        found[key] = _digits(numbers.get(key))
    found["memory_gb"] = _digits(numbers["memory_bytes"] / 1e9) if "memory_bytes" in numbers else ""
    found["efficiency"] = _digits(row.efficiency)
    found["predicted_seconds"] = _digits(row.predicted.get("seconds"))
    found["predicted_memory_gb"] = _digits(row.predicted["memory_bytes"] / 1e9) if row.predicted else ""
    return found | {"reason": row.reason}


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def as_csv(rows: Sequence[Row]) -> str:
    """The whole file."""
    out = io.StringIO()
    lines = [flat(row) for row in rows]
    if lines:
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return out.getvalue()
