"""Rows as markdown."""

from collections.abc import Mapping
from typing import Any

from benchmarks import common

TIMES = {"name", "ms", "ms_min", "ms_max", "floor_ms", "floor", "times_floor"}
EXACT = {"flops", "shape", "parameters", "matrices"}  # for the JSON


def markdown(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for each section."""
    text = ""
    for name, section in sections.items():
        text += f"## {name}\n\n"
        if "error" in section:
            text += f"**failed**: {section['error']}\n\n"
        if "skipped" in section:
            text += f"skipped: {section['skipped']}\n\n"
        if section["rows"]:
            header = ("what", "ms (min to max)", "floor, ms", "times the floor", "floor", "further")
            text += common.table(header, [_cells(row) for row in section["rows"]]) + "\n"
    return text


def _cells(row: Mapping[str, Any]) -> list[str]:
    for key in ("skipped", "error"):
        if key in row:
            return [row["name"], f"{key}: {row[key]}".replace("|", "/"), "", "", "", ""]
    measured = f"{row['ms']:.4g} ({row['ms_min']:.4g} to {row['ms_max']:.4g})" if "ms" in row else ""
    floor = f"{row['floor_ms']:.4g}" if "floor_ms" in row else ""
    times = f"{row['times_floor']:.2f}" if "times_floor" in row else ""
    further = ", ".join(f"{key} {_said(value)}" for key, value in row.items() if key not in TIMES | EXACT)
    return [row["name"], measured, floor, times, str(row.get("floor", "")), further.replace("|", "/")]


def _said(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value / 1e9:.3g}e9" if abs(value) >= 1e7 else f"{value:.4g}"
