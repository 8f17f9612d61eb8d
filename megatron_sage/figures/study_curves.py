"""Curves of a study's runs over their iterations: mean over the seeds and its 95 % t-interval, without smoothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sage.errors import UserError
from megatron_sage.study.charts import by_iteration
from megatron_sage.study.statistics import MIN_SEEDS, CurveRow, Interval, RunRow, read_curves, read_results

HEADER = ["cell", "quantity", "iteration", "mean", "low", "high", "seeds"]
BAND = f"mean over the seeds; band: its 95 % t-interval, from {MIN_SEEDS} seeds on"


@dataclass(frozen=True)
class Line:
    """How one cell is drawn."""

    cell: str
    label: str
    colour: str
    marker: str
    style: str = "-"


@dataclass(frozen=True)
class StudyCurves:
    """The finished runs in a study's directory."""

    rows: Sequence[RunRow]
    curves: Sequence[CurveRow]

    def of(self, cell: str, quantity: str) -> dict[int, Interval]:
        """Iteration: interval of a column of curves.csv over the cell's seeds; empty without a finite value."""
        found = by_iteration(self.rows, self.curves, cell, quantity)
        return {iteration: one for iteration, one in found.items() if one.n}


def load(directory: Path, cells: Sequence[str]) -> StudyCurves:
    """A study that has run at least one of the cells. Raises UserError, in one line, for any other."""
    for name in ("results.csv", "curves.csv"):
        if not (directory / name).is_file():
            raise UserError(
                f"--study {directory}: has no {name}; run a study (`megatron-sage study --out {directory}`) or name "
                "the directory of one"
            )
    rows = read_results(directory / "results.csv")
    if not {row.cell for row in rows} & set(cells):
        raise UserError(
            f"--study {directory}: has no finished run of any cell of this figure; run them with "
            f"`megatron-sage study --out {directory} --cells {','.join(cells)}`"
        )
    return StudyCurves(rows, read_curves(directory / "curves.csv"))


def numbers(study: StudyCurves, cells: Sequence[str], quantities: Sequence[str]) -> list[list[Any]]:
    """Rows as HEADER; low and high are empty where there are too few seeds for an interval."""
    found: list[list[Any]] = []
    for cell in cells:
        for quantity in quantities:
            for iteration, one in study.of(cell, quantity).items():
                ends = [one.low, one.high] if one.n >= MIN_SEEDS else ["", ""]
                found.append([cell, quantity, iteration, one.mean, *ends, one.n])
    return found


def panel(axes: Any, study: StudyCurves, title: str, lines: Sequence[Line], quantity: str) -> None:
    """Draws the lines that the study has; names the others under the title, and says where seeds differ."""
    missing = []
    drawn: set[frozenset[int]] = set()
    for line in lines:
        found = study.of(line.cell, quantity)
        if not found:
            missing.append(line.cell)
            continue
        drawn.add(frozenset(row.seed for row in study.rows if row.cell == line.cell))
        seeds = sorted({one.n for one in found.values()})
        several = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        label = f"{line.label} ({several} seed{'s' * (seeds != [1])})"
        mean = [one.mean for one in found.values()]
        axes.plot(list(found), mean, line.style, color=line.colour, marker=line.marker, label=label)
        band = [(one.low, one.high) if one.n >= MIN_SEEDS else (math.nan, math.nan) for one in found.values()]
        axes.fill_between(list(found), *zip(*band, strict=True), color=line.colour, alpha=0.12, linewidth=0)
    if missing:
        title += f"\nnot in this study: {', '.join(missing)}"
    if len(drawn) > 1:
        title += "\nthe curves have different seeds: not comparable"
    axes.set_title(title)
    axes.set_xlabel("iteration")
    if len(missing) == len(lines):  # axes from 0 to 1 would look like a scale
        axes.tick_params(labelbottom=False)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
