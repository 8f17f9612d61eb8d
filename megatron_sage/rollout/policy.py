"""The guided velocity of a model for one micro-batch: the one function that rollout, reference and training share.

Shapes: S this rank's video tokens, B samples of one prompt, C = 32 latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_sage.model.transformer import TextCondition
from megatron_sage.parallel.sequence import TokenShard


@dataclass(frozen=True)
class Prompt:
    """One prompt's text, conditional and unconditional, each of batch 1 and without padding."""

    text: str
    conditional: TextCondition
    unconditional: TextCondition


@dataclass(frozen=True)
class VideoShape:
    """The latent grid of one video and this rank's share of its tokens."""

    grid: tuple[int, int, int]  # latent frames, height, width
    channels: int
    shard: TokenShard

    @property
    def elements(self) -> int:
        """Latent elements of a whole video: the D of the log-probability's mean."""
        return self.shard.num_tokens * self.channels


def expand(text: TextCondition, batch: int) -> TextCondition:
    """The same text for `batch` samples: a view, no copy."""
    return TextCondition(*(x.expand(batch, -1, -1) for x in (text.qwen_BLD, text.byt5_BLD, text.image_BLD)))


def model_input(x_SBC: torch.Tensor, in_channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Latents followed by the condition latents and mask, zero for text-to-video: [S, B, in_channels]."""
    condition = x_SBC.new_zeros((*x_SBC.shape[:-1], in_channels - x_SBC.shape[-1]))
    return torch.cat([x_SBC, condition], dim=-1).to(dtype)


def guided_velocity(
    model: Callable[..., torch.Tensor],
    x_SBC: torch.Tensor,
    sigma: float,
    prompt: Prompt,
    shape: VideoShape,
    guidance: float,
    in_channels: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """v = v_uncond + guidance * (v_cond - v_uncond) in float32, [S, B, C]; one forward when guidance is 1.

    The two branches are forwards of their own because their texts have different lengths: padding one of them
    would bring back the mask that this model does without. `sigma` becomes the timestep 1000 * sigma in float32:
    in bfloat16 it would be off by up to 2 of 1000.
    """
    video_SBC = model_input(x_SBC, in_channels, dtype)
    batch = x_SBC.shape[1]
    timestep_B = torch.full((batch,), 1000.0 * sigma, dtype=torch.float32, device=x_SBC.device)
    cond = model(video_SBC, timestep_B, expand(prompt.conditional, batch), shape.grid).float()
    if guidance == 1.0:
        return cond
    uncond = model(video_SBC, timestep_B, expand(prompt.unconditional, batch), shape.grid).float()
    return uncond + guidance * (cond - uncond)
