"""slurm/train_sage_b.sh as Slurm runs it: time limit, node failure, arrays, errors. Run by `make test-slurm`.

Five nodes on this machine (tests/slurm/cluster.py) and the tiny world, one rank a GPU. All jobs are submitted at once:
most of their time they import or wait.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.slurm.cluster import ROOT, Cluster, missing, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ITERATIONS = 3
STALL = 25  # seconds; longer than a phase of the tiny world takes on a busy machine
OPEN = "1000"


@dataclass
class Jobs:
    """What was submitted, with the directories of the runs."""

    cluster: Cluster
    root: Path
    chain: str  # two nodes; its seed is that of the array's first task
    array: str  # tasks 3 and 4 on a node each; 4 never comes back from its reward
    refused: str
    dry: str

    def open(self, gate: int, calls: str) -> None:
        """Let that many calls of the reward pass."""
        partial = self.root / f"partial_{gate}"
        partial.write_text(calls)
        os.replace(partial, self.root / f"gate_{gate}")


def settings(root: Path, gate: str) -> list[str]:
    """Arguments of the script: two ranks, the same run for every seed."""
    return [
        "slurm/train_sage_b.sh",
        "--recipe",
        "tiny_b_sage_dual",
        f"model.weights={root}/weights",
        "parallel.tensor=2",
        "evaluation.prompts=null",
        "video.frames=17",
        "grpo.group_size=4",
        "grpo.prompts_per_iteration=2",
        "sampler.micro_batch=4",
        f"training.iterations={ITERATIONS}",
        "training.save_interval=1",
        "kl.anchor_interval=3",
        "reward.function=tests.slurm.gate:GatedReward",
        f"reward.settings={{gate: {root}/gate_{gate}}}",
    ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    if missing():
        pytest.fail(f"not installed: {', '.join(missing())}; `make test-slurm` as root installs them")
    root = tmp_path_factory.mktemp("slurm")
    convert = [sys.executable, "-m", "megatron_sage", "convert", "hf-to-megatron", "examples/tiny_world/model"]
    begin = time.monotonic()
    with Cluster(root / "cluster", 5) as cluster:
        assert time.monotonic() - begin < 60
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*convert, str(root / "weights")], check=True, cwd=ROOT, env=environment, capture_output=True)
        one = ["--nodes=1", "--gpus-per-node=2"]
        two = ["--nodes=2", "--gpus-per-node=1", "--signal=USR1@150"]
        chain = cluster.submit(*two, *settings(root, "9"), "seed=3", f"output_dir={root}/chain", SECRET_TOKEN="x")
        array = cluster.submit(
            *one,
            "--array=3-4",
            *settings(root, "%a"),
            "seed=%a",
            f"output_dir={root}/task",
            f"training.stall_seconds={STALL}",
            MAX_RETRIES="1",
        )
        refused = cluster.submit(*one, *settings(root, "9"), "optimizer.lr=-1", f"output_dir={root}/refused")
        dry = cluster.submit(*one, *settings(root, "9"), f"output_dir={root}/dry", DRYRUN="1")
        found = Jobs(cluster, root, chain, array, refused, dry)
        found.open(3, OPEN)
        yield found


def result(directory: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows]
    return rows, load_file(directory / "export" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_time_limit_and_node_failure_leave_the_uninterrupted_run(jobs: Jobs) -> None:
    cluster, run = jobs.cluster, jobs.root / "chain"
    # 1. It waits in the first reward. Its limit is now in two to three minutes; the signal is due 150 s before.
    until(lambda: (jobs.root / "gate_9.waiting").exists(), 200, "the chain's first reward")
    for node in ("n1", "n2"):
        assert cluster.processes(f"SLURMD_NODENAME={node}", "NCCL_DEBUG=WARN"), "a rank of each node has the settings"
    assert not cluster.processes("SECRET_TOKEN=x")
    again = cluster.submit("--nodes=1", "--gpus-per-node=2", *settings(jobs.root, "9"), f"output_dir={run}")
    minutes = int(cluster.job(jobs.chain)["RunTime"].split(":")[1])
    cluster.run("scontrol", "update", f"JobId={jobs.chain}", f"TimeLimit={minutes + 3}")
    until(lambda: "SIGUSR1: the rest of this phase (reward)" in cluster.log(jobs.chain), 90, "the signal")
    jobs.open(9, "2")
    until(lambda: int(cluster.job(jobs.chain)["Restarts"]) == 1, 90, "the job that is queued again")
    assert "[slurm] status 75 after 0 iterations: to be queued again" in cluster.log(jobs.chain)
    cluster.run("scontrol", "update", f"JobId={jobs.chain}", "TimeLimit=60")
    # 2. From the state that was saved to the third reward, where it waits: then the second node fails.
    until(lambda: (run / "checkpoints" / "iteration_000002").is_dir(), 200, "two iterations of the second start")
    cluster.fail_node("n2")
    until(lambda: int(cluster.job(jobs.chain)["Restarts"]) == 2, 120, "the job of the node that failed")
    assert cluster.ended(again)["ExitCode"] == "2:0"
    assert f"error: output_dir={run}: job {jobs.chain} trains there" in cluster.log(again)
    # 3. On nodes that are left.
    jobs.open(9, OPEN)
    ended = cluster.ended(jobs.chain)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "2")
    assert "n2" not in ended["NodeList"]
    assert cluster.ended(f"{jobs.array}_3")["JobState"] == "COMPLETED"

    expected_rows, expected = result(jobs.root / "task_3")
    rows, weights = result(run)
    assert len(rows) == ITERATIONS and rows == expected_rows
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[key], expected[key]) for key in expected)
    for start in range(3):
        folder = run / "slurm" / f"{jobs.chain}.{start}"
        assert f"output_dir: {run}" in (folder / "config.yaml").read_text()
        assert f"JobId={jobs.chain}" in (folder / "job.txt").read_text()
        assert {"code.txt", "command.txt"} <= {path.name for path in folder.iterdir()}


def test_a_stalled_task_of_an_array_is_queued_again_once_and_alone(jobs: Jobs) -> None:
    """Task 4 is the array's last: its job's number is that of the whole array. MAX_RETRIES is 1."""
    stalled, other = jobs.cluster.ended(f"{jobs.array}_4"), jobs.cluster.ended(f"{jobs.array}_3")
    assert (stalled["JobState"], stalled["ExitCode"], stalled["Restarts"]) == ("FAILED", "70:0", "1")
    assert (other["JobState"], other["ExitCode"], other["Restarts"]) == ("COMPLETED", "0:0", "0")
    log = jobs.cluster.log(stalled["JobId"])
    assert log.count("status 70 after 0 iterations: to be queued again") == 1
    assert log.splitlines()[-1] == "[slurm] status 70: 2 starts in a row without a further iteration: not queued again"
    for seed in (3, 4):
        assert f"seed: {seed}\n" in (jobs.root / f"task_{seed}" / "config.yaml").read_text()


def test_a_wrong_setting_ends_the_job_with_2_before_any_process_starts(jobs: Jobs) -> None:
    ended = jobs.cluster.ended(jobs.refused)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    (line,) = jobs.cluster.log(jobs.refused).splitlines()
    assert line.startswith("error: optimizer.lr=-1")
    assert not (jobs.root / "refused").exists()


def test_a_dry_run_in_a_job_prints_and_ends(jobs: Jobs) -> None:
    assert jobs.cluster.ended(jobs.dry)["ExitCode"] == "0:0"
    log = jobs.cluster.log(jobs.dry)
    assert "1 nodes x 2 processes" in log and "accepted" in log and "--recipe tiny_b_sage_dual" in log
    assert not (jobs.root / "dry").exists()
