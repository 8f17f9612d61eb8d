"""A random tiny world in the diffusers layout, and jobs that train on it: everything but trained weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPTS = ["a red circle moving left slowly", "a blue square moving up quickly, then nothing", "a green triangle"]
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "rope_axes_dim": (4, 6, 6),
    "text_embed_dim": 24,
    "text_embed_2_dim": 16,
    "image_embed_dim": 16,
    "task_type": "t2v",
}


class BrightnessReward:
    """A reward of random videos that differs from sample to sample; its dimensions are VQ, MQ and TA."""

    dimensions = ("VQ", "MQ", "TA")

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        mean = np.array([video.mean() / 255 for video in videos])
        spread = np.array([video.std() / 255 for video in videos])
        return {"VQ": mean, "MQ": spread, "TA": mean - spread}


class BrokenReward(BrightnessReward):
    """Never finite."""

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        return {name: np.full(len(videos), np.nan) for name in self.dimensions}


class SteadyReward(BrightnessReward):
    """In steps of 1/1000. A pixel that rounds the other way moves a mean by 1e-7, which is nothing, but 1e-5 of the
    advantages, which divide by the spread of a group: without the steps, gradients of equal runs differ by as much.
    """

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        return {name: np.round(values, 3) for name, values in super().__call__(videos, prompts, fps).items()}


class PatchyReward(SteadyReward):
    """Not finite where the brightness, in thousandths, divides by three: samples here and there drop out."""

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        scores = super().__call__(videos, prompts, fps)
        dropped = np.round(scores["VQ"] * 1000).astype(int) % 3 == 0
        return scores | {"VQ": np.where(dropped, np.nan, scores["VQ"])}


def build(root: Path, seed: int = 0, matrix_scale: float | None = None, **transformer_config: Any) -> Path:
    """Random weights seeded from numpy, small enough to train in seconds; returns the diffusers root.

    `matrix_scale`: of the transformer's matrices, over the root of their number of inputs; None: 0.05 for all.
    """
    from diffusers import HunyuanVideo15Transformer3DModel

    from megatron_sage.checkpoint.convert import hf_to_megatron
    from megatron_sage.conditioning.patch_codec import PatchCodec
    from megatron_sage.conditioning.words import WordEncoder

    rng = np.random.default_rng(seed)
    config = TRANSFORMER | transformer_config
    transformer, codec = HunyuanVideo15Transformer3DModel(**config), PatchCodec(hidden=16)
    with torch.no_grad():
        for module, scale in ((transformer, 0.05), (codec, 0.2)):
            for name, parameter in module.named_parameters():
                size = scale
                if matrix_scale is not None and module is transformer and parameter.ndim > 1:
                    size = matrix_scale / parameter[0].numel() ** 0.5
                value = torch.from_numpy(rng.standard_normal(parameter.shape, dtype=np.float32)) * size
                parameter.copy_(value + 1 if "norm" in name and name.endswith("weight") and value.ndim == 1 else value)
    transformer.save_pretrained(root / "hf" / "transformer")
    codec.save_pretrained(root / "hf" / "vae")
    WordEncoder(dim=24, dim_2=16).save_pretrained(root / "hf" / "text_encoder")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    hf_to_megatron(root / "hf", root / "megatron")
    return root / "hf"


def settings(root: Path, output: str, **changes: Any) -> dict[str, Any]:
    """Overrides of a run of three iterations on `build(root)`'s world; 5 latent frames of 1x3: 15 tokens."""
    base: dict[str, Any] = {
        "name": output,
        "output_dir": str(root / output),
        "seed": 3,
        "model.pretrained": str(root / "hf"),
        "model.weights": str(root / "megatron"),
        "precision.dtype": "fp32",
        "precision.threads": 1,
        "video.frames": 17,
        "video.height": 16,
        "video.width": 48,
        "video.fps": 16,
        "sampler.num_steps": 4,
        "sampler.shift": 3.0,
        "sampler.guidance_scale": 2.0,
        "sampler.micro_batch": 2,
        "grpo.group_size": 4,
        "grpo.prompts_per_iteration": 2,
        "grpo.updates_per_rollout": 2,
        "kl.anchor_interval": 3,
        "kl.lambda_max": 0.01,
        "reward.function": "tests.training.world:BrightnessReward",
        "optimizer.lr": 1e-4,
        "data.prompts": str(root / "prompts.txt"),
        "training.iterations": 3,
    }
    return base | changes


def overrides(values: dict[str, Any]) -> list[str]:
    """As the command line writes them."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in values.items()]


def train_job(arguments: list[str], processes: int) -> dict[str, Any]:
    """Train on this rank; what the run left behind."""
    from safetensors.torch import load_file

    from megatron_sage.config import load_config, validate
    from megatron_sage.training.run import train

    config = load_config(None, arguments)
    validate(config, processes)
    train(config)
    directory = Path(config.output_dir)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(directory / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    return {"rows": rows, "weights": {name: value.float().numpy() for name, value in weights.items()}}
