"""Hand-made clips: the tiny world's own renderer, and ways of spoiling what it renders."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from scipy.ndimage import gaussian_filter


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_world_clips", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


clips = _load(Path(__file__).parents[2] / "examples" / "tiny_world" / "clips.py")
FPS = clips.FPS


def to_uint8(video: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(video * 255 + 0.5), 0, 255).astype(np.uint8)


def scene(colour="red", form="square", direction="right", speed="quickly"):
    return clips.Scene(colour, form, direction, speed)


def render(what=None, seed=0) -> np.ndarray:
    """A clean clip, float [81, 32, 48, 3] in [0, 1]."""
    return clips.render(what or scene(), np.random.default_rng(seed))


def draw(
    track: np.ndarray,
    radius: np.ndarray | float = 6.0,
    form="square",
    colour=(0.9, 0.15, 0.15),
    ground=0.15,
    size=(32, 48),
) -> np.ndarray:
    """A clip whose form follows `track` [F, 2] (x, y) with a radius per frame."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    radii = np.broadcast_to(radius, len(track))
    frames = []
    for (cx, cy), r in zip(track, radii, strict=True):
        dx, dy = x - cx, y - cy
        distance = np.hypot(dx, dy) - r if form == "circle" else np.maximum(abs(dx), abs(dy)) - 0.89 * r
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        frames.append(ground * (1 - cover) + np.array(colour) * cover)
    return np.array(frames)


def line(frames=81, start=(14.0, 16.0), travel=(14.0, 0.0)) -> np.ndarray:
    """A steady track [F, 2]."""
    return np.array(start) + np.linspace(0, 1, frames)[:, None] * np.array(travel)


def noisy(video: np.ndarray, sigma: float, seed=1) -> np.ndarray:
    return video + sigma * np.random.default_rng(seed).standard_normal(video.shape)


def blurred(video: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(video, (0, sigma, sigma, 0))
