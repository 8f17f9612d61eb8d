"""A run directory as training leaves it, with made-up numbers."""

import json
import math
from pathlib import Path

import numpy as np

from megatron_sage.reporting.video import write_mp4

PROMPTS = ["a red circle moving left slowly", "a <b>blue</b> & green square", "a yellow triangle moving up quickly"]


def clip(seed: int, frames: int = 9, height: int = 31, width: int = 47) -> np.ndarray:
    """A moving square over a plain ground, odd in size."""
    video = np.full((frames, height, width, 3), 30, np.uint8)
    for place in range(frames):
        video[place, 8:20, 4 + place + seed : 16 + place + seed] = (230, 40 * seed, 40)
    return video


def metrics(iterations: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(iterations):
        mean = 1.2 + 0.4 * (1 - math.exp(-i / 12)) + 0.06 * rng.standard_normal()
        rows.append(
            {
                "iteration": i,
                "reward/nonfinite": 0,
                "reward/mean": mean,
                "reward/std": 0.12 + 0.03 * rng.random(),
                "reward/VQ": 0.5 + 0.1 * mean * rng.random(),
                "reward/MQ": 0.6 + 0.1 * rng.random(),
                "reward/TA": 0.7 + 0.05 * rng.random(),
                "reward/zero_std_groups": 0,
                "reward/dropped_groups": 0,
                "loss": 1e-3 * rng.standard_normal(),
                "loss/policy": 1e-3 * rng.standard_normal(),
                "kl/position": 1e-6 * (1 + i),
                "kl/velocity": 3e-5 * (1 + rng.random()),
                "lambda": 1e-7 * 1.12**i,
                "grad_norm": 0.3 + 0.1 * rng.random(),
                "ratio/mean": 1 + 1e-6 * rng.random(),
                "ratio/min": 1 - 1e-4 * rng.random(),
                "ratio/max": 1 + 1e-4 * rng.random(),
                "clip_fraction": 0.3 * rng.random(),
                "ratio/initial_deviation": 2e-7,
                "lr": 1e-4,
                "optimizer_steps": i + 1,
                "seconds/rollout": 2 + 0.2 * rng.random(),
                "seconds/decode": 0.4,
                "seconds/reward": 0.1,
                "seconds/reference": 1.1,
                "seconds/train": 4 + 0.3 * rng.random(),
                "seconds/total": 8.0,
            }
        )
    return rows


def write_run(directory: Path, iterations: int = 40, evaluation: bool = True, scale: int = 2, make=clip) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(iterations)))
    (directory / "config.yaml").write_text(
        "name: quick<start>\nmodel: {pretrained: examples/tiny_world/checkpoint}\nparallel: {tensor: 2}\n"
        "video: {frames: 9, height: 31, width: 47, fps: 16.0}\n"
        "sampler: {sde_type: sage_grpo, num_steps: 10, guidance_scale: 3.0}\n"
        "grpo: {group_size: 8, prompts_per_iteration: 2}\n"
        "reward: {weights: {VQ: 0.5, MQ: 0.5, TA: 1.0}}\noptimizer: {lr: 0.0001}\nprecision: {dtype: fp32}\n"
    )
    (directory / "environment.json").write_text(
        json.dumps(
            {
                "python": "3.11.2",
                "machine": "Linux x86_64, 2 cores",
                "gpu": None,
                "processes": 2,
                "packages": {"torch": "2.13.0", "megatron-core": "0.16.1"},
            }
        )
    )
    for label in ("before", "after"):
        for place in range(len(PROMPTS)):
            write_mp4(directory / "samples" / label / f"{place:03d}.mp4", make(place), 16, scale)
    if evaluation:
        rng = np.random.default_rng(5)
        content = {}
        for label, shift in (("before", 0.0), ("after", 0.25)):
            rows = [
                {
                    "index": i,
                    "prompt": PROMPTS[i % 3],
                    "reward": 1.3 + shift + 0.1 * rng.standard_normal(),
                    "VQ": 0.5 + shift,
                    "MQ": 0.6,
                    "TA": 0.75,
                }
                for i in range(16)
            ]
            for row in rows[:3]:
                row["file"] = f"samples/{label}/{row['index']:03d}.mp4"
            content[label] = {
                "mean": float(np.mean([row["reward"] for row in rows])),
                "stderr": 0.03,
                "per_dimension": {"VQ": 0.5 + shift, "MQ": 0.6, "TA": 0.75},
                "samples": rows,
            }
        content["difference"] = {"mean": content["after"]["mean"] - content["before"]["mean"], "stderr": 0.031}
        (directory / "evaluation.json").write_text(json.dumps(content))
    return directory
