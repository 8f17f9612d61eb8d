"""What can be measured of one coloured form over a plain ground, softly, so that it varies with every pixel.

A clip x [F, H, W, 3] in [0, 1] is read as `ground + coverage * contrast`: `ground` and `contrast` are one colour
each for the whole clip, `coverage` is 1 inside the form and 0 outside. Everything is finite on any input, a
constant clip included. Shape suffixes: F frames, H height, W width, N pixels of a frame. Lengths are in pixels.
"""

from dataclasses import dataclass

import numpy as np

EPSILON = 1e-6
FAINT = 0.05  # contrast below which coverage fades out instead of amplifying the codec's noise
GROUND_TOLERANCE = 0.1  # colours this far from the median count half when the ground is averaged


@dataclass(frozen=True)
class Blob:
    """One clip's measurements. The form's reach is a disc around its centre in each frame, soft at the rim."""

    frames: int
    width: int
    ground_3: np.ndarray  # colour of the ground
    contrast_3: np.ndarray  # colour of the form minus the ground
    centre_F2: np.ndarray  # (x, y) of the form in each frame, y grows downwards
    area_F: np.ndarray  # covered pixels in each frame
    compactness: float  # mean over frames of area² / (2π · moment of inertia): 1 for one disc, towards 0 if scattered
    ground_error: float  # rms difference from the ground outside the form's reach
    form_error: float  # rms difference from `ground + coverage * contrast` inside the form's reach
    edge_width: float  # pixels over which the rim goes from ground to form, 1/6 to 1/5 where ideally sampled
    harmonic_3: float  # third harmonic of the outline, > 0 for an upright triangle; blur does not change it
    harmonic_4: float  # fourth harmonic of the outline, < 0 for an upright square; blur does not change it

    @property
    def velocity_2(self) -> np.ndarray:
        """Slope of the straight line through the track, pixels (x, y) a frame; 0 for a single frame."""
        time = np.arange(self.frames) - (self.frames - 1) / 2
        return time @ self.centre_F2 / max(time @ time, EPSILON)


