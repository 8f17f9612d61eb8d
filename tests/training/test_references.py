"""References: where their weights wait changes nothing, several at once, the base of a run with adapters; refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.errors import UserError
from tests.parallel.pool import run_on_ranks
from tests.training import world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("references")
    run_on_ranks(1, "tests.training.world:build", root=root)
    return root


def run(root: Path, name: str, processes: int = 1, **changes: Any) -> dict[str, Any]:
    arguments = world.overrides(world.settings(root, name, **changes))
    found = run_on_ranks(
        processes, "tests.training.world:train_job", arguments=arguments, processes=processes, timeout=300
    )
    found[0]["rows"] = [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in found[0]["rows"]]
    lines = (root / name / "references.jsonl").read_text().splitlines()
    found[0]["references"] = [json.loads(line) for line in lines]
    return found[0]


@pytest.fixture(scope="module")
def streamed(root: Path) -> dict[str, Any]:
    """Dual with the moving anchor, refreshed after the third of six steps."""
    return run(root, "streamed")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = all(np.array_equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    return one["rows"] == other["rows"] and one["references"] == other["references"] and weights


def test_a_resident_anchor_gives_the_same_run(root: Path, streamed: dict[str, Any]) -> None:
    assert same(run(root, "resident", **{"kl.anchor_placement": "device"}), streamed)
    moving = [line["moving"] for line in streamed["references"]]
    assert moving[0] == moving[1] != moving[2]  # refreshed after the third step, in the second iteration


def test_an_anchor_cut_over_replicas_gives_the_same_run(root: Path, streamed: dict[str, Any]) -> None:
    layout = {"parallel.context": 2}
    whole = run(root, "whole_cp2", 2, **layout)
    cut = run(root, "cut_cp2", 2, **{"kl.anchor_sharded": True}, **layout)
    assert same(cut, whole)
    # the initial model's checksum knows no layout
    assert whole["references"][0] == streamed["references"][0]


def test_the_initial_model_beside_the_anchor(root: Path, streamed: dict[str, Any]) -> None:
    measured = run(root, "measured", **{"kl.position": "both"})
    for mine, theirs in zip(measured["rows"], streamed["rows"], strict=True):
        assert mine["kl/initial"] >= 0
        assert {k: v for k, v in mine.items() if k != "kl/initial"} == theirs  # without a weight it is only measured
    first, second, third = measured["rows"]
    # until the refresh the anchor is the initial model
    assert first["kl/initial"] == first["kl/position"] and second["kl/initial"] == second["kl/position"]
    assert third["kl/initial"] > 0 and third["kl/initial"] != third["kl/position"]
    # half the weight on each of two equal references is one reference of the whole weight, until the refresh
    split = {"kl.position": "both", "kl.position_weight": 0.5, "kl.initial_weight": 0.5, "kl.phase": "training"}
    half = run(root, "half", **split, **{"kl.anchor_interval": 100})
    whole = run(root, "unrefreshed", **{"kl.anchor_interval": 100})
    for mine, theirs in zip(half["rows"], whole["rows"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


LORA = {"lora.rank": 2, "lora.export": "merged", "optimizer.lr": 1e-2, "kl.warmup_steps": 1}


def test_the_base_is_the_fixed_reference_of_adapters(root: Path) -> None:
    """An anchor that is never refreshed holds B = 0: the same reference, by another way."""
    fixed = run(root, "lora_fixed", **LORA, **{"kl.strategy": "fixed"})
    held = run(root, "lora_held", **LORA, **{"kl.strategy": "moving", "kl.anchor_interval": 100})
    assert fixed["rows"][-1]["kl/position"] > 1e-9
    for mine, theirs in zip(fixed["rows"], held["rows"], strict=True):
        assert mine["kl/position"] == pytest.approx(theirs["kl/position"], rel=1e-3, abs=1e-10)
        assert mine["reward/mean"] == pytest.approx(theirs["reward/mean"], rel=1e-5)


def test_a_run_with_adapters_goes_on_exactly_and_saves_them_alone(root: Path) -> None:
    whole = run(root, "lora_whole", **LORA)
    run(root, "lora_resumed", **LORA, **{"training.iterations": 2})
    (checkpoint,) = (root / "lora_resumed" / "checkpoints").iterdir()
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 2_000_000  # the model has 19 MB
    resumed = run(root, "lora_resumed", **LORA, **{"training.resume": "yes"})
    assert same(resumed, whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora.alpha": 7.0}, "lora=.*was saved with.*keep it, or start anew"),
        ({"lora.rank": 3}, "lora=.*was saved with"),
        ({"lora.rank": "null"}, "lora=None"),
        ({"model.weights": "other/megatron"}, "is not the model that .* began with"),
        ({"model.pretrained": "wide/hf", "model.weights": "wide/megatron"}, "is of another model, with"),
        ({"kl.strategy": "none"}, "position references moving, this run's are none"),
        ({"optimizer.name": "muon", "lora.rank": "null"}, "lora=None"),
        ({"optimizer.ema_decay": 0.9}, "optimizer.ema_decay=True"),
    ],
    ids=lambda value: next(iter(value.items())).__str__() if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(root: Path, changes: dict[str, Any], said: str) -> None:
    if not (root / "lora_saved").exists():
        run(root, "lora_saved", **LORA, **{"training.iterations": 1})
        run_on_ranks(1, "tests.training.world:build", root=root / "other", seed=9)
        run_on_ranks(1, "tests.training.world:build", root=root / "wide", num_layers=3)
    changes = {k: str(root / v) if k.startswith("model") else v for k, v in changes.items()}
    before = sorted(path.name for path in (root / "lora_saved" / "checkpoints").rglob("*"))
    with pytest.raises(UserError, match=said) as caught:
        run(root, "lora_saved", **(LORA | changes), **{"training.resume": "yes"})
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (root / "lora_saved" / "checkpoints").rglob("*")) == before
