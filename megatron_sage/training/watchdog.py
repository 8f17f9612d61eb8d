"""Who stalls, and where: every rank's place goes through the store, one rank looks at all of them.

A thread of each process does it. Where the main thread waits in a collective for ever, the thread still runs; it uses
a connection to the store of its own. It also spreads what every rank must know soon: that one got a stop signal, and
that one has failed, so that none waits for a rank that is gone.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_sage.errors import FAULT, STALLED
from megatron_sage.monitoring.heartbeat import Heartbeat
from megatron_sage.parallel.control import Control
from megatron_sage.training.stalls import Beat, Watch, place

INTERVAL = 2.0  # seconds between two beats, at most
GRACE = 10.0  # seconds in which a rank may end by itself after another has failed


class Watchdog:
    """The thread of this rank. Ranks 0 and 1 look at all; rank 1 is there for a rank 0 that is dead or frozen."""

    def __init__(
        self,
        control: Control,
        rank: int,
        world_size: int,
        stall_seconds: float | None,
        directory: Path,
        on_stall: Callable[[str], None],
    ) -> None:
        """`on_stall`: called with the reason on the rank that finds it. All ranks call, at the same place."""
        self.control, self.rank, self.world_size, self.directory = control, rank, world_size, directory
        self.on_stall = on_stall
        self.interval = min(INTERVAL, (stall_seconds or 10 * INTERVAL) / 10)
        limit = stall_seconds if rank == 0 or stall_seconds is None else 1.25 * stall_seconds
        self.watch = Watch(limit, self.interval) if limit is not None and rank < 2 else None
        store = _get_default_store().clone()  # type: ignore[attr-defined]  # a connection of its own, which no wait blocks
        # more than one run may go over one store: each has keys of its own
        self.store = dist.PrefixStore(f"watchdog{(store.add('watchdogs', 1) - 1) // world_size}", store)
        self._main = threading.main_thread().ident
        self._host, self._beats, self._told = socket.gethostname(), 0, False
        self._heartbeat = Heartbeat(directory) if rank == 0 else None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._beat()
        dist.barrier(group=dist.group.WORLD)  # from now on every rank's key can be read without waiting
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(timeout=GRACE)  # a daemon: a store that does not answer must not hold the run's end

    def fail(self, reason: str) -> None:
        """This rank leaves by an error: the others must not wait for it."""
        self._end("failed", reason)

    def _run(self) -> None:
        try:
            while not self._closing.wait(self.interval):
                self._beat()
                self._spread_signal()
                if self.store.check(["end"]):
                    self._leave(**json.loads(self.store.get("end")))
                    return
                if self.watch is not None:
                    self._look(self.watch)
        except RuntimeError as error:  # the store went with its process: a launcher ends the others
            if not self._closing.is_set():
                _say(f"watchdog of rank {self.rank}: the store is gone ({str(error).splitlines()[0]})")

    def _beat(self) -> None:
        self._beats += 1
        frame = sys._current_frames().get(self._main or 0)
        where, waits = place(frame)
        control = self.control
        beat = Beat(
            self.rank,
            self._beats,
            control.total,
            control.phase,
            control.iteration,
            control.step,
            where,
            waits,
            f"{self._host}:{os.getpid()}",
        )
        self.store.set(f"beat/{self.rank}", json.dumps(beat))
        if self._heartbeat is not None:
            self._heartbeat.beat(control)

    def _spread_signal(self) -> None:
        if self._told:
            return
        if self.store.check(["signal"]):
            number = int(self.store.get("signal"))
            self.control.signal, self._told = self.control.signal or number, True
        elif self.control.signal:
            self.store.set("signal", str(self.control.signal))
            self._told = True

    def _look(self, watch: Watch) -> None:
        keys = [f"beat/{rank}" for rank in range(self.world_size)]
        beats = [Beat(*json.loads(text)) for text in self.store.multi_get(keys)]
        report = watch.look(beats, time.monotonic())
        if report is None:
            return
        folder = self._dump_stack()
        (folder / "report.txt").write_text(report.text + "\n")
        _say(f"{report.text}\nstacks of all ranks whose interpreter still runs: {folder}")
        self.on_stall(report.reason)
        self._end("stalled", report.reason)
        time.sleep(2 * self.interval + 0.5)  # the others write their stacks before torchrun ends them
        os._exit(STALLED)  # the main thread waits in a collective that does not come back

    def _end(self, kind: str, reason: str) -> None:
        if not self.store.check(["end"]):  # what follows the first end is its consequence
            self.store.set("end", json.dumps({"kind": kind, "rank": self.rank, "reason": reason}))

    def _leave(self, kind: str, rank: int, reason: str) -> None:
        """Another rank has ended the run (or this one: then there is nothing to do)."""
        if rank == self.rank:
            return
        if kind == "stalled":
            self._dump_stack()
            os._exit(STALLED)
        elif not self._closing.wait(GRACE):  # it waits for the rank that is gone
            _say(f"rank {self.rank}: ends, for rank {rank} has failed: {reason}")
            os._exit(FAULT)

    def _dump_stack(self) -> Path:
        folder = self.directory / "stalls"
        folder.mkdir(exist_ok=True)
        with (folder / f"rank_{self.rank}.txt").open("w") as out:
            faulthandler.dump_traceback(out, all_threads=True)
        return folder


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def _say(text: Any) -> None:
    os.write(2, f"{text}\n".encode())
