"""What a model directory says of how it wants to be sampled: the settings of diffusers' pipelines for it."""

import json
from pathlib import Path
from typing import Any

from megatron_sage.config.schema import Config
from megatron_sage.errors import UserError

# Where scheduler/scheduler_config.json is missing. The shift that HunyuanVideo-1.5's README gives for each model:
# (transformer's target_size, image-to-video) -> shift
SHIFTS = {(640, False): 5.0, (640, True): 5.0, (960, False): 9.0, (960, True): 7.0}
FRAMES, STEPS, GUIDANCE = 121, 50, 6.0  # of diffusers' pipelines
WIDE = (9, 16)  # height and width of the picture that text-to-video makes by default


def model_defaults(pretrained: str | Path, aspect: tuple[int, int] = WIDE) -> Config:
    """Settings under which `sample` does what diffusers' pipeline does with this directory by default.

    `aspect`: height and width of a picture whose shape the videos shall have (image-to-video: the image's). The size
    is the largest of diffusers' sizes for the model's resolution with about that aspect ratio.

    Raises:
        UserError: a file is missing or unreadable, or says nothing of the shift or the size.
    """
    root, config = Path(pretrained), Config()
    transformer = _read(root / "transformer" / "config.json")
    if transformer is None:
        raise UserError(f"model.pretrained={root}: has no transformer/config.json; name the model's root")
    target = transformer.get("target_size", 640)
    scheduler = _read(root / "scheduler" / "scheduler_config.json") or {}
    shift = scheduler.get("shift", SHIFTS.get((target, is_image_to_video(root))))
    if not isinstance(shift, int | float):
        raise UserError(
            f"{root}: neither scheduler/scheduler_config.json nor target_size={target} says the shift; set "
            "sampler.shift in a configuration file"
        )
    guider = _read(root / "guider" / "guider_config.json") or {}
    config.model.pretrained = str(root)
    config.sampler.shift, config.sampler.num_steps = float(shift), STEPS
    config.sampler.guidance_scale = float(guider.get("guidance_scale", GUIDANCE))
    config.video.frames = FRAMES
    config.video.height, config.video.width = video_size(target, aspect)
    return config


def is_image_to_video(pretrained: str | Path) -> bool:
    """Whether the directory is an image-to-video model's: only those come with an image encoder.

    Not by `task_type` in the transformer's config: the released text-to-video files say "i2v" there.
    """
    return (Path(pretrained) / "image_encoder").is_dir()


def video_size(target_size: int, aspect: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels by diffusers' own rule: (640, (9, 16)) is 480 x 848."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    rule = HunyuanVideo15ImageProcessor(vae_scale_factor=16)
    height, width = rule.calculate_default_height_width(*aspect, target_size)
    return int(height), int(width)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}; fetch it again")
    return content
