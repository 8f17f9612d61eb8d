"""`megatron-sage study`: many small runs, a table of results, a page that compares them."""

import argparse
import csv
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sage.config import Config, validate
from megatron_sage.errors import UserError
from megatron_sage.study.cells import Run, chosen_cells, planned_runs
from megatron_sage.study.page import write_markdown, write_page

RESULTS, CURVES, SETTINGS = "results.csv", "curves.csv", "study.json"
MAX_DEATHS = 3  # of workers in a row: what kills every run need not be tried a hundred times
MEASURES = ("reward", "VQ", "MQ", "TA", "overall")
RESULT_COLUMNS = ["cell", "sampler", "kl", "setting", "equalizer", "schedule", "seed", "iterations", "videos"]
RESULT_COLUMNS += ["base_reward", "final_reward", "change"]
RESULT_COLUMNS += [f"{moment}_{name}" for name in MEASURES[1:] for moment in ("base", "final")]
RESULT_COLUMNS += ["kl_position", "ratio_max", "clip_fraction", "lambda", "seconds"]
CURVE_COLUMNS = ["cell", "seed", "iteration", "reward_mean", "reward_std", "VQ", "MQ", "TA", "kl_position"]
CURVE_COLUMNS += ["kl_velocity", "lambda", "grad_norm", "clip_fraction"]


