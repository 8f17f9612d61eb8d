"""kill -9 at random moments, saving included: never a lost or half checkpoint, always a resume, the same run."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_sage.checkpoint.store import complete
from megatron_sage.checkpoint.torch_dist import verify_files
from tests.disk import small_disk
from tests.training import world

ITERATIONS = 5
ROOT = Path(__file__).parents[2]


class Runs:
    """The zygote, and what it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.resilience.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the zygote died"
        return json.loads(line)

    def start(self, name: str, ranks: int = 1, **changes: Any) -> list[int]:
        return self._start(world.overrides(world.settings(self.root, name, **BASE | changes)), ranks)

    def start_command(self, arguments: list[str], ranks: int, log: Path) -> list[int]:
        """Any command line; its output goes to `log`."""
        return self._start(arguments, ranks, str(log))

    def _start(self, arguments: list[str], ranks: int, log: str | None = None) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"arguments": arguments, "ranks": ranks, "port": port, "log": log}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()["pids"]

    def wait(self) -> list[int]:
        return self._answer()["statuses"]


# every kind of state there is: dual KL with an anchor that is refreshed within the run, adaptive lambda, two updates
BASE = {
    "training.iterations": ITERATIONS,
    "training.save_interval": 1,
    "training.keep_last": 2,
    "training.resume": "auto",
    "kl.warmup_steps": 2,
    "kl.anchor_interval": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("kills")
    world.build(root)
    found = Runs(root)
    yield found
    found.process.kill()
    found.process.wait()


def result(directory: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]
    return rows, load_file(directory / "export" / "transformer" / "diffusion_pytorch_model.safetensors")


def finish(runs: Runs, name: str, ranks: int = 1, **changes: Any) -> float:
    begin = time.monotonic()
    runs.start(name, ranks, **changes)
    assert runs.wait() == [0] * ranks, (runs.root / f"{name}.log").read_text()[-3000:]
    return time.monotonic() - begin


def kill(
    runs: Runs, pids: list[int], directory: Path, moment: float, in_save: float | None, victims: list[int]
) -> bool:
    """Wait for the moment (seconds), or for a save and then `in_save` seconds; False: the run ended before."""
    deadline = time.monotonic() + (60.0 if in_save is not None else moment)
    checkpoints = directory / "checkpoints"
    while time.monotonic() < deadline:
        if in_save is not None and any(checkpoints.glob(".iteration_*.partial")):
            time.sleep(in_save)
            break
        if not Path(f"/proc/{pids[0]}").exists() or _ended(pids[0]):
            break
        time.sleep(0.0005)
    for number in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[number], signal.SIGKILL)
    time.sleep(0.05)
    for pid in pids:  # as a launcher does when one has died
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return -signal.SIGKILL in runs.wait()


def _ended(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def killed_runs(runs: Runs, kills: int, ranks: int, seed: int, **layout: Any) -> dict[str, int]:
    chance = random.Random(seed)
    whole, name = f"whole{ranks}", f"killed{ranks}"
    seconds = finish(runs, whole, ranks, **layout)
    rows, weights = result(runs.root / whole)
    directory, seen, counts = runs.root / name, 0, {"kills": 0, "in save": 0, "finished": 0}
    while counts["kills"] < kills:
        changes = {"training.async_save": bool(chance.getrandbits(1))} | layout
        pids = runs.start(name, ranks, **changes)
        in_save = chance.uniform(0, 0.05) if chance.random() < 0.5 else None
        victims = [chance.randrange(ranks)]
        if kill(runs, pids, directory, chance.uniform(0, seconds), in_save, victims):
            counts["kills"] += 1
            counts["in save"] += any((directory / "checkpoints").glob(".iteration_*"))
        visible = complete(directory / "checkpoints")
        for path in visible:
            verify_files(path)
        newest = int(visible[-1].name[-6:]) if visible else 0
        assert newest >= seen, "a checkpoint was lost"
        seen = newest
        if newest == ITERATIONS or counts["kills"] == kills:
            finish(runs, name, ranks, **layout)  # whatever state it is in, it goes on
            found_rows, found_weights = result(directory)
            assert found_rows == rows
            assert all(np.array_equal(found_weights[key], weights[key]) for key in weights)
            counts["finished"] += 1
            shutil.rmtree(directory)
            seen = 0
    return counts


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_kills(runs: Runs, kills: int) -> None:
    counts = killed_runs(runs, kills, 1, seed=kills)
    assert counts["in save"] >= kills // 8 and counts["finished"] >= 1, counts


@pytest.mark.nightly
def test_kills_of_one_of_two_ranks(runs: Runs) -> None:
    layout = {"parallel.tensor": 2, "optimizer.distributed": False}
    counts = killed_runs(runs, 10, 2, seed=8, **layout)
    assert counts["in save"] >= 1 and counts["finished"] >= 1, counts


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(runs: Runs) -> None:
    finish(runs, "sound")
    finish(runs, "damaged", **{"training.iterations": 3})
    directory = runs.root / "damaged"
    newest, older = (directory / "checkpoints" / f"iteration_{n:06d}" for n in (3, 2))
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 1
    data.write_bytes(content)
    runs.start("damaged")
    assert runs.wait() == [2]
    last = (runs.root / "damaged.log").read_text().splitlines()[-1]
    assert last.startswith("error: ") and "damaged: checksum" in last and "then iteration_000002 is the newest" in last
    assert older.is_dir() and newest.is_dir()  # nothing is removed behind anybody's back
    shutil.rmtree(newest)
    finish(runs, "damaged")
    rows, weights = result(runs.root / "sound")
    found_rows, found_weights = result(directory)
    assert found_rows == rows and all(np.array_equal(found_weights[key], weights[key]) for key in weights)


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_with_space(runs: Runs) -> None:
    """Room for one checkpoint and a half."""
    finish(runs, "roomy")
    runs.start("full", **{"training.iterations": 1})
    assert runs.wait() == [0]
    size = sum(file.stat().st_size for file in (runs.root / "full" / "checkpoints" / "iteration_000001").iterdir())
    shutil.rmtree(runs.root / "full")
    with small_disk(runs.root / "full", f"{size * 3 // 2 // 1024}k"):
        for attempt in range(2):  # and the second one fails like the first, with nothing lost
            runs.start("full", **{"training.async_save": bool(attempt)})
            assert runs.wait() == [2]
            last = (runs.root / "full.log").read_text().splitlines()[-1]
            assert last.startswith("error: ") and "No space left on device" in last, last
            (only,) = (runs.root / "full" / "checkpoints").iterdir()
            verify_files(only)
            assert only.name == "iteration_000001"
        subprocess.run(["mount", "-o", "remount,size=1g", str(runs.root / "full")], check=True)
        finish(runs, "full")
        rows, weights = result(runs.root / "roomy")
        found_rows, found_weights = result(runs.root / "full")
        assert found_rows == rows and all(np.array_equal(found_weights[key], weights[key]) for key in weights)
        subprocess.run(["mount", "-o", "remount,ro", str(runs.root / "full")], check=True)
        runs.start("full", **{"training.iterations": ITERATIONS + 1})
        assert runs.wait() == [2]
        last = (runs.root / "full.log").read_text().splitlines()[-1]
        assert last.startswith("error: output_dir=") and "Read-only file system" in last, last
