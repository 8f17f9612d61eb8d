"""The tiny world's reward: VideoAlign's interface (VQ, MQ, TA), computed by rule from decoded frames.

Captions read "a {colour} {form} moving {direction} {speed}". A clip is measured by `blob.measure`; one unit of
length is 1/48 of the frame's width (a pixel of the tiny world), speeds are units a second. Every score lies in
[0, 1], higher better, and is a smooth function of the measurements; `soft(e, s) = 1 / (1 + e/s)` falls from 1
without ever becoming flat. `geo` is the geometric mean: the weakest part decides.

    presence = tanh(|contrast| / 0.3) · (0.1 + 0.9 · tanh(1.5 · compactness) / tanh(1.5))
        Is there one form at all? contrast: the form's colour minus the ground's; compactness: 1 for a disc, 0.83 for
        a triangle, towards 0 if the colour is scattered.

    VQ = presence · geo(soft(ground_error, 0.05), soft(form_error, 0.05), soft(edge excess, 0.3))
        ground_error, form_error: rms differences from the two-colour reading of the clip, outside and inside the
        form's reach; edge excess: pixels of rim beyond the 0.2 of an ideally sampled form.
    MQ = presence · move · geo(soft(bend, 1), soft(shake, 0.3), soft(growth, 0.2), soft(flicker, 0.1))
        move: tanh(travel/3 units), travel of the straight line through the track, so that a frozen form has no
        good motion; bend: rms distance from that line; shake: rms second difference of the track, units;
        growth: std/mean of the covered area; flicker: rms frame-to-frame change of area/mean.
    TA = presence · (colour + form + direction + speed) / 4
        colour, form: d_other / (d_asked + d_other), distances to the asked word's prototype and to the nearest
        other one's (hue vectors; outline harmonics); direction: (1 + v·asked / (|v| + 0.1 units/s)) / 2;
        speed: 1 / (1 + ((|v| - asked) / 0.7 units/s)²).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sage.errors import UserError
from megatron_sage.rewards.blob import Blob, measure
from megatron_sage.rewards.protocol import check_inputs

COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
}
FORMS = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
SPEEDS = {"slowly": 1.4, "quickly": 2.8}  # units a second: 7 and 14 pixels in the five seconds of 81 frames at 16 fps
GROUND = 0.15  # the grey that hues are taken relative to
UNITS_PER_WIDTH = 48
# (third harmonic / a triangle's, fourth harmonic / a square's)
OUTLINES = {"circle": (0.0, 0.0), "square": (0.0, 1.0), "triangle": (1.0, 0.0)}
TRIANGLE_HARMONIC = 0.3761  # equilateral: Im of the mean of z³ over it, per r³ of the disc of equal area
SQUARE_HARMONIC = -(np.pi**2) / 60  # the same of Re z⁴ over a square


@dataclass(frozen=True)
class Attributes:
    """What a caption asks for, or what is read from a clip."""

    colour: str
    form: str
    direction: str
    speed: str


@lru_cache(maxsize=4096)
def parse_caption(caption: str) -> Attributes:
    """The four attributes of a caption; UserError, in one line, unless each is named exactly once."""
    words = re.findall(r"[a-z]+", caption.lower())
    found = {}
    vocabularies: dict[str, Sequence[str]] = {
        "colour": tuple(COLOURS),
        "form": FORMS,
        "direction": tuple(DIRECTIONS),
        "speed": tuple(SPEEDS),
    }
    for attribute, vocabulary in vocabularies.items():
        hits = [word for word in words if word in vocabulary]
        if len(hits) != 1:
            what = f"{len(hits)} words" if hits else "no word"
            raise UserError(
                f"prompt {caption!r}: {what} for the {attribute} ({', '.join(vocabulary)}); ShapesReward "
                "reads captions such as 'a red circle moving left slowly'"
            )
        found[attribute] = hits[0]
    return Attributes(**found)


def read_attributes(video: np.ndarray, fps: float = 16.0) -> Attributes:
    """Decide by rule what a uint8 clip [F, H, W, 3] shows: the nearest prototype in each attribute."""
    check_inputs([video], [""], fps)
    blob = measure(video)
    velocity_2 = _velocity(blob, fps)
    along = {name: velocity_2 @ np.array(vector) for name, vector in DIRECTIONS.items()}
    # speeds are told apart by ratio: half-way between 7 and 14 pixels is their geometric mean
    speed = np.log(np.linalg.norm(velocity_2) + 1e-6)
    return Attributes(
        colour=_nearest(_colour_distances(blob)),
        form=_nearest(_form_distances(blob)),
        direction=max(along, key=along.__getitem__),
        speed=_nearest({name: abs(speed - np.log(value)) for name, value in SPEEDS.items()}),
    )


class ShapesReward:
    """VQ (clean form), MQ (smooth, steady motion), TA (caption obeyed); formulas in the module's docstring."""

    dimensions: tuple[str, ...] = ("VQ", "MQ", "TA")

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Score uint8 clips [F, H, W, 3] of any length and size: {"VQ", "MQ", "TA"}, float64 [n] in [0, 1]."""
        check_inputs(videos, prompts, fps)
        asked = [parse_caption(prompt) for prompt in prompts]
        blobs = [measure(video) for video in videos]
        rows = [
            (visual_quality(blob), motion_quality(blob), text_alignment(blob, want, fps))
            for blob, want in zip(blobs, asked, strict=True)
        ]
        return dict(zip(self.dimensions, np.array(rows, np.float64).reshape(-1, 3).T, strict=True))


def visual_quality(blob: Blob) -> float:
    """VQ of the module's docstring."""
    edge_excess = max(blob.edge_width - 0.2, 0.0)
    return presence(blob) * _geometric_mean(
        _soft(blob.ground_error, 0.05), _soft(blob.form_error, 0.05), _soft(edge_excess, 0.3)
    )