def measure(video: np.ndarray) -> Blob:
    """Measure one uint8 clip [F, H, W, 3]."""
    frames, height, width, _ = video.shape
    x_FN3 = video.reshape(frames, height * width, 3).astype(np.float32) * np.float32(1 / 255)
    ground_3 = _ground(video, x_FN3)
    d_FN3 = x_FN3 - ground_3
    energy_FN = _squared_length(d_FN3)
    contrast_3 = _contrast(d_FN3, energy_FN)
    raw_FN = d_FN3 @ (contrast_3 / (contrast_3 @ contrast_3 + np.float32(FAINT**2)))
    sharp_FN = _sharpen(raw_FN)
    y_N, x_N = (axis.ravel() for axis in np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5))
    plane_N6 = np.stack([np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], axis=1)

    # whole frame first: where the form is, how large, how scattered
    centre_F2, area_F, inertia_F = _moments(sharp_FN, plane_N6, (width / 2, height / 2))
    compactness = float(np.mean(area_F**2 / (2 * np.pi * inertia_F + EPSILON + area_F**2 / 1e3)))
    radius = float(np.sqrt(np.median(area_F) / np.pi)) + 0.5

    # then within the form's reach only: far noise must not pull on the track
    def reach(centre_F2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dx_FN = x_N - centre_F2[:, :1].astype(np.float32)
        dy_FN = y_N - centre_F2[:, 1:].astype(np.float32)
        r2_FN = (dx_FN * dx_FN + dy_FN * dy_FN) * np.float32(1 / radius**2)
        return dx_FN, dy_FN, np.clip((np.float32(5.0) - r2_FN) * np.float32(0.5), 0, 1)  # 1 to 1.7 r, 0 from 2.2 r

    inside_FN = reach(centre_F2)[2]
    centre_F2, area_F = _refined(raw_FN * inside_FN, plane_N6, centre_F2)
    dx_FN, dy_FN, inside_FN = reach(centre_F2)
    cover_FN = np.clip(raw_FN, 0, 1)
    # |d - c·f|² without another [F, N, 3] array
    along_FN = d_FN3 @ contrast_3
    misfit_FN = energy_FN - cover_FN * (2 * along_FN - cover_FN * np.float32(contrast_3 @ contrast_3))
    rim = float(np.vdot(cover_FN * (1 - cover_FN), inside_FN))
    perimeter = 2 * np.sqrt(np.pi * max(float(np.mean(area_F)), 0.0)) * frames
    harmonic_3, harmonic_4 = _harmonics(raw_FN * inside_FN, dx_FN, dy_FN)
    return Blob(
        frames=frames,
        width=width,
        ground_3=ground_3.astype(np.float64),
        contrast_3=contrast_3.astype(np.float64),
        centre_F2=centre_F2,
        area_F=area_F,
        compactness=compactness,
        ground_error=_rms(energy_FN, 1 - inside_FN),
        form_error=_rms(misfit_FN, inside_FN),
        edge_width=rim / (perimeter + frames),
        harmonic_3=harmonic_3,
        harmonic_4=harmonic_4,
    )


def _ground(video: np.ndarray, x_FN3: np.ndarray) -> np.ndarray:
    """Colour of the ground [3]: the median, then one pass of averaging what is close to it.

    The median of uint8 is a step function of the clip; the average makes the ground vary with every pixel.
    """
    counts_3 = [np.bincount(video[..., channel].ravel(), minlength=256) for channel in range(3)]
    median_3 = np.array([np.searchsorted(np.cumsum(c), (c.sum() + 1) // 2) for c in counts_3], np.float32) / 255
    weight_FN = 1 / (1 + _squared_length(x_FN3 - median_3) * np.float32(1 / GROUND_TOLERANCE**2))
    weight_FN *= weight_FN
    return (weight_FN.reshape(-1) @ x_FN3.reshape(-1, 3)) / weight_FN.sum()


def _contrast(d_FN3: np.ndarray, energy_FN: np.ndarray) -> np.ndarray:
    """Colour of the form relative to the ground [3]: mean of the differences, weighted by |d|⁴."""
    weight_FN = energy_FN * energy_FN
    return (weight_FN.reshape(-1) @ d_FN3.reshape(-1, 3)) / (weight_FN.sum() + np.float32(EPSILON**2))


def _sharpen(raw_FN: np.ndarray) -> np.ndarray:
    """Smooth step c⁴ / (c⁴ + (1-c)⁴) of the clipped coverage: keeps the half-way contour, mutes faint noise."""
    c_FN = np.clip(raw_FN, 0, 1)
    rest_FN = 1 - c_FN
    c_FN *= c_FN
    c_FN *= c_FN
    rest_FN *= rest_FN
    rest_FN *= rest_FN
    return c_FN / (c_FN + rest_FN)


def _moments(
    mass_FN: np.ndarray, plane_N6: np.ndarray, rest: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre [F, 2], mass [F] and moment of inertia [F] about the centre; an empty frame's centre is `rest`."""
    m_F6 = (mass_FN @ plane_N6).astype(np.float64)
    total_F = m_F6[:, 0]
    # one tenth of a pixel's mass sits at the middle of the frame, so that an empty frame has a centre
    prior = 0.1 * np.exp(-total_F)
    centre_F2 = (m_F6[:, 1:3] + prior[:, None] * np.array(rest)) / (total_F + prior)[:, None]
    inertia_F = m_F6[:, 3] + m_F6[:, 4] - total_F * (centre_F2**2).sum(1)
    return centre_F2, total_F, np.maximum(inertia_F, 0)


def _refined(mass_FN: np.ndarray, plane_N6: np.ndarray, centre_F2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [F, 2] and mass [F] of a signed coverage around a first estimate of the centre.

    Neither clipped nor sharpened: linear in the clip, so a form's sub-pixel motion is exact (a sharpened rim makes
    area and centre wobble as it crosses the pixel grid) and zero-mean noise cancels.
    """
    m_F3 = (mass_FN @ plane_N6[:, :3]).astype(np.float64)
    total_F = m_F3[:, 0]
    floor_F = 0.25 * np.abs(mass_FN).sum(1) + 0.1  # keeps the step bounded where positive and negative mass cancel
    step_F2 = (m_F3[:, 1:] - total_F[:, None] * centre_F2) / np.maximum(total_F, floor_F)[:, None]
    return centre_F2 + step_F2, np.maximum(total_F, 0)


def _harmonics(mass_FN: np.ndarray, dx_FN: np.ndarray, dy_FN: np.ndarray) -> tuple[float, float]:
    """Im Σ m z³ and Re Σ m z⁴ with z = dx + i·dy, per mass and per power of the equal-area radius.

    z^n is harmonic, so any isotropic blur leaves these sums unchanged: a soft form keeps its outline's signature.
    """
    dx2_FN, dy2_FN = dx_FN * dx_FN, dy_FN * dy_FN
    third = np.vdot(mass_FN, dy_FN * (3 * dx2_FN - dy2_FN))
    fourth = np.vdot(mass_FN, dx2_FN * (dx2_FN - 6 * dy2_FN) + dy2_FN * dy2_FN)
    total = max(float(mass_FN.sum()), 1.0)
    radius2 = total / len(mass_FN) / np.pi + EPSILON
    return float(third) / (total * radius2**1.5), float(fourth) / (total * radius2**2)


def _squared_length(d_FN3: np.ndarray) -> np.ndarray:
    return np.einsum("fnc,fnc->fn", d_FN3, d_FN3)


def _rms(squares_FN: np.ndarray, weight_FN: np.ndarray) -> float:
    """Root of the weighted mean over pixels of a squared colour distance, per channel."""
    return float(np.sqrt(max(np.vdot(squares_FN, weight_FN), 0.0) / (3 * float(weight_FN.sum()) + 1.0)))
