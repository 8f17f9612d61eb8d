"""Frames of a clip on their way into an image model: which ones, at which size. Torch only, on the CPU.

The rules are those of qwen-vl-utils as VideoAlign uses them (KwaiVGI/VideoAlign, vision_process.py) and of Hugging
Face's image processors; a reward model scores another picture without an error if any of them differs.
"""

import math

import numpy as np
import torch

from megatron_sage.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MIN_FRAMES, MAX_FRAMES = 4, 768  # of a sampled video
VIDEO_MIN_PIXELS = 128 * 28 * 28  # of a sampled frame
MAX_RATIO = 200  # of a frame's sides


def uniform(total: int, number: int) -> list[int]:
    """`number` frame numbers from first to last of `total`, equally far apart."""
    return torch.linspace(0, total - 1, number).round().long().tolist()


def sampled_number(total: int, video_fps: float, fps: float) -> int:
    """How many of `total` frames at `video_fps` are looked at, at `fps` a second: even, 4 to 768, at most `total`.

    A clip of 2 or 3 frames gives 2 (as the original does); UserError below that.
    """
    if total < 2:
        raise UserError(f"a clip of {total} frame: at least 2 are needed, for they are looked at in pairs")
    highest = min(MAX_FRAMES, total) // 2 * 2
    return round(min(max(total / video_fps * fps, MIN_FRAMES), highest) / 2) * 2


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size near (height, width) with sides that `factor` divides and an area between the bounds, where possible."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(f"frames of {height} x {width}: one side is more than {MAX_RATIO} times the other")
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def resized(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> float32 [F, 3, height, width], whole numbers 0 to 255.

    Bicubic with antialiasing, and rounded: torchvision does so for uint8 images, and the model saw such images.
    """
    x_F3HW = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    if x_F3HW.shape[-2:] != (height, width):
        x_F3HW = torch.nn.functional.interpolate(x_F3HW, (height, width), mode="bicubic", antialias=True)
    return x_F3HW.clamp(0, 255).round()


def normalized(
    x_F3HW: torch.Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """(x / 255 - mean) / std of each colour."""
    return (x_F3HW / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def patches(x_F3HW: torch.Tensor, patch: int, merge: int, depth: int) -> tuple[torch.Tensor, list[int]]:
    """Rows of depth x patch x patch pixels, in Qwen2-VL's order, and the grid [T, H, W] of patches.

    Returns float32 [T·H·W, 3·depth·patch²]: T slowest, then merge x merge squares of patches; a row is
    [colour][frame][y][x].
    """
    frames, _, height, width = x_F3HW.shape
    t, h, w = frames // depth, height // patch, width // patch
    x = x_F3HW.view(t, depth, 3, h // merge, merge, patch, w // merge, merge, patch)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * depth * patch * patch), [t, h, w]
