"""How far bf16 and emulated FP8 move velocities and log-probabilities from fp32's, at the same latents and weights.

python benchmarks/fp8_log_prob.py [--out benchmarks/fp8_log_prob.json]

A random model of 4 blocks, hidden 128; 8 samples of 15 tokens x 32 channels, 4 steps. The trajectories are fp32's. A
log-probability is a mean over the latent elements, 480 here: a real clip has a million, and an error that is random
from element to element moves its mean by the root of the ratio less. FP8 is `tests/fp8_emulation.py`, no kernel.
"""

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the Trainer is put together by the tests' helper
FORMATS = ("bf16", "tensorwise", "delayed", "blockwise", "mxfp8")
MODEL: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "rope_axes_dim": (8, 12, 12),
}


def trainer(root: Path, precision: str) -> Any:
    """A Trainer on the random world, calibrated."""
    from megatron_sage.training.precision import calibrate
    from tests.fp8_emulation import emulated
    from tests.parallel.iterations import prepare
    from tests.training import world

    changes: dict[str, Any] = {"precision.dtype": "fp32" if precision == "fp32" else "bf16"}
    if precision not in ("fp32", "bf16"):
        changes |= {"precision.fp8": "hybrid", "precision.fp8_recipe": precision}
    settings = world.settings(root, "benchmark", **changes, **{"sampler.guidance_scale": 1.0})
    with emulated():
        made = prepare(world.overrides(settings), 1)
    calibrate(made.engine, made.prompts)
    made.engine.eval()
    return made


@torch.no_grad()
def evaluate(trainer: Any, trajectories: list[Any], steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities [pairs, B] of these trajectories in this model, and its velocities at their latents."""
    from megatron_sage.grpo.sde import step_mean
    from megatron_sage.rollout.transitions import transition_log_prob

    engine, table = trainer.engine, trainer.table
    network, local = engine.training_network(), engine.shape.shard.local
    log_probs, velocities = [], []
    for trajectory in trajectories:
        latents = {
            step: F.pad(trajectory.latents_SBC[step], (0, 0, 0, 0, 0, local - len(trajectory.latents_SBC[step])))
            for step in range(steps + 1)
        }
        for step in table.trained_steps:
            v_SBC = network.forward(0, latents[step], table.sigmas[step], trajectory.prompt, 0)
            v_SBC = v_SBC.float()
            mean = step_mean(latents[step].float(), v_SBC, table.a[step], table.b[step])
            std = table.std[step]
            log_probs.append(transition_log_prob(latents[step + 1], mean, std, engine.shape, None, table.normalized))
            velocities.append(v_SBC[: engine.shape.shard.num_tokens])
    return torch.stack(log_probs), velocities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "fp8_log_prob.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from megatron_sage.parallel import groups
    from tests.training import world

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        world.build(root, matrix_scale=1.0, **MODEL)
        exact = trainer(root, "fp32")
        steps = exact.engine.config.sampler.num_steps
        trajectories, _ = exact._roll_out()
        log_prob, velocities = evaluate(exact, trajectories, steps)
        for precision in FORMATS:
            groups.shutdown()
            found, theirs = evaluate(trainer(root, precision), trajectories, steps)
            moved = (found - log_prob).abs()
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(theirs, velocities, strict=True)]
            rows[precision] = {
                "velocity_relative_error": round(torch.tensor(errors).median().item(), 5),
                "log_prob_median": float(f"{moved.median():.3g}"),
                "log_prob_largest": float(f"{moved.max():.3g}"),
            }
            print(precision, rows[precision], flush=True)
    content = {"date": date.today().isoformat(), "torch": torch.__version__, "against": "fp32", "rows": rows}
    Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
