"""Videos to latents and back, one clip at a time: diffusers' AutoencoderKLHunyuanVideo15, or the small PatchCodec."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo15

from megatron_sage.conditioning.patch_codec import PatchCodec
from megatron_sage.errors import UserError

CLASSES = {"AutoencoderKLHunyuanVideo15": AutoencoderKLHunyuanVideo15, "PatchCodec": PatchCodec}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the VAE and the encoders


class NonFiniteVideoError(ValueError):
    """Latents or pixels are NaN or infinite: the sample's reward is unknown, it must not be rounded to a video."""


class VideoCodec:
    """Deterministic encoding (the posterior's mode) and decoding, in the latents' scale of the transformer.

    A clip of F = tc·n + 1 frames of H x W pixels has latents [C, n + 1, H/sc, W/sc]; tc, sc and C come from the
    VAE's config (4, 16 and 32 in HunyuanVideo-1.5). One clip at a time: this VAE raises for larger batches.

    Tiling: diffusers' tiles of 256 pixels with blended seams, where a clip is larger than one. Untiled, the VAE's
    middle block makes a mask of (T·h·w)² elements. PatchCodec needs no tiles and has none.
    """

    def __init__(self, vae: AutoencoderKLHunyuanVideo15 | PatchCodec, tiling: bool = False) -> None:
        self.vae = vae.eval().requires_grad_(False)
        if tiling and isinstance(vae, AutoencoderKLHunyuanVideo15):
            vae.enable_tiling()
        self.scaling_factor = float(vae.config.scaling_factor)
        self.spatial = int(vae.config.spatial_compression_ratio)
        self.temporal = int(vae.config.temporal_compression_ratio)
        self.channels = int(vae.config.latent_channels)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tiling: bool = False,
    ) -> "VideoCodec":
        """Load a saved VAE; UserError, in one line, where the directory is missing, incomplete or another class's."""
        config_path = Path(directory) / "config.json"
        if not config_path.is_file():
            raise UserError(f"{config_path}: not found; expected the vae/ folder of a HunyuanVideo-1.5 checkpoint")
        try:
            found = json.loads(config_path.read_text()).get("_class_name")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config_path}: not a JSON object ({error}); copy the checkpoint's vae/ anew") from error
        if found not in CLASSES:
            raise UserError(f"{config_path}: _class_name is {found!r}, expected one of {', '.join(CLASSES)}")
        try:
            vae, report = CLASSES[found].from_pretrained(
                directory, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{directory}: the VAE's weights cannot be loaded ({reason}); copy vae/ anew") from error
        missing = sorted(report["missing_keys"])
        if missing:  # diffusers only warns of them
            raise UserError(f"{directory}: {len(missing)} weights are missing, e.g. {missing[0]}; copy vae/ anew")
        return cls(vae.to(device), tiling)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C, T, h, w] of a clip's latents; UserError, in one line, for sizes that this VAE cannot take."""
        if frames < 1 or (frames - 1) % self.temporal:
            raise UserError(
                f"video.frames={frames}: expected {self.temporal}n+1, e.g. "
                f"{max(frames - 1, 0) // self.temporal * self.temporal + 1}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.spatial:
                raise UserError(f"video.{name}={size}: expected a multiple of {self.spatial}")
        return self.channels, (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    @torch.no_grad()
    def encode(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [F, H, W, 3] -> float32 latents [C, T, h, w]: mode of the posterior times scaling_factor."""
        clip = torch.as_tensor(frames)
        if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
            raise UserError(f"encode: {clip.dtype} {list(clip.shape)}: expected one uint8 clip [F, H, W, 3]")
        self.latent_shape(*clip.shape[:3])
        x = clip.to(self.vae.device).permute(3, 0, 1, 2)[None].to(torch.float32) / 127.5 - 1
        mode = self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode()
        return mode[0].float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents [C, T, h, w] -> uint8 frames [F, H, W, 3], F = tc·(T-1) + 1.

        Pixels: clamp to [-1, 1], then floor((x + 1)/2·255 + 1/2). Raises NonFiniteVideoError.
        """
        if latents.ndim != 4 or latents.shape[0] != self.channels:
            raise UserError(f"decode: latents {list(latents.shape)}: expected one clip [{self.channels}, T, h, w]")
        if not bool(torch.isfinite(latents).all()):
            raise NonFiniteVideoError("decode: the latents are not finite")
        z = (latents.to(self.vae.device, torch.float32) / self.scaling_factor).to(self.vae.dtype)
        x = self.vae.decode(z[None]).sample[0].float()
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteVideoError("decode: the decoded pixels are not finite")
        pixels = torch.floor(x.clamp(-1, 1).add(1).mul(127.5).add(0.5)).to(torch.uint8)
        return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
