"""`megatron-sage scaling CONFIG --out DIR --gpus 1,2,4`: short runs on more and more devices, and what they say.

Alone, it starts a torchrun of its own for each cell that fits this machine. Under torchrun (a Slurm job's, one for each
number of devices) its ranks measure the cells of their number, one after the other.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sage.config import Config, load_config, validate
from megatron_sage.config.validation import validate_layout
from megatron_sage.errors import UserError
from megatron_sage.planning.command import transformer_config
from megatron_sage.planning.flops import Text
from megatron_sage.planning.machine import known_gpus
from megatron_sage.reporting.progress import Reporter
from megatron_sage.scaling.cells import (
    STRONG,
    WEAK,
    Cell,
    Layout,
    cell_config,
    fingerprint,
    grid,
    layouts_of,
    parse_gpus,
    parse_layouts,
)
from megatron_sage.scaling.page import figure, page
from megatron_sage.scaling.predict import predict
from megatron_sage.scaling.table import FAILED, MEASURED, PREDICTED, SKIPPED, Row, add_efficiency, as_csv

RESULT, CPU_PROCESSES = "result.json", 4
ENDED = "ended before it was measured (killed, or out of memory): see its log; --again tries it once more"


def main(argv: list[str]) -> int:
    """Command line of `scaling`; 0, or 1 where a cell that should have run has failed."""
    options = _parser().parse_intermixed_args(argv)
    config = _config(options)
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if options.warmup < 0 or options.iterations < 1:
        raise UserError(f"--warmup {options.warmup} --iterations {options.iterations}: at least 0 and 1")
    gpus = parse_gpus(options.gpus) if options.gpus else [world or 1]
    layouts = parse_layouts(options.layouts) if options.layouts else list(layouts_of(config))
    cells = grid(gpus, layouts, [STRONG, WEAK] if options.mode == "both" else [options.mode])
    study = Study(config, options, world)
    if world:
        study.measure_here([cell for cell in cells if cell.gpus == world and options.only in (None, cell.name)])
        if options.only is not None or os.environ.get("RANK", "0") != "0":
            return 0
    rows = study.run(cells)
    return 1 if any(row.status == FAILED for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-sage scaling",
        description="Throughput of short runs on more and more devices, beside the planner's prediction. Resumable.",
        epilog="Example: megatron-sage scaling run.yaml --out runs/scaling --gpus 1,2,4,8 "
        "--layouts 'tensor=1;tensor=2;tensor=2,context=2'",
    )
    parser.add_argument("settings", metavar="CONFIG key=value", nargs="*", help="YAML file, then dotted overrides")
    parser.add_argument("--recipe", metavar="NAME", help="start from a named run; `megatron-sage recipes list`")
    parser.add_argument("--out", required=True, help="directory of the results: scaling.csv, .png, .html, cells/")
    parser.add_argument("--gpus", help="numbers of devices, e.g. 1,2,4; default: as many as this job has ranks")
    parser.add_argument("--layouts", help="e.g. 'tensor=2,context=1;pipeline=2'; default: the configuration's")
    parser.add_argument("--mode", choices=("strong", "weak", "both"), default="both",
                        help="strong: the same prompts; weak: as many for each replica (both)")  # fmt: skip
    parser.add_argument("--iterations", type=int, default=3, help="measured ones (3)")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before them, which do not count (1)")
    parser.add_argument("--gpu", help=f"predict for {', '.join(known_gpus())} or a .yaml file; default: no prediction")
    parser.add_argument("--text-tokens", type=int, default=300, help="valid Qwen tokens of a prompt, to predict (300)")
    parser.add_argument("--processes", type=int, help="the most that are started here; GPUs, or 4 on a CPU")
    parser.add_argument("--again", action="store_true", help="measure failed cells once more")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the cell that a torchrun of this command's is for
    return parser


def _config(options: argparse.Namespace) -> Config:
    from megatron_sage.recipes import recipe

    paths = [text for text in options.settings if "=" not in text]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one configuration file at most ({paths[0]} is one); overrides are key=value")
    base = recipe(options.recipe) if options.recipe else None
    return load_config(paths[0] if paths else None, [text for text in options.settings if "=" in text], base)


class Study:
    """A directory of cells and their results."""

    def __init__(self, config: Config, options: argparse.Namespace, world: int) -> None:
        self.config, self.options, self.world, self.out = config, options, world, Path(options.out)
        self.transformer = transformer_config(config)
        self.texts = Text(options.text_tokens), Text(6)  # the empty prompt's six tokens, as `plan` has it
        self.reporter = Reporter(os.environ.get("RANK", "0") == "0")

    def run(self, cells: list[Cell]) -> list[Row]:
        """All cells; the files are written anew after each that was measured."""
        self.out.mkdir(parents=True, exist_ok=True)
        cells += [cell for cell in self.earlier() if cell not in cells]
        rows: list[Row] = []
        for number, cell in enumerate(cells, 1):
            row = self.row(cell)
            rows.append(row)
            self.reporter.line(f"{number}/{len(cells)} {cell.name}: {_say(row)}")
            if row.status in (MEASURED, FAILED):  # hours may follow, and the job may end
                self.write(rows)
        self.write(rows)
        self.reporter.line(f"{self.out / 'scaling.html'}, {self.out / 'scaling.csv'}")
        return rows

    def earlier(self) -> list[Cell]:
        """Cells of this directory that were measured by another call, such as a job of another size."""
        specs = [json.loads(path.read_text())["cell"] for path in sorted(self.out.glob(f"cells/*/{RESULT}"))]
        return [Cell(spec["mode"], spec["gpus"], Layout(**spec["layout"])) for spec in specs]

    def row(self, cell: Cell) -> Row:
        """Measured, now or before; else predicted; else why not."""
        try:
            config = self.cell(cell)
            here = cell.gpus == self.world if self.world else cell.gpus <= self.processes()
            if here:
                validate(config, cell.gpus)
            else:  # what this machine lacks does not matter then
                validate_layout(config, cell.gpus, self.transformer)
        except UserError as error:
            return Row(cell, SKIPPED, reason=str(error))
        grpo = config.grpo
        row = Row(cell, SKIPPED, grpo.prompts_per_iteration, grpo.prompts_per_iteration * grpo.group_size)
        if self.options.gpu is not None:
            row.predicted, row.reason = predict(config, self.transformer, cell.gpus, self.options.gpu, self.texts)
            if row.reason:
                return row
        found = self.result(cell, config, self.options.again and not self.world)
        if found is None and here and not self.world:
            self.start(cell)
            found = self.result(cell, config) or {"status": FAILED, "reason": f"no result: {self.log(cell)}"}
        if found is not None:
            row.status, row.reason = found["status"], found.get("reason", "")
            row.numbers = found.get("numbers", {})
        elif row.predicted:
            row.status, row.numbers = PREDICTED, row.predicted
        else:
            row.reason = f"needs {cell.gpus} devices, {self.world or self.processes()} are here; --gpu predicts it"
        return row

    def cell(self, cell: Cell) -> Config:
        """Its configuration."""
        return cell_config(self.config, cell, self.out, self.options.warmup, self.options.iterations)

    def processes(self) -> int:
        """How many ranks this machine can have."""
        import torch

        if self.options.processes is not None:
            return int(self.options.processes)
        return torch.cuda.device_count() if torch.cuda.is_available() else CPU_PROCESSES

    def log(self, cell: Cell) -> Path:
        """What its processes print."""
        return self.out / "cells" / cell.name / "output.txt"

    def result(self, cell: Cell, config: Config, again: bool = False) -> dict[str, Any] | None:
        """What was measured with the same settings; None: to be measured. `again`: failures do not count."""
        path = self.out / "cells" / cell.name / RESULT
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); delete it to measure the cell again") from error
        if found["fingerprint"] != fingerprint(config, self.options.warmup):
            return None
        if found["status"] == "begun":
            found |= {"status": FAILED, "reason": ENDED}
        return None if found["status"] == FAILED and again else found

    def start(self, cell: Cell) -> None:
        """This command again, for one cell, under a torchrun of its own."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cell.gpus)]
        given = [*self.options.settings, "--out", str(self.out), "--gpus", str(cell.gpus), "--only", cell.name]
        given += ["--layouts", ",".join(f"{key}={value}" for key, value in vars(cell.layout).items())]
        given += [
            "--mode",
            cell.mode,
            "--warmup",
            str(self.options.warmup),
            "--iterations",
            str(self.options.iterations),
        ]
        given += ["--recipe", self.options.recipe] if self.options.recipe else []
        given += ["--again"] if self.options.again else []
        self.log(cell).parent.mkdir(parents=True, exist_ok=True)
        with self.log(cell).open("w") as log:
            code = subprocess.run(
                [*command, "-m", "megatron_sage", "scaling", *given], stdout=log, stderr=log
            ).returncode
        if code != 0:
            lines = [
                line for line in self.log(cell).read_text(errors="replace").splitlines() if "error" in line.lower()
            ]
            self.record(
                cell, {"status": FAILED, "reason": f"{lines[0] if lines else f'status {code}'}; {self.log(cell)}"}
            )

    def record(self, cell: Cell, content: dict[str, Any]) -> None:
        """Write its result in one step."""
        path = self.out / "cells" / cell.name / RESULT
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        stamp = {"cell": asdict(cell), "fingerprint": fingerprint(self.cell(cell), self.options.warmup)}
        partial.write_text(json.dumps(content | stamp, indent=1) + "\n")
        os.replace(partial, path)

    def measure_here(self, cells: list[Cell]) -> None:
        """On all ranks of this job: the cells that rank 0 finds to be missing."""
        import torch.distributed as dist

        from megatron_sage.scaling.measure import measure
        from megatron_sage.scaling.world import one_world

        with one_world():
            wanted: list[Any] = [[cell for cell in cells if self._missing(cell)]]
            dist.broadcast_object_list(wanted, src=0, group=dist.group.WORLD)
            for cell in wanted[0]:
                config = self.cell(cell)
                if dist.get_rank() == 0:
                    self.record(cell, {"status": "begun"})
                found = measure(config, self.options.warmup, self.reporter)
                if dist.get_rank() == 0:
                    self.record(cell, {"status": MEASURED, "numbers": found})

    def _missing(self, cell: Cell) -> bool:
        try:
            config = self.cell(cell)
            validate(config, cell.gpus)
        except UserError:  # `row` says it
            return False
        return self.result(cell, config, self.options.again) is None

    def write(self, rows: list[Row]) -> None:
        """scaling.csv, scaling.png and scaling.html of the rows so far."""
        rows = sorted(rows, key=lambda row: row.cell.name)
        add_efficiency(rows)
        (self.out / "scaling.csv").write_text(as_csv(rows))
        png = figure(rows)
        (self.out / "scaling.png").write_bytes(png)
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores."
        (self.out / "scaling.html").write_text(page(rows, self.config.name, machine, png), encoding="utf-8")


def _say(row: Row) -> str:
    if row.status in (MEASURED, PREDICTED):
        numbers = row.numbers
        return f"{row.status}: {numbers['seconds']:.2f} s/it, {numbers['videos_per_hour']:.0f} videos/h"
    return f"{row.status}: {row.reason}"
