"""Reads a run directory: what the report shows, checked before anything is written."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_sage.errors import UserError


@dataclass(frozen=True)
class RunRecord:
    """A run directory's files. Only metrics.jsonl must exist; what else is missing is left out of the page."""

    directory: Path
    metrics: list[dict[str, Any]]
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)  # of the last rollout's pipeline
    noise_floor: dict[str, Any] = field(default_factory=dict)  # of the ratio, measured before the first update
    notes: tuple[str, ...] = ()  # what the reader of the page should know about the files

    def column(self, key: str) -> list[float]:
        """One metric over all iterations; NaN where it is missing or no number."""
        return [_number(row.get(key)) for row in self.metrics]

    def keys(self, prefix: str) -> list[str]:
        """Names of the metrics that start with `prefix`, in order of appearance."""
        return list(dict.fromkeys(key for row in self.metrics for key in row if key.startswith(prefix)))

    def setting(self, key: str, default: Any = None) -> Any:
        """A dotted setting of config.yaml."""
        here: Any = self.config
        for part in key.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return default if here is None else here

    @property
    def iterations(self) -> list[float]:
        """The x axis of every curve: the row's iteration, or its place where it is missing."""
        found = self.column("iteration")
        return [place if math.isnan(value) else value for place, value in enumerate(found)]


def load_record(directory: str | Path) -> RunRecord:
    """Read a run directory; UserError, in one line, for a missing or broken file."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory; expected the output_dir of a training run")
    metrics, notes = _read_metrics(directory / "metrics.jsonl")
    config_text = _read_text(directory / "config.yaml")
    try:
        config = yaml.safe_load(config_text) if config_text else {}
    except yaml.YAMLError as error:
        raise UserError(f"{directory / 'config.yaml'}: not YAML ({' '.join(str(error).split())[:120]})") from error
    return RunRecord(
        directory=directory,
        metrics=metrics,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        environment=_read_object(directory / "environment.json"),
        evaluation=_checked_evaluation(directory / "evaluation.json"),
        schedule=_checked_schedule(directory / "pipeline_schedule.json"),
        noise_floor=_checked_noise_floor(directory / "noise_floor.json"),
        notes=tuple(notes),
    )


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not path.is_file():
        raise UserError(f"{path}: not found; a report needs the metrics of at least one iteration")
    rows, notes = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if place < len(lines):
                raise UserError(f"{path}, line {place}: not JSON ({error})") from error
            notes.append(
                f"The last line of metrics.jsonl is incomplete and left out (line {place}): "
                "the run was stopped while writing it."
            )
            continue
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {place}: expected one JSON object an iteration, found {line[:40]!r}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: empty; a report needs the metrics of at least one iteration")
    return rows, notes


def _checked_evaluation(path: Path) -> dict[str, Any]:
    evaluation = _read_object(path)
    for label in ("before", "after"):
        part = evaluation.get(label, {})
        samples = part.get("samples", []) if isinstance(part, dict) else None
        if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
            raise UserError(f"{path}: {label!r} should be an object with a list of samples; evaluate the run anew")
    return evaluation


def _checked_schedule(path: Path) -> dict[str, Any]:
    schedule = _read_object(path)
    tasks = schedule.get("tasks", [])
    sound = isinstance(tasks, list) and all(
        isinstance(task, list) and len(task) == 6 and all(type(number) is int and number >= 0 for number in task)
        for task in tasks
    )
    if not sound or (tasks and not isinstance(schedule.get("stages"), int)):
        raise UserError(f"{path}: expected stages and tasks of six numbers each; delete it to leave the figure out")
    return schedule


def _checked_noise_floor(path: Path) -> dict[str, Any]:
    floor = _read_object(path)
    steps = floor.get("steps", {})
    sound = isinstance(steps, dict) and all(
        step.isdigit() and math.isfinite(_number(value)) for step, value in steps.items()
    )
    if not sound or bool(floor) != bool(steps):
        raise UserError(f"{path}: expected the difference of each step as a number; delete it to leave the figure out")
    return floor


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        content = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
