"""What surrounds a training run to be watched: clock, logs, throughput, stragglers, TensorBoard and W&B."""

import contextlib
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sage.config import Config
from megatron_sage.errors import UserError
from megatron_sage.monitoring.peak import peak_flops
from megatron_sage.monitoring.performance import COLUMNS, performance, scalars, stragglers, table_of
from megatron_sage.monitoring.phases import PHASES, PhaseClock
from megatron_sage.monitoring.rank_log import RankLog
from megatron_sage.monitoring.work import WorkCount
from megatron_sage.monitoring.writers import Writer, build_writers, finite
from megatron_sage.parallel.control import Control, Stopped
from megatron_sage.parallel.groups import Groups
from megatron_sage.parallel.waiting import Waiting
from megatron_sage.reporting.progress import Reporter
from megatron_sage.training.metrics import MetricsLog

PERFORMANCE, STRAGGLERS = "performance.jsonl", "stragglers.jsonl"
WORTH_SAYING = 0.2  # of the others' time: so much longer has to be the slowest rank's before the terminal shows it


class Monitor:
    """`with Monitor(...) as monitor:` a run, which calls `start` once and `iteration` after each. All ranks do."""

    def __init__(self, config: Config, groups: Groups, control: Control, reporter: Reporter) -> None:
        self.config, self.groups, self.control, self.reporter = config, groups, control, reporter
        self.waiting = Waiting()
        self.writers: list[Writer] = []
        self.hosts: list[str] = []
        self.peak: float | None = None
        self._said: tuple[str, int] | None = None

    def __enter__(self) -> "Monitor":
        try:
            self.log = RankLog(Path(self.config.output_dir), self.groups.rank)
        except OSError as error:
            raise UserError(
                f"output_dir={self.config.output_dir}: logs cannot be written there: {error.strerror}; choose another"
            ) from error
        self.clock = PhaseClock(lambda: self.waiting.seconds, self.log)
        self.control.on_enter = self.clock.enter
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self.waiting.counted())
        self._stack.enter_context(self.log.collecting())
        return self

    def start(self, trainer: Any) -> None:
        """There is a trainer, in the state that the run begins with."""
        directory, main, first = Path(self.config.output_dir), self.groups.rank == 0, trainer.iteration
        self.trainer, self.work = trainer, WorkCount(trainer.engine)
        self.hosts = self._gather_hosts()
        self.peak, source = peak_flops(self.config.logging.peak_tflops)
        self.performance = MetricsLog(directory / PERFORMANCE, main, first)
        self.stragglers = MetricsLog(directory / STRAGGLERS, main, first)
        if main:
            self.writers = build_writers(self.config, first)
            self.reporter.line(f"MFU against {source}" if self.peak is not None else f"no MFU: {source}")
        self.log.line(f"iteration {first} is the first; {self.config.training.iterations} are wanted")

    def iteration(self, number: int, row: dict[str, Any]) -> None:
        """Iteration `number` has ended with these metrics. Gathers over the control's gloo group of all ranks."""
        trainer = self.trainer
        spent = self.clock.take()
        done = self.work.phases(trainer.flown, len(trainer.table.trained_steps), len(trainer.reference.kinds))
        tables = self._gather(table_of(spent, done))
        self.log.line(f"iteration {number}: done in {row['seconds/total']:.3f} s")
        if self.groups.rank != 0:
            return
        grpo = self.config.grpo
        videos = grpo.prompts_per_iteration * grpo.group_size
        speed = performance(tables, row["seconds/total"], videos, self.peak)
        slow = stragglers(tables, self.hosts)
        self.performance.write({"iteration": number} | speed)
        self.stragglers.write({"iteration": number} | slow)
        self._say(slow["worst"])
        values = finite(row | scalars(speed) | straggler_scalars(slow))
        for writer in self.writers:
            writer.write(number, values)

    def _say(self, worst: dict[str, Any] | None) -> None:
        """On the terminal and in the log, where it is another rank or phase than before."""
        if worst is None or worst["excess_seconds"] < max(0.1, WORTH_SAYING * worst["median_of_the_others"]):
            self._said = None
            return
        place = worst["phase"], worst["slowest_rank"]
        if place != self._said:
            text = (
                f"slowest in {worst['phase']}: rank {worst['slowest_rank']} ({worst['host']}) computed "
                f"{worst['busy_seconds']:.1f} s, the others {worst['median_of_the_others']:.1f} s (stragglers.jsonl)"
            )
            self.reporter.line(text)
            self.log.line(text, "warning")
        self._said = place

    def _gather(self, table: np.ndarray) -> np.ndarray:
        """[ranks, phases, COLUMNS] from every rank's table, over the control's group of all ranks, which is gloo's."""
        group = self.control.world
        if group is None:
            return table[None]
        mine = torch.from_numpy(table)
        parts = [torch.empty(len(PHASES), COLUMNS, dtype=torch.float64, device="cpu") for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
        return torch.stack(parts).numpy()

    def _gather_hosts(self) -> list[str]:
        group = self.control.world
        if group is None:
            return [socket.gethostname()]
        names: list[Any] = [None] * group.size()
        dist.all_gather_object(names, socket.gethostname(), group=group)
        return names

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.control.on_enter = None
        if error is None:
            self.clock.stop()
        if error is None or isinstance(error, Stopped):
            self.log.line("end" if error is None else f"end: {error}")
        else:
            self.log.line(f"end by {type(error).__name__}: {error}", "error")
        self._stack.close()
        self.log.close()
        for writer in self.writers:
            writer.close()


def straggler_scalars(found: dict[str, Any]) -> dict[str, float]:
    """Of each phase, for charts: which rank was slowest and by how many seconds."""
    values: dict[str, float] = {}
    for phase, one in found["phases"].items():
        values[f"stragglers/{phase}/rank"] = one["slowest_rank"]
        values[f"stragglers/{phase}/excess_seconds"] = one["excess_seconds"]
    return values
