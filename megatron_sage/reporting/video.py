"""Clips as H.264 files that every browser plays."""

import os
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from megatron_sage.errors import UserError


def write_mp4(path: str | Path, frames: np.ndarray, fps: float, scale: int = 1) -> Path:
    """Write a uint8 clip [F, H, W, 3] as mp4 (H.264, yuv420p), every pixel enlarged to scale x scale.

    yuv420p shares its colours among 2x2 pixels: small clips need scale >= 2 to keep crisp edges, and odd sizes are
    completed by repeating the last row or column. The file appears whole or not at all.
    """
    path = Path(path)
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        kind = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise UserError(f"{path}: {kind}: expected a numpy uint8 clip [frames, height, width, 3]")
    if frames.size == 0 or not (np.isfinite(fps) and fps > 0) or int(scale) != scale or scale < 1:
        raise UserError(
            f"{path}: clip {list(frames.shape)} at fps={fps}, scale={scale}: expected at least one frame, "
            "a positive frame rate and a whole scale of 1 or more"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.mp4")
    try:
        encode(str(temporary), frames, fps, int(scale))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def encode(target: str | BinaryIO, frames: np.ndarray, fps: float, scale: int = 1, crf: int = 16) -> None:
    """The mp4 of `write_mp4` into a file by name or an open one; a smaller `crf` is a better picture."""
    height, width = (size * scale for size in frames.shape[1:3])
    options = {"movflags": "+faststart"} if isinstance(target, str) else {}  # which reads its file again
    with av.open(target, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"}
        for frame in frames:
            large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
            even = np.pad(large, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))
        container.mux(stream.encode(None))
