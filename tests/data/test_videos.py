"""Which frames a video gives, and that it gives them whole; against frames that are known."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.data.images import crop_resize
from megatron_sage.data.videos import presentation_times, read_video, select
from megatron_sage.errors import UserError
from megatron_sage.reporting.video import write_mp4


def write(path: Path, frames: np.ndarray, rate=24, codec="libvpx-vp9", pix_fmt="yuv444p", **options: str) -> Path:
    """A video of uint8 [F, H, W, 3]; `rate` may be a list of times in milliseconds instead."""
    index_first = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}  # so that a cut file has its index
    with av.open(str(path), "w", options=index_first) as container:
        stream = container.add_stream(codec, rate=24 if isinstance(rate, list) else rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = pix_fmt, options
        if isinstance(rate, list):
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if isinstance(rate, list):
                frame.pts, frame.time_base = rate[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def greys(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame k is grey 8·k: a frame says which one it is, whatever the codec does to it."""
    return np.ones((count, height, width, 3), np.uint8) * (8 * np.arange(count, dtype=np.uint8))[:, None, None, None]


def which(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in frames]


def refusal(path: Path, *request) -> str:
    with pytest.raises(UserError) as error:
        read_video(path, *request)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(("suffix", "codec", "pix_fmt"), [("mp4", "libx264", "yuv420p"), ("webm", "libvpx", "yuv420p")])
def test_frames_at_a_rate(tmp_path, suffix: str, codec: str, pix_fmt: str) -> None:
    """WebM rounds times to milliseconds, so 24 frames a second are 0, 42, 83, 125 ms: still every one is met."""
    path = write(tmp_path / f"v.{suffix}", greys(25), 24, codec, pix_fmt)
    assert which(read_video(path, 25, 16, 16)) == which(read_video(path, 25, 16, 16, 24.0)) == list(range(25))
    assert which(read_video(path, 13, 16, 16, 12)) == list(range(0, 25, 2))
    assert which(read_video(path, 3, 16, 16, 2)) == [0, 12, 24]
    assert which(read_video(path, 5, 16, 16, 48))[::2] == [0, 1, 2]  # a faster rate repeats frames
    assert which(read_video(path, 4, 16, 16)) == [0, 1, 2, 3]


def test_an_uneven_video_goes_by_its_times(tmp_path) -> None:
    times = [0, 100, 130, 400, 420, 900]
    path = write(tmp_path / "v.webm", greys(6), times, "libvpx", "yuv420p")
    assert [int(t * 1000) for t in presentation_times(path)] == times
    assert which(read_video(path, 10, 16, 16, 10)) == [0, 1, 2, 3, 3, 4, 4, 5, 5, 5]


@given(
    st.lists(st.fractions(0, 10, max_denominator=1000), min_size=1, max_size=12),
    st.integers(1, 20),
    st.sampled_from([1, 7.5, 8, 16, 23.976, 24, 30]),
)
def test_every_chosen_frame_is_the_nearest(times: list[Fraction], frames: int, fps: float) -> None:
    times = sorted(times)
    times = [time - times[0] for time in times]
    rate = Fraction(fps).limit_denominator(100_000)
    spacing = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / rate
    if (frames - 1) / rate >= times[-1] + spacing:
        with pytest.raises(UserError, match="use a longer video"):
            select(Path("v"), times, frames, fps)
        return
    chosen = select(Path("v"), times, frames, fps)
    assert chosen == [min(range(len(times)), key=lambda i: (abs(times[i] - k / rate), i)) for k in range(frames)]


def test_pixels_are_the_decoders_and_the_crop_the_images(tmp_path) -> None:
    """Lossless 4:4:4 returns what was written, but for RGB -> YUV -> RGB in 8 bits."""
    y, x = np.mgrid[:30, :50]
    frames = np.stack([np.stack([127 + 100 * np.sin(x / 9 + y / 7 + k + c) for c in range(3)], -1) for k in range(3)])
    frames = frames.astype(np.uint8)
    path = write(tmp_path / "v.webm", frames, lossless="1")
    assert np.abs(read_video(path, 3, 30, 50).astype(int) - frames).max() <= 3
    whole = read_video(path, 3, 30, 50)
    assert np.array_equal(read_video(path, 3, 16, 16), np.stack([crop_resize(frame, 16, 16) for frame in whole]))


def test_our_own_files_are_read(tmp_path) -> None:
    path = write_mp4(tmp_path / "v.mp4", greys(9), 8.0)
    assert which(read_video(path, 9, 32, 48, 8.0)) == list(range(9))


def test_a_turned_video_stands_upright(tmp_path) -> None:
    """The display matrix of an mp4's track, as phones write it: x' = -y, y' = x, a quarter turn clockwise."""
    frames = greys(3)
    frames[:, :16, :24] = 255  # top left
    path = write(tmp_path / "v.mp4", frames, 24, "libx264", "yuv420p")
    content, one = bytearray(path.read_bytes()), 1 << 16
    at = content.index(b"tkhd") + 4 + 40  # version and flags, times, id, duration, layer, volume
    assert struct.unpack(">9i", content[at : at + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    upright = read_video(path, 3, 48, 32)
    assert upright[0, :20, 20:].mean() > 250 and upright[0, 28:].mean() < 5 and upright[0, :, :12].mean() < 5


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx")])
def test_a_cut_video_is_refused_or_whole(tmp_path, suffix: str, codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    path = write(tmp_path / f"v.{suffix}", noise, 24, codec, "yuv420p")
    content, whole, refused = path.read_bytes(), read_video(path, 9, 16, 16), 0
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(container.streams.video[0]) if packet.size]
    for cut in [*range(0, len(content), len(content) // 25), *ends, *(end - 1 for end in ends)]:
        path.write_bytes(content[:cut])
        for frames in (9, 4):
            try:
                assert np.array_equal(read_video(path, frames, 16, 16), whole[:frames]), cut
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
            else:  # WebM says nowhere how many frames it should have; a whole mp4 may lack what follows its frames
                assert suffix == "webm" or cut >= max(ends)
    assert refused >= 40


def test_requests_that_cannot_be_met(tmp_path) -> None:
    path = write(tmp_path / "v.mp4", greys(8), 8, "libx264", "yuv420p")
    assert "8 frames, 9 are wanted" in refusal(path, 9, 16, 16)
    assert "1.000 s" in refusal(path, 9, 16, 16, 8.0)
    assert "fps=0" in refusal(path, 9, 16, 16, 0)
    assert "fps=nan" in refusal(path, 9, 16, 16, float("nan"))
    assert "frames=0" in refusal(path, 0, 16, 16)
    assert "no such file" in refusal(tmp_path / "none.mp4", 1, 16, 16)
    (tmp_path / "text.mp4").write_text("no video")
    assert "no video" in refusal(tmp_path / "text.mp4", 1, 16, 16)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "has no video in it" in refusal(tmp_path / "sound.mp4", 1, 16, 16)
