"""Iterations with emulated FP8 on this rank, intact and broken on purpose."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.fp8_emulation import emulated
from tests.parallel.iterations import prepare

MODEL: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 3}


def settings(root: Path, name: str, recipe: str, **changes: Any) -> dict[str, Any]:
    """Two iterations of one update; without guidance, for speed."""
    from tests.training import world

    base = {
        "precision.dtype": "bf16",
        "precision.fp8": "hybrid",
        "precision.fp8_recipe": recipe,
        "sampler.num_steps": 3,
        "sampler.guidance_scale": 1.0,
        "grpo.updates_per_rollout": 1,
        "reward.function": "tests.training.world:SteadyReward",
        "optimizer.lr": 1e-3,
    }
    return world.settings(root, name, **(base | changes))


def build(root: Path) -> None:
    """A world whose network is not nearly linear: what FP8 does to it is seen."""
    from tests.training import world

    world.build(root, matrix_scale=1.0, **MODEL)


def job(arguments: list[str], processes: int, iterations: int = 2, broken: str | None = None) -> dict[str, Any]:
    """Train; metrics, noise floor, and what became of the quantised weights and scales.

    `broken`: "roll" moves the delayed scales between rollout and update, "bf16" trains without FP8.
    """
    with emulated():
        trainer = prepare(arguments, processes)
        quantisation = trainer.engine.quantisation
        with _breaking(trainer, broken):
            rows, scales = [], []
            for _ in range(iterations):
                rows.append(trainer.run_iteration()[0])
                scales.append({name: x.clone() for name, x in _scales(quantisation).items()})
        # of the last block's text nothing is trained, and most is never run
        layers = {name: layer for name, layer in quantisation.layers.items() if layer.weight.requires_grad}
        return {
            "rows": rows,
            "floor": json.loads((Path(trainer.engine.config.output_dir) / "noise_floor.json").read_text()),
            "layers": sorted(layers),
            "casts": sorted({layer.casts for layer in layers.values()}),
            "scales_moved": [
                sum(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(scales, scales[1:], strict=False)
            ],
            "scales": {name: x.tolist() for name, x in scales[-1].items()},
            "layers_without_gradient": [n for n, layer in layers.items() if not bool(layer.weight.main_grad.any())],
        }


def _scales(quantisation: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": x
        for name, layer in quantisation.layers.items()
        if layer.weight.requires_grad
        for part, x in layer.scaling().items()
        if part.endswith("scale")
    }


@contextlib.contextmanager
def _breaking(trainer: Any, broken: str | None) -> Iterator[None]:
    """One rule less."""
    if broken == "roll":
        reference_pass = trainer._reference_pass

        def rolled(trajectories: Any) -> None:
            reference_pass(trajectories)
            trainer.engine.quantisation.after_update()

        trainer._reference_pass = rolled
    elif broken == "bf16":
        gradients = trainer.replay.gradients

        def without(*args: Any) -> Any:
            layers = list(trainer.engine.quantisation.layers.values())
            for layer in layers:
                layer.runs_fp8 = False
            try:
                return gradients(*args)
            finally:
                for layer in layers:
                    layer.runs_fp8 = True

        trainer.replay.gradients = without
    yield


def train(arguments: list[str], processes: int) -> dict[str, Any]:
    """A whole `train` with emulated FP8: rows and weights."""
    from tests.training.world import train_job

    with emulated():
        return train_job(arguments, processes)
