"""Pictures and crops against diffusers' own, and damaged files of every format."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from megatron_sage.data.images import FORMATS, crop_resize, read_image
from megatron_sage.errors import UserError


def smooth(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / 17 + y / 31 + phase + channel) for channel in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **options)
    return out.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_image(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture(scope="module")
def processor():
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    return HunyuanVideo15ImageProcessor(vae_scale_factor=16, do_resize=False, do_convert_rgb=True)


def test_the_crop_is_the_pipelines_to_the_bit(processor) -> None:
    draw = random.Random(5)
    sizes = [[draw.randint(1, 200) for _ in range(4)] for _ in range(40)]
    for height, width, tall, wide in [*sizes, [97, 31, 97, 31], [480, 848, 48, 80], [7, 300, 33, 9], [1, 1, 5, 3]]:
        pixels = noise(height, width, seed=height)
        theirs = processor.resize(Image.fromarray(pixels), height=tall, width=wide, resize_mode="crop")
        assert np.array_equal(crop_resize(pixels, tall, wide), np.asarray(theirs)), (height, width, tall, wide)


def test_the_crop_refuses_what_is_no_picture() -> None:
    with pytest.raises(UserError, match=r"float32 \[4, 4, 3\]"):
        crop_resize(np.zeros((4, 4, 3), np.float32), 2, 2)
    with pytest.raises(UserError, match="at least 1"):
        crop_resize(noise(4, 4), 0, 2)
    with pytest.raises(UserError, match="too narrow"):
        crop_resize(noise(1_000_000, 1), 480, 848)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_as_diffusers_loads_them(tmp_path, kind: str, orientation: int) -> None:
    from diffusers.utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "p"  # the content says the format, not the name
    path.write_bytes(encoded(smooth(23, 41), kind, exif=exif))
    read = read_image(path)
    assert read.dtype == np.uint8 and read.flags["WRITEABLE"]
    assert read.shape == ((41, 23, 3) if orientation > 4 else (23, 41, 3))
    assert np.array_equal(read, np.asarray(load_image(str(path))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_pixel_formats_become_rgb(tmp_path, mode: str) -> None:
    image = Image.fromarray(smooth(9, 13)).convert(mode)
    (tmp_path / "p.png").write_bytes(encoded(image, "PNG"))
    assert np.array_equal(read_image(tmp_path / "p.png"), np.asarray(image.convert("RGB")))


def test_what_would_have_to_be_guessed_is_refused(tmp_path) -> None:
    path, image = tmp_path / "p", Image.fromarray(smooth(9, 13))
    see_through = image.convert("RGBA")
    see_through.putpixel((3, 4), (1, 2, 3, 254))
    path.write_bytes(encoded(see_through, "PNG"))
    assert "transparent" in refusal(path)
    path.write_bytes(encoded(image.convert("P"), "PNG", transparency=7))
    path.write_bytes(encoded(image, "PNG", transparency=tuple(int(v) for v in smooth(9, 13)[2, 2])))
    assert "transparent" in refusal(path)
    path.write_bytes(encoded(image.convert("CMYK"), "JPEG"))
    assert "CMYK" in refusal(path)
    path.write_bytes(encoded(Image.fromarray(np.full((4, 4), 999, np.uint16)), "PNG"))
    assert "16-bit" in refusal(path)
    path.write_bytes(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    assert "floating-point" in refusal(path)
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        more = [Image.fromarray(smooth(9, 13, phase)) for phase in (1.0, 2.0)]
        path.write_bytes(encoded(image, kind, save_all=True, append_images=more))
        assert "3 pictures" in refusal(path)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in FORMATS] + [("JPEG", {"progressive": True}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_a_cut_file_is_refused_or_whole_never_half(tmp_path, monkeypatch, kind: str, options, filled: bool) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", filled)  # as some other library may have set it
    path = tmp_path / "p"
    content = encoded(smooth(31, 43), kind, **options)
    path.write_bytes(content)
    whole = read_image(path)
    cuts = {*range(0, len(content), max(1, len(content) // 40)), *range(max(0, len(content) - 12), len(content))}
    refused = 0
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        try:
            assert np.array_equal(read_image(path), whole), cut
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
    assert refused >= len(cuts) - 12
    assert ImageFile.LOAD_TRUNCATED_IMAGES is filled


def test_a_changed_byte_of_a_png_is_noticed(tmp_path) -> None:
    path, content = tmp_path / "p.png", encoded(noise(12, 15), "PNG")
    path.write_bytes(content)
    whole, draw = read_image(path), random.Random(1)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content) - 12)] ^= draw.randint(1, 255)  # all but IEND
        path.write_bytes(damaged)
        try:
            assert np.array_equal(read_image(path), whole)
        except UserError:
            continue
        raise AssertionError("a damaged PNG was read")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_shows_a_traceback(tmp_path) -> None:
    path, draw = tmp_path / "p", random.Random(2)
    for kind in FORMATS:
        content = encoded(smooth(20, 20), kind)
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(draw.randint(1, 6)):
                damaged[draw.randrange(min(len(content), 300))] = draw.randrange(256)
            path.write_bytes(damaged)
            try:
                read_image(path)
            except UserError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1


def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch) -> None:
    path = tmp_path / "p.png"
    for side, limit in ((9_500, Image.MAX_IMAGE_PIXELS), (14_000, Image.MAX_IMAGE_PIXELS), (14_000, None)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        path.write_bytes(encoded(Image.new("1", (side, side)), "PNG"))
        assert "pixels" in refusal(path)


def test_files_that_are_no_pictures(tmp_path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "not a picture" in refusal(path)
    assert "cannot read" in refusal(tmp_path / "none.png")
    assert "cannot read" in refusal(tmp_path)
