"""One pool of spawned gloo workers for all multi-process tests: importing torch and megatron costs seconds each time.

    from tests.parallel.pool import run_on_ranks

    def check(rank_offset: int) -> int:                       # importable, module level; runs on every rank
        return torch.distributed.get_rank() + rank_offset

    def test_ranks() -> None:
        assert run_on_ranks(2, "tests.parallel.test_x:check", rank_offset=5) == [5, 6]

Each job gets a torch.distributed world of its own (file store, gloo), which is destroyed behind it together with
Megatron's groups, so a function calls `megatron_sage.parallel.groups.initialize(tensor=...)` itself.
Arguments and results are pickled. An exception of a worker is raised again in the test, its traceback as the cause. A
job that hangs is ended with its workers after `timeout` seconds; the next job starts new ones.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_WORKERS = 8  # `make test` uses up to 4
DEFAULT_TIMEOUT = 120.0


class RemoteTracebackError(Exception):
    """The text of a worker's traceback: the cause of the exception that the test sees."""


def run_on_ranks(world_size: int, function: str, *, timeout: float = DEFAULT_TIMEOUT, **kwargs: Any) -> list[Any]:
    """Run "module.path:function"(**kwargs) on `world_size` ranks and return the results in the order of the ranks.

    Raises:
        ValueError: a world size that the pool does not have.
        TimeoutError: no answer within `timeout` seconds (the workers print their stacks to stderr before they end).
        Exception: whatever the first failing rank raised, with its traceback as the cause.
    """
    if not 1 <= world_size <= MAX_WORKERS:
        raise ValueError(f"world_size {world_size}: the pool has 1 to {MAX_WORKERS} workers")
    return _pool.run(world_size, function, kwargs, timeout)


class WorkerPool:
    """Workers that outlive their jobs. Tests share one, through `run_on_ranks`."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, world_size: int, function: str, kwargs: dict[str, Any], timeout: float) -> list[Any]:
        """See `run_on_ranks`."""
        self._grow(world_size)
        connections = [connection for _, connection in self._workers[:world_size]]
        with tempfile.TemporaryDirectory(prefix="gloo_") as directory:
            for rank, connection in enumerate(connections):
                job = (function, kwargs, world_size, rank, os.path.join(directory, "store"), timeout)
                connection.send_bytes(pickle.dumps(job))
            try:
                return self._collect(connections, function, timeout)
            except (TimeoutError, EOFError, KeyboardInterrupt):
                self.close()
                raise

    def _collect(self, connections: list[Connection], function: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, BaseException, str]] = []
        deadline = time.monotonic() + timeout
        pending = {connection: rank for rank, connection in enumerate(connections)}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._print_stacks()
                raise TimeoutError(f"{function}: ranks {sorted(pending.values())} gave no answer in {timeout:g} s")
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    failed_at, value, text = pickle.loads(connection.recv_bytes())
                except EOFError as error:
                    raise EOFError(f"{function}: the worker of rank {rank} died") from error
                if failed_at is None:
                    results[rank] = value
                else:
                    failures.append((failed_at, rank, value, text))
        if failures:
            # The first one to fail is the reason, the others lost their peer. Arrival does not tell: the machine's
            # monotonic clock, one for all processes, does.
            _, rank, error, text = min(failures, key=lambda failure: failure[0])
            raise error from RemoteTracebackError(f"rank {rank} of {function}:\n{text}")
        return [results[rank] for rank in range(len(connections))]

    def _grow(self, size: int) -> None:
        if any(not process.is_alive() for process, _ in self._workers):
            self.close()
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"):
                process.start()
            theirs.close()  # else a dead worker would not show up as the end of file
            self._workers.append((process, ours))

    def _print_stacks(self) -> None:
        for process, _ in self._workers:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1.0)

    def close(self) -> None:
        """End all workers."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection) -> None:
    """A worker's life: one job after the other, until the parent closes the pipe or dies."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _end_with_parent()
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(_answer(*job))


def _end_with_parent() -> None:
    """Inside a collective nobody reads the pipe: a thread notices that the parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _answer(
    function: str, kwargs: dict[str, Any], world_size: int, rank: int, store_file: str, timeout: float
) -> bytes:
    import torch.distributed as dist

    try:
        target = _resolve(function)
        store = dist.FileStore(store_file, world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
    except BaseException as error:
        return _pickled_error(error)
    try:
        answer = pickle.dumps((None, target(**kwargs), ""))
    except BaseException as error:  # the test has to learn of everything, SystemExit included
        answer = _pickled_error(error)
    _leave_world()
    return answer


def _leave_world() -> None:
    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        from megatron_sage.parallel.groups import shutdown

        shutdown()
    # after an exception this also frees the other ranks: their collective ends with "connection closed by peer"
    dist.destroy_process_group()
    gc.collect()  # groups in circles of references keep their threads


def _resolve(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _pickled_error(error: BaseException) -> bytes:
    failed_at, text = time.monotonic(), traceback.format_exc()
    try:
        payload = pickle.dumps((failed_at, error, text))
        pickle.loads(payload)  # some exceptions pickle but cannot be built again
        return payload
    except Exception:
        return pickle.dumps((failed_at, RuntimeError(f"{type(error).__name__}: {error}"), text))


_pool = WorkerPool()
atexit.register(_pool.close)
