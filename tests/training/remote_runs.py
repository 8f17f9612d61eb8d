"""Runs whose reward is on a server, on the ranks of a world."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any


def outcome(arguments: list[str], processes: int) -> dict[str, Any]:
    """Train; metrics, exported weights and the sequence of phases on this rank."""
    from megatron_sage.parallel.control import Control
    from tests.training import stops, world

    phases: list[str] = []

    def entered(original: Any, control: Any, phase: str) -> None:
        if not phases or phases[-1] != phase:
            phases.append(phase)
        original(control, phase)

    with stops.patched(Control, "enter", entered):
        found = world.train_job(arguments, processes)
    return found | {"phases": phases}


def stop_while_waiting(arguments: list[str], processes: int, asked: str) -> dict[str, Any]:
    """Train; every rank gets SIGTERM once the file `asked` says that a server holds a request. (status, seconds after).

    Every rank, as torchrun and Slurm do it: one that waits in a collective for the rank whose answer is held would
    handle a signal of its own only when that ends.
    """
    from tests.training import stops

    sent: list[float] = []

    def send() -> None:
        while not Path(asked).exists():
            time.sleep(0.02)
        time.sleep(0.5)  # by now the run does nothing but wait
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    status = stops.run(arguments, processes)
    return {"status": status, "seconds": time.monotonic() - sent[0] if sent else None}


def refused(arguments: list[str], processes: int) -> dict[str, Any]:
    """Train; the one line in which the run ends, and its metrics."""
    from megatron_sage.config import load_config
    from megatron_sage.errors import UserError
    from tests.training import stops

    file = Path(load_config(None, arguments).output_dir) / "metrics.jsonl"
    try:
        stops.run(arguments, processes)
    except UserError as error:
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {"said": str(error), "rows": rows}
    raise AssertionError("the run has not ended by an error")