def motion_quality(blob: Blob) -> float:
    """MQ of the module's docstring; a clip of fewer than three frames has no motion to judge beyond its line."""
    unit = blob.width / UNITS_PER_WIDTH
    line_F2 = blob.centre.mean(0) + blob.time[:, None] * blob.velocity
    travel = np.linalg.norm(blob.velocity) * (len(blob.area) - 1) / unit
    mean_area = blob.area.mean() + 1e-6
    return (
        presence(blob)
        * float(np.tanh(travel / 3))
        * _geometric_mean(
            _soft(_rms(blob.centre - line_F2) / unit, 1.0),
            _soft(_rms(np.diff(blob.centre, 2, axis=0)) / unit, 0.3),
            _soft(blob.area.std() / mean_area, 0.2),
            _soft(_rms(np.diff(blob.area)[:, None]) / mean_area, 0.1),
        )
    )


def text_alignment(blob: Blob, asked: Attributes, fps: float) -> float:
    """TA of the module's docstring."""
    velocity_2 = _velocity(blob, fps)
    speed = float(np.linalg.norm(velocity_2))
    along = float(velocity_2 @ np.array(DIRECTIONS[asked.direction])) / (speed + 0.1)
    parts = (
        _closeness(_colour_distances(blob), asked.colour),
        _closeness(_form_distances(blob), asked.form),
        (1 + along) / 2,
        1 / (1 + ((speed - SPEEDS[asked.speed]) / 0.7) ** 2),
    )
    return presence(blob) * sum(parts) / len(parts)


def presence(blob: Blob) -> float:
    """How much there is one form, in [0, 1]: by its contrast and by how little its mass is scattered."""
    contrast = np.tanh(np.linalg.norm(blob.contrast) / 0.3)
    return float(contrast * (0.1 + 0.9 * np.tanh(1.5 * blob.compactness) / np.tanh(1.5)))


def _velocity(blob: Blob, fps: float) -> np.ndarray:
    """(x, y) in units a second."""
    return blob.velocity * fps * UNITS_PER_WIDTH / blob.width


def _colour_distances(blob: Blob) -> dict[str, float]:
    """Distance of the form's hue (unit vector of its contrast) to every colour's; faint forms have no hue."""
    hue_3 = blob.contrast / (np.linalg.norm(blob.contrast) + 0.01)
    prototypes = {name: np.array(colour) - GROUND for name, colour in COLOURS.items()}
    return {name: float(np.linalg.norm(hue_3 - p / np.linalg.norm(p))) for name, p in prototypes.items()}


def _form_distances(blob: Blob) -> dict[str, float]:
    outline = np.array([blob.harmonic_3 / TRIANGLE_HARMONIC, blob.harmonic_4 / SQUARE_HARMONIC])
    return {form: float(np.linalg.norm(outline - np.array(OUTLINES[form]))) for form in FORMS}


def _closeness(distances: dict[str, float], asked: str) -> float:
    """d_other / (d_asked + d_other): 1 at the asked prototype, 1/2 midway, 0 at another one's."""
    other = min(distance for name, distance in distances.items() if name != asked)
    return other / (distances[asked] + other + 1e-9)


def _nearest(distances: dict[str, float]) -> str:
    return min(distances, key=distances.__getitem__)


def _soft(error: float, scale: float) -> float:
    return 1 / (1 + error / scale)


def _geometric_mean(*values: float) -> float:
    return float(np.prod(values) ** (1 / len(values)))


def _rms(x_N2: np.ndarray) -> float:
    """Root mean square length of vectors; 0 of none."""
    return float(np.sqrt((x_N2**2).sum() / max(len(x_N2), 1)))
