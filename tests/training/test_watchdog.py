"""A rank that stalls is named, with its phase and its stack, and the run ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sage.training.stalls import Beat, Watch, place, ranks_text
from tests.parallel.pool import run_on_ranks
from tests.training import stops

REPOSITORY = Path(__file__).parents[2]


def beat(rank: int, beats: int, total: int, phase: str = "train", waits: bool = False) -> Beat:
    return Beat(rank, beats, total, phase, 4, total, "some.py:1 f", waits, f"host:{rank}")


def test_the_rank_that_waits_for_nobody_is_named() -> None:
    watch = Watch(limit=10.0, interval=1.0)
    for second in range(30):
        beats = [beat(0, second, 7, "reward", waits=True), beat(1, second, 7, "reward")]
        report = watch.look(beats, float(second))
        assert (report is None) == (second <= 10)
    assert report is not None and report.reason.startswith("rank 1 is behind: phase reward, iteration 4")
    assert "waits for others" in report.text


def test_of_several_the_one_with_least_progress() -> None:
    watch = Watch(limit=10.0, interval=1.0)
    for second in range(12):
        report = watch.look([beat(rank, second, total) for rank, total in enumerate((9, 8, 5, 8))], float(second))
    assert report is not None and report.reason.startswith("rank 2 is behind")
    assert len(report.text.splitlines()) == 5, "equal ranks share a line"


def test_a_process_that_gives_no_sign_of_life_is_the_culprit() -> None:
    watch = Watch(limit=10.0, interval=1.0)
    for second in range(12):
        report = watch.look([beat(0, second, 3), beat(1, min(second, 2), 9), beat(2, second, 2)], float(second))
    assert report is not None and report.reason.startswith("rank 1 gives no sign of life")


def test_waiting_for_a_slow_rank_that_advances_is_no_stall() -> None:
    watch = Watch(limit=10.0, interval=1.0)
    for second in range(100):
        assert watch.look([beat(0, second, 5, waits=True), beat(1, second, second // 8)], float(second)) is None


def test_all_waiting_is_a_stall() -> None:
    watch = Watch(limit=10.0, interval=1.0)
    reports = [watch.look([beat(0, s, 5, waits=True), beat(1, s, 4, waits=True)], float(s)) for s in range(13)]
    assert reports[10] is None and reports[11] is not None and reports[11].reason.startswith("rank 1 is behind")


def test_ranks_are_written_as_ranges() -> None:
    assert ranks_text([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8" and ranks_text([3]) == "3"


def test_a_place_is_the_innermost_frame_outside_torch() -> None:
    import inspect

    where, waits = place(inspect.currentframe())
    assert where.startswith("training/test_watchdog.py:") and where.endswith("innermost_frame_outside_torch")
    assert not waits and place(None) == ("no main thread", False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


HANGS = {"reward.function": "tests.training.stall_rewards:HangingReward"}


def hang(arguments: list[str], directory: Path) -> list[tuple[int, dict[str, Any]]]:
    """(exit status, status.json then) that the watchdog would have ended this process with; a worker must live on."""
    from megatron_sage.training import watchdog
    from megatron_sage.training.status import read_status

    left: list[tuple[int, dict[str, Any]]] = []

    def leave(code: int) -> None:
        left.append((code, read_status(directory)))

    def look(original: Any, watch: Watch, beats: list[Beat], now: float) -> Any:
        # before that, a busy machine may take longer than the test's few seconds
        return original(watch, beats, now) if all(one.phase == "reward" for one in beats) else None

    os.environ["TEST_RUN"] = str(directory)
    original, watchdog.os._exit = watchdog.os._exit, leave  # type: ignore[assignment]
    try:
        with stops.patched(Watch, "look", look):
            stops.run(arguments, 2)
    finally:
        watchdog.os._exit = original
        del os.environ["TEST_RUN"]
    return left


def test_a_rank_that_hangs_in_its_reward_is_reported(root: Path) -> None:
    changes = {**HANGS, "parallel.tensor": 2, "training.stall_seconds": 4.0, "training.iterations": 1}
    arguments = stops.settings(root, "hangs", **changes)
    found = run_on_ranks(2, "tests.training.test_watchdog:hang", arguments=arguments, directory=root / "hangs")
    for left in found:
        assert [code for code, _ in left] == [70]
        check_status(left[0][1])
    check_report(root / "hangs")


def check_report(directory: Path) -> None:
    report = (directory / "stalls" / "report.txt").read_text()
    assert report.startswith("stalled: rank 1 is behind: phase reward, iteration 0"), report
    lines: list[Any] = [line.split() for line in report.splitlines()[2:]]
    assert {line[0]: line[1] for line in lines} == {"0": "reward", "1": "reward"}
    assert "waits for others" in next(line for line in report.splitlines()[2:] if line.startswith("0"))
    assert "stall_rewards.py" in (directory / "stalls" / "rank_1.txt").read_text()


def check_status(status: dict[str, Any]) -> None:
    assert status["state"] == "failed" and status["exit_code"] == 70 and "rank 1" in status["reason"]


@pytest.mark.nightly
def test_a_hanging_run_ends_under_torchrun(root: Path) -> None:
    arguments = stops.settings(root, "torchrun", **HANGS, **{"parallel.tensor": 2, "training.stall_seconds": 30.0})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "-m", "megatron_sage", "train", *arguments],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode != 0 and "exitcode  : 70" in done.stderr.replace("exitcode : 70", "exitcode  : 70")
    check_report(root / "torchrun")
    check_status(json.loads((root / "torchrun" / "status.json").read_text()))
    assert (root / "torchrun" / "stalls" / "report.txt").read_text().splitlines()[0] in done.stderr
