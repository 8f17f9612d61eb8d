"""A run that is watched: real processes, a rank that is slow on purpose, files that a resumed run goes on in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.monitoring import status
from tests.parallel.pool import run_on_ranks
from tests.training import world

PEAK = 0.02  # TFLOPS
SLEEP = 0.04


def rows_of(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def settings(root: Path, name: str, **changes: Any) -> list[str]:
    base = {"logging.peak_tflops": PEAK, "kl.velocity_weight": 0.1, "training.iterations": 2}
    return world.overrides(world.settings(root, name, **(base | changes)))


@pytest.fixture(scope="module")
def slow(root: Path) -> Path:
    """TP = 2: both ranks take as long as rank 1, which sleeps in every forward of the rollout. One more follows."""
    changes = {"parallel.tensor": 2, "logging.tensorboard": True, "training.save_interval": 1}
    late = {"rank": 1, "phase": "rollout", "seconds": SLEEP}
    run_on_ranks(2, "tests.monitoring.jobs:run", arguments=settings(root, "slow", **changes), processes=2, **late)
    changes |= {"training.iterations": 3, "training.resume": "yes"}
    run_on_ranks(2, "tests.monitoring.jobs:run", arguments=settings(root, "slow", **changes), processes=2)
    return root / "slow"


def test_the_slow_rank_of_a_tensor_parallel_group_is_named(slow: Path) -> None:
    rows = rows_of(slow, "stragglers.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    forwards = 4 * 4 * 2  # micro-batches, steps, branches
    for row in rows[:2]:
        found = row["phases"]["rollout"]
        assert found["slowest_rank"] == 1 and found["host"]
        assert found["excess_seconds"] == pytest.approx(forwards * SLEEP, rel=0.4)
        # wall seconds would not have told: both ranks of the group took as long
        assert found["seconds"][0] == pytest.approx(found["seconds"][1], rel=0.1)
        assert row["worst"]["phase"] == "rollout" and row["worst"]["slowest_rank"] == 1
    assert abs(rows[2]["phases"]["rollout"]["excess_seconds"]) < 0.5 * forwards * SLEEP, "nobody slept in the third"


def test_throughput_follows_from_what_was_done(slow: Path) -> None:
    metrics = rows_of(slow, "metrics.jsonl")
    for row, found in zip(metrics, rows_of(slow, "performance.jsonl"), strict=True):
        assert not any("mfu" in key or "performance" in key for key in row), "metrics.jsonl holds what resumes exactly"
        assert found["videos_per_hour"] == pytest.approx(8 * 3600 / row["seconds/total"])
        assert found["mfu"] == pytest.approx(found["model_tflop"] / (row["seconds/total"] * 2 * PEAK))
        assert 0 < found["mfu"] < found["hfu"]
        assert set(found["phases"]) >= {"rollout", "decode", "reward", "reference", "train", "optimizer"}
        train, rollout = found["phases"]["train"], found["phases"]["rollout"]
        # as many forwards in both (4 steps, all trained), and a backward of twice that
        assert train["model_tflop"] == pytest.approx(3 * rollout["model_tflop"])
        assert found["phases"]["reference"]["model_tflop"] == pytest.approx(rollout["model_tflop"])
        assert rollout["mfu"] == pytest.approx(rollout["model_tflop"] / (rollout["seconds"] * 2 * PEAK), rel=1e-3)
        total = sum(phase["seconds"] for name, phase in found["phases"].items() if name != "save")
        assert total == pytest.approx(row["seconds/total"], rel=0.25)


def test_tensorboard_holds_each_iteration_once_after_a_resume(slow: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(slow / "tensorboard")).Reload()
    rewards = events.Scalars("reward/mean")
    assert [event.step for event in rewards] == [0, 1, 2]
    expected = [row["reward/mean"] for row in rows_of(slow, "metrics.jsonl")]
    assert [event.value for event in rewards] == pytest.approx(expected, rel=1e-6)
    assert {"performance/mfu", "performance/rollout/mfu", "stragglers/rollout/rank"} <= set(events.Tags()["scalars"])


def test_every_rank_has_a_log_with_its_phases(slow: Path) -> None:
    for rank in range(2):
        text = (slow / "logs" / f"rank_{rank:04d}.log").read_text()
        assert text.count(f"begin: rank {rank}, ") == 2, "the resumed run goes on in the same file"
        assert text.count("phase rollout: begin") == text.count("phase rollout: end after") == 3
        assert "iteration 2: done in" in text and text.rstrip().endswith("info end")
    warnings = [line for line in (slow / "logs" / "rank_0000.log").read_text().splitlines() if " warning " in line]
    assert any("slowest in rollout: rank 1" in line for line in warnings)


def test_status_of_the_finished_run_is_one_line(slow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(slow)]) == 0
    text = capsys.readouterr().out
    reward = rows_of(slow, "metrics.jsonl")[-1]["reward/mean"]
    assert text.count("\n") == 1 and "finished" in text and "iteration 3/3" in text and f"{reward:.4f}" in text
    assert "last checkpoint 3" in text


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"precision.recompute": "full"}, id="recompute"),
        pytest.param({"kl.phase": "training", "sampler.sde_window.size": 2, "kl.strategy": "step"}, id="window",
                     marks=pytest.mark.nightly),
        pytest.param({"kl.phase": "training", "grpo.cfg_in_training": "distilled"}, id="distilled",
                     marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_hardware_flops_are_what_torch_counts(root: Path, changes: dict[str, Any], request: Any) -> None:
    """FlopCounterMode sees GEMMs and, on the CPU, its own count of attention; the texts have 6, 9 and 3 words."""
    arguments = settings(root, request.node.callspec.id, **changes)
    found = run_on_ranks(1, "tests.monitoring.jobs:counted", arguments=arguments)[0]
    phases = found["row"]["phases"]
    for phase in ("rollout", "train"):
        assert found["counts"][phase] / 1e12 == pytest.approx(phases[phase]["hardware_tflop"], rel=0.02), phase


def test_model_flops_do_not_depend_on_the_layout(root: Path, slow: Path) -> None:
    arguments = settings(root, "alone", **{"training.iterations": 1})
    run_on_ranks(1, "tests.monitoring.jobs:run", arguments=arguments, processes=1)
    alone, split = (rows_of(path, "performance.jsonl")[0] for path in (root / "alone", slow))
    assert alone["model_tflop"] == pytest.approx(split["model_tflop"])
    # what every rank of TP repeats, and padding, is executed and not asked for
    assert split["hardware_tflop"] > alone["hardware_tflop"] > 0
    assert np.isclose(
        alone["tokens_per_second"] * alone["seconds"], split["tokens_per_second"] * split["seconds"], rtol=1e-3
    )
