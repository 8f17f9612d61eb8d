"""Everything a run needs, built once: groups, policy, prompts with their text, codec, reward, step table."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sage import parallel  # noqa: F401  (CPU backend before Megatron)
from megatron_sage.checkpoint.distributed import load_weights
from megatron_sage.conditioning.cache import EmbeddingCache
from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.conditioning.words import WordEncoder
from megatron_sage.config import Config
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import StepCoefficients, step_coefficients
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.transformer import HunyuanVideoDiT, TextCondition
from megatron_sage.parallel.device import device
from megatron_sage.parallel.groups import Groups
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.rollout.policy import Prompt, VideoShape, guided_velocity
from megatron_sage.rollout.sampler import StepTable, Velocity

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPORAL, SPATIAL = 4, 16  # compression of the HunyuanVideo-1.5 VAE


@dataclass
class Engine:
    """The model and what surrounds it on this rank."""

    config: Config
    groups: Groups
    model: HunyuanVideoDiT
    dtype: torch.dtype
    device: torch.device
    shape: VideoShape
    token_group: dist.ProcessGroup | None  # over which video tokens are split; None: every rank holds all

    def velocity(self, guidance: float | None = None, model: torch.nn.Module | None = None) -> Velocity:
        """The guided velocity of the policy (or of its DDP wrapper, when gradients are wanted)."""
        scale = self.config.sampler.guidance_scale if guidance is None else guidance
        network, channels = model or self.model, self.model.config.in_channels

        def call(x_SBC: torch.Tensor, sigma: float, prompt: Prompt) -> torch.Tensor:
            return guided_velocity(network, x_SBC, sigma, prompt, self.shape, scale, channels, self.dtype)

        return call


def step_table(sde_type: str, num_steps: int, shift: float, eta: float) -> tuple[StepTable, StepCoefficients]:
    """Schedule and coefficients of one sampler."""
    sigmas = shifted_sigmas(num_steps, shift)
    coefficients = step_coefficients(sde_type, sigmas, eta)
    return StepTable.build(sigmas, coefficients), coefficients


def build_engine(config: Config, groups: Groups) -> Engine:
    """The policy with its weights, on this rank's device."""
    dtype = DTYPES[config.precision.dtype]
    tensor = config.parallel.tensor
    split = config.parallel.sequence and tensor > 1
    model_config = HunyuanVideoConfig.from_diffusers(
        read_transformer_config(config.model.pretrained),
        tensor=tensor,
        sequence_parallel=split,
        dtype=dtype,
        recompute=config.precision.recompute,
    )
    model = HunyuanVideoDiT(model_config, groups.collection).to(device())
    assert config.model.weights is not None  # validated
    load_weights(model, config.model.weights)
    video = config.video
    grid = ((video.frames - 1) // TEMPORAL + 1, video.height // SPATIAL, video.width // SPATIAL)
    shard = TokenShard(grid[0] * grid[1] * grid[2], tensor if split else 1, groups.tp_rank if split else 0)
    shape = VideoShape(grid, model_config.out_channels, shard)
    return Engine(config, groups, model, dtype, device(), shape, groups.tp if split else None)


def read_transformer_config(pretrained: str) -> dict[str, Any]:
    """`transformer/config.json` of a diffusers directory."""
    return json.loads((Path(pretrained) / "transformer" / "config.json").read_text())


def load_codec(config: Config) -> VideoCodec:
    """The VAE, in float32 on a CPU and in the run's dtype on a GPU."""
    target = device()
    dtype = torch.float32 if target.type == "cpu" else DTYPES[config.precision.dtype]
    return VideoCodec.from_pretrained(Path(config.model.pretrained) / "vae", device=target, dtype=dtype)


def encode_prompts(config: Config, engine: Engine, texts: list[str]) -> dict[str, Prompt]:
    """Each text's conditioning through the embedding cache; rank 0 encodes what the cache lacks."""
    encoder = WordEncoder.from_pretrained(Path(config.model.pretrained) / "text_encoder")
    directory = Path(config.data.embedding_cache or Path(config.output_dir) / "embeddings")
    cache = EmbeddingCache(directory, encoder.fingerprint)
    wanted = dict.fromkeys([" ", *texts])
    if engine.groups.rank == 0:
        for text in wanted:
            if text not in cache:
                cache.put(text, encoder.encode(text))
    dist.barrier(group=dist.group.WORLD)
    conditions = {text: _condition(cache, text, engine) for text in wanted}
    return {text: Prompt(text, conditions[text], conditions[" "]) for text in texts}


def _condition(cache: EmbeddingCache, text: str, engine: Engine) -> TextCondition:
    """One text without its padding tokens, batch 1, on the device; no image tokens: text-to-video."""
    embedding = cache.get(text).valid()
    image = torch.zeros(1, 0, engine.model.config.image_embed_dim)
    tokens = (embedding.encoder_hidden_states[None], embedding.encoder_hidden_states_2[None], image)
    return TextCondition(*(x.to(engine.device, engine.dtype) for x in tokens))
