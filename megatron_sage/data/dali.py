"""Decoding by NVIDIA DALI: on a GPU where there is one, else on the CPU.

DALI decodes; what follows (orientation, crop, resize) is the code of the Pillow path, because DALI's Lanczos does not
round between its two passes as Pillow's does: on noise the two differ by up to 43 of 255. On the CPU the decoders
agree with Pillow and PyAV to the byte. Not verified on a GPU: nvJPEG and NVDEC round on their own.

What DALI cannot decode, or would decode otherwise, goes the other path: WebP (its EXIF is refused), BMP (a cut file
comes back half), TIFF, palettes, alpha, 16 bits; on the CPU videos that are not VP8, VP9 or MJPEG; videos that are
rotated or tagged with another colour space than BT.601 (DALI's CPU decoder ignores the tag).
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from megatron_sage.data import images, videos
from megatron_sage.errors import UserError

IMAGE_FORMATS, IMAGE_MODES = ("JPEG", "PNG"), ("RGB", "L")
CPU_CODECS = ("vp8", "vp9", "mjpeg")
GPU_CODECS = (*CPU_CODECS, "av1", "mpeg4", "h264", "hevc")
ORIENTATION = 0x0112  # EXIF tag
_PNG_DEPTH = 24  # byte of a PNG that holds its bits a channel


class DaliReader:
    """Reads images and videos by DALI; `device` is the GPU's number, None the CPU."""

    name = "dali"

    def __init__(self, device: int | None = None) -> None:
        self.device = device
        self._pipelines: dict[str, Any] = {}

    def read_image(self, path: str | Path) -> np.ndarray:
        """Upright uint8 [H, W, 3]; the same bytes, and the same errors, as `images.read_image`."""
        path = Path(path)
        with images.refusals(path):
            content = images.read_bytes(path)
            with images.opened(path, content) as image:
                deep = image.format == "PNG" and content[_PNG_DEPTH] == 16
                plain = image.mode in IMAGE_MODES and not image.has_transparency_data and not deep
                if image.format not in IMAGE_FORMATS or not plain:
                    return images.to_rgb(path, image)
                turned = image.getexif().get(ORIENTATION, 1)
        picture = self._run(path, "image", {"content": np.frombuffer(content, np.uint8)})
        if turned == 1:
            return picture
        image = Image.fromarray(picture)
        image.getexif()[ORIENTATION] = turned
        return np.array(ImageOps.exif_transpose(image))

    def read_video(
        self, path: str | Path, frames: int, height: int, width: int, fps: float | None = None
    ) -> np.ndarray:
        """uint8 [F, H, W, 3]; the frames, and on the CPU the bytes, of `videos.read_video`."""
        path = Path(path)
        videos.check_request(path, frames, height, width, fps)
        with videos.video_refusals(path):
            codec, plain = videos.describe(path)
            if not plain or codec not in (CPU_CODECS if self.device is None else GPU_CODECS):
                return videos.read_video(path, frames, height, width, fps)
            wanted = videos.select(path, videos.presentation_times(path), frames, fps)
        content = np.frombuffer(images.read_bytes(path), np.uint8)
        decoded = self._run(path, "video", {"content": content, "frames": np.asarray(wanted, np.int32)})
        if len(decoded) != frames:
            raise UserError(f"{path}: {len(decoded)} of {frames} frames could be decoded; fetch the video again")
        return np.stack([images.crop_resize(picture, height, width) for picture in decoded])

    def _run(self, path: Path, kind: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if kind not in self._pipelines:
            self._pipelines[kind] = _build(kind, self.device)
        pipeline = self._pipelines[kind]
        try:
            for name, value in inputs.items():
                pipeline.feed_input(name, [value])
            (output,) = pipeline.run()
            return np.array((output if self.device is None else output.as_cpu()).at(0))
        except RuntimeError as error:
            del self._pipelines[kind]  # after an error DALI's pipeline is of no more use
            what = [line for line in str(error).splitlines() if line.strip()][-1].strip()[:200]
            cure = "fetch it again, or set data.backend=pillow"
            raise UserError(f"{path}: DALI cannot decode it ({what}); {cure}") from error


def _build(kind: str, device: int | None) -> Any:
    """A pipeline of one file at a time. Nothing is prefetched: what goes in is what comes out."""
    from nvidia.dali import fn, pipeline_def, types

    where = "cpu" if device is None else "mixed"
    decoders: Any = fn.decoders

    @pipeline_def(
        batch_size=1, num_threads=1, device_id=device, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False
    )
    def pipeline() -> Any:
        content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
        if kind == "video":
            chosen = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            return decoders.video(content, device=where, frames=chosen)
        # Fancy upsampling is what libjpeg, and so Pillow, does with colours that 2x2 pixels share.
        return decoders.image(
            content, device=where, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
        )

    built = pipeline()
    built.build()
    return built
