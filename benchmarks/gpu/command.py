"""The run: sections one after the other, each row printed as JSON when it is there, all of them written at the end."""

import gc
import json
import math
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import common
from benchmarks.gpu.attention import attention
from benchmarks.gpu.bench import Bench, Row, Section, one_line
from benchmarks.gpu.block import block
from benchmarks.gpu.ceiling import ceiling
from benchmarks.gpu.collectives import collectives
from benchmarks.gpu.optimizer import optimizer
from benchmarks.gpu.passes import anchor, offload, rollout_section
from benchmarks.gpu.report import markdown
from benchmarks.gpu.sizes import SMALL, Sizes
from benchmarks.gpu.syncs import syncs
from megatron_sage.errors import UserError
from megatron_sage.parallel.device import device
from megatron_sage.parallel.groups import initialize, shutdown

SECTIONS: dict[str, Section] = {
    "ceiling": ceiling,
    "block": block,
    "attention": attention,
    "rollout": rollout_section,
    "anchor": anchor,
    "offload": offload,
    "optimizer": optimizer,
    "syncs": syncs,
    "collectives": collectives,
}
OURS = ("megatron_sage", "benchmarks")


def run(options: Namespace) -> int:
    """Exit status: 1 if a section failed, after all others."""
    deadline = time.monotonic() + 60 * options.minutes
    _check_device(options.device)
    ours = not dist.is_initialized()
    groups = initialize(timeout_seconds=300)
    bench = Bench(SMALL if options.small else Sizes(), groups, device(), deadline)
    wanted = [name for name in SECTIONS if name == "ceiling" or not options.only or name in options.only]
    found = measure(bench, {name: SECTIONS[name] for name in wanted})
    status = int(any(broken(section) for section in found.values()))
    if groups.rank == 0:
        content = {"device": str(bench.device), "ranks": groups.world_size, "small": options.small, "sections": found}
        folder = Path(options.out) if options.out else Path("runs/benchmarks") if options.small else None
        common.write("gpu", content, markdown(found), folder)
    if ours:
        shutdown()
    return status


def _check_device(wanted: str) -> None:
    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise UserError("--device cuda: torch finds no CUDA device here; choose --device cpu --small")
    if wanted == "cpu" and present:
        raise UserError("--device cpu: torch has found a GPU already; set CUDA_VISIBLE_DEVICES= before it is imported")


def measure(bench: Bench, sections: Mapping[str, Section]) -> dict[str, dict[str, Any]]:
    """Rows of every section. One that fails keeps the rows that it had, and the next one begins."""
    found: dict[str, dict[str, Any]] = {}
    for name, section in sections.items():
        rows: list[Row] = []
        found[name] = {"rows": rows}
        if bench.late():
            found[name]["skipped"] = "the time given by --minutes is over"
            continue
        begin = time.monotonic()
        _say(bench, {"section": name})
        try:
            torch.manual_seed(0)  # replicas must have the same weights
            for row in section(bench):
                rows.append(finite(row))
                _say(bench, row)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in OURS:
                raise
            found[name]["skipped"] = f"the package {missing} is not installed"
        except Exception as error:  # a benchmark of many parts: one must not take the others with it
            found[name]["error"] = one_line(error)
        found[name]["seconds"] = round(time.monotonic() - begin, 1)
        _say(bench, {"section": name} | {k: v for k, v in found[name].items() if k != "rows"})
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
    return found


def broken(section: Mapping[str, Any]) -> bool:
    """Whether something failed in it."""
    return "error" in section or any("error" in row for row in section["rows"])


def finite(row: Row) -> Row:
    """The row; ValueError for a number that JSON does not know."""
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{row['name']}: {key} is {value}")
    return row


def _say(bench: Bench, content: Mapping[str, Any]) -> None:
    if bench.groups.rank == 0:
        print(json.dumps(content), flush=True)
