"""Whole runs of a random tiny world: exactness, layouts, resumption, and what happens to bad rewards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.errors import UserError
from tests.parallel.pool import run_on_ranks
from tests.training import world

JOB = "tests.training.world:train_job"
TIMED = ("seconds/",)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def run(root: Path, name: str, ranks: int = 1, **changes: Any) -> dict[str, Any]:
    """Train on `ranks` processes; metrics rows and exported weights of rank 0."""
    arguments = world.overrides(world.settings(root, name, **changes))
    return run_on_ranks(ranks, JOB, arguments=arguments, processes=ranks)[0]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIMED)}


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Any]:
    return run(root, "single")


def test_ratio_is_one_before_the_first_update(single: dict[str, Any]) -> None:
    deviations = [row["ratio/initial_deviation"] for row in single["rows"]]
    assert len(deviations) == 3 and max(deviations) <= 1e-6
    assert single["rows"][0]["ratio/max"] > 1  # and the second update of the rollout is not on-policy


def test_metrics_have_every_promised_key(single: dict[str, Any]) -> None:
    promised = (
        "iteration reward/mean reward/std reward/VQ reward/MQ reward/TA reward/nonfinite reward/zero_std_groups loss "
        "loss/policy kl/position kl/velocity lambda grad_norm ratio/mean ratio/min ratio/max clip_fraction "
        "ratio/initial_deviation lr optimizer_steps seconds/rollout seconds/decode seconds/reward seconds/reference "
        "seconds/train seconds/total"
    )
    for row in single["rows"]:
        assert set(promised.split()) <= set(row)
        assert all(np.isfinite(value) for value in row.values())
    assert [row["optimizer_steps"] for row in single["rows"]] == [2, 4, 6]


def test_two_runs_of_one_layout_are_bit_identical(root: Path, single: dict[str, Any]) -> None:
    again = run(root, "again")
    assert [untimed(row) for row in again["rows"]] == [untimed(row) for row in single["rows"]]
    for name, value in single["weights"].items():
        assert np.array_equal(value, again["weights"][name]), name


@pytest.mark.nightly  # the resumed run on context and pipeline ranks shows the same
def test_two_parallel_runs_are_bit_identical(root: Path) -> None:
    changes = {"parallel.tensor": 2, "training.iterations": 2}
    first, second = (run(root, f"parallel_{number}", 2, **changes) for number in range(2))
    assert [untimed(row) for row in first["rows"]] == [untimed(row) for row in second["rows"]]
    for name, value in first["weights"].items():
        assert np.array_equal(value, second["weights"][name]), name


def test_export_is_a_diffusers_model(root: Path, single: dict[str, Any]) -> None:
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel.from_pretrained(root / "single" / "export" / "transformer")
    before = HunyuanVideo15Transformer3DModel.from_pretrained(root / "hf" / "transformer").state_dict()
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert set(before) == set(model.state_dict()) and len(changed) > 0.5 * len(before)


LAYOUTS = [
    pytest.param(2, {"parallel.tensor": 2}, id="tp2-sp", marks=pytest.mark.nightly),
    pytest.param(2, {"parallel.tensor": 2, "parallel.sequence": False}, id="tp2", marks=pytest.mark.nightly),
    pytest.param(4, {"parallel.tensor": 4}, id="tp4-sp", marks=pytest.mark.nightly),
    pytest.param(2, {}, id="dp2"),
    pytest.param(4, {"parallel.tensor": 2}, id="tp2-sp-dp2", marks=pytest.mark.nightly),
    pytest.param(2, {"parallel.pipeline": 2, "sampler.micro_batch": 1}, id="pp2-single-samples"),
    pytest.param(
        4,
        {"parallel.tensor": 2, "parallel.sequence": False, "parallel.context": 2},
        id="tp2-cp2",
        marks=pytest.mark.nightly,
    ),
    pytest.param(1, {"sampler.micro_batch": 4}, id="whole-group"),
]


@pytest.fixture(scope="module")
def one_update(root: Path) -> dict[str, Any]:
    return run(root, "one_update", **{"grpo.updates_per_rollout": 1})


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_every_layout_gives_the_same_run(
    root: Path, one_update: dict[str, Any], ranks: int, layout: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """15 video tokens and texts of 6, 9 and 3 words: nothing divides by the number of ranks."""
    other = run(root, request.node.callspec.id, ranks, **{"grpo.updates_per_rollout": 1}, **layout)
    for number, (mine, theirs) in enumerate(zip(one_update["rows"], other["rows"], strict=True)):
        tolerance = 1e-5 if number == 0 else 1e-3
        for key, value in untimed(mine).items():
            if number > 0 and key in ("kl/position", "kl/velocity", "clip_fraction", "ratio/initial_deviation"):
                continue  # of the order of the rounding in Adam's sign, which these amplify
            assert theirs[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (number, key)
    for name, value in one_update["weights"].items():
        assert np.abs(other["weights"][name] - value).max() <= 3 * 2 * 1e-4, name  # three Adam steps of lr, both ways


def test_a_resumed_run_is_the_uninterrupted_run(root: Path, single: dict[str, Any]) -> None:
    run(root, "resumed", **{"training.iterations": 2})
    resumed = run(root, "resumed", **{"training.resume": True})
    assert [untimed(row) for row in resumed["rows"]] == [untimed(row) for row in single["rows"]]
    for name, value in single["weights"].items():
        assert np.array_equal(value, resumed["weights"][name]), name


def test_a_run_does_not_go_on_with_another_reference_or_other_prompts(root: Path) -> None:
    run(root, "anchored", **{"training.iterations": 1})
    kept = json.loads((root / "anchored" / "data.json").read_text())
    assert [(entry["rows"], entry["images"], entry["skipped"]) for entry in kept] == [(3, 0, [])]
    rows = [json.dumps({"prompt": text}) for text in (*world.PROMPTS[:2], world.PROMPTS[2] + "!")]
    (root / "edited.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="resume: the 3 prompts are not those of the run"):
        run(root, "anchored", **{"training.resume": True, "data.prompts": str(root / "edited.jsonl")})
    with pytest.raises(UserError, match="saved with the position references moving, this run.s are fixed: keep them"):
        run(root, "anchored", **{"training.resume": True, "kl.strategy": "fixed"})


@pytest.mark.nightly
def test_a_resumed_run_on_context_and_pipeline_ranks_is_the_uninterrupted_run(root: Path) -> None:
    layout = {"parallel.context": 2, "parallel.pipeline": 2}
    whole = run(root, "whole_parallel", 4, **layout)
    run(root, "resumed_parallel", 4, **{"training.iterations": 2}, **layout)
    resumed = run(root, "resumed_parallel", 4, **{"training.resume": True}, **layout)
    assert [untimed(row) for row in resumed["rows"]] == [untimed(row) for row in whole["rows"]]
    for name, value in whole["weights"].items():
        assert np.array_equal(value, resumed["weights"][name]), name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"parallel.context": 2, "parallel.pipeline": 2}, {"parallel.tensor": 2}),
        pytest.param({"parallel.tensor": 2}, {"parallel.pipeline": 2}, marks=pytest.mark.nightly),
    ],
    ids=["cp2-pp2 to tp2", "tp2 to pp2"],
)
def test_a_run_goes_on_at_another_layout(
    root: Path, first: dict[str, Any], second: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    name, steady = request.node.callspec.id.replace(" ", "_"), {"optimizer.eps": 1e-5}
    steady |= {"reward.function": "tests.training.world:SteadyReward"}
    whole = run(root, f"whole_{name}", **steady)
    run(root, name, int(np.prod(list(first.values()))), **{"training.iterations": 2}, **steady, **first)
    resumed = run(root, name, int(np.prod(list(second.values()))), **{"training.resume": True}, **steady, **second)
    for mine, theirs in zip(resumed["rows"], whole["rows"], strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["reward/mean"] == theirs["reward/mean"]
    for key, value in whole["weights"].items():
        assert np.abs(resumed["weights"][key] - value).max() <= 1e-3 * 3 * 2 * 1e-4, key  # of six steps of lr


def test_trajectories_in_half_precision_are_scored_as_they_are_stored(root: Path) -> None:
    rows = run(root, "half", **{"sampler.latent_dtype": "bf16", "sampler.offload_trajectories": True})["rows"]
    assert max(row["ratio/initial_deviation"] for row in rows) <= 1e-6


def test_a_run_directory_is_not_overwritten(root: Path, single: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        run(root, "single")


def test_rewards_that_are_never_finite_stop_the_run_after_saving(root: Path) -> None:
    changes = {"reward.function": "tests.training.world:BrokenReward", "training.iterations": 9}
    with pytest.raises(UserError, match="not finite in three iterations"):
        run(root, "broken", **changes)
    rows = [json.loads(line) for line in (root / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/nonfinite"] for row in rows] == [8, 8, 8] and "loss" not in rows[0]
    assert [row["reward/bad_iterations"] for row in rows] == [1, 2, 3]
    assert rows[-1]["optimizer_steps"] == 0
    assert (root / "broken" / "checkpoints" / "iteration_000003").is_dir()


@pytest.mark.parametrize(
    "changes",
    [{"kl.strategy": "none"}, {"kl.step_kl": "closed_form"}, {"sampler.sde_type": "cps"}, {"grpo.equalizer": False}],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_other_methods_run(root: Path, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    found = run(root, request.node.callspec.id, **{"training.iterations": 1}, **changes)
    row = found["rows"][0]
    assert row["ratio/initial_deviation"] <= 1e-6 and row["grad_norm"] > 0
    assert (row["kl/position"] > 0) == (changes.get("kl.strategy") != "none")


def test_the_learning_rate_warms_up(root: Path) -> None:
    rows = run(root, "warm", **{"optimizer.warmup_steps": 4})["rows"]
    assert [row["lr"] for row in rows] == pytest.approx([0.5e-4, 1e-4, 1e-4])  # two steps an iteration


def test_latents_that_are_not_numbers_lose_their_sample_alone() -> None:
    """Zero times nan is nan: a dropped sample must not reach a gradient, whatever its tensors hold."""
    import torch

    from megatron_sage.model.transformer import TextCondition
    from megatron_sage.rollout.buffer import MicroTrajectory
    from megatron_sage.rollout.policy import Prompt

    empty = torch.zeros(1, 1, 1)
    prompt = Prompt("", TextCondition(empty, empty, empty), TextCondition(empty, empty, empty))
    latents = torch.ones(3, 2, 4)
    latents[:, 1] = torch.nan
    trajectory = MicroTrajectory(0, [0, 1], prompt, log_prob_B={0: torch.tensor([1.0, torch.nan])})
    trajectory.latents_SBC[0] = latents
    trajectory.keep(torch.tensor([True, False]))
    weight = torch.ones(4, requires_grad=True)
    (trajectory.latents_SBC[0] * weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((4,), 3.0)) and torch.equal(
        trajectory.log_prob_B[0], torch.tensor([1.0, 0.0])
    )
