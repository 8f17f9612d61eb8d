"""NVIDIA DALI's CPU decoders against Pillow and PyAV: the same pictures and the same refusals."""

import random
import sys

import numpy as np
import pytest
from PIL import Image

from megatron_sage.data.backend import PillowReader, check_backend, open_reader
from megatron_sage.errors import UserError
from tests.data.test_images import encoded, noise, smooth
from tests.data.test_videos import greys, which, write

pytest.importorskip("nvidia.dali", reason="the extra dali is not installed")
BOUND = 0  # of 255; 1 is what is promised


@pytest.fixture(scope="module")
def dali():
    return open_reader("dali")


def deviation(ours: np.ndarray, theirs: np.ndarray) -> int:
    assert ours.dtype == theirs.dtype == np.uint8 and ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs).max())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 75, "progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("WEBP", {}),
    ],
)
def test_pictures_of_random_sizes(tmp_path, dali, kind: str, options) -> None:
    draw, path = random.Random(3), tmp_path / "p"
    for number in range(12):
        height, width = draw.randint(1, 300), draw.randint(1, 300)
        for pixels in (noise(height, width, number), smooth(height, width, number)):
            exif = Image.Exif()
            exif[0x0112] = draw.randint(1, 8)
            path.write_bytes(encoded(pixels, kind, exif=exif, **options))
            assert deviation(dali.read_image(path), PillowReader().read_image(path)) <= BOUND


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_pixel_formats(tmp_path, dali, mode: str) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(encoded(Image.fromarray(smooth(21, 34)).convert(mode), "PNG"))
    assert deviation(dali.read_image(path), PillowReader().read_image(path)) <= BOUND


def test_damaged_pictures_are_refused_alike(tmp_path, dali, capfd) -> None:
    path = tmp_path / "p"
    contents = [encoded(smooth(31, 43), kind) for kind in ("PNG", "JPEG", "BMP", "GIF")]
    bad = [content[: len(content) * part // 7] for content in contents for part in range(7)]
    bad.append(encoded(Image.fromarray(smooth(9, 9)).convert("CMYK"), "JPEG"))
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            dali.read_image(path)
        assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1
    path.write_bytes(contents[1])
    assert deviation(dali.read_image(path), PillowReader().read_image(path)) <= BOUND  # it goes on after errors


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [
        ("webm", "libvpx-vp9", "yuv420p"),
        ("mp4", "libvpx-vp9", "yuv444p"),
        ("webm", "libvpx", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("mp4", "libx264", "yuv420p"),  # which DALI's CPU decoder does not know: PyAV reads it
    ],
)
def test_videos(tmp_path, dali, suffix: str, codec: str, pix_fmt: str) -> None:
    draw = random.Random(codec + pix_fmt)
    height, width = 2 * draw.randint(10, 40), 2 * draw.randint(10, 40)
    rough = noise(height * 5, width).reshape(5, height, width, 3)
    frames = np.concatenate([np.stack([smooth(height, width, k / 4) for k in range(8)]), rough])
    path = write(tmp_path / f"v.{suffix}", frames, 24, codec, pix_fmt)
    for request in ((13, 33, 47), (5, 48, 20, 9.0), (20, 16, 16, 48.0)):
        assert deviation(dali.read_video(path, *request), PillowReader().read_video(path, *request)) <= BOUND


def test_a_tagged_colour_space_is_heeded(tmp_path, dali) -> None:
    """DALI's CPU decoder takes every video for BT.601; one that says BT.709 goes the other path."""
    import av
    from av.video.reformatter import Colorspace

    path = tmp_path / "v.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709
        for k in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(smooth(32, 48, k), format="rgb24")))
        container.mux(stream.encode(None))
    assert deviation(dali.read_video(path, 3, 32, 48), PillowReader().read_video(path, 3, 32, 48)) <= BOUND


def test_videos_are_refused_alike(tmp_path, dali) -> None:
    path = write(tmp_path / "v.webm", greys(6), 24, "libvpx", "yuv420p")
    content = path.read_bytes()
    for request in ((7, 16, 16), (6, 16, 16, 1.0), (0, 16, 16), (2, 16, 16, -1.0)):
        lines = []
        for reader in (PillowReader(), dali):
            with pytest.raises(UserError) as error:
                reader.read_video(path, *request)
            lines.append(str(error.value))
        assert lines[0] == lines[1]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="v.webm"):
        dali.read_video(path, 6, 16, 16)
    path.write_bytes(content)
    assert which(dali.read_video(path, 6, 16, 16)) == list(range(6))


def test_the_backend_is_chosen(monkeypatch) -> None:
    assert open_reader("pillow").name == "pillow" and open_reader("dali").name == "dali"
    import torch

    assert open_reader().name == ("dali" if torch.cuda.is_available() else "pillow")
    with pytest.raises(UserError, match="data.backend=pil: unknown"):
        open_reader("pil")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr("megatron_sage.data.backend.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"megatron-sage\[dali\]"):
        check_backend("dali")
    assert open_reader("auto").name == "pillow"
