"""Seconds that this process' main thread waits inside collectives: a rank's time without them compares.

In a synchronous program every rank of a group takes as long as the slowest one: the others wait for it inside the next
collective. Their seconds are equal, what they computed in them is not.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class Waiting:
    """`seconds` spent in collectives so far, transfers included; counted inside `counted()` alone.

    Every call of torch.distributed that is not asynchronous ends in `Work.wait`, and so does an asynchronous one when
    its result is needed. Over gloo that is where the thread waits. Over NCCL `wait` only orders streams and returns at
    once: there what is seen is the agreements of `parallel.control`, which are gloo's.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counted(self) -> Iterator["Waiting"]:
        """Inside the block; may not be nested."""
        original: Any = dist.Work.wait
        main = threading.get_ident()

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(work, *args, **kwargs)
            finally:
                if threading.get_ident() == main:
                    self.seconds += time.perf_counter() - begin

        dist.Work.wait = wait  # type: ignore[method-assign, assignment]
        try:
            yield self
        finally:
            dist.Work.wait = original  # type: ignore[method-assign]
