"""A made-up study: planted effects per cell, an effect per seed that all cells share, and noise per run."""

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_sage.study.claims import NAMES
from megatron_sage.study.statistics import CurveRow, RunRow

SAMPLERS = {name: name if name == "cps" else f"{name}_grpo" for name in NAMES}


def cell_of(name: str) -> dict[str, Any]:
    """The configuration that a cell's name says."""
    setting, sampler, kl = name.split("_")[:3]
    schedule = name.rpartition("_lambda_")[2] if "_lambda_" in name else "two_stage"
    return {
        "cell": name,
        "sampler": SAMPLERS[sampler],
        "kl": kl,
        "setting": setting.upper(),
        "equalizer": "no_equalizer" not in name,
        "schedule": schedule,
    }


def run(cell: str, seed: int, gain: float = 0.1, **changed: Any) -> RunRow:
    """One finished run whose VQ, MQ and TA rise by `gain` each; the reward is their mean (A) or B's weighted sum."""
    values: dict[str, Any] = {field.name: 0.5 for field in fields(RunRow)}
    values |= {**cell_of(cell), "seed": seed, "iterations": 12, "videos": 384, "seconds": 90.0}
    weight = 1.0 if cell.startswith("a") else 2.0
    for measure, factor in (("VQ", 1.0), ("MQ", 1.0), ("TA", 1.0), ("overall", 3.0), ("reward", weight)):
        values[f"base_{measure}"] = 0.5 * factor
        values[f"final_{measure}"] = (0.5 + gain) * factor
    values["change"] = gain * weight
    return RunRow(**{**values, **changed})


def study(gains: Mapping[str, float], seeds: Sequence[int] = range(5), noise: float = 0.01) -> list[RunRow]:
    """A run for each cell and seed: gain + seed effect (std 0.2, shared by all cells) + noise of the run."""
    draw = random.Random(f"{[*seeds]}")  # another list of seeds is another study
    shared = {seed: draw.gauss(0, 0.2) for seed in seeds}
    return [
        run(cell, seed, gain + shared[seed] + draw.gauss(0, noise)) for cell, gain in gains.items() for seed in seeds
    ]


def curves(rows: Sequence[RunRow], iterations: int = 12) -> list[CurveRow]:
    """Curves that rise to each run's change."""
    found = []
    for row in rows:
        for iteration in range(iterations):
            values: dict[str, Any] = {field.name: 0.01 * (iteration + 1) for field in fields(CurveRow)}
            reward = 0.5 + row.change * iteration / iterations
            values |= {"cell": row.cell, "seed": row.seed, "iteration": iteration, "reward_mean": reward}
            found.append(CurveRow(**values))
    return found


def write(path: Path, rows: Sequence[RunRow] | Sequence[CurveRow]) -> Path:
    """The rows as the study's runner writes them."""
    names = [field.name for field in fields(rows[0])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([name.rstrip("_") for name in names])
        writer.writerows([getattr(row, name) for name in names] for row in rows)
    return path
