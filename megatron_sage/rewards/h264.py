"""What a clip looks like after an mp4 file, without the file."""

import io

import numpy as np


def round_trip(frames: np.ndarray, fps: float, crf: int = 18) -> np.ndarray:
    """uint8 [F, H, W, 3] compressed by H.264 (yuv420p) and read back, same shape; odd sides are padded meanwhile."""
    import av

    from megatron_sage.reporting.video import encode

    buffer = io.BytesIO()
    encode(buffer, frames, fps, crf=crf)
    buffer.seek(0)
    height, width = frames.shape[1:3]
    with av.open(buffer, "r") as container:
        found = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(video=0)]
    if len(found) != len(frames):
        raise RuntimeError(f"H.264 gave {len(found)} of {len(frames)} frames back")
    return np.stack(found)
