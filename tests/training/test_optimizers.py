"""Every optimizer against torch.optim in a single process on the same gradients, and its checkpoints."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.pool import run_on_ranks
from tests.training import optimizer_world as tiny

STEPS = 4
# of the largest change. Host kernels hold 1 - beta2^t in fp32, 1e-5 off at first; Muon rounds to bf16 as it iterates
TOLERANCE = {("adamw", "fp32"): 5e-5, ("adamw", "bf16"): 5e-5, ("muon", "fp32"): 2e-4, ("muon", "bf16"): 3e-2}

SHARDED = {"distributed": True}
HYBRID = SHARDED | {"offload": "hybrid"}
MUON = {"name": "muon"}
SINGLE: dict[str, dict[str, Any]] = {
    "adamw": {"whole": True, "beta1": 0.8, "beta2": 0.95},
    "adamw bf16": {"dtype": "bf16", "grad_clip": 0.0},
    "distributed": SHARDED | {"frozen": "ff."},
    "distributed bf16": SHARDED | {"dtype": "bf16", "model": {"num_layers": 1}},
    "hybrid": HYBRID,
    "hybrid bf16": HYBRID | {"dtype": "bf16", "frozen": "transformer_blocks.0."},
    "hybrid bf16, a part": HYBRID | {"dtype": "bf16", "offload_fraction": 0.4},
    "hybrid, a part": HYBRID | {"offload_fraction": 0.7, "frozen": "norm"},
    "muon": MUON | {"muon_momentum": 0.8, "muon_steps": 3},
    "muon bf16": MUON | {"dtype": "bf16", "frozen": "txt_"},
}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "deepspeed": SHARDED | {"offload": "deepspeed"},
    "deepspeed bf16": SHARDED | {"offload": "deepspeed", "dtype": "bf16", "frozen": "ff."},
}
# those of one layout together: gloo keeps the threads of groups that are no longer used
TWO: dict[str, dict[str, Any]] = {
    "adamw TP": {"tensor": 2},
    "distributed TP": SHARDED | {"tensor": 2, "dtype": "bf16"},
    "muon TP": MUON | {"tensor": 2},
    "muon TP bf16": MUON | {"tensor": 2, "dtype": "bf16"},
    "distributed DP": SHARDED | {"frozen": "attn", "whole": True},
    # the second rank's part of the buffer is padding
    "distributed DP, hardly any": SHARDED | {"model": {"num_layers": 1}, "only": "img_q_layernorm"},
    "hybrid DP, hardly any": HYBRID | {"model": {"num_layers": 1}, "only": "img_q_layernorm", "dtype": "bf16"},
    "hybrid DP": HYBRID | {"dtype": "bf16"},
    "distributed CP bf16": SHARDED | {"context": 2, "dtype": "bf16"},
}
MORE: dict[str, dict[str, Any]] = {
    "hybrid TP PP": HYBRID | {"tensor": 2, "pipeline": 2, "dtype": "bf16"},
    "adamw TP PP": {"tensor": 2, "pipeline": 2},
    "muon TP PP": MUON | {"tensor": 2, "pipeline": 2},
    "distributed TP DP": SHARDED | {"tensor": 2},
    "muon TP DP": MUON | {"tensor": 2},
    "distributed CP DP bf16": SHARDED | {"context": 2, "dtype": "bf16"},
    "distributed PP DP": SHARDED | {"pipeline": 2},
    "muon TP 4": MUON | {"tensor": 4, "dtype": "bf16"},
}
# settings, layout that saves, layout that loads
MOVES: dict[str, tuple[dict[str, Any], ...]] = {
    "distributed bf16": (SHARDED | {"dtype": "bf16", "frozen": "txt_"}, {"tensor": 2}, {}),
    "distributed": (SHARDED, {}, {"pipeline": 2}),
    "to the host": (SHARDED | {"dtype": "bf16"}, {"context": 2}, {"tensor": 2, "offload": "hybrid"}),
    "muon": (MUON, {"tensor": 2}, {"pipeline": 2}),
}
MORE_MOVES: dict[str, tuple[dict[str, Any], ...]] = {
    "distributed": (SHARDED, {"tensor": 2, "pipeline": 2}, {"context": 2}),
    "distributed bf16": (SHARDED | {"dtype": "bf16"}, {"context": 4}, {"tensor": 4}),
    "from the host": (SHARDED, {"tensor": 2, "offload": "hybrid"}, {"pipeline": 2}),
    "hybrid": (HYBRID | {"dtype": "bf16"}, {"pipeline": 2}, {"tensor": 2, "context": 2}),
    "adamw bf16": ({"dtype": "bf16"}, {"tensor": 4}, {"pipeline": 2}),
    "muon bf16": (MUON | {"dtype": "bf16"}, {"pipeline": 2}, {"tensor": 4}),
}


def follow(variants: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """On every rank: errors of steps, of norms, of a resumed run."""
    return {name: _follow(index, variant, folder) for index, (name, variant) in enumerate(variants.items())}


def _follow(seed: int, variant: dict[str, Any], folder: Path) -> dict[str, Any]:
    world = tiny.build(seed, **variant)
    directory = folder / f"{seed}_{world.groups.world_size}"
    norms = [tiny.step(world, number) for number in range(STEPS - 2)]
    tiny.save(world, directory)
    norms += [tiny.step(world, number) for number in range(STEPS - 2, STEPS)]
    wanted, wanted_norms = tiny.reference(world, STEPS)
    found = {
        "error": tiny.error(world, wanted),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, wanted_norms, strict=True)),
    }
    after = tiny.snapshot(world)
    again = tiny.build(seed, **variant, weights_seed=seed + 100)
    tiny.load(again, directory)
    for number in range(STEPS - 2, STEPS):
        tiny.step(again, number)
    resumed = tiny.snapshot(again)
    found["resumed"] = len(after) == len(resumed) and all(map(torch.equal, after, resumed))
    return found


def check(variants: dict[str, dict[str, Any]], ranks: list[dict[str, dict[str, Any]]]) -> None:
    for found in ranks:
        for name, variant in variants.items():
            tolerance = TOLERANCE[variant.get("name", "adamw"), variant.get("dtype", "fp32")]
            assert found[name]["error"] < tolerance, (name, found[name])
            assert found[name]["norms"] < 1e-6, (name, found[name])
            assert found[name]["resumed"], name


def run(processes: int, variants: dict[str, dict[str, Any]], folder: Path) -> None:
    job = "tests.training.test_optimizers:follow"
    check(variants, run_on_ranks(processes, job, timeout=550, variants=variants, folder=folder))


def move(moves: dict[str, tuple[dict[str, Any], ...]], folder: Path) -> dict[str, float]:
    """On every rank: the error where the first half of the steps ran at one layout and the second at another."""
    errors = {}
    for seed, (name, (common, before, after)) in enumerate(moves.items()):
        world = tiny.build(seed, **common, **before)
        for number in range(STEPS // 2):
            tiny.step(world, number)
        directory = folder / f"{seed}_{world.groups.world_size}"
        tiny.save(world, directory)
        world = tiny.build(seed, **common, **after, weights_seed=seed + 100)
        tiny.load(world, directory)
        for number in range(STEPS // 2, STEPS):
            tiny.step(world, number)
        # the weights that do not learn were loaded too
        errors[name] = tiny.error(world, tiny.reference(world, STEPS)[0])
    return errors


def check_moves(processes: int, moves: dict[str, tuple[dict[str, Any], ...]], folder: Path) -> None:
    job = "tests.training.test_optimizers:move"
    for errors in run_on_ranks(processes, job, timeout=550, moves=moves, folder=folder):
        for name, (common, _, _) in moves.items():
            tolerance = TOLERANCE[common.get("name", "adamw"), common.get("dtype", "fp32")]
            assert errors[name] < tolerance, (name, errors[name])


def test_checkpoint_of_another_layout(tmp_path: Path) -> None:
    check_moves(2, MOVES, tmp_path)


@pytest.mark.nightly
def test_checkpoint_of_another_layout_on_four_ranks(tmp_path: Path) -> None:
    check_moves(4, MORE_MOVES, tmp_path)


def test_single_process(tmp_path: Path) -> None:
    run(1, SINGLE, tmp_path)


def test_two_ranks(tmp_path: Path) -> None:
    run(2, TWO, tmp_path)


@pytest.mark.nightly
def test_four_ranks(tmp_path: Path) -> None:
    run(4, MORE, tmp_path)


def test_deepspeed(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip(
            "deepspeed is not installed: pip install --no-build-isolation 'megatron-sage[deepspeed]', run again"
        )
    run(1, DEEPSPEED, tmp_path)
