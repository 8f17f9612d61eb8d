"""Which encoders a model directory holds: the released ones, or the tiny world's."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megatron_sage.conditioning.embedding import ImageEmbedding, PromptEmbedding
from megatron_sage.conditioning.fingerprint import Record, Shapes
from megatron_sage.conditioning.loading import read_json
from megatron_sage.conditioning.qwen import HunyuanTextEncoder
from megatron_sage.conditioning.siglip import HunyuanImageEncoder
from megatron_sage.conditioning.words import CLASS_NAME, WordEncoder


class TextEncoder(Protocol):
    """Prompt -> embedding. `shapes`: what its tensors look like, None where the length follows the prompt."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def shapes(self) -> Shapes: ...

    def encode(self, text: str) -> PromptEmbedding: ...


class ImageEncoder(Protocol):
    """Picture, uint8 [H, W, 3] -> embedding at one video size."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def shapes(self) -> Shapes: ...

    def encode(self, image: np.ndarray) -> ImageEmbedding: ...


def open_text_encoder(
    pretrained: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    record: Record | None = None,
) -> TextEncoder:
    """The text encoder of a model directory, without its weights: the first `encode` loads them.

    `dtype` None: as stored. UserError, in one line, where files are missing or of another class.
    """
    folder = Path(pretrained) / "text_encoder"
    if read_json(folder / "config.json").get("_class_name") == CLASS_NAME:
        return WordEncoder.from_pretrained(folder)
    return HunyuanTextEncoder(Path(pretrained), device, dtype, record)


def open_image_encoder(
    pretrained: str | Path,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    record: Record | None = None,
) -> ImageEncoder:
    """The image encoder of an image-to-video directory for videos of height x width pixels; weights come later."""
    return HunyuanImageEncoder(Path(pretrained), height, width, device, dtype, record)
