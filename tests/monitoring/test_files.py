"""Status lines, logs, charts and numbers out of files and tables made here: no training."""

import json
import logging
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.config import Config
from megatron_sage.config.logging_rules import check_logging
from megatron_sage.errors import UserError
from megatron_sage.monitoring import peak, status
from megatron_sage.monitoring.performance import COLUMNS, performance, scalars, stragglers
from megatron_sage.monitoring.phases import PHASES, PhaseClock
from megatron_sage.monitoring.rank_log import RankLog
from megatron_sage.monitoring.writers import TensorBoard, WeightsAndBiases, finite

NOW = 1_700_000_000.0


def tables(ranks: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.uniform(1, 2, (ranks, len(PHASES), COLUMNS))
    found[:, :, 1] = 0.25 * found[:, :, 0]
    return found


@pytest.mark.parametrize(("ranks", "seed"), [(1, 0), (2, 1), (5, 2), (64, 3)])
def test_the_slowest_rank_is_the_one_that_computed_longest(ranks: int, seed: int) -> None:
    found, rng = tables(ranks, seed), np.random.default_rng(seed)
    late, phase = int(rng.integers(ranks)), int(rng.integers(len(PHASES)))
    found[:, phase, 0] = 9.0  # all take as long as the slowest one ...
    found[:, phase, 1] = 6.0
    found[late, phase, 1] = 1.0  # ... which waits least
    row = stragglers(found, [f"host{rank // 4}" for rank in range(ranks)])
    one = row["phases"][PHASES[phase]]
    assert one["slowest_rank"] == late and one["host"] == f"host{late // 4}"
    assert one["busy_seconds"] == 8.0 and one["median_of_the_others"] == (3.0 if ranks > 1 else 8.0)
    assert row["worst"]["phase"] == PHASES[phase] or ranks == 1


def test_utilisation_is_over_all_ranks_and_only_with_a_peak() -> None:
    found = tables(3, 7)
    row = performance(found, 10.0, 12, 5e11)
    assert row["mfu"] == pytest.approx(found[:, :, 2].sum() / (3 * 5e11 * 10))
    train = PHASES.index("train")
    seconds = found[:, train, 0].max()
    assert row["phases"]["train"]["hfu"] == pytest.approx(found[:, train, 3].sum() / (3 * 5e11 * seconds))
    assert row["videos_per_hour"] == pytest.approx(12 * 360)
    plain = performance(found, 10.0, 12, None)
    assert not any("fu" in key.split("/")[-1] for key in scalars(plain)), "no number is made up without a peak"
    assert scalars(row)["performance/train/hfu"] == row["phases"]["train"]["hfu"]


def test_a_phase_that_is_entered_again_goes_on() -> None:
    clock, waited = PhaseClock(lambda: waited[0]), [0.0]
    for phase in ("train", "optimizer", "train", "train"):
        clock.enter(phase)
        time.sleep(0.01)
        waited[0] += 0.004
    found = clock.take()
    assert set(found) == {"train", "optimizer"} and clock.take() == {}
    assert found["train"].seconds >= 0.03 and found["train"].waiting == pytest.approx(0.012)


def test_peaks_are_those_of_data_sheets_or_none() -> None:
    assert peak.peak_of("NVIDIA H200") == pytest.approx(989.4e12)
    assert peak.peak_of("NVIDIA H100 80GB HBM3") is not None and peak.peak_of("NVIDIA B200") is not None
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA H20", "Tesla T4"):
        assert peak.peak_of(other) is None, other
    assert peak.peak_flops(2.5)[0] == 2.5e12


def test_a_log_collects_warnings_and_leaves_python_as_it_was(tmp_path: Path) -> None:
    before, handlers = warnings.showwarning, list(logging.getLogger().handlers)
    log = RankLog(tmp_path, 13)
    with log.collecting(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("a\nwarning", UserWarning, "file.py", 7)
        logging.getLogger("library").warning("of %d", 3)
        logging.getLogger("library").info("not this")
    log.close()
    assert warnings.showwarning is before and logging.getLogger().handlers == handlers
    lines = (tmp_path / "logs" / "rank_0013.log").read_text().splitlines()
    assert "begin: rank 13" in lines[0] and lines[1].endswith("warning UserWarning: a warning (file.py:7)")
    assert lines[2].endswith("warning library: of 3") and len(lines) == 3


def run_directory(root: Path, state: str, beat: float, moved: float, rows: int = 12) -> Path:
    """A run of 100 iterations, each 30 s but for one, `beat` and `moved` seconds before NOW."""
    (root / "checkpoints" / "iteration_000010").mkdir(parents=True)
    (root / "checkpoints" / ".iteration_000012.partial").mkdir()
    (root / "config.yaml").write_text("name: long\ntraining: {iterations: 100, stall_seconds: 1800}\n")
    lines = [{"iteration": i, "reward/mean": i / 8, "seconds/total": 300 if i == 7 else 30} for i in range(rows)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"iteration": 12, "re')
    (root / "status.json").write_text(json.dumps({"state": state, "reason": "reward failed\nbadly"}))
    content = {"time": NOW - beat, "moved": NOW - moved, "phase": "rollout", "step": 31, "iteration": 12}
    (root / "heartbeat.json").write_text(json.dumps(content | {"host": "node7", "pid": 5}))
    return root


@pytest.mark.parametrize(
    ("state", "beat", "moved", "expected", "text"),
    [
        ("running", 3, 40, "running", "alive in rollout, micro-step 31"),
        ("running", 3, 400, "stalled", "no progress since"),
        ("running", 500, 500, "gone", "no sign of life since"),
        ("failed", 500, 500, "failed", "reward failed badly"),
        ("stopped", 500, 500, "stopped", "stopped"),
    ],
)
def test_status_says_whether_a_run_lives(
    tmp_path: Path, state: str, beat: float, moved: float, expected: str, text: str
) -> None:
    found = status.examine(run_directory(tmp_path, state, beat, moved), NOW)
    shown = status.line(found)
    assert found["state"] == expected and text in shown and "\n" not in shown
    assert "iteration 12/100" in shown and "reward 1.3750" in shown and "30.0 s/it" in shown
    assert "last checkpoint 10," in shown
    assert ("ETA 44 min" in shown) == (state == "running")
    code = status.main([str(tmp_path), "--stalled-after", "1e12", "--json"])
    assert code == (1 if state in ("running", "failed") else 0), "seen from today, the process is long gone"


def test_status_is_said_without_importing_torch(tmp_path: Path) -> None:
    from megatron_sage.training import status as written

    assert (status.STATUS, status.RUNNING, status.FAILED) == (written.FILE, written.RUNNING, written.FAILED)
    code = "import sys, megatron_sage.monitoring.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_status_of_what_is_no_run_or_has_just_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        status.examine(tmp_path, NOW)
    (tmp_path / "config.yaml").write_text("name: new\ntraining: {iterations: 5}\n")
    assert status.line(status.examine(tmp_path, NOW)) == "new: not started  iteration 0/5  no checkpoint"


@pytest.mark.parametrize(
    ("wandb", "message"),
    [
        ({"projet": "x"}, "logging.wandb.projet: unknown key; did you mean project?"),
        ({"name": "x"}, "project is missing"),
        ({"project": 3}, "logging.wandb.project=3: expects text"),
        ({"project": "x", "tags": "a"}, "expects a list of texts"),
    ],
)
def test_wandb_settings_are_checked(wandb: dict[str, Any], message: str) -> None:
    config = Config()
    config.logging.wandb = wandb
    with pytest.raises(UserError) as error:
        check_logging(config)
    assert message in str(error.value)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.logging.wandb = {"project": "x"}
    monkeypatch.setattr("megatron_sage.config.logging_rules.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'megatron-sage\[wandb\]'"):
        check_logging(config)
    config.logging.tensorboard = True
    with pytest.raises(UserError, match="logging.tensorboard=true"):
        check_logging(config)


def test_tensorboard_forgets_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((0, 5, 1.0), (3, 7, 2.0)):  # killed after five iterations, resumed from the third
        writer = TensorBoard(tmp_path / "tensorboard", first)
        for step in range(first, last):
            writer.write(step, {"x": value})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("x")
    assert [(event.step, event.value) for event in events] == [(i, 1.0 if i < 3 else 2.0) for i in range(7)]


def test_charts_get_finite_numbers() -> None:
    assert finite({"a": 1, "b": float("nan"), "c": "text", "d": True, "e": 0.5}) == {"a": 1.0, "e": 0.5}


def records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format, in which W&B keeps what it will upload: blocks of 32 KiB, each record's checksum, length
    and kind (1: whole; 2, 3, 4: first, middle and last part) before it; seven bytes of W&B's own come first.
    """
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        data, place = content[place + 7 : place + 7 + length], place + 7 + length
        parts = data if kind in (1, 2) else parts + data
        if kind in (1, 4):
            yield parts


def logged(directory: Path) -> list[tuple[str, int, dict[str, float]]]:
    """(file, step, numbers) of everything in the offline files, the oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                found.append((path.stem, record.history.step.num, items))
    return found


def test_wandb_offline_gets_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = Config(name="chart")
    config.logging.wandb = {"project": "sage", "tags": ["tiny"]}
    for first, last in ((0, 4), (2, 6)):
        writer = WeightsAndBiases(config, tmp_path)
        for step in range(first, last):
            writer.write(step, {"reward/mean": step / 4})
        writer.close()
        time.sleep(1.1)  # W&B names a process' folder by the second
    found = logged(tmp_path)
    assert [step for _, step, _ in found] == [0, 1, 2, 3, 4, 5]
    assert [items["reward/mean"] for _, _, items in found] == [step / 4 for step in range(6)]
    assert len({name for name, _, _ in found}) == 1, "one run, whose id is in wandb.json"
    assert json.loads((tmp_path / "wandb.json").read_text())["next"] == 6
