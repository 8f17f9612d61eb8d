"""logs/rank_0000.log: what one rank did and when, for when a run of many ranks ended and nobody saw it."""

import contextlib
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "logs"


class RankLog:
    """Lines `time level text`, appended and flushed; a resumed run goes on in the same file."""

    def __init__(self, directory: Path, rank: int) -> None:
        """`directory`: the run's, which exists. Raises OSError where it cannot be written."""
        folder = directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank_{rank:04d}.log"
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self.line(f"begin: rank {rank}, {socket.gethostname()}, process {os.getpid()}")

    def line(self, text: str, level: str = "info") -> None:
        """One line, whatever is in `text`. A disk that has become full must not end a run that can still compute."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
        try:
            self._file.write(f"{stamp} {level} {' '.join(text.split())}\n")
        except OSError:
            # the line is lost; metrics.jsonl, which a run needs, says so in its own words at the next iteration
            return

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the block Python's warnings and logged warnings of libraries stand in the file as well."""
        shown, handler = warnings.showwarning, _Handler(self)

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            self.line(f"{category.__name__}: {message} ({filename}:{lineno})", "warning")
            shown(message, category, filename, lineno, file, line)

        root = logging.getLogger()
        handlers: list[logging.Handler] = [handler]
        if not root.handlers:  # the first handler of the root ends Python's own output of warnings on stderr
            handlers.append(logging.StreamHandler())
            handlers[-1].setLevel(logging.WARNING)
        for one in handlers:
            root.addHandler(one)
        warnings.showwarning = show
        try:
            yield
        finally:
            if warnings.showwarning is show:
                warnings.showwarning = shown
            for one in handlers:
                root.removeHandler(one)

    def close(self) -> None:
        """No further lines."""
        with contextlib.suppress(
            OSError
        ):  # lines that a full disk did not take: the run's own error must stay the reason
            self._file.close()


class _Handler(logging.Handler):
    def __init__(self, log: RankLog) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.line(f"{record.name}: {record.getMessage()}", record.levelname.lower())
