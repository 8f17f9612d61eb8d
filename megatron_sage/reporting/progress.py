"""Progress on the terminal of rank 0; silent elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Bars for what runs, lines for what is done; on a file or a pipe only the lines."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self.console = Console(highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """One finished line."""
        if self.active:
            self.console.print(text, markup=False)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator["Bar"]:
        """A bar of `total` ticks that disappears when it is done."""
        if not (self.active and self.console.is_terminal):
            yield Bar(None)
            return
        columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            progress.add_task(label, total=total)
            yield Bar(progress)


class Bar:
    """Call it for each finished piece of work, or with their number."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def __call__(self, count: int = 1) -> None:
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], count)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers' bar while weights are loaded, once for every rank, would only garble the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
