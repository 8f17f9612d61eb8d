"""Progress of long file operations: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def byte_progress(label: str, total: int, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields `advance(nbytes)`. Without a terminal prints a line to stderr for each quarter done."""
    if not enabled:
        yield lambda nbytes: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda nbytes: bar.advance(task, nbytes)
    else:
        yield _quarters(label, total)


def _quarters(label: str, total: int) -> Callable[[int], None]:
    done = shown = 0

    def advance(nbytes: int) -> None:
        nonlocal done, shown
        done += nbytes
        quarter = 4 * done // max(total, 1)
        if quarter > shown:
            shown = quarter
            print(f"{label}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)

    return advance
