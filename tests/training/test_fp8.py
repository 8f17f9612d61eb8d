"""Whole iterations in emulated FP8: one quantisation for rollout, reference and training, and what happens without."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sage.errors import UserError
from tests.parallel.pool import run_on_ranks
from tests.training import world
from tests.training.fp8_jobs import settings

JOB = "tests.training.fp8_jobs:job"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    run_on_ranks(1, "tests.training.fp8_jobs:build", root=folder)
    return folder


def run(root: Path, name: str, recipe: str, ranks: int = 1, options: Any = None, **changes: Any) -> list[Any]:
    arguments = world.overrides(settings(root, name, recipe, **changes))
    return run_on_ranks(ranks, JOB, arguments=arguments, processes=ranks, **(options or {}))


def assert_one_quantisation(found: dict[str, Any]) -> None:
    assert found["floor"]["largest"] == 0
    assert [row["ratio/initial_deviation"] for row in found["rows"]] == [0] * len(found["rows"])
    # the anchor is the policy in the first iteration: what is cast of its weights must be the same numbers
    assert found["rows"][0]["kl/position"] == 0
    assert found["rows"][1]["kl/position"] > 0
    assert not found["layers_without_gradient"]


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", pytest.param("mxfp8", marks=pytest.mark.nightly)])
def test_the_ratio_begins_at_one_exactly(root: Path, recipe: str) -> None:
    (found,) = run(root, recipe, recipe)
    assert_one_quantisation(found)
    assert found["floor"]["fp8"] == f"hybrid {recipe}"


def test_delayed_is_frozen_from_the_rollout_to_the_update(root: Path) -> None:
    (found,) = run(root, "delayed", "delayed")
    assert_one_quantisation(found)
    assert found["scales_moved"][0] > 0  # and with the update they do move on
    backward = [scale[0] for name, scale in found["scales"].items() if "backward" in name]
    assert min(backward) > 1e3  # gradients are small: Transformer Engine's first scale, 1, would leave nothing of them


def test_scales_that_move_before_the_update_are_refused(root: Path) -> None:
    changes = {"grpo.allow_clip_below_floor": True}
    options = {"broken": "roll", "iterations": 1}
    (found,) = run(root, "rolled", "delayed", options=options, **changes)
    assert found["floor"]["largest"] > found["floor"]["clip_range"]
    with pytest.raises(UserError, match="is below the noise floor"):
        run(root, "rolled_refused", "delayed", options=options)


def test_training_in_another_precision_than_the_rollout_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="is below the noise floor"):
        run(root, "other", "tensorwise", options={"broken": "bf16", "iterations": 1})


def test_weights_are_cast_once_an_update(root: Path) -> None:
    """For rollout, noise floor and training together; not at every forward, nor where Megatron would."""
    (found,) = run(root, "casts", "tensorwise", options={"iterations": 3}, **{"kl.strategy": "none"})
    assert found["casts"] == [3]


LAYOUTS = [
    pytest.param(2, {"parallel.tensor": 2}, id="tp2-sp"),
    pytest.param(2, {"parallel.tensor": 2, "parallel.sequence": False}, id="tp2"),
    pytest.param(2, {"parallel.context": 2}, id="cp2"),
    pytest.param(3, {"parallel.pipeline": 3, "sampler.micro_batch": 1}, id="pp3"),
    pytest.param(4, {"parallel.tensor": 2, "precision.recompute": "selective"}, id="tp2-sp-dp2-selective"),
    pytest.param(2, {"precision.recompute": "full"}, id="dp2-full"),
]


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_every_layout_begins_at_one(root: Path, ranks: int, layout: dict[str, Any], recipe: str) -> None:
    name = "_".join([recipe, *(f"{key}{value}" for key, value in layout.items())])
    changes = {"precision.fp8_first_bf16": 1, **layout}
    found = run(root, name, recipe, ranks, **changes)
    for one in found:
        # sequence-parallel sums may be added in another order in the training path
        assert one["floor"]["largest"] <= 1e-6
        assert max(row["ratio/initial_deviation"] for row in one["rows"]) <= 1e-6
        assert not one["layers_without_gradient"]
    blocks = {name.split(".")[2] for one in found for name in one["layers"]}
    assert blocks == {"1", "2"}  # by the number in the whole model, whatever the stage


@pytest.mark.nightly
def test_a_resumed_delayed_run_is_the_same_run(root: Path) -> None:
    def train(name: str, **changes: Any) -> dict[str, Any]:
        arguments = world.overrides(settings(root, name, "delayed", **changes))
        return run_on_ranks(1, "tests.training.fp8_jobs:train", arguments=arguments, processes=1)[0]

    whole = train("whole", **{"training.iterations": 4})
    train("parts", **{"training.iterations": 2})
    parts = train("parts", **{"training.iterations": 4, "training.resume": "yes"})
    for mine, theirs in zip(parts["rows"], whole["rows"], strict=True):
        for key in ("loss", "ratio/max", "kl/position", "grad_norm"):
            assert mine[key] == theirs[key], (mine["iteration"], key)
