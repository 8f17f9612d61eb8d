"""From all ranks' phases to throughput and stragglers: plain numbers, no collectives."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_sage.monitoring.phases import PHASES, Spent
from megatron_sage.monitoring.work import COUNTED, Done

COLUMNS = 5  # of a rank's table: seconds, waiting, model FLOPs, hardware FLOPs, tokens


def table_of(spent: dict[str, Spent], done: dict[str, Done]) -> np.ndarray:
    """float64 [phases, COLUMNS] of this rank; what it did not pass is zero."""
    rows = []
    for phase in PHASES:
        work, time = done.get(phase, Done()), spent.get(phase, Spent(0.0, 0.0))
        rows.append([time.seconds, time.waiting, work.model, work.hardware, work.tokens])
    return np.array(rows, dtype=np.float64)


def performance(tables: np.ndarray, seconds: float, videos: int, peak: float | None) -> dict[str, Any]:
    """A line of performance.jsonl.

    Args:
        tables: [ranks, phases, COLUMNS].
        seconds: of the whole iteration.
        videos: made in it, on all replicas.
        peak: operations a second of one device; None: nothing about MFU and HFU is said.
    """
    ranks = len(tables)
    row: dict[str, Any] = {
        "seconds": round(seconds, 4),
        "videos_per_hour": videos * 3600 / seconds,
        "tokens_per_second": float(tables[:, :, 4].sum()) / seconds,
        "model_tflop": float(tables[:, :, 2].sum()) / 1e12,
        "hardware_tflop": float(tables[:, :, 3].sum()) / 1e12,
    }
    row |= _utilisation(tables[:, :, 2].sum(), tables[:, :, 3].sum(), seconds, ranks, peak)
    row["phases"] = {}
    for index, phase in enumerate(PHASES):
        longest = float(tables[:, index, 0].max())
        if longest == 0:
            continue
        row["phases"][phase] = {"seconds": round(longest, 4), "waiting": round(float(tables[:, index, 1].mean()), 4)}
        if phase in COUNTED:
            model, hardware, tokens = (float(value) for value in tables[:, index, 2:].sum(axis=0))
            row["phases"][phase] |= {
                "tokens_per_second": tokens / longest,
                "model_tflop": model / 1e12,
                "hardware_tflop": hardware / 1e12,
            }
            row["phases"][phase] |= _utilisation(model, hardware, longest, ranks, peak)
    return row


def _utilisation(model: float, hardware: float, seconds: float, ranks: int, peak: float | None) -> dict[str, float]:
    found = {"model_tflops_per_rank": float(model) / seconds / ranks / 1e12}
    if peak is not None:
        found |= {"mfu": float(model) / (seconds * ranks * peak), "hfu": float(hardware) / (seconds * ranks * peak)}
    return found


def stragglers(tables: np.ndarray, hosts: Sequence[str]) -> dict[str, Any]:
    """A line of stragglers.jsonl: of each phase, the rank that computed longest and by how much.

    Ranks are compared by the seconds that they did not wait in collectives: a phase's wall time is the same for all
    ranks of a group, for they wait for the slowest one.
    """
    phases: dict[str, Any] = {}
    for index, phase in enumerate(PHASES):
        busy = np.maximum(tables[:, index, 0] - tables[:, index, 1], 0.0)
        if tables[:, index, 0].max() == 0:
            continue
        rank, typical = (
            int(busy.argmax()),
            float(np.median(np.delete(busy, busy.argmax())) if len(busy) > 1 else busy[0]),
        )
        phases[phase] = {
            "slowest_rank": rank,
            "host": hosts[rank],
            "busy_seconds": round(float(busy[rank]), 4),
            "median_of_the_others": round(typical, 4),
            "excess_seconds": round(float(busy[rank]) - typical, 4),
            "seconds": [round(value, 4) for value in tables[:, index, 0].tolist()],
            "waiting": [round(value, 4) for value in tables[:, index, 1].tolist()],
        }
    return {"phases": phases, "worst": _worst(phases)}


def _worst(phases: dict[str, Any]) -> dict[str, Any] | None:
    """The phase in which the slowest rank costs most."""
    if not phases:
        return None
    name = max(phases, key=lambda phase: phases[phase]["excess_seconds"])
    found = phases[name]
    keys = ("slowest_rank", "host", "busy_seconds", "median_of_the_others", "excess_seconds")
    return {"phase": name} | {key: found[key] for key in keys}


def scalars(row: dict[str, Any], prefix: str = "performance") -> dict[str, float]:
    """The numbers of a nested row under names for a chart: performance/rollout/mfu."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if key == "phases":
            for phase, inner in value.items():
                found |= scalars(inner, f"{prefix}/{phase}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}/{key}"] = float(value)
    return found
