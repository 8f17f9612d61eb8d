"""Pictures from files."""

from pathlib import Path

import numpy as np

from megatron_sage.errors import UserError


def read_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], turned as its EXIF says; UserError, in one line, where it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a picture ({reason}); replace or remove it") from error
