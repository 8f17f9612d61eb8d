"""Which library decodes images and videos."""

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_sage.errors import UserError

BACKENDS = ("auto", "dali", "pillow")


class Reader(Protocol):
    """Decodes files; every implementation crops and resizes by the same code (`crop_resize`)."""

    name: str

    def read_image(self, path: str | Path) -> np.ndarray:
        """Upright uint8 [H, W, 3]; see `images.read_image`."""

    def read_video(
        self, path: str | Path, frames: int, height: int, width: int, fps: float | None = None
    ) -> np.ndarray:
        """uint8 [F, H, W, 3]; see `videos.read_video`."""


class PillowReader:
    """Images by Pillow, videos by PyAV, on the CPU."""

    name = "pillow"

    def read_image(self, path: str | Path) -> np.ndarray:
        """See `images.read_image`."""
        from megatron_sage.data.images import read_image

        return read_image(path)

    def read_video(
        self, path: str | Path, frames: int, height: int, width: int, fps: float | None = None
    ) -> np.ndarray:
        """See `videos.read_video`."""
        from megatron_sage.data.videos import read_video

        return read_video(path, frames, height, width, fps)


def open_reader(backend: str = "auto", device: int | None = None) -> Reader:
    """The reader of `data.backend`. auto: DALI where it is installed and there is a GPU, else Pillow and PyAV.

    `device`: number of the GPU for DALI; None: the current one, or the CPU where there is none. UserError for an
    unknown backend and for DALI without its package.
    """
    check_backend(backend)
    if backend == "pillow" or (backend == "auto" and not (dali_installed() and _gpu())):
        return PillowReader()
    from megatron_sage.data.dali import DaliReader

    if device is None and _gpu():
        import torch

        device = torch.cuda.current_device()
    return DaliReader(device)


def check_backend(backend: str) -> None:
    """UserError where `backend` is unknown or its package is missing."""
    if backend not in BACKENDS:
        raise UserError(f"data.backend={backend}: unknown; choose from {', '.join(BACKENDS)}")
    if backend == "dali" and not dali_installed():
        cure = "pip install 'megatron-sage[dali]', or set it to auto"
        raise UserError(f"data.backend=dali: NVIDIA DALI is not installed: {cure}")


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported; it is not imported here."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
