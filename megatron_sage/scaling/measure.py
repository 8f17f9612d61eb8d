"""One cell on the ranks of this job: a run's own iterations, without what a run writes."""

import json
import resource
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sage.config import Config
from megatron_sage.data.prompts import read_rows
from megatron_sage.engine import (
    build_engine,
    collective_timeout,
    encode_prompts,
    initialize_groups,
    load_codec,
    prepare_embeddings,
)
from megatron_sage.errors import UserError
from megatron_sage.monitoring.monitor import PERFORMANCE, Monitor
from megatron_sage.parallel import groups as process_groups
from megatron_sage.parallel.control import build_control
from megatron_sage.parallel.device import device
from megatron_sage.reporting.progress import Reporter
from megatron_sage.rewards.build import build_reward
from megatron_sage.training.optimizer import build_optimizer, wrap
from megatron_sage.training.trainer import Trainer


def measure(config: Config, warmup: int, reporter: Reporter) -> dict[str, Any]:
    """Medians over the iterations behind `warmup`; the numbers of all ranks, on rank 0. All ranks call."""
    if config.precision.threads:
        torch.set_num_threads(config.precision.threads)
    groups = initialize_groups(config)
    directory = Path(config.output_dir)
    if groups.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier(group=dist.group.WORLD)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    control = build_control(groups, collective_timeout(config))
    try:
        with Monitor(config, groups, control, Reporter(False)) as monitor:
            trainer = _trainer(config, groups, control)
            monitor.start(trainer)
            with reporter.bar(config.name, config.training.iterations) as tick:
                for number in range(config.training.iterations):
                    row, reason = trainer.run_iteration()
                    if reason is not None:
                        raise UserError(reason)
                    monitor.iteration(number, row)
                    tick()
            memory = torch.tensor([_peak_memory()], dtype=torch.float64, device=device())
            dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
    finally:
        control.close()
        process_groups.shutdown()
    found = summary(directory, warmup) if groups.rank == 0 else {}
    return found | {"memory_bytes": float(memory), "device": _device_name()}


def _trainer(config: Config, groups: process_groups.Groups, control: Any) -> Trainer:
    rows = read_rows(config.data.prompts)
    prepare_embeddings(config, groups, rows)
    engine = build_engine(config, groups)
    engine.control = control
    ddp = wrap(engine.chunks, groups, config.optimizer.distributed)
    optimizer = build_optimizer(config, ddp, engine.dtype)
    prompts = encode_prompts(config, engine, rows)
    codec, reward = load_codec(config), build_reward(config.reward, device())
    return Trainer(engine, ddp, optimizer, prompts, codec, reward, Reporter(False))


def _peak_memory() -> float:
    """Bytes: what torch had allocated on a GPU, or the process' resident memory (Linux counts it in KiB)."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo"


def summary(directory: Path, warmup: int) -> dict[str, Any]:
    """Out of the run's performance.jsonl: medians behind the warm-up."""
    rows = [json.loads(line) for line in (directory / PERFORMANCE).read_text().splitlines()][warmup:]
    found: dict[str, Any] = {"iterations": len(rows)}
    for key in ("seconds", "videos_per_hour", "tokens_per_second", "mfu", "hfu", "model_tflops_per_rank"):
        if all(key in row for row in rows):
            found[key] = statistics.median(row[key] for row in rows)
    names = {name for row in rows for name in row["phases"]}
    found["phases"] = {
        name: statistics.median(row["phases"].get(name, {}).get("seconds", 0.0) for row in rows)
        for name in sorted(names)
    }
    return found
