"""The public loop is the same mathematics as ours, and the benchmark that compares them counts what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.iteration import SMALL, TOLERANCES, disagreement, padded_flops
from benchmarks.public_loop import check
from benchmarks.sides import LOOP, Padding, pad
from tests.parallel.pool import run_on_ranks

METRICS = ("loss", "loss/policy", "kl/position", "kl/velocity", "ratio/mean", "ratio/min", "ratio/max")


def compared(root: Path, seed: int, **changes: Any) -> dict[str, Any]:
    return run_on_ranks(1, "tests.benchmarks.public:compare", root=root, seed=seed, timeout=300, **changes)[0]


def assert_same(found: dict[str, Any]) -> None:
    """Float32 rounding and nothing else, through iterations whose weights follow from each other.

    What was seen with thirteen seeds: latents 3e-7, log-probabilities 2e-7, terms 9e-8, norms 5e-7, weights 5e-6.
    """
    for number, apart in enumerate(found["iterations"]):
        assert apart["samples"] == apart["clipped"] == 0, (number, apart)
        assert apart["latents"] <= 1e-6 and apart["log_prob"] <= 1e-6, (number, apart)
        assert max(apart[key] for key in ("ratio", "loss", "loss/policy", "kl/velocity")) <= 3e-7, (number, apart)
        assert apart["kl/position"] <= 5e-8, (number, apart)
    for mine, theirs in zip(found["rows"]["ours"], found["rows"]["theirs"], strict=True):
        for key in METRICS:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6, abs=3e-8 if key == "kl/position" else 2e-7), key
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-6)
        assert mine["lambda"] == pytest.approx(theirs["lambda"], rel=1e-5)
        assert mine["clip_fraction"] == pytest.approx(theirs["clip_fraction"])
    assert found["weights"] <= 1.5e-5


def test_guidance_two_updates_and_an_anchor_that_differs(tmp_path: Path) -> None:
    found = compared(tmp_path, 0)
    assert_same(found)
    first, second, third = found["rows"]["theirs"]
    assert found["reference_moved"]  # after the third of six steps, in the middle of the second iteration
    assert min(row["kl/position"] for row in (first, second, third)) > 1e-7
    assert max(row["clip_fraction"] for row in (first, second, third)) > 0
    assert second["ratio/max"] - second["ratio/min"] > 1e-5 and second["ratio/initial_deviation"] <= 1e-6
    assert first["lambda"] < second["lambda"]


def test_no_guidance_batches_and_rewards_that_are_no_numbers(tmp_path: Path) -> None:
    changes = {"sampler.guidance_scale": 1.0, "sampler.micro_batch": 2, "grpo.replay_batch": 3}
    found = compared(tmp_path, 1, patchy=True, **changes)
    assert_same(found)
    assert found["rows"]["ours"][0]["updates/skipped"] == 0


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (2, {"kl.strategy": "none", "grpo.updates_per_rollout": 1, "sampler.micro_batch": 2}),
        (3, {"kl.strategy": "fixed", "sampler.sde_type": "cps_unnormalized", "optimizer.grad_clip": 1.0}),
        (4, {"kl.strategy": "moving", "sampler.sde_type": "flow_grpo", "grpo.equalizer": False}),
        (5, {"kl.strategy": "step", "sampler.sde_type": "cps", "grpo.timestep_permutation": False}),
        (6, {"kl.position": "fixed", "sampler.sde_type": "dance_grpo", "kl.schedule": "fixed"}),
        (7, {"grpo.updates_per_rollout": 3, "kl.feedback": "tighten", "kl.anchor_interval": 2}),
        (8, {"grpo.replay_batch": 2, "optimizer.weight_decay": 0.1, "grpo.prompts_per_iteration": 3}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_other_sizes_and_settings(tmp_path: Path, seed: int, changes: dict[str, Any]) -> None:
    assert_same(compared(tmp_path, seed, **changes))


def test_the_small_benchmark_counts_what_it_says(tmp_path: Path) -> None:
    (found,) = run_on_ranks(1, "tests.benchmarks.public:small_benchmark", folder=tmp_path / "small", timeout=300)
    result, case = found["result"], SMALL[0]
    samples, steps, branches = 4, case.settings["sampler.num_steps"], 2
    asked, micro, replay = samples * steps * branches, *case.best.values()
    theirs, ours, single = (result["counts"][name] for name in (LOOP, "ours", "ours, one by one"))
    transformer = json.loads((tmp_path / "small" / "hf" / "transformer" / "config.json").read_text())
    velocity = padded_flops(transformer, result["video_tokens"], case.padding)
    for phase in ("rollout", "reference", "train"):
        assert [theirs[phase][key] for key in ("forwards", "videos", "refiner_runs", "refiner_texts")] == [asked] * 4
        assert ours[phase]["videos"] == single[phase]["videos"] == single[phase]["forwards"] == asked
        assert ours[phase]["forwards"] == asked // micro // (1 if phase != "train" else min(replay, steps))
        assert ours[phase]["flops"] <= single[phase]["flops"] < theirs[phase]["flops"]
    assert theirs["rollout"]["flops"] == theirs["reference"]["flops"] == asked * velocity
    for counts in (ours, single):  # once for a group's step and branch, whatever its micro-batches
        assert counts["rollout"]["refiner_texts"] == counts["reference"]["refiner_texts"] == steps * branches
        assert counts["train"]["refiner_texts"] <= 2 * asked  # with its recomputation
    # what is kept of the policy: all but the last block's text layers, which nothing reads
    kept = result["reference_bytes"]
    assert 0 < kept["public loop, device, always"] - kept["ours, host, always"] < 0.05 * kept["ours, host, always"]
    assert set(result["ratios"]["ours"]) == {"rollout", "reference", "train", "optimizer", "total"}
    assert "| small | public loop | rollout | 16 | 16 | 16 | 16 |" in found["markdown"]


def test_sides_that_differ_end_the_benchmark() -> None:
    rows = [{"ratio/min": 1.0, "ratio/max": 1.0, "grad_norm": 0.2}] * 2
    assert disagreement(rows, rows) == dict.fromkeys(TOLERANCES, 0.0)
    with pytest.raises(RuntimeError, match="grad_norm differs by 5.0e-02"):
        disagreement(rows, [rows[0], rows[1] | {"grad_norm": 0.2 / 0.95}])
    with pytest.raises(RuntimeError, match="ratio/max differs by nan"):
        disagreement([rows[0] | {"ratio/max": float("nan")}], rows[:1])


def test_the_loop_refuses_what_it_does_not_have() -> None:
    from megatron_sage.conditioning.words import WordEncoder
    from megatron_sage.config import Config

    config = Config()
    config.precision.dtype = "fp32"
    check(config)
    config.grpo.cfg_in_training = "off"
    with pytest.raises(ValueError, match="grpo.cfg_in_training=off"):
        check(config)
    with pytest.raises(ValueError, match="a text has 3 tokens, the padding 2"):
        pad(WordEncoder().encode("three plain words"), Padding(2, 0, 0), 8)
