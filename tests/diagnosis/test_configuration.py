"""doctor CONFIG: every broken rule at once, for any world size; and the collectives of two and more ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sage import doctor
from megatron_sage.diagnosis.asked import given
from tests.parallel.pool import run_on_ranks
from tests.training import world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def findings(root: Path, world_size: int | None = None, **changes: Any) -> dict[str, tuple[str, str]]:
    arguments = world.overrides(world.settings(root, "checked", **changes))
    return {f.name: (f.status, f.detail) for f in given(arguments, None, world_size)}


def test_a_legal_configuration(root: Path) -> None:
    found = findings(root)
    assert found["rules"] == ("ok", "all hold on 1 rank")
    assert {status for status, _ in found.values()} <= {"ok", "optional"}
    assert {"transformer", "vae", "text encoders", "Megatron weights", "output_dir"} <= set(found)


def test_every_broken_rule_is_told(root: Path) -> None:
    broken = {"optimizer.lr": -1.0, "sampler.num_steps": 0, "kl.gain": 2.0}
    assert {key for key, (status, _) in findings(root, **broken).items() if status == "failed"} == set(broken)
    later = {"grpo.updates_per_rollout": 999, "kl.lambda_min": 1.0, "logging.wandb": "{project: 3}"}
    found = findings(root, **later)
    failed = {key for key, (status, _) in found.items() if status == "failed"}
    assert {"grpo.updates_per_rollout", "kl.lambda_min", "logging.wandb.project"} == failed


@pytest.mark.parametrize(
    ("ranks", "broken"), [(4, None), (3, "world size 3 ≠ TP·CP·PP·DP"), (12, "grpo.prompts_per_iteration")]
)
def test_the_world_size_decides(root: Path, ranks: int, broken: str | None) -> None:
    found = findings(root, ranks, **{"parallel.tensor": 2})
    failed = [detail for status, detail in found.values() if status == "failed"]
    assert (failed == []) if broken is None else (len(failed) == 1 and broken in failed[0])


def test_weights_that_are_missing_are_told_with_the_command_that_makes_them(root: Path) -> None:
    status, detail = findings(root, **{"model.weights": str(root / "none")})["model.weights"]
    assert status == "failed" and "megatron-sage convert hf-to-megatron" in detail


def test_the_command_line(root: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_self_checks", lambda: iter(()))
    assert doctor.main(["--json", *world.overrides(world.settings(root, "cli"))]) == 0
    assert {"configuration", "weights", "run"} <= {f["section"] for f in json.loads(capsys.readouterr().out)}
    assert doctor.main([*world.overrides(world.settings(root, "cli")), "optimizer.lrr=1"]) == 1
    assert (
        "error: keys: optimizer.lrr (command line): unknown key; did you mean optimizer.lr?" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, {"tensor": 2}), pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.nightly)],
)
def test_collectives_are_right_and_measured(ranks: int, layout: dict[str, int]) -> None:
    every = run_on_ranks(ranks, "tests.diagnosis.jobs:check", seconds=0.5, **layout)
    assert all([name for name, _, _ in one] == [name for name, _, _ in every[0]] for one in every)
    found = {name: (status, detail) for name, status, detail in every[0]}
    for group in ["world", "tensor", "replica"] + ["pipeline"] * ("pipeline" in layout):
        for operation in ("all-reduce", "all-gather", "broadcast"):
            assert found[f"{operation} {group}"][0] == "ok"
        assert "GB/s all-reduce" in found[f"bandwidth {group}"][1]
    assert "data" not in " ".join(found) or ranks > 4
    assert {"slowest compute", "slowest link"} <= set(found)


def test_a_slow_rank_is_named() -> None:
    for one in run_on_ranks(2, "tests.diagnosis.jobs:check", seconds=0.5, fault="slow", rank=1):
        status, detail = {name: (status, detail) for name, status, detail in one}["slowest compute"]
        assert status == "warning" and "slowest rank 1 (" in detail


def test_a_wrong_sum_on_one_rank_fails_and_names_it() -> None:
    for one in run_on_ranks(2, "tests.diagnosis.jobs:check", seconds=0.5, fault="wrong", rank=1):
        failed = [(name, detail) for name, status, detail in one if status == "failed"]
        assert [name for name, _ in failed] == ["all-reduce data"]
        assert "a wrong result on rank 1 (" in failed[0][1] and "NCCL_DEBUG=INFO" in failed[0][1]


@pytest.mark.nightly  # a launcher and its processes: half a minute of imports
def test_under_torchrun(root: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = world.overrides(world.settings(root, "torchrun", **{"parallel.tensor": 2}))
    done = subprocess.run(
        [*command, "megatron_sage", "doctor", "--json", "--seconds", "1", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = {finding["name"]: finding["status"] for finding in json.loads(done.stdout)}
    assert names["all-reduce tensor"] == "ok" and names["rules"] == "ok" and "all_reduce" not in names
