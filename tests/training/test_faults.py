"""Gradients that are not numbers, and memory that does not suffice."""

import json
from pathlib import Path

import pytest

from megatron_sage.errors import OutOfMemory
from tests.parallel.pool import run_on_ranks
from tests.training import stops

POISONED = "tests.training.stops:poisoned"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def rows(root: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "layout", "at"),
    [
        (1, {}, 0),
        (2, {"parallel.tensor": 2}, 1),
        pytest.param(2, {"parallel.pipeline": 2}, 1, marks=pytest.mark.nightly),
        pytest.param(2, {}, 1, marks=pytest.mark.nightly),
        pytest.param(2, {"parallel.context": 2}, 0, marks=pytest.mark.nightly),
        pytest.param(4, {"parallel.tensor": 2, "parallel.pipeline": 2}, 3, marks=pytest.mark.nightly),
    ],
)
def test_an_update_with_nan_is_skipped_and_counted(root: Path, ranks: int, layout: dict[str, int], at: int) -> None:
    """Of four updates the first and the third: weights, moments, lambda and counters stay; the others go on."""
    name = f"nan_{ranks}_{'_'.join(layout)}"
    arguments = stops.settings(root, name, **{"optimizer.max_nonfinite": 1}, **layout)
    for found in run_on_ranks(
        ranks, POISONED, arguments=arguments, processes=ranks, updates=[0, 2], rank=at, exception=False
    ):
        assert found["seen"] == [(False, True), (True, False), (False, True), (True, False)], "(step made, all kept)"
    assert [row["updates/skipped"] for row in rows(root, name)] == [1, 1]
    assert [row["optimizer_steps"] for row in rows(root, name)] == [1, 2]


def test_too_many_in_a_row_stop_the_run_with_its_state(root: Path) -> None:
    """The count goes on in a resumed run."""
    name = "too_many"
    arguments = stops.settings(root, name, **{"optimizer.max_nonfinite": 2, "training.iterations": 9})
    job = {"processes": 1, "rank": 0, "updates": list(range(99))}
    (first,) = run_on_ranks(1, POISONED, arguments=[*arguments, "training.iterations=1"], exception=False, **job)
    assert first["message"] == ""
    (second,) = run_on_ranks(1, POISONED, arguments=[*arguments, "training.resume=yes"], exception=True, **job)
    assert second["message"].startswith("optimizer.max_nonfinite=2: 4 updates in a row were skipped")
    assert str(root / name / "checkpoints") in second["message"] and "lower optimizer.lr" in second["message"]
    assert (root / name / "checkpoints" / "iteration_000002").is_dir()
    assert [row["optimizer_steps"] for row in rows(root, name)] == [0, 0]
    status = json.loads((root / name / "status.json").read_text())
    assert status["state"] == "failed" and status["exit_code"] == 2 and status["reason"] == second["message"]


CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"


@pytest.mark.parametrize(
    ("phase", "step", "text", "keys"),
    [
        ("rollout", 3, CUDA, ["sampler.micro_batch=2 -> 1", "sampler.offload_trajectories=False -> True"]),
        ("decode", 2, CPU, ["sampler.offload_trajectories=False -> True", "video.frames=17 -> 13"]),
        ("reward", 1, CUDA, ["optimizer.offload=none -> hybrid"]),
        ("reference", 2, CPU, ["kl.anchor_placement=device -> host", "sampler.micro_batch=2 -> 1"]),
        ("train", 2, CUDA, ["grpo.replay_batch=2 -> 1", "precision.recompute=none -> full", "parallel.context=1 -> 2"]),
        ("save", 1, CPU, ["parallel.pipeline=1 -> 2"]),
    ],
)
def test_out_of_memory_names_phase_tensors_and_settings(
    root: Path, phase: str, step: int, text: str, keys: list[str]
) -> None:
    changes = {"kl.anchor_placement": "device", "grpo.replay_batch": 2, "training.iterations": 1}
    arguments = stops.settings(root, f"memory_{phase}", **changes)
    (said,) = run_on_ranks(
        1, "tests.training.stops:out_of_memory", arguments=arguments, phase=phase, step=step, text=text
    )
    first, machine, *lines = said.splitlines()
    assert first.startswith(f"out of memory in phase {phase} (rank 0, iteration {int(phase == 'save')},")
    assert text in first and "GB free" in machine
    assert any("MB" in line and "float32 on cpu" in line for line in lines)
    assert any("gradient buffer 0" in line for line in lines), "tensors have names"
    for key in keys:
        assert any(line.strip().startswith(key) for line in lines), (key, said)
    status = json.loads((root / f"memory_{phase}" / "status.json").read_text())
    assert status["state"] == "failed" and status["exit_code"] == 2 and status["reason"] == said


def test_its_lines_survive_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_sage.__main__ import _report

    assert _report(OutOfMemory("first\n  second")) == 2
    assert capsys.readouterr().err.endswith("error: first\n  second\n")
