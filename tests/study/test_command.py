"""A study of the random tiny world by its own workers: results, interruption, refusal, failure."""

import csv
from pathlib import Path
from typing import Any

import pytest

from megatron_sage.__main__ import main as command_line
from megatron_sage.errors import UserError
from megatron_sage.study.cells import ABLATIONS, CHOICES, GRID, chosen_cells, planned_runs
from megatron_sage.study.claims import CLAIMS
from megatron_sage.study.command import RESULTS, main
from tests.parallel.pool import run_on_ranks
from tests.training import world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def arguments(root: Path, out: str, *options: str, **changes: Any) -> list[str]:
    settings = world.settings(root, "unused", **changes)
    for key in ("name", "output_dir", "seed"):
        del settings[key]
    settings |= {"evaluation.prompts": settings["data.prompts"], "training.iterations": 2}
    settings |= {"evaluation.num_steps": 2, "evaluation.samples_per_prompt": 1, "kl.lambda_min": 0.001}
    return [*world.overrides(settings | changes), "--out", str(root / out), *options]


def rows(root: Path, out: str, file: str = RESULTS) -> list[dict[str, str]]:
    with (root / out / file).open(newline="") as lines:
        return list(csv.DictReader(lines))


def untimed(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.nightly
def test_a_study_goes_on_where_it_was_interrupted(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cells = ["--cells", "b_sage_dual,b_cps_none"]
    assert main(arguments(root, "whole", *cells, "--seeds", "1", "--processes", "1")) == 0
    found = rows(root, "whole")
    assert {(row["cell"], row["sampler"], row["kl"]) for row in found} == {
        ("b_sage_dual", "sage_grpo", "dual"),
        ("b_cps_none", "cps", "none"),
    }
    curves = rows(root, "whole", "curves.csv")
    assert len(curves) == 4 and all(float(row["grad_norm"]) > 0 for row in curves)
    assert (root / "whole" / "study.html").read_text().count("b_sage_dual") > 0
    # as after a kill between the two files: the curves of a run are there, its result is not
    kept, lost = found
    lines = (root / "whole" / RESULTS).read_text().splitlines(keepends=True)
    (root / "whole" / RESULTS).write_text("".join(lines[:2]))
    assert main(arguments(root, "whole", *cells, "--seeds", "1", "--processes", "1")) == 0
    assert "2 runs: 1 finished before, 1 to do" in capfd.readouterr().out
    again = rows(root, "whole")
    assert again[0] == kept and untimed(again[1]) == untimed(lost), "a run is a function of cell and seed"
    assert sorted(map(str, rows(root, "whole", "curves.csv"))) == sorted(map(str, curves))
    with pytest.raises(UserError, match="holds a study with other settings"):
        main(arguments(root, "whole", *cells, **{"optimizer.lr": 0.5}))
    assert main(["--report", "--out", str(root / "whole")]) == 0


@pytest.mark.nightly
def test_a_run_that_fails_is_reported_and_the_others_go_on(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = {"reward.function": "tests.training.world:BrokenReward", "optimizer.lr": 1e30}
    broken = arguments(root, "broken", "--cells", "b_sage_dual", "--seeds", "2", "--processes", "2", **changes)
    broken = [text for text in broken if not text.startswith("reward.function")]
    broken.append("reward.function=tests.training.world:BrightnessReward")
    assert main(broken) == 1
    printed = capfd.readouterr()
    assert printed.err.count("failed: b_sage_dual, seed ") == 2 and "Traceback" not in printed.err
    assert not (root / "broken" / RESULTS).exists()


def test_cells_are_named_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(GRID) == 4 * 3 * 2 and set(CHOICES["all"]) == {*GRID, *ABLATIONS}
    assert chosen_cells("a_cps_none, b_sage_step") == ["a_cps_none", "b_sage_step"]
    with pytest.raises(UserError, match="did you mean b_sage_dual"):
        chosen_cells("b_sage_dua")
    with pytest.raises(UserError, match="names no cell"):
        chosen_cells(" ,")
    assert command_line(["study", "--seeds", "0"]) == 2
    runs = planned_runs(["a", "b"], 2)
    assert [(run.cell, run.seed) for run in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    every = {cell for claim in CLAIMS for cell in (claim.better, claim.worse) if cell}
    assert every <= set(CHOICES["all"]), "a claim compares cells that no study runs"
