"""What a model directory says of how it wants to be sampled."""

import json
from pathlib import Path

import pytest

from megatron_sage.config.model_defaults import is_image_to_video, model_defaults, video_size
from megatron_sage.errors import UserError


def directory(root: Path, target: int, i2v: bool = False, **files: dict) -> Path:
    for name, content in ({"transformer/config": {"target_size": target}} | files).items():
        path = root / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    if i2v:
        (root / "image_encoder").mkdir()
    return root


@pytest.mark.parametrize(
    ("target", "i2v", "shift", "size"),
    [
        (640, False, 5, (480, 848)),
        (640, True, 5, (480, 848)),
        (960, False, 9, (720, 1280)),
        (960, True, 7, (720, 1280)),
    ],
)
def test_the_released_models_have_their_shift_and_size(
    tmp_path: Path, target: int, i2v: bool, shift: float, size: tuple[int, int]
) -> None:
    config = model_defaults(directory(tmp_path, target, i2v))
    assert (config.sampler.shift, config.video.height, config.video.width) == (shift, *size)
    assert (config.sampler.guidance_scale, config.sampler.num_steps, config.video.frames) == (6.0, 50, 121)
    assert is_image_to_video(tmp_path) == i2v


def test_what_the_directory_says_goes_first(tmp_path: Path) -> None:
    files = {"scheduler/scheduler_config": {"shift": 3.5}, "guider/guider_config": {"guidance_scale": 1.0}}
    config = model_defaults(directory(tmp_path, 640, **files))
    assert (config.sampler.shift, config.sampler.guidance_scale) == (3.5, 1.0)


def test_image_to_video_takes_the_images_shape() -> None:
    assert video_size(640, (100, 100)) == (640, 640)
    assert video_size(640, (1600, 900)) == (848, 480)


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no transformer/config\.json"):
        model_defaults(tmp_path)
    with pytest.raises(UserError, match=r"target_size=480 says the shift; set sampler\.shift"):
        model_defaults(directory(tmp_path, 480))
    (tmp_path / "transformer" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        model_defaults(tmp_path)
