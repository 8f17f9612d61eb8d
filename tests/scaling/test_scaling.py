"""A scaling study of the tiny world on one, two and four gloo processes, and its tables out of numbers made here."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sage.errors import UserError
from megatron_sage.scaling import cells as grid_of
from megatron_sage.scaling import command
from megatron_sage.scaling.cells import Cell, Layout
from megatron_sage.scaling.page import figure, page
from megatron_sage.scaling.table import Row, add_efficiency, as_csv
from tests.parallel.pool import run_on_ranks
from tests.training import world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def arguments(root: Path, **changes: Any) -> list[str]:
    return world.overrides(world.settings(root, "study", **({"sampler.num_steps": 2} | changes)))


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {f"{r['mode']} {r['gpus']}: {r['tensor']}{r['context']}{r['pipeline']}": r for r in rows}


def test_lists_of_devices_and_layouts() -> None:
    assert grid_of.parse_gpus("4, 1,2,2") == [1, 2, 4]
    assert grid_of.parse_layouts("tensor=2,context=4;;pipeline=2") == [Layout(2, 4, 1), Layout(1, 1, 2)]
    for text in ("1,x", "", "0"):
        with pytest.raises(UserError, match="--gpus"):
            grid_of.parse_gpus(text)
    with pytest.raises(UserError, match="did you mean tensor"):
        grid_of.parse_layouts("tenso=2")
    with pytest.raises(UserError, match="whole number"):
        grid_of.parse_layouts("tensor=0")


def test_one_replica_is_measured_once_for_both_modes() -> None:
    found = grid_of.grid([1, 2], [Layout(), Layout(2)], ["strong", "weak"])
    # two devices hold one replica of TP = 2: nothing grows with it
    names = [(cell.mode, cell.gpus, cell.layout.tensor) for cell in found]
    assert names == [
        ("strong", 1, 1),
        ("strong", 1, 2),
        ("strong", 2, 1),
        ("strong", 2, 2),
        ("weak", 2, 1),
    ]


def rows_of(rates: dict[tuple[str, int, int], float]) -> list[Row]:
    rows = []
    for (mode, gpus, tensor), rate in rates.items():
        numbers = {"videos_per_hour": rate, "seconds": 3600 / rate, "phases": {"rollout": 1.0}, "memory_bytes": 1e9}
        rows.append(Row(Cell(mode, gpus, Layout(tensor)), "measured", 1, 4, numbers))
    return rows


def test_efficiency_is_per_device_against_the_fastest_on_the_fewest() -> None:
    rows = rows_of(
        {("strong", 2, 1): 90, ("strong", 2, 2): 100, ("strong", 8, 2): 300, ("weak", 8, 2): 380, ("weak", 2, 1): 95}
    )
    rows.append(Row(Cell("strong", 16, Layout(3)), "skipped", reason="no multiple"))
    add_efficiency(rows)
    # weak starts from one replica (TP = 2 on two devices), or two of one device: the faster one
    assert [row.efficiency for row in rows[:5]] == [0.9, 1.0, 0.75, 0.95, 0.95]
    lines = as_csv(rows).splitlines()
    assert len(lines) == 7 and lines[-1].endswith("no multiple")
    html = page(rows, "a <study>", "2 cores", figure(rows))
    assert "a &lt;study&gt;" in html and "data:image/png" in html and "no multiple" in html and "<script" not in html


def test_cells_that_cannot_be_are_told_and_others_predicted(root: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--out", str(tmp_path), "--processes", "0", "--gpus", "2,3,8,512", "--layouts", "tensor=2;tensor=3"]
    settings = arguments(root, **{"grpo.prompts_per_iteration": 4})
    assert command.main([*settings, *options, "--gpu", "h200"]) == 0
    found = table(tmp_path)
    assert found["strong 2: 211"]["status"] == "predicted" and float(found["strong 2: 211"]["seconds"]) > 0
    assert found["strong 3: 211"]["reason"] == "3 devices are no multiple of TP·CP·PP = 2"
    assert "parallel.tensor=3" in found["strong 3: 311"]["reason"]
    assert "grpo.prompts_per_iteration=4" in found["strong 512: 211"]["reason"]
    assert found["weak 512: 211"]["status"] == "predicted" and found["weak 512: 211"]["videos"] == str(4 * 256 * 4)
    assert command.main([*settings, "--out", str(tmp_path / "b"), "--processes", "0", "--gpus", "2"]) == 0
    assert "needs 2 devices" in table(tmp_path / "b")["strong 2: 111"]["reason"]


def check_measured(found: dict[str, str], videos: int) -> None:
    assert found["status"] == "measured" and found["device"] == "CPU, gloo" and found["videos"] == str(videos)
    assert float(found["videos_per_hour"]) == pytest.approx(videos * 3600 / float(found["seconds"]), rel=0.01)
    parts = sum(
        float(found[f"{phase}_seconds"] or 0)
        for phase in ("rollout", "decode", "reward", "reference", "train", "optimizer")
    )
    assert 0.5 * float(found["seconds"]) < parts < 1.2 * float(found["seconds"])
    assert found["mfu"] and float(found["memory_gb"]) > 0


def test_ranks_of_a_job_measure_their_cells_and_a_second_call_measures_nothing(root: Path, tmp_path: Path) -> None:
    """What a Slurm job's torchrun does, on two ranks and on one, into one directory."""
    settings = arguments(root, **{"logging.peak_tflops": 0.05})
    options = [*settings, "--out", str(tmp_path), "--iterations", "1", "--warmup", "1", "--mode", "strong"]
    options += ["--layouts", "tensor=2;tensor=1"]
    run_on_ranks(2, "tests.scaling.jobs:study", arguments=options, world=2)
    run_on_ranks(1, "tests.scaling.jobs:study", arguments=[*options[:-1], "tensor=1"], world=1)
    found = table(tmp_path)
    assert set(found) == {"strong 1: 111", "strong 2: 111", "strong 2: 211"}
    for row in found.values():
        check_measured(row, 8)
    assert found["strong 1: 111"]["efficiency"] == "1"
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/result.json")}
    run_on_ranks(2, "tests.scaling.jobs:study", arguments=options, world=2)
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert not list(tmp_path.glob("cells/*/checkpoints")) and not list(tmp_path.glob("cells/*/export"))


