"""Synthetic captioned clips: one coloured form moving steadily over a plain dark ground.

The attributes that a caption states are exactly those that `megatron_sage.rewards.shapes` reads back
from decoded frames. Clips are 81 frames of 32x48 pixels (latent 21 x 2 x 3 under a 4x16x16 VAE): small
enough for two CPU cores, not square, so that a swap of height and width cannot go unseen.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_sage.rewards.shapes import COLOURS, DIRECTIONS, FORMS

FRAMES, HEIGHT, WIDTH = 81, 32, 48
FPS = 16
SPEEDS = {"slowly": 7.0, "quickly": 14.0}  # pixels travelled in a whole clip
# how far a form of radius 1 reaches from its centroid: (left, up), (right, down)
REACH = {"circle": ((1, 1), (1, 1)), "square": ((0.89, 0.89), (0.89, 0.89)), "triangle": ((1.35, 1.56), (1.35, 0.78))}


@dataclass(frozen=True)
class Scene:
    """What a caption says of a clip."""

    colour: str
    form: str
    direction: str
    speed: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.form} moving {self.direction} {self.speed}"


def all_scenes() -> list[Scene]:
    """The 96 captions, in a fixed order."""
    return [Scene(*parts) for parts in itertools.product(COLOURS, FORMS, DIRECTIONS, SPEEDS)]


def held_out(scenes: list[Scene]) -> list[Scene]:
    """Every sixth caption in a scrambled fixed order: never trained on, neither by the DiT nor by RL."""
    order = np.random.default_rng(2024).permutation(len(scenes))
    return [scenes[i] for i in order[::6]]


def _form_coverage(form: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Anti-aliased coverage in [0, 1] of a form centred at the origin, from its signed distance in pixels."""
    if form == "circle":
        distance = np.hypot(dx, dy) - radius
    elif form == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.89 * radius  # equal area with the circle
    else:  # upright triangle with its centroid at the origin; equal area again
        inner = 0.78 * radius  # inradius of an equilateral triangle of area pi r^2
        slope = np.sqrt(3) / 2
        distance = np.maximum(dy, np.maximum(slope * dx - dy / 2, -slope * dx - dy / 2)) - inner
    return np.clip(0.5 - distance, 0.0, 1.0)


def coverage(scene: Scene, rng: np.random.Generator, frames: int = FRAMES, start_frame: int = 0) -> np.ndarray:
    """Where the form of one clip is, float64 [frames, HEIGHT, WIDTH, 1] in [0, 1]; it stays whole in the frame."""
    direction = np.array(DIRECTIONS[scene.direction], dtype=np.float64)
    travel = SPEEDS[scene.speed] * rng.uniform(0.9, 1.1)
    radius = rng.uniform(6.2, 7.0)
    before, after = (np.array(reach) * radius for reach in REACH[scene.form])
    low = before + np.maximum(-direction, 0) * travel
    high = np.array([WIDTH, HEIGHT]) - after - np.maximum(direction, 0) * travel
    middle, half = (low + high) / 2, (high - low) / 2
    start = middle + half * rng.uniform(-1, 1, 2)
    time = (np.arange(start_frame, start_frame + frames) / (FRAMES - 1))[:, None]
    centre = start + time * travel * direction  # [frames, 2]
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    dx = x[None] - centre[:, 0, None, None]
    dy = y[None] - centre[:, 1, None, None]
    return _form_coverage(scene.form, dx, dy, radius)[..., None]


def render(scene: Scene, rng: np.random.Generator, frames: int = FRAMES, start_frame: int = 0) -> np.ndarray:
    """One clip, float32 [frames, HEIGHT, WIDTH, 3] in [0, 1]; `start_frame` cuts a piece out of the 81."""
    cover = coverage(scene, rng, frames, start_frame)
    ground = rng.uniform(0.08, 0.22)
    colour = np.clip(np.array(COLOURS[scene.colour]) + rng.uniform(-0.05, 0.05, 3), 0, 1)
    return (ground * (1 - cover) + colour * cover).astype(np.float32)


def main() -> None:
    """Write the prompt files: what RL trains on, and what neither RL nor the DiT has seen."""
    folder = Path(__file__).parent
    unseen = held_out(all_scenes())
    for name, scenes in (("train", [s for s in all_scenes() if s not in unseen]), ("held_out", unseen)):
        lines = [scene.caption for scene in scenes]
        (folder / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
