"""The reference image of image-to-video: SigLIP's tokens, and the VAE's latents of the first frame."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.conditioning.embedding import ImageEmbedding
from megatron_sage.conditioning.fingerprint import Fingerprinted, Record, Shapes
from megatron_sage.conditioning.loading import class_of, load_model, load_processor, read_json
from megatron_sage.errors import UserError

VERSION = "HunyuanVideo-1.5 image 1"


class HunyuanImageEncoder(Fingerprinted):
    """SigLIP and the VAE of a diffusers directory, for videos of one size; weights are loaded by the first `encode`.

    The picture is scaled and cropped to the video's size (diffusers' resize_mode "crop"); both models see that.
    """

    label = "hunyuan-image"
    folders = ("image_encoder", "feature_extractor", "vae")
    weight_folders = ("image_encoder", "vae")
    loaded = ("_siglip", "_codec", "_features", "_processor")

    def __init__(
        self,
        pretrained: Path,
        height: int,
        width: int,
        device: torch.device | str,
        dtype: torch.dtype,
        record: Record | None = None,
    ) -> None:
        super().__init__(pretrained, record, version=VERSION, height=height, width=width, dtype=str(dtype))
        self.height, self.width, self.device, self.dtype = height, width, device, dtype
        for name in self.folders:
            if not (pretrained / name).is_dir():
                cure = "prompts with images need an image-to-video checkpoint (i2v)"
                raise UserError(f"{pretrained}: has no {name}/; {cure}")
        class_of(pretrained, "image_encoder", ("SiglipVisionModel",))
        siglip = read_json(pretrained / "image_encoder" / "config.json")
        vae = read_json(pretrained / "vae" / "config.json")
        compression = vae.get("spatial_compression_ratio", 16)
        for key, size in (("height", height), ("width", width)):
            if size < 1 or size % compression:
                raise UserError(f"video.{key}={size}: expected a multiple of {compression}")
        latent = (vae.get("latent_channels", 32), height // compression, width // compression)
        self.shapes: Shapes = {
            "image_embeds": (None, siglip.get("hidden_size", 768)),
            "first_frame": latent,
        }

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> ImageEmbedding:
        """The embedding of one picture, uint8 [H, W, 3] of any size, on the CPU."""
        from PIL import Image

        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"image: {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3]")
        picture = self._processor.resize(Image.fromarray(image), self.height, self.width, resize_mode="crop")
        pixels = self._features.preprocess(images=picture, do_resize=True, return_tensors="pt", do_convert_rgb=True)
        siglip = self._siglip
        tokens = siglip(**pixels.to(device=self.device, dtype=siglip.dtype)).last_hidden_state[0]
        vae, scale = self._codec.vae, self._codec.scaling_factor
        frame = self._processor.preprocess(picture, height=self.height, width=self.width)  # [1, 3, H, W] in [-1, 1]
        x = frame.to(self.device, vae.dtype)[:, :, None]
        # One frame is never tiled: its attention mask is small, and tiles would leave seams in the condition.
        latents = vae.encode(x).latent_dist.mode()[0, :, 0] * scale
        return ImageEmbedding(tokens.cpu(), latents.float().cpu())

    @cached_property
    def _processor(self) -> Any:
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor(do_resize=False, do_convert_rgb=True)

    @cached_property
    def _features(self) -> Any:
        # Pillow's resampling on every machine: with torchvision installed, diffusers' default would be another one.
        from transformers import SiglipImageProcessorPil

        return load_processor(SiglipImageProcessorPil, self.root / "feature_extractor")

    @cached_property
    def _siglip(self) -> Any:
        from transformers import SiglipVisionModel

        return load_model(SiglipVisionModel, self.root / "image_encoder", self.device, self.dtype)

    @cached_property
    def _codec(self) -> VideoCodec:
        return VideoCodec.from_pretrained(self.root / "vae", self.device, self.dtype)
