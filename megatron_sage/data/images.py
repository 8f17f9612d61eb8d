"""Pictures as arrays, and the crop that HunyuanVideo-1.5 makes of a reference image."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from megatron_sage.errors import UserError

# What reference images come in. A closed list: Pillow also has decoders that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
MAX_PIXELS = 89_478_485  # 256 MB as RGB: Pillow's own limit, kept here for a process that has switched it off
_ADVICE = {
    "CMYK": "CMYK has no colours without its profile; convert it to RGB",
    "I;16": "16-bit greyscale; convert it to 8 bits a channel",
    "I": "32-bit greyscale; convert it to 8 bits a channel",
    "F": "floating-point greyscale; convert it to 8 bits a channel",
}


def read_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], upright (EXIF orientation applied); greyscale and palettes become RGB.

    As diffusers' `load_image`, with refusals where that would guess: a UserError, one line that names the file, for a
    damaged or cut file, transparency, CMYK, 16-bit greyscale, animations, more than `MAX_PIXELS`. Colour profiles are
    ignored, as there. A JPEG has no checksum: altered bytes inside one cannot be noticed.
    """
    path = Path(path)
    with refusals(path), opened(path, read_bytes(path)) as image:
        return to_rgb(path, image)


def crop_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of uint8 [H, W, 3] at [height, width], aspect kept, what stands over cut off; Lanczos.

    Equal, bit for bit, to diffusers' `HunyuanVideo15ImageProcessor.resize(..., resize_mode="crop")`.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image {image.dtype} {list(image.shape)}: expects uint8 [height, width, 3]")
    if height < 1 or width < 1:
        raise UserError(f"height={height}, width={width}: both must be at least 1 pixel")
    source_height, source_width = image.shape[:2]
    by_height = width / height <= source_width / source_height  # the picture is the wider one: fit its height
    tall = height if by_height else source_height * width // source_width
    wide = source_width * height // source_height if by_height else width
    if tall * wide > MAX_PIXELS:
        raise UserError(
            f"image {source_height}x{source_width}: too narrow to fill {height}x{width} with (more than {MAX_PIXELS} "
            "pixels on the way); crop it first"
        )
    resized = np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.LANCZOS))
    # Not (tall - height) // 2: diffusers halves each size on its own, which differs by one for some odd sizes.
    top, left = tall // 2 - height // 2, wide // 2 - width // 2
    return np.ascontiguousarray(resized[top : top + height, left : left + width])


def read_bytes(path: Path) -> bytes:
    """The file's content; UserError in one line where it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f"{path}: cannot read the image ({getattr(error, 'strerror', None) or error})") from error


@contextmanager
def opened(path: Path, content: bytes) -> Iterator[Image.Image]:
    """The picture with its header read and checked, its pixels not yet decoded."""
    if not content:
        raise UserError(f"{path}: the file is empty; expects a picture")
    Image.init()  # registers the formats that Pillow does not load by itself
    _check_png(content)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{path}: {image.width}x{image.height} is more than {MAX_PIXELS} pixels; make it smaller")
        # Several pictures in an MPO are a phone's depth map or preview beside the photograph, which is the first.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise UserError(f"{path}: holds {getattr(image, 'n_frames', 'several')} pictures; expects a single one")
        if image.mode not in MODES:
            kind = "I;16" if image.mode.startswith("I;16") else image.mode  # either byte order
            advice = _ADVICE.get(kind, f"pixel format {image.mode}; convert it to 8-bit RGB")
            raise UserError(f"{path}: {advice}")
        yield image


def to_rgb(path: Path, image: Image.Image) -> np.ndarray:
    """The pixels of an opened picture as upright uint8 [H, W, 3]."""
    # Some program around us may have asked Pillow to fill what is missing of a cut file with grey.
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        alpha = np.asarray(upright.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise UserError(f"{path}: parts of it are transparent, so their colour is open; put it on a background")
    return np.array(upright.convert("RGB"))


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises at a bad file into one line that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{path}: a decompression bomb, or just more pixels than {MAX_PIXELS}; make it smaller"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path}: not a picture of the formats {', '.join(FORMATS)}, or damaged") from error
    except Exception as error:  # at damaged files the decoders raise nearly everything: struct.error, SyntaxError, ...
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: the picture is damaged ({what}); fetch it again, or remove it") from error


def _check_png(content: bytes) -> None:
    """A PNG's chunks against their checksums: Pillow decodes pixels without looking at them."""
    if content.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()
