"""How long each phase of an iteration takes on this rank, and how much of that the rank only waits."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_sage.monitoring.rank_log import RankLog

# Phases that every rank of every layout passes: what is gathered has the same shape everywhere.
PHASES = ("rollout", "decode", "reward", "reference", "noise floor", "train", "optimizer", "save")


class Spent(NamedTuple):
    """Seconds of a phase on one rank."""

    seconds: float
    waiting: float  # of these, inside collectives

    def __add__(self, other: "Spent") -> "Spent":  # type: ignore[override]  # of tuples it would be a longer one
        return Spent(self.seconds + other.seconds, self.waiting + other.waiting)


class PhaseClock:
    """Called with the name of each phase that begins (`Control.on_enter`); a phase lasts until the next one."""

    def __init__(self, waited: Callable[[], float], log: RankLog | None = None) -> None:
        """`waited`: seconds in collectives so far."""
        self.waited, self.log = waited, log
        self.spent: dict[str, Spent] = {}
        self._open: tuple[str, float, float] | None = None

    def enter(self, phase: str) -> None:
        """The last phase ends, `phase` begins. A phase entered again goes on: its updates are added up."""
        if self._open is not None and self._open[0] == phase:
            return
        self.stop()
        if self.log is not None:
            self.log.line(f"phase {phase}: begin")
        self._open = phase, time.perf_counter(), self.waited()

    def stop(self) -> None:
        """The last phase ends. A GPU is waited for, so that its work counts where it belongs."""
        if self._open is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        phase, begin, waited = self._open
        self._open = None
        spent = Spent(time.perf_counter() - begin, self.waited() - waited)
        self.spent[phase] = self.spent.get(phase, Spent(0.0, 0.0)) + spent
        if self.log is not None:
            self.log.line(f"phase {phase}: end after {spent.seconds:.3f} s, {spent.waiting:.3f} of them in collectives")

    def take(self) -> dict[str, Spent]:
        """What was spent since the last call."""
        self.stop()
        found, self.spent = self.spent, {}
        return found