def test_a_cell_that_was_killed_has_failed_until_it_is_asked_for_again(root: Path, tmp_path: Path) -> None:
    options = command._parser().parse_intermixed_args([*arguments(root), "--out", str(tmp_path), "--gpus", "1"])
    study = command.Study(command._config(options), options, 1)
    cell = Cell("strong", 1, Layout())
    study.record(cell, {"status": "begun"})
    row = study.row(cell)
    assert row.status == "failed" and "--again" in row.reason
    assert not study._missing(cell)
    options.again = True
    assert study._missing(cell)
    path = tmp_path / "cells" / cell.name / "result.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"status": "measured", "fingerprint": "of other settings"})
    )
    assert study.result(cell, study.cell(cell)) is None


@pytest.mark.nightly  # torchrun on 1, 2 and 4 processes: minutes on two cores
def test_the_command_starts_its_own_processes(root: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--gpus", "1,2,4", "--layouts", "tensor=1;tensor=2", "--iterations", "1"]
    assert command.main([*arguments(root, **{"logging.peak_tflops": 0.05}), *options, "--warmup", "0"]) == 0
    found = table(tmp_path)
    assert {key for key, row in found.items() if row["status"] == "measured"} == {
        "strong 1: 111", "strong 2: 111", "strong 2: 211", "strong 4: 211", "weak 2: 111", "weak 4: 111", "weak 4: 211",
    }  # fmt: skip
    assert "grpo.prompts_per_iteration=2" in found["strong 4: 111"]["reason"]
    check_measured(found["weak 4: 111"], 32)
