"""Which frames a model sees, and at which size: the rules, and Hugging Face's own code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sage.errors import UserError
from megatron_sage.rewards import frames
from megatron_sage.rewards.h264 import round_trip


@pytest.mark.parametrize(("fps", "number"), [(24, 6), (16, 10), (8, 20), (2, 80), (240, 4)])
def test_81_frames(fps: float, number: int) -> None:
    assert frames.sampled_number(81, fps, 2.0) == number


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 2000), st.floats(1, 240), st.floats(0.5, 8))
def test_sampling(total: int, video_fps: float, fps: float) -> None:
    number = frames.sampled_number(total, video_fps, fps)
    assert number % 2 == 0 and 2 <= number <= min(total, 768) and number >= min(4, total // 2 * 2)
    wanted = total / video_fps * fps
    if 4 <= wanted <= min(768, total // 2 * 2):
        assert abs(number - wanted) <= 1
    chosen = frames.uniform(total, number)
    assert chosen[0] == 0 and chosen[-1] == total - 1 and chosen == sorted(chosen) and len(set(chosen)) == number
    if total > number:
        steps = np.diff(chosen)
        assert steps.max() - steps.min() <= 1


def test_one_frame_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        frames.sampled_number(1, 24, 2.0)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_size(height: int, width: int) -> None:
    least, most = 100352, 200704
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(UserError, match="200 times"):
            frames.smart_size(height, width, 28, least, most)
        return
    h, w = frames.smart_size(height, width, 28, least, most)
    assert h % 28 == 0 and w % 28 == 0 and h and w
    if max(height, width) <= 8 * min(height, width):  # where both bounds can be kept
        assert least <= h * w <= most
        assert abs(np.log((h / w) / (height / width))) < 0.35
    if height % 28 == 0 and width % 28 == 0 and least <= height * width <= most:
        assert (h, w) == (height, width)


@settings(max_examples=100, deadline=None)
@given(st.integers(28, 3000), st.integers(28, 3000))
def test_size_is_transformers(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(height, width) <= 200 * min(height, width):
        assert frames.smart_size(height, width, 28, 100352, 200704) == smart_resize(height, width, 28, 100352, 200704)


def test_480p() -> None:
    assert frames.smart_size(480, 848, 28, 100352, 200704) == (336, 588)  # 480 x 848 x s² <= 200704, floor to 28


@pytest.mark.parametrize("size", [(100, 64), (33, 95), (56, 84), (300, 20)])
def test_resizing_is_pil_within_rounding(size: tuple[int, int]) -> None:
    """PIL rounds and clips between its two passes, so pixels differ by a level; more only where noise overshoots."""
    from PIL import Image

    image = np.random.default_rng(0).integers(70, 180, (1, 61, 83, 3), dtype=np.uint8)
    ours = frames.resized(image, *size)
    pil = np.asarray(Image.fromarray(image[0]).resize(size[::-1], Image.Resampling.BICUBIC)).astype(np.float32)
    difference = (ours[0].permute(1, 2, 0) - torch.from_numpy(pil)).abs()
    assert difference.max() <= 2 and difference.mean() < 0.3
    assert torch.equal(ours, ours.round()) and ours.min() >= 0 and ours.max() <= 255
    assert torch.equal(frames.resized(image, 61, 83)[0].permute(1, 2, 0).byte(), torch.from_numpy(image[0]))


def test_patches_are_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    video = np.random.default_rng(1).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    rows, grid = frames.patches(frames.normalized(frames.resized(video, 56, 84)), 14, 2, 2)
    assert grid == [2, 4, 6] and rows.shape == (48, 3 * 2 * 14 * 14)
    whole = Qwen2VLImageProcessorPil(do_resize=False)
    for t in range(2):
        for depth in range(2):
            expected = whole(images=[video[2 * t + depth]], return_tensors="pt")["pixel_values"]
            ours = rows[24 * t : 24 * t + 24].view(24, 3, 2, 14, 14)[:, :, depth]
            torch.testing.assert_close(ours, expected.view(24, 3, 2, 14, 14)[:, :, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(9, 32, 48), (5, 33, 47)])
def test_a_round_trip_is_lossy_and_near(shape: tuple[int, int, int]) -> None:
    y, x = np.mgrid[: shape[1], : shape[2]]
    clip = (
        np.stack([np.stack([4 * x + f, 5 * y, 200 - 2 * x], -1) for f in range(shape[0])]).clip(0, 255).astype(np.uint8)
    )
    back = round_trip(clip, 24.0)
    assert back.shape == clip.shape and back.dtype == np.uint8
    difference = np.abs(back.astype(float) - clip).mean()
    assert 0 < difference < 6
    assert difference < np.abs(round_trip(clip, 24.0, crf=45).astype(float) - clip).mean()
