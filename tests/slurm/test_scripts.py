"""The scripts in slurm/ without Slurm: sound, printable before anything runs, and right about starting again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TRAINING = ["slurm/train_sage_a.sh", "slurm/train_sage_b.sh"]


def bash(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In the repository's root; no variable of a job that runs this test."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {"PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_scripts_are_sound() -> None:
    assert len(SCRIPTS) == 4
    for script in SCRIPTS:
        checked = bash("-n", str(script))
        assert checked.returncode == 0, checked.stderr
        assert (script.name == "common.sh") != os.access(script, os.X_OK), script


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    others = [ROOT / "tools" / "install_slurm.sh", ROOT / "tools" / "setup_env.sh"]
    command = ["shellcheck", "--external-sources", *map(str, [*SCRIPTS, *others])]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", TRAINING)
def test_a_dry_run_prints_the_command(script: str) -> None:
    printed = bash(script, "optimizer.lr=5e-6", DRYRUN="1")
    assert printed.returncode == 0, printed.stderr
    command = printed.stdout.splitlines()[-1].split()
    setting = script[-4]
    assert "dry run: 8 nodes x 8 processes" in printed.stdout, "what the #SBATCH lines ask for"
    assert command[0] == "srun" and command[-1] == "optimizer.lr=5e-6"
    assert command[command.index("--recipe") + 1] == f"hv15_480p_{setting}_sage_dual"
    assert command[command.index("--nnodes") + 1] == "8" and command[command.index("--nproc-per-node") + 1] == "8"
    assert "training.resume=auto" in command


def test_a_configuration_replaces_the_recipe_and_arrays_have_directories(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "metadata.json").write_text("{}")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_PER_NODE": "h100:2", "DRYRUN": "1"}
    arguments = ["slurm/train_sage_b.sh", "examples/quickstart/quickstart.yaml", "seed=%a", f"model.weights={tmp_path}"]
    printed = bash(*arguments, **job, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="5")
    assert "the run's directory is runs/quickstart_3" in printed.stdout, printed.stdout + printed.stderr
    command = printed.stdout.splitlines()[-1].split()
    assert "--recipe" not in command and "seed=3" in command and command[-1] == "output_dir=runs/quickstart_3"
    alone = bash(*arguments, **job)
    assert alone.returncode == 2 and alone.stderr.startswith("error: seed=%a: ")


def test_refused_settings_are_said_in_a_dry_run() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_PER_NODE": "2", "DRYRUN": "1"}
    printed = bash("slurm/train_sage_b.sh", "optimiser.lr=1", **job)
    assert printed.returncode == 0 and "the settings would be refused" in printed.stdout
    assert printed.stderr.startswith("error: optimiser") and "did you mean optimizer" in printed.stderr


def test_without_slurm_nothing_runs() -> None:
    for script in TRAINING:
        done = bash(script)
        assert (done.returncode, done.stdout) == (2, "") and "DRYRUN=1" in done.stderr and "\n" not in done.stderr[:-1]
    done = bash("slurm/train_sage_b.sh", SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1")
    assert done.returncode == 2 and "--gpus-per-node=: a number is needed" in done.stderr


def test_the_scaling_study_runs_each_size() -> None:
    done = bash("slurm/scaling_study.sh", "run.yaml", "precision.dtype=bf16", DRYRUN="1")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[line.index("--nnodes") + 1] for line in lines] == ["1", "2", "4", "8"], done.stderr
    assert [line[line.index("--out") + 1] for line in lines] == ["runs/scaling/JOB"] * 4, "one table of all sizes"
    assert all(line[line.index("megatron_sage") + 1 :][:2] == ["scaling", "run.yaml"] for line in lines)
    assert all(line[-1] == "precision.dtype=bf16" for line in lines)


@pytest.mark.parametrize(
    ("ends", "queued"),
    [
        ([(75, 1), (75, 2), (75, 3), (75, 4), (75, 5), (75, 6)], 6),  # the time limit: as long as it goes on
        ([(70, 0)] * 6, 3),  # a stall that comes back
        ([(70, 4), (1, 4), (75, 4), (70, 4), (70, 4)], 4),  # whatever ends it; the first one had brought it to 4
        ([(1, 0), (1, 0), (75, 1), (1, 1), (1, 1), (1, 1), (1, 1)], 6),  # an iteration counts from anew
        ([(2, 5)], 0),  # a setting that is wrong stays wrong
    ],
)
def test_a_job_is_queued_again_while_that_helps(tmp_path: Path, ends: list[tuple[int, int]], queued: int) -> None:
    """`again` with a scontrol that only writes down what it is asked."""
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$*" >>"$(dirname "$0")/asked"\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "slurm").mkdir()
    calls = "; ".join(f"again {code} {iteration}" for code, iteration in ends)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = bash("-c", f"source slurm/common.sh; RUN={tmp_path} JOB=5_3; {calls}", PATH=path)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines() if queued else []
    assert asked == ["requeue 5_3"] * queued and (tmp_path / "asked").exists() == bool(queued)
    assert done.stdout.count(": to be queued again") == queued


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (None, "1 0"),  # it did not come so far
        ({"exit_code": 75, "iteration": 4}, "75 4"),
        ({"exit_code": None, "iteration": 7, "state": "running"}, "1 7"),  # killed from outside
        ({"exit_code": 70, "iteration": None}, "70 0"),
        ({"exit_code": 0, "iteration": 9}, "0 9"),
    ],
)
def test_the_outcome_is_that_of_status_json(tmp_path: Path, status: dict[str, int | None] | None, found: str) -> None:
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps(status))
    done = bash("-c", f"source slurm/common.sh; RUN={tmp_path}; outcome")
    assert done.stdout.strip() == found, done.stderr
