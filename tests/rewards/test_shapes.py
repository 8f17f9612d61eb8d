"""The tiny world's reward on hand-made good and bad clips."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import FPS, blurred, clips, draw, line, noisy, render, scene, to_uint8

from megatron_sage.errors import UserError
from megatron_sage.rewards import shapes
from megatron_sage.rewards.blob import measure
from megatron_sage.rewards.shapes import ShapesReward, parse_caption, read_attributes

CAPTION = scene().caption


def scores(video: np.ndarray, caption: str = CAPTION) -> dict[str, float]:
    """VQ, MQ, TA of one clip given in [0, 1]."""
    result = ShapesReward()([to_uint8(video)], [caption], FPS)
    assert all(values.shape == (1,) and values.dtype == np.float64 for values in result.values())
    return {name: float(values[0]) for name, values in result.items()}


def falls_most(video: np.ndarray, dimension: str, caption: str = CAPTION, by: float = 0.15) -> None:
    """The named dimension falls by at least `by`, and further than either of the others."""
    good, bad = scores(render()), scores(video, caption)
    loss = {name: good[name] - bad[name] for name in good}
    assert loss[dimension] > by, loss
    assert all(loss[dimension] > loss[other] + 0.05 for other in loss if other != dimension), loss


def monotone(values: list[float], step: float = 0.01) -> None:
    assert all(later < earlier - step for earlier, later in zip(values, values[1:], strict=False)), values


# ---- vocabulary and captions


def test_the_vocabulary_is_the_tiny_worlds() -> None:
    assert shapes.UNITS_PER_WIDTH == clips.WIDTH
    seconds = (clips.FRAMES - 1) / clips.FPS
    assert {name: speed * seconds for name, speed in shapes.SPEEDS.items()} == pytest.approx(clips.SPEEDS)


def test_every_caption_of_the_tiny_world_parses_to_its_scene() -> None:
    for one in clips.all_scenes():
        assert vars(parse_caption(one.caption)) == vars(one)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("", "no word for the colour"),
        (" ", "no word for the colour"),
        ("a cat", "no word for the colour"),
        ("a red moving left slowly", "no word for the form"),
        ("a red circle moving slowly", "no word for the direction"),
        ("a red circle moving left", "no word for the speed"),
        ("a red blue circle moving left slowly", "2 words for the colour"),
        ("a reddish circle moving left slowly", "no word for the colour"),
    ],
)
def test_a_caption_that_cannot_be_parsed_is_refused_in_one_line(caption: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        ShapesReward()([to_uint8(render())], [caption], FPS)
    assert "\n" not in str(error.value) and repr(caption) in str(error.value)


# ---- reading attributes


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda video, seed: video, 1.0),
        (lambda video, seed: blurred(video, 1.0), 1.0),
        (lambda video, seed: noisy(blurred(video, 1.0), 0.05, seed), 0.96),
    ],
    ids=["clean", "blur 1 px", "blur 1 px + noise 0.05"],
)
def test_attributes_are_read_back(spoil, wanted: float) -> None:
    right = np.zeros(4)
    scenes = clips.all_scenes()[::3]
    for seed, one in enumerate(scenes):
        found = read_attributes(to_uint8(spoil(render(one, seed), seed)), FPS)
        right += [getattr(found, key) == getattr(one, key) for key in ("colour", "form", "direction", "speed")]
    assert (right / len(scenes) >= wanted).all(), right / len(scenes)


def test_attributes_do_not_depend_on_size_or_frame_rate() -> None:
    big = to_uint8(draw(line(41, (30, 32), (28, 0)), radius=12.0, size=(64, 96)))  # half the frames, twice the pixels
    found = read_attributes(big, fps=8.0)
    assert vars(found) == {"colour": "red", "form": "square", "direction": "right", "speed": "quickly"}
    assert read_attributes(big, fps=4.0).speed == "slowly"  # the same frames shown half as fast


# ---- quality


def test_clean_clips_score_high_and_leave_room() -> None:
    for seed, one in enumerate(clips.all_scenes()[::7]):
        got = scores(render(one, seed), one.caption)
        assert all(0.8 < value <= 1.0 for value in got.values()), (one, got)


def test_noise_lowers_visual_quality_most_and_monotonically() -> None:
    falls_most(noisy(render(), 0.05), "VQ")
    monotone([scores(noisy(render(), sigma))["VQ"] for sigma in (0, 0.02, 0.04, 0.08, 0.16)])


def test_blur_lowers_visual_quality_most_and_monotonically() -> None:
    falls_most(blurred(render(), 1.5), "VQ")
    monotone([scores(blurred(render(), sigma))["VQ"] for sigma in (0, 0.5, 1, 1.5, 2, 3)])


def test_an_uneven_ground_lowers_visual_quality_most() -> None:
    def shaded(amount: float) -> np.ndarray:
        return render() + amount * np.linspace(-1, 1, 48)[:, None] * np.ones(3)

    falls_most(shaded(0.15), "VQ", by=0.1)
    monotone([scores(shaded(amount))["VQ"] for amount in (0, 0.03, 0.06, 0.12)])


def test_several_forms_score_below_one() -> None:
    one = draw(line(start=(10.0, 10.0)), radius=5.0)
    two = np.maximum(one, draw(line(start=(28.0, 22.0)), radius=5.0))
    assert scores(two)["VQ"] < scores(one)["VQ"] - 0.15


def test_a_fading_form_lowers_every_dimension_without_getting_stuck() -> None:
    faded = [0.15 + share * (render() - 0.15) for share in (1, 0.5, 0.25, 0.1, 0.04)]
    for name in ("VQ", "MQ", "TA"):
        monotone([scores(video)[name] for video in faded], step=0.005)


# ---- motion


def test_jitter_lowers_motion_quality_most_and_monotonically() -> None:
    shake = np.random.default_rng(3).standard_normal((81, 2))
    falls_most(draw(line() + 0.7 * shake), "MQ")
    monotone([scores(draw(line() + amount * shake))["MQ"] for amount in (0, 0.1, 0.3, 0.6, 1.0)])


def test_a_jump_lowers_motion_quality_most_and_monotonically() -> None:
    def jumping(far: float) -> np.ndarray:
        track = line(travel=(10.0, 0.0))
        track[40:, 1] += far
        return draw(track)

    falls_most(jumping(6.0), "MQ", by=0.1)
    monotone([scores(jumping(far))["MQ"] for far in (0, 1, 2, 4, 7)])


def test_freezing_lowers_motion_quality_most_and_monotonically() -> None:
    still = [scores(draw(line(travel=(travel, 0.0))))["MQ"] for travel in (7, 5, 3, 1.5, 0.5, 0.1)]
    monotone(still)
    falls_most(draw(line(travel=(0.0, 0.0))), "MQ", by=0.8)


def test_a_stop_half_way_lowers_motion_quality() -> None:
    halting = line()
    halting[40:] = halting[40]
    assert scores(draw(halting))["MQ"] < scores(draw(line()))["MQ"] - 0.1


def test_changing_size_lowers_motion_quality_most() -> None:
    def breathing(amount: float) -> np.ndarray:
        return draw(line(), radius=6.0 * (1 + amount * np.sin(np.arange(81))))

    falls_most(breathing(0.25), "MQ")
    monotone([scores(breathing(amount))["MQ"] for amount in (0, 0.05, 0.1, 0.2, 0.3)])


# ---- caption


@pytest.mark.parametrize(
    "wrong",
    [
        scene(colour="blue"),
        scene(form="circle"),
        scene(form="triangle"),
        scene(direction="left"),
        scene(direction="up"),
        scene(speed="slowly"),
    ],
    ids=lambda one: one.caption,
)
def test_a_wrong_attribute_lowers_only_the_alignment(wrong) -> None:
    good, bad = scores(render()), scores(render(), wrong.caption)
    assert bad["VQ"] == good["VQ"] and bad["MQ"] == good["MQ"]
    assert bad["TA"] < good["TA"] - 0.08


def test_alignment_falls_with_every_further_wrong_attribute() -> None:
    asked = [
        scene(),
        scene("blue"),
        scene("blue", "circle"),
        scene("blue", "circle", "left"),
        scene("blue", "circle", "left", "slowly"),
    ]
    monotone([scores(render(), one.caption)["TA"] for one in asked], step=0.08)


def test_alignment_follows_colour_and_direction_smoothly() -> None:
    red, blue = np.array((0.9, 0.15, 0.15)), np.array((0.2, 0.35, 0.95))
    mixes = [scores(draw(line(), colour=tuple(red + share * (blue - red))))["TA"] for share in (0, 0.25, 0.5, 0.75, 1)]
    monotone(mixes)
    angles = np.radians((0, 45, 90, 135, 180))
    monotone([scores(draw(line(travel=(12 * np.cos(a), 12 * np.sin(a)))))["TA"] for a in angles])


# ---- every input has a finite score


DEGENERATE = {
    "black": np.zeros((81, 32, 48, 3)),
    "grey": np.full((81, 32, 48, 3), 0.4),
    "one coloured frame": np.full((5, 16, 16, 3), 0.4) * np.array([1.0, 0.1, 0.1]),
    "noise": np.random.default_rng(0).random((81, 32, 48, 3)),
    "almost constant": 0.3 + 0.004 * np.random.default_rng(0).random((81, 32, 48, 3)),
    "flicker": np.tile(np.array([0.0, 1.0])[:, None, None, None], (40, 32, 48, 3)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_clips_score_finite_and_low(name: str) -> None:
    got = scores(DEGENERATE[name])
    assert all(0 <= value < 0.3 for value in got.values()), got
    read_attributes(to_uint8(DEGENERATE[name]), FPS)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 32, 48, 3), (2, 16, 16, 3), (5, 7, 300, 3)])
def test_any_size_is_scored(shape: tuple[int, ...]) -> None:
    got = scores(np.random.default_rng(0).random(shape))
    assert all(np.isfinite(value) and 0 <= value <= 1 for value in got.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_scores_stay_in_range(seed: int, share: float, level: float) -> None:
    rng = np.random.default_rng(seed)
    video = share * rng.random((9, 16, 24, 3)) + (1 - share) * level * rng.random((1, 16, 24, 3)).round()
    got = scores(video)
    assert all(np.isfinite(value) and 0 <= value <= 1 for value in got.values())


def test_a_change_of_one_pixel_changes_the_scores_a_little() -> None:
    """No thresholds: one level of one pixel moves every dimension, and by little."""
    video = to_uint8(noisy(blurred(render(), 1.0), 0.1))
    moved = video.copy()
    moved[40, 16, 24] += 20
    first, second = (ShapesReward()([v], [CAPTION], FPS) for v in (video, moved))
    for name in first:
        assert 0 < abs(first[name][0] - second[name][0]) < 2e-3


def test_a_clips_scores_do_not_depend_on_its_company() -> None:
    videos = [to_uint8(render(seed=seed)) for seed in range(3)]
    together = ShapesReward()(videos, [CAPTION] * 3, FPS)
    alone = [ShapesReward()([video], [CAPTION], FPS) for video in videos]
    for name, values in together.items():
        assert values.tolist() == [one[name][0] for one in alone]
    assert {name: values.shape for name, values in ShapesReward()([], [], FPS).items()} == dict.fromkeys(together, (0,))


def test_outline_harmonics_survive_blur() -> None:
    for form, harmonic in (("square", "harmonic_4"), ("triangle", "harmonic_3")):
        clean = render(scene(form=form))
        sharp, soft = (getattr(measure(to_uint8(video)), harmonic) for video in (clean, blurred(clean, 1.2)))
        assert soft == pytest.approx(sharp, rel=0.15)


# ---- bad calls


@pytest.mark.parametrize(
    ("video", "named"),
    [
        (np.zeros((81, 32, 48, 3), np.float32), "float32"),
        (np.zeros((81, 3, 32, 48), np.uint8), r"\[81, 3, 32, 48\]"),
        (np.zeros((32, 48, 3), np.uint8), r"\[32, 48, 3\]"),
        (np.zeros((0, 32, 48, 3), np.uint8), r"\[0, 32, 48, 3\]"),
        ([[1]], "list"),
    ],
)
def test_a_wrong_video_is_refused_in_one_line(video, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        ShapesReward()([video], [CAPTION], FPS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan")])
def test_a_wrong_frame_rate_is_refused(fps: float) -> None:
    with pytest.raises(UserError, match="fps"):
        ShapesReward()([to_uint8(render())], [CAPTION], fps)


def test_videos_and_prompts_must_match() -> None:
    with pytest.raises(UserError, match="1 videos but 2 prompts"):
        ShapesReward()([to_uint8(render())], [CAPTION] * 2, FPS)
