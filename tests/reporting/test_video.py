"""mp4 files are read back by PyAV."""

from fractions import Fraction

import av
import numpy as np
import pytest

from megatron_sage.errors import UserError
from megatron_sage.reporting.video import write_mp4


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """Smooth colours: H.264 and yuv420p keep them closely."""
    t, y, x = np.meshgrid(np.linspace(0, 1, frames), np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return (np.stack([x, y, t], axis=-1) * 200 + 20).astype(np.uint8)


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.array([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context.name, stream.codec_context.pix_fmt


@pytest.mark.parametrize(
    ("frames", "height", "width", "scale"), [(81, 32, 48, 2), (5, 31, 47, 1), (1, 2, 2, 3), (3, 1, 1, 1), (4, 7, 9, 3)]
)
def test_every_size_plays(tmp_path, frames: int, height: int, width: int, scale: int) -> None:
    clip = gradient(frames, height, width)
    path = write_mp4(tmp_path / "new" / "clip.mp4", clip, 16, scale)
    decoded, rate, codec, pixels = read(path)
    assert (codec, pixels, rate) == ("h264", "yuv420p", 16)
    tall, wide = height * scale, width * scale
    assert decoded.shape == (frames, tall + tall % 2, wide + wide % 2, 3)
    assert [item.name for item in path.parent.iterdir()] == ["clip.mp4"]  # no temporary file left
    if min(height, width) > 8:
        enlarged = clip.repeat(scale, 1).repeat(scale, 2).astype(float)
        assert np.abs(decoded[:, :tall, :wide] - enlarged).mean() < 4


def test_enlarging_keeps_pixels_apart(tmp_path) -> None:
    """Two neighbours of different colours stay two flat squares; interpolation or chroma sharing would mix them."""
    clip = np.zeros((2, 2, 2, 3), np.uint8)
    clip[:, :, 0], clip[:, :, 1] = (220, 30, 30), (30, 30, 220)
    decoded, *_ = read(write_mp4(tmp_path / "clip.mp4", clip, 8, scale=16))
    left, right = decoded[0, 8, 2:12].astype(int), decoded[0, 8, 20:30].astype(int)
    assert np.ptp(left, axis=0).max() < 12 and np.ptp(right, axis=0).max() < 12
    assert np.abs(left.mean(0) - (220, 30, 30)).max() < 25 and np.abs(right.mean(0) - (30, 30, 220)).max() < 25


@pytest.mark.parametrize("fps", [16, 24.0, 23.976, 7.5])
def test_frame_rates(tmp_path, fps: float) -> None:
    _, rate, *_ = read(write_mp4(tmp_path / "clip.mp4", gradient(6, 16, 16), fps))
    assert float(rate) == pytest.approx(float(Fraction(fps).limit_denominator(1001)), rel=1e-3)


@pytest.mark.parametrize(
    ("clip", "fps", "scale", "named"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), 8, 1, "float32"),
        (np.zeros((2, 4, 4), np.uint8), 8, 1, r"\[2, 4, 4\]"),
        ([1], 8, 1, "list"),
        (np.zeros((0, 4, 4, 3), np.uint8), 8, 1, "at least one frame"),
        (np.zeros((2, 4, 4, 3), np.uint8), 0, 1, "fps=0"),
        (np.zeros((2, 4, 4, 3), np.uint8), 8, 0, "scale=0"),
        (np.zeros((2, 4, 4, 3), np.uint8), 8, 1.5, "scale=1.5"),
    ],
)
def test_what_is_no_clip_is_refused_in_one_line(tmp_path, clip, fps: float, scale: int, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        write_mp4(tmp_path / "clip.mp4", clip, fps, scale)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
