"""A small video autoencoder with the shape of HunyuanVideo-1.5's VAE: 4x16x16 pixels of 3 channels -> 32 numbers.

It stands in for `AutoencoderKLHunyuanVideo15` in worlds too small for the real one, behind the same interface
(`encode(x).latent_dist`, `decode(z).sample`, `config`, diffusers' directory layout).
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn

NO_NOISE = -30.0  # log-variance: the posterior is its mode


class PatchCodec(ModelMixin, ConfigMixin):
    """Video [B, 3, F, H, W] in [-1, 1] <-> latents [B, 32, (F-1)/4+1, H/16, W/16], without randomness.

    Every latent voxel is a small network of its own patch of pixels and of its eight spatial neighbours. A patch is
    written as two colours blended by a soft mask (block truncation coding with a learned mask): sharp edges then
    need only a smooth mask before its sigmoid, which a small network can give. Like the VAE it takes 4n + 1 frames;
    the first frame stands alone in the first latent frame.
    """

    @register_to_config
    def __init__(
        self,
        hidden: int = 256,
        latent_channels: int = 32,
        spatial_compression_ratio: int = 16,
        temporal_compression_ratio: int = 4,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.time, self.space = temporal_compression_ratio, spatial_compression_ratio
        patch = 3 * self.time * self.space**2
        self.encoder = nn.Sequential(
            nn.Conv3d(patch, hidden, 1),
            nn.SiLU(),
            nn.Conv3d(hidden, hidden, (1, 3, 3), padding=(0, 1, 1)),
            nn.SiLU(),
            nn.Conv3d(hidden, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv3d(latent_channels, hidden, (1, 3, 3), padding=(0, 1, 1)),
            nn.SiLU(),
            nn.Conv3d(hidden, hidden, 1),
            nn.SiLU(),
            nn.Conv3d(hidden, self.time * self.space**2 + 6, 1),  # mask of every pixel, two colours
        )

    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Latents, not scaled; ValueError unless F = 4n + 1 and H, W divide by 16."""
        batch, _, frames, height, width = x.shape
        t, s = self.time, self.space
        if frames % t != 1 or height % s or width % s:
            raise ValueError(f"video is {frames}x{height}x{width}: needs {t}n + 1 frames, height and width % {s} = 0")
        padded = torch.cat([x[:, :, :1].expand(-1, -1, t - 1, -1, -1), x], dim=2)
        blocks = padded.reshape(batch, 3, -1, t, height // s, s, width // s, s)
        mode = self.encoder(blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4))
        moments = torch.cat([mode, torch.full_like(mode, NO_NOISE)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Video from latents that are not scaled; values may leave [-1, 1] a little."""
        t, s = self.time, self.space
        patches = self.decoder(z)
        batch, _, frames, rows, columns = patches.shape
        mask, low, high = patches.split([t * s * s, 3, 3], dim=1)
        mask = mask.sigmoid().reshape(batch, 1, t, s, s, frames, rows, columns)
        low, high = (colour.reshape(batch, 3, 1, 1, 1, frames, rows, columns) for colour in (low, high))
        blocks = (low + mask * (high - low)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        video = blocks.reshape(batch, 3, frames * t, rows * s, columns * s)
        return DecoderOutput(sample=video[:, :, t - 1 :])
