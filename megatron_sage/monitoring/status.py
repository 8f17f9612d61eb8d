"""`megatron-sage status RUN_DIR`: how a run is, in one line, from its files alone; the run is not disturbed."""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_sage.errors import UserError
from megatron_sage.monitoring.heartbeat import FILE as HEARTBEAT

# What training.status writes; importing it would cost the seconds that importing torch takes.
STATUS, RUNNING, FAILED = "status.json", "running", "failed"
GONE_SECONDS = 60.0  # without a heartbeat, of which there is one every five seconds
RECENT = 10  # iterations whose median is the time of one
CHECKPOINT = "iteration_"


def main(argv: list[str]) -> int:
    """Prints the line (or --json); 0 where nothing is wrong, 1 where the run has failed, stalls or is gone."""
    parser = argparse.ArgumentParser(
        prog="megatron-sage status",
        description="How a run is, in one line. Exit status 1: it failed, stalls, or its process is gone.",
    )
    parser.add_argument("run_dir", help="output directory of a training run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead")
    parser.add_argument(
        "--stalled-after",
        type=float,
        metavar="SECONDS",
        help="without a micro-step; a tenth of training.stall_seconds, at least 60",
    )
    options = parser.parse_args(argv)
    found = examine(Path(options.run_dir), time.time(), options.stalled_after)
    print(json.dumps(found) if options.json else line(found))
    return 1 if found["state"] in (FAILED, "stalled", "gone") else 0


def examine(directory: Path, now: float, stalled_after: float | None = None) -> dict[str, Any]:
    """What is known of a run at `now` (seconds since 1970). Raises UserError where there is no run."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory}: holds no run (no config.yaml); give the output_dir of a training run")
    settings = _read(directory / "config.yaml", yaml.safe_load) or {}
    training = settings.get("training") or {}
    rows = _rows(directory / "metrics.jsonl")
    status = _read(directory / STATUS, json.loads) or {}
    done, total = len(rows) and rows[-1]["iteration"] + 1, int(training.get("iterations", 0))
    seconds = statistics.median([row["seconds/total"] for row in rows[-RECENT:]]) if rows else None
    found: dict[str, Any] = {
        "name": settings.get("name"),
        "state": status.get("state", "not started"),
        "reason": status.get("reason"),
        "iteration": done,
        "iterations": total,
        "reward": rows[-1].get("reward/mean") if rows else None,
        "seconds_per_iteration": seconds,
        "eta_seconds": None,
        "checkpoint": _checkpoint(directory / "checkpoints", now),
    }
    if found["state"] == RUNNING:
        limit = stalled_after if stalled_after is not None else max(60.0, (training.get("stall_seconds") or 600) / 10)
        found |= _alive(directory, now, limit)
        found["eta_seconds"] = seconds and seconds * (total - done)
    return found


def _alive(directory: Path, now: float, limit: float) -> dict[str, Any]:
    beat = _read(directory / HEARTBEAT, json.loads)
    if not beat:
        return {"state": RUNNING, "place": "no heartbeat yet", "since": None}
    place = f"{beat['phase']}, micro-step {beat['step']}"
    if now - beat["time"] > GONE_SECONDS:
        return {"state": "gone", "place": f"{place}, process {beat['host']}:{beat['pid']}", "since": beat["time"]}
    if now - beat["moved"] > limit:
        return {"state": "stalled", "place": place, "since": beat["moved"]}
    return {"state": RUNNING, "place": place, "since": beat["moved"]}


def line(found: dict[str, Any]) -> str:
    """The one line."""
    parts = [f"{found['name']}: {found['state']}", f"iteration {found['iteration']}/{found['iterations']}"]
    if found["reward"] is not None:
        parts.append(f"reward {found['reward']:.4f}")
    if found["seconds_per_iteration"] is not None:
        parts.append(f"{found['seconds_per_iteration']:.1f} s/it")
    if found["eta_seconds"] is not None:
        parts.append(f"ETA {_span(found['eta_seconds'])}")
    saved = found["checkpoint"]
    parts.append(f"last checkpoint {saved['iteration']}, {_span(saved['age'])} ago" if saved else "no checkpoint")
    if found["state"] in ("stalled", "gone"):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        parts.append(
            f"{'no progress' if found['state'] == 'stalled' else 'no sign of life'} since {when} in {found['place']}"
        )
    elif found["state"] == RUNNING:
        parts.append(f"alive in {found['place']}" if found["since"] else found["place"])
    elif found["reason"]:
        parts.append(" ".join(str(found["reason"]).split()))
    return "  ".join(parts)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Complete lines; the last one may be half written."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1][-RECENT:]
    try:
        return [json.loads(text) for text in lines]
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}; look at the file") from error


def _read(path: Path, parse: Any) -> Any:
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _checkpoint(folder: Path, now: float) -> dict[str, Any] | None:
    """The newest complete one; by names, for opening one would import torch."""
    names = [path for path in folder.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdigit()]
    if not names:
        return None
    newest = max(names, key=lambda path: path.name)
    return {"iteration": int(newest.name.removeprefix(CHECKPOINT)), "age": max(0.0, now - newest.stat().st_mtime)}


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
