"""What travels between a run and its reward server: frames as bytes behind a header, never pickled.

    b"MSR1" | length of the header, uint32 little-endian | header, JSON | one zlib stream for each video

The header is {"fps": number, "videos": [{"prompt": text, "shape": [F, H, W, 3], "bytes": length of its stream}]}. It is
checked before anything is decompressed, and a stream may not give more bytes than its shape says: a small body cannot
become a large array. Answers are JSON; a score that is not finite is null.
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"MSR1"
PREFIX = struct.Struct("<4sI")
MAX_HEADER = 4 << 20  # bytes
LEVEL = 1  # zlib's fastest: decoded frames are smooth, more effort gains little


class Refused(Exception):
    """A request that is not answered with scores: an HTTP status and one line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(status, line)
        self.status, self.line = status, line


@dataclass(frozen=True)
class Header:
    """A checked header; the streams begin at byte `begin` of the body."""

    fps: float
    prompts: list[str]
    shapes: list[tuple[int, int, int, int]]
    lengths: list[int]
    begin: int


def body_limit(max_bytes: int) -> int:
    """Bytes of the longest body whose videos have at most `max_bytes` when decompressed.

    zlib adds 5 bytes to every 16 KiB that it cannot compress.
    """
    return max_bytes + max_bytes // 1000 + MAX_HEADER + (1 << 16)


def encode(videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> bytes:
    """The body of a request: uint8 clips [F, H, W, 3] with their prompts."""
    streams = [zlib.compress(np.ascontiguousarray(video).data, LEVEL) for video in videos]
    rows = [
        {"prompt": prompt, "shape": list(video.shape), "bytes": len(stream)}
        for video, prompt, stream in zip(videos, prompts, streams, strict=True)
    ]
    header = json.dumps({"fps": float(fps), "videos": rows}).encode()
    return b"".join([PREFIX.pack(MAGIC, len(header)), header, *streams])


def read_header(body: bytes, max_bytes: int) -> Header:
    """Check a body up to the first compressed byte.

    Raises Refused: 422 for a body that is not of this format or whose length does not fit its header, 413 for more
    than `max_bytes` of decompressed frames.
    """
    if len(body) < PREFIX.size or not body.startswith(MAGIC):
        raise Refused(422, "the body does not begin with MSR1: it was not made by megatron-sage's remote reward")
    length = PREFIX.unpack_from(body)[1]
    begin = PREFIX.size + length
    if length > MAX_HEADER:
        raise Refused(413, f"the header has {length} bytes; at most {MAX_HEADER}")
    if begin > len(body):
        raise Refused(422, f"the body ends within its header of {length} bytes: it is truncated")
    try:
        content = json.loads(body[PREFIX.size : begin])
    except (ValueError, RecursionError) as error:
        raise Refused(422, "the header is not JSON") from error
    header = _checked(content, begin)
    size = sum(math.prod(shape) for shape in header.shapes)
    if size > max_bytes:
        raise Refused(413, f"the videos have {size} bytes; at most {max_bytes} in one request: send fewer at once")
    if sum(header.lengths) != len(body) - begin:
        raise Refused(422, f"{len(body) - begin} bytes follow the header, which says {sum(header.lengths)}")
    return header


def _checked(content: Any, begin: int) -> Header:
    if not isinstance(content, dict) or set(content) != {"fps", "videos"}:
        raise Refused(422, "the header must have the keys fps and videos, and no others")
    fps, rows = content["fps"], content["videos"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise Refused(422, "fps must be a positive number of frames a second")
    if not isinstance(rows, list) or not rows:
        raise Refused(422, "videos must be a list of at least one video")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != {"prompt", "shape", "bytes"} or not isinstance(row["prompt"], str):
            raise Refused(422, f"video {number} must have a prompt, a shape and a number of bytes")
        shape = row["shape"]
        if not isinstance(shape, list) or len(shape) != 4 or not all(map(_counts, [*shape, row["bytes"]])):
            raise Refused(422, f"video {number}: shape and bytes must be whole numbers >= 1, four of them in the shape")
        if shape[3] != 3:
            raise Refused(422, f"video {number}: the shape must be [frames, height, width, 3]")
    return Header(
        float(fps),
        [row["prompt"] for row in rows],
        [tuple(row["shape"]) for row in rows],
        [row["bytes"] for row in rows],
        begin,
    )


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def decode(body: bytes, header: Header) -> list[np.ndarray]:
    """The clips, uint8 [F, H, W, 3]. Raises Refused (422) where a stream is damaged or does not fit its shape."""
    videos, position, view = [], header.begin, memoryview(body)
    for number, (shape, length) in enumerate(zip(header.shapes, header.lengths, strict=True)):
        expected, stream = math.prod(shape), zlib.decompressobj()
        try:
            frames = stream.decompress(view[position : position + length], expected + 1)
        except zlib.error as error:
            raise Refused(422, f"video {number}: its stream is damaged ({error})") from error
        if len(frames) != expected or not stream.eof or stream.unused_data:
            raise Refused(422, f"video {number}: its stream does not hold the {expected} bytes of its shape")
        videos.append(np.frombuffer(bytearray(frames), np.uint8).reshape(shape))  # writable, as a local reward's are
        position += length
    return videos


def pack_scores(scores: Mapping[str, np.ndarray], dimensions: Sequence[str]) -> dict[str, list[float | None]]:
    """Scores [n] of each dimension as JSON can hold them: null where one is not finite."""
    return {
        name: [float(x) if math.isfinite(x) else None for x in np.asarray(scores[name], np.float64)]
        for name in dimensions
    }


def unpack_scores(content: Any, dimensions: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """float64 [count] of each dimension, nan for null. Raises ValueError where `content` is no answer of a server."""
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, dict) or set(scores) != set(dimensions):
        raise ValueError("the answer does not hold the scores of the reward's dimensions")
    for values in scores.values():
        right = isinstance(values, list) and len(values) == count
        if not right or not all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values):
            raise ValueError(f"the answer does not hold one number for each of {count} videos")
    return {name: np.array([np.nan if v is None else v for v in scores[name]], np.float64) for name in dimensions}
