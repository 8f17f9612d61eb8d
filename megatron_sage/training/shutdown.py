"""Signals that ask a run to save and leave: SIGTERM, SIGUSR1, SIGUSR2."""

import faulthandler
import os
import signal
from types import FrameType
from typing import Any

from megatron_sage.parallel.control import Control

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Inside the block a signal is noted in `control` and nothing else: the run leaves where its state is whole."""

    def __init__(self, control: Control, rank: int) -> None:
        self.control, self.rank = control, rank
        self._previous: dict[signal.Signals, Any] = {}
        self._dumped: set[signal.Signals] = set()
        self._repeated = False

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            # faulthandler's signals are set behind Python's back: its handler would not come back by signal.signal
            if faulthandler.unregister(number):  # type: ignore[func-returns-value]  # True where it was registered
                self._dumped.add(number)
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        for number in self._dumped:
            faulthandler.register(number, all_threads=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.control.signal:
            self._say_once_more(number)
            return
        self.control.signal = number
        if self.rank == 0:
            _write(f"{signal.Signals(number).name}: {what_happens(self.control)}")

    def _say_once_more(self, number: int) -> None:
        if not self._repeated and self.rank == 0:
            _write(f"{signal.Signals(number).name}: the run is stopping already; SIGKILL ends it without saving")
        self._repeated = True


def what_happens(control: Control) -> str:
    """After the first signal."""
    if control.hold:
        return "the weights have been updated in this iteration: it is finished, then the run saves and leaves"
    if control.phase in ("load", "save", "export"):  # no micro-steps that could be skipped
        return f"this phase ({control.phase}) is completed, then the run leaves where its state is whole"
    return (
        f"the rest of this phase ({control.phase}) is skipped; the run saves the state that iteration "
        f"{control.iteration} began with and leaves"
    )


def _write(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # print() may not be called again in a handler that has interrupted it
