"""Everything around a run that is not the run: stop signals, the watchdog, status.json, and how it ends."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sage.config import Config
from megatron_sage.engine import collective_timeout
from megatron_sage.errors import FAULT, FINISHED, STALLED, STOPPED, USER_ERROR, UserError
from megatron_sage.parallel.control import Stopped, build_control
from megatron_sage.parallel.groups import Groups
from megatron_sage.training import memory
from megatron_sage.training.shutdown import StopSignals
from megatron_sage.training.status import DONE, LEFT, RUNNING, Status
from megatron_sage.training.watchdog import Watchdog, signal_name


class Supervision:
    """`with Supervision(config, groups) as supervision:` a run, which asks `supervision.control`. All ranks enter.

    `Stopped` ends in the block's end, with `exit_code` 75: the run has saved before it let it pass. Any other exception
    goes on, after status.json and the other ranks have been told; out of memory is explained on the way.
    """

    def __init__(self, config: Config, groups: Groups) -> None:
        self.config, self.groups, self.exit_code = config, groups, FINISHED
        self.trainer: Any = None  # set when there is one: names the tensors in an out-of-memory report
        self.status = Status(Path(config.output_dir), groups.rank)

    def __enter__(self) -> "Supervision":
        config, groups = self.config, self.groups
        self.control = build_control(groups, collective_timeout(config), config.kl.anchor_sharded)
        self.progress(0)
        self.watchdog = Watchdog(
            self.control,
            groups.rank,
            groups.world_size,
            config.training.stall_seconds,
            Path(config.output_dir),
            self._stalled,
        )
        self.signals = StopSignals(self.control, groups.rank)
        self.signals.__enter__()
        return self

    def progress(self, iteration: int) -> None:
        """`iteration` iterations are done."""
        if self.groups.rank == 0:
            self.status.write(RUNNING, iteration=iteration)

    def _stalled(self, reason: str) -> None:
        self.status.fail(reason=reason, iteration=self.control.iteration, exit_code=STALLED)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            if error is None or isinstance(error, Stopped):
                self._record_end(error)
                return error is not None
            if memory.is_out_of_memory(error):
                explained = memory.explain(error, self.config, self.groups, self.control, self._names())
                self._record_failure(explained)
                raise explained from error
            self._record_failure(error)
            return False
        finally:
            self.watchdog.close()
            self.signals.__exit__()
            if error is None or isinstance(error, Stopped):
                self.control.close()

    def _names(self) -> dict[int, str]:
        if self.trainer is None:
            return {}
        return memory.tensor_names(self.trainer.engine.chunks, self.trainer.replay.ddp, self.trainer.optimizer)

    def _record_end(self, stopped: Stopped | None) -> None:
        done = self.trainer.iteration if self.trainer is not None else 0
        if stopped is not None:
            self.exit_code = STOPPED
        if self.groups.rank != 0:
            return
        if stopped is None:
            self.status.write(DONE, iteration=done, exit_code=FINISHED)
        else:
            name = signal_name(stopped.signal)
            self.status.write(LEFT, iteration=done, signal=name, reason=f"{name}; the state is saved",
                              exit_code=STOPPED)  # fmt: skip

    def _record_failure(self, error: BaseException) -> None:
        text = str(error) or type(error).__name__
        reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        code = USER_ERROR if isinstance(error, UserError) else FAULT
        self.watchdog.fail(reason.splitlines()[0])
        try:
            self.status.fail(reason=reason, iteration=self.control.iteration, exit_code=code)
        except OSError as second:  # a full disk, as often as not what has ended the run: the first error is the reason
            print(f"{self.status.path}: cannot be written: {second.strerror}", file=sys.stderr, flush=True)
