"""What a reward is: scores of decoded clips, one array per dimension, higher better."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from megatron_sage.errors import UserError


@runtime_checkable
class Reward(Protocol):
    """A callable with named dimensions; VideoAlign's are VQ, MQ and TA.

    It sees decoded uint8 clips only, so that no reward can depend on how a clip was made. `fps` is explicit:
    the same frames are another motion at another rate, and a reward that guesses the rate changes its scores
    without an error.
    """

    dimensions: tuple[str, ...]

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Score n clips, uint8 [F, H, W, 3] each, of n prompts: {dimension: float64 [n]}."""
        ...


def load_reward(
    path: str, key: str = "reward.function", settings: Mapping[str, Any] | None = None, device: Any = None
) -> Reward:
    """The reward named by an import path `module:name`; a class is instantiated with `settings`.

    A class with a parameter `device` is given `device` where the settings do not name one. Raises UserError, in one
    line, where the path cannot be imported or what it names is no reward.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise UserError(f"{key}={path!r}: expected 'module:name', e.g. 'megatron_sage.rewards.shapes:ShapesReward'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{key}={path!r}: cannot import {module_name!r} ({error}); install it or correct the path"
        ) from error
    if not hasattr(module, name):
        raise UserError(f"{key}={path!r}: module {module_name!r} has no {name!r}")
    reward = getattr(module, name)
    if isinstance(reward, type):
        given = dict(settings or {})
        if device is not None and "device" in inspect.signature(reward).parameters:
            given.setdefault("device", device)
        reward = reward(**given)
    if not (isinstance(reward, Reward) and reward.dimensions):
        raise UserError(f"{key}={path!r}: a reward is callable and has `dimensions`, a tuple of names")
    return reward


def check_scores(
    scores: Mapping[str, np.ndarray], dimensions: Sequence[str], number: int, who: str
) -> dict[str, np.ndarray]:
    """The named dimensions of what a reward returned, as float64 [number]; what is not finite stays as it is."""
    found = {}
    for name in dimensions:
        if name not in scores:
            raise UserError(f"{who}: returned no {name}; its dimensions are {', '.join(dimensions)}")
        values = np.asarray(scores[name], np.float64)
        if values.shape != (number,):
            raise UserError(f"{who}: {name} has shape {list(values.shape)} for {number} videos; return one number each")
        found[name] = values
    return found


def check_inputs(videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> None:
    """Refuse, in one line, what is not n uint8 clips [F, H, W, 3] with n prompts at a positive frame rate."""
    if len(videos) != len(prompts):
        raise UserError(f"reward: {len(videos)} videos but {len(prompts)} prompts; give one prompt per video")
    if not (np.isfinite(fps) and fps > 0):
        raise UserError(f"reward: fps={fps}: expected a positive number of frames per second")
    for number, video in enumerate(videos):
        if not isinstance(video, np.ndarray) or video.dtype != np.uint8:
            kind = video.dtype if isinstance(video, np.ndarray) else type(video).__name__
            raise UserError(f"reward: video {number} is {kind}: expected a numpy uint8 array of decoded frames")
        if video.ndim != 4 or video.shape[-1] != 3 or video.size == 0:
            raise UserError(
                f"reward: video {number} has shape {list(video.shape)}: "
                "expected [frames, height, width, 3], none of them 0"
            )