def main(argv: list[str]) -> int:
    """Command line of `study`; see `--help`. Status 1 where a run failed."""
    parser = argparse.ArgumentParser(
        prog="megatron-sage study",
        description="Train many small runs of the tiny world and compare them. Finished runs are kept: the same "
        "command goes on where it was interrupted.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument("--cells", default="all", help="grid, ablations, all, or names of cells with commas between")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each cell (5)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core (2)")
    parser.add_argument("--out", default="runs/study", help="directory of results.csv, curves.csv and study.html")
    parser.add_argument("--report", action="store_true", help="write only the page, from the results that are there")
    parser.add_argument("--markdown", action="store_true", help="print its tables as Markdown instead")
    options = parser.parse_intermixed_args(argv)
    if options.seeds < 1 or options.processes < 1:
        raise UserError(f"--seeds {options.seeds} --processes {options.processes}: both must be at least 1")
    directory = Path(options.out)
    if options.markdown:
        print(write_markdown(directory), end="")
        return 0
    if options.report:
        print(write_page(directory))
        return 0
    runs = planned_runs(chosen_cells(options.cells), options.seeds)
    for run in runs[: len(runs) // options.seeds]:  # every cell once: nothing starts that cannot end
        validate(run.config(options.overrides), 1)
    directory.mkdir(parents=True, exist_ok=True)
    _same_settings(directory, options.overrides)
    done = _finished(directory)
    left = [run for run in runs if run not in done]
    print(
        f"{len(runs)} runs: {len(runs) - len(left)} finished before, {len(left)} to do, {options.processes} at a time"
    )
    failed = _Study(directory, options.overrides, left).run(min(options.processes, max(1, len(left))))
    if _finished(directory):
        print(write_page(directory))
    for message in failed:
        print(f"failed: {message}", file=sys.stderr)
    return 1 if failed else 0


def _same_settings(directory: Path, overrides: Sequence[str]) -> None:
    """A study goes on with the settings that it began with, whatever has been changed since."""
    config = dataclasses.asdict(Run("b_sage_dual", 0).config(overrides))
    file = directory / SETTINGS
    if not file.exists():
        file.write_text(json.dumps({"overrides": list(overrides), "config": config}, indent=1) + "\n")
    elif json.loads(file.read_text())["config"] != config:
        raise UserError(f"{directory}: holds a study with other settings ({file}): choose another --out, or delete it")


def _finished(directory: Path) -> set[Run]:
    """Runs in results.csv; lines of curves.csv that belong to no finished run go away."""
    file, curves = directory / RESULTS, directory / CURVES
    if not file.exists():
        curves.unlink(missing_ok=True)
        return set()
    with file.open(newline="") as lines:
        done = {Run(row["cell"], int(row["seed"])) for row in csv.DictReader(lines)}
    if curves.exists():
        with curves.open(newline="") as lines:
            kept = [row for row in csv.DictReader(lines) if Run(row["cell"], int(row["seed"])) in done]
        partial = curves.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        _append(partial, CURVE_COLUMNS, kept)
        os.replace(partial, curves)
    return done


def _append(file: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


class _Study:
    """Workers that take runs from one queue; what they answer is written by one thread at a time."""

    def __init__(self, directory: Path, overrides: Sequence[str], runs: Sequence[Run]) -> None:
        self.directory, self.overrides = directory, list(overrides)
        self.waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
        for run in runs:
            self.waiting.put(run)
        self.total, self.count, self.failed = len(runs), 0, []  # type: int, int, list[str]
        self.lock, self.begin = threading.Lock(), time.perf_counter()

    def run(self, processes: int) -> list[str]:
        """All runs; what failed, a line each."""
        threads = [threading.Thread(target=self._feed, args=(number,), daemon=True) for number in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.failed

    def _worker(self) -> "subprocess.Popen[str]":
        cache = str(self.directory / "embeddings")
        command = [sys.executable, "-m", "megatron_sage.study.work", cache, *self.overrides]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"OMP_NUM_THREADS": "1"}
        log = (self.directory / "workers.log").open("a")
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )

    def _feed(self, number: int) -> None:
        time.sleep(5.0 * number)  # the first worker fills the embedding cache
        worker, deaths = self._worker(), 0
        while deaths < MAX_DEATHS:
            try:
                run = self.waiting.get_nowait()
            except queue.Empty:
                break
            line = self._ask(worker, run)
            deaths = 0 if line else deaths + 1
            if not line:  # it died: its log says why; the next run gets a new one
                worker.wait()
                worker = self._worker()
                line = json.dumps({"error": f"the worker ended; see {self.directory / 'workers.log'}"})
            with self.lock:
                self._take(run, json.loads(line))
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()

    @staticmethod
    def _ask(worker: "subprocess.Popen[str]", run: Run) -> str:
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(dataclasses.asdict(run)) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return ""
        return worker.stdout.readline()

    def _take(self, run: Run, answer: dict[str, Any]) -> None:
        self.count += 1
        if "error" in answer:
            self.failed.append(f"{run.cell}, seed {run.seed}: {answer['error']}")
            print(f"[{self.count}/{self.total}] {self.failed[-1]}", flush=True)
            return
        config = run.config(self.overrides)
        _append(self.directory / CURVES, CURVE_COLUMNS, _curve_rows(run, answer))
        row = _result_row(run, config, answer)
        _append(self.directory / RESULTS, RESULT_COLUMNS, [row])  # last: a run without this line is not finished
        left = (time.perf_counter() - self.begin) / self.count * (self.total - self.count)
        print(
            f"[{self.count}/{self.total}] {run.cell} seed {run.seed}: reward {row['base_reward']:.4f} -> "
            f"{row['final_reward']:.4f}, {answer['seconds']:.0f} s; about {left / 60:.0f} min left",
            flush=True,
        )


def _result_row(run: Run, config: Config, answer: dict[str, Any]) -> dict[str, Any]:
    base, final, curves = answer["base"], answer["final"], answer["curves"]
    for scores in (base, final):
        scores["overall"] = scores["VQ"] + scores["MQ"] + scores["TA"]
    row: dict[str, Any] = {
        "cell": run.cell,
        "sampler": config.sampler.sde_type,
        "kl": config.kl.strategy,
        "setting": run.cell[0].upper(),
        "equalizer": config.grpo.equalizer,
        "schedule": config.kl.schedule,
        "seed": run.seed,
        "iterations": config.training.iterations,
        "videos": config.training.iterations * config.grpo.prompts_per_iteration * config.grpo.group_size,
        "change": final["reward"] - base["reward"],
        "kl_position": curves[-1].get("kl/position"),
        "ratio_max": answer["ratio_max"],
        "clip_fraction": _mean([point.get("clip_fraction") for point in curves]),
        "lambda": curves[-1].get("lambda"),
        "seconds": round(answer["seconds"], 1),
    }
    for name in MEASURES:
        row |= {f"base_{name}": base[name], f"final_{name}": final[name]}
    return row


def _curve_rows(run: Run, answer: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for iteration, point in enumerate(answer["curves"]):
        values = {key.removeprefix("reward/").replace("/", "_"): value for key, value in point.items()}
        values |= {"reward_mean": values.pop("mean"), "reward_std": values.pop("std")}
        rows.append({"cell": run.cell, "seed": run.seed, "iteration": iteration} | values)
    return rows


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
