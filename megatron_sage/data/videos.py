"""Videos as arrays: which frames are taken, and how they are decoded and cropped."""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from megatron_sage.data.images import crop_resize
from megatron_sage.errors import UserError

# Chroma interpolated to every pixel, exact rounding: swscale's default for yuv420p -> rgb24 repeats chroma samples and
# rounds coarsely. DALI's CPU decoder uses these flags too, and gives the same bytes.
SCALER = "bilinear+full_chroma_int+accurate_rnd"

_BT601 = (2, 5, 6)  # AVColorSpace: unspecified (which swscale takes for it), BT.470BG, SMPTE 170M


def read_video(path: str | Path, frames: int, height: int, width: int, fps: float | None = None) -> np.ndarray:
    """`frames` pictures of a video as uint8 [F, H, W, 3], each cropped and resized like a reference image.

    With `fps`, picture k is the one nearest in time to k / fps after the first (of two equally near the earlier one),
    whatever the file's own rate, be it constant or not; without it the first `frames` pictures as they come. UserError,
    one line that names the file, where it is damaged, cut, too short or no video.
    """
    path = Path(path)
    check_request(path, frames, height, width, fps)
    with video_refusals(path):
        times = presentation_times(path)
        wanted = select(path, times, frames, fps)
        decoded = _decoded(path, sorted(set(wanted)))
        chosen = {index: crop_resize(picture, height, width) for index, picture in decoded}
    return np.stack([chosen[index] for index in wanted])


def check_request(path: Path, frames: int, height: int, width: int, fps: float | None) -> None:
    """UserError for a request that no video could fulfil."""
    if frames < 1 or height < 1 or width < 1:
        raise UserError(f"{path}: frames={frames}, height={height}, width={width}: each must be at least 1")
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise UserError(f"{path}: fps={fps}: must be a positive number; None takes the frames as they come")


def presentation_times(path: Path) -> list[Fraction]:
    """When each frame is shown, in seconds after the first, in order; read from the container, nothing is decoded."""
    with av.open(str(path)) as container:
        stream = _stream(path, container)
        stamps: list[int] = []
        base = stream.time_base
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the flushing packet; frames that an edit list cuts away
                continue
            if packet.is_corrupt:
                raise UserError(f"{path}: frame {len(stamps)} is damaged or cut; fetch the video again, or remove it")
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:
                raise UserError(f"{path}: its frames carry no times; write it anew as mp4")
            stamps.append(stamp)
        if stream.frames > len(stamps):  # what the container's index promises, where it has one
            raise UserError(f"{path}: cut: {len(stamps)} of {stream.frames} frames are there; fetch it again")
    if not stamps:
        raise UserError(f"{path}: holds no frame; expects a video")
    stamps.sort()
    return [(stamp - stamps[0]) * base for stamp in stamps]


def describe(path: Path) -> tuple[str, bool]:
    """Name of the codec, and whether the first frame is plain: upright, and its colours untagged or BT.601."""
    with av.open(str(path)) as container:
        stream = _stream(path, container)
        frame = next(iter(container.decode(stream)), None)
        if frame is None:
            raise UserError(f"{path}: no frame of it can be decoded; fetch the video again, or remove it")
        return stream.codec_context.codec.canonical_name, frame.rotation == 0 and frame.colorspace in _BT601


def select(path: Path, times: list[Fraction], frames: int, fps: float | None) -> list[int]:
    """Indices of the frames that `read_video` takes, given when each is shown; not falling."""
    if fps is None:
        if frames > len(times):
            raise UserError(f"{path}: {len(times)} frames, {frames} are wanted; use a longer video or fewer frames")
        return list(range(frames))
    # 23.976 as a float is no fraction that times are multiples of; a rate below 1e-5 stays what it is.
    rate = Fraction(fps).limit_denominator(100_000) or Fraction(fps)
    spacing = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / rate
    end = times[-1] + spacing  # the last frame is shown that long
    if (frames - 1) / rate >= end:
        raise UserError(
            f"{path}: {float(end):.3f} s, {frames} frames at {fps:g} a second need more than "
            f"{float((frames - 1) / rate):.3f} s; use a longer video or fewer frames"
        )
    indices = []
    for number in range(frames):
        moment = number / rate
        after = bisect_left(times, moment)
        near = [times[i] for i in (after - 1, after) if 0 <= i < len(times)]
        indices.append(bisect_left(times, min(near, key=lambda time: abs(time - moment))))
    return indices


@contextmanager
def video_refusals(path: Path) -> Iterator[None]:
    """Turns what PyAV raises at a bad file into one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: no video, or a damaged one ({what}); fetch it again, or remove it") from error


def _stream(path: Path, container: Any) -> Any:
    if not container.streams.video:
        raise UserError(f"{path}: has no video in it; expects one")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UserError(f"{path}: its codec is not one that PyAV can decode; write it anew as H.264")
    return stream


def _decoded(path: Path, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 [H, W, 3]) of the wanted frames, upright."""
    with av.open(str(path)) as container:
        stream = _stream(path, container)
        # Report damage rather than conceal it. Not all is seen: H.264 has no checksum.
        stream.codec_context.options = {"err_detect": "explode"}
        wanted, graph = iter(indices), _RgbGraph(stream)
        index = next(wanted)
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise UserError(f"{path}: frame {number} is damaged; fetch the video again, or remove it")
            if number == index:
                yield index, graph.convert(frame)
                index = next(wanted, -1)
                if index < 0:
                    return
    raise UserError(f"{path}: frame {index} cannot be decoded; fetch the video again, or remove it")


class _RgbGraph:
    """Frames to RGB by swscale with `SCALER`, turned as the file's display matrix says."""

    def __init__(self, stream: Any) -> None:
        self._graph = av.filter.Graph()
        source = self._graph.add_buffer(template=stream)
        scale, rgb = self._graph.add("scale", f"flags={SCALER}"), self._graph.add("format", "rgb24")
        sink = self._graph.add("buffersink")
        for first, second in ((source, scale), (scale, rgb), (rgb, sink)):
            first.link_to(second)
        self._graph.configure()

    def convert(self, frame: Any) -> np.ndarray:
        turns = round(frame.rotation / 90)
        self._graph.push(frame)
        picture = self._graph.pull().to_ndarray()
        return np.ascontiguousarray(np.rot90(picture, turns)) if turns % 4 else picture
