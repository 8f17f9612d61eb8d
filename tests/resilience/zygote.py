"""Runs that can be killed: one process imports everything once and forks a child for each run.

A start from nothing costs ten seconds of imports; twenty kills would cost minutes of them.

    python -m tests.resilience.zygote        reads {"arguments": [...], "ranks": n, "port": p} a line, answers
                                             {"pids": [...]} at once and {"statuses": [...]} when all have ended

"arguments" are those of `train`; with "log", a file for the output, they are a whole command line.
"""

import contextlib
import json
import os
import sys
import traceback
from typing import Any


def _child(arguments: list[str], rank: int, ranks: int, port: int, log_file: str | None) -> int:
    """One rank of a run, to its end. Its output goes to a file in the run's directory, as a terminal's would."""
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from megatron_sage.__main__ import main

    if log_file is None:
        directory = next(a.partition("=")[2] for a in arguments if a.startswith("output_dir="))
        arguments, log_file = ["train", *arguments], f"{directory}.log"
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return main(arguments)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)  # and no thread pool that a fork would lose
    from megatron_sage.evaluation import command  # noqa: F401
    from megatron_sage.training import run  # noqa: F401
    from tests.training import world  # noqa: F401

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    status = _child(job["arguments"], rank, job["ranks"], job["port"], job.get("log"))
                except BaseException:
                    traceback.print_exc()
                finally:
                    with contextlib.suppress(Exception):
                        sys.stdout.flush()
                    os._exit(status)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"statuses": statuses}), flush=True)


if __name__ == "__main__":
    _serve()
