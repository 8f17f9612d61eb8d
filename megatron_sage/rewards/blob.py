"""What can be measured of one coloured form over a plain ground, softly, so that it varies with every pixel.

A clip x [F, H, W, 3] in [0, 1] is read as `ground + coverage * contrast`: `ground` and `contrast` are one colour
each for the whole clip, `coverage` is 1 inside the form and 0 outside. Everything is finite on any input, a
constant clip included. Shape suffixes: F frames, H height, W width, N pixels of a frame, P = F·N pixels
of a clip. Lengths are in pixels.
"""

from dataclasses import dataclass

import numpy as np

EPSILON = 1e-6
FAINT = 0.02  # contrast below which coverage fades out instead of amplifying the codec's noise
GROUND_TOLERANCE = 0.1  # colours this far from the median count half when the ground is averaged


@dataclass(frozen=True)
class Blob:
    """One clip's measurements. The form's reach is a disc around its centre in each frame, soft at the rim."""

    width: int
    contrast: np.ndarray  # [3], colour of the form minus the ground's
    centre: np.ndarray  # [F, 2], (x, y) of the form in each frame, y grows downwards
    area: np.ndarray  # [F], covered pixels in each frame
    compactness: float  # mean over frames of area² / (2π · moment of inertia): 1 for one disc, towards 0 if scattered
    ground_error: float  # rms difference from the ground outside the form's reach
    form_error: float  # rms difference from `ground + coverage * contrast` inside the form's reach
    edge_width: float  # pixels over which the rim goes from ground to form, 1/6 to 1/5 where ideally sampled
    harmonic_3: float  # third harmonic of the outline, > 0 for an upright triangle; blur does not change it
    harmonic_4: float  # fourth harmonic of the outline, < 0 for an upright square; blur does not change it

    @property
    def time(self) -> np.ndarray:
        """Frame numbers [F], 0 in the middle of the clip."""
        return np.arange(len(self.area)) - (len(self.area) - 1) / 2

    @property
    def velocity(self) -> np.ndarray:
        """Slope of the straight line through the track, pixels (x, y) a frame; 0 for a single frame."""
        return self.time @ self.centre / max(self.time @ self.time, EPSILON)


def measure(video: np.ndarray) -> Blob:
    """Measure one uint8 clip [F, H, W, 3]."""
    frames, height, width, _ = video.shape
    bytes_3P = np.ascontiguousarray(video.reshape(-1, 3).T)  # channels first: numpy is slow along rows of 3
    x_3P = bytes_3P.astype(np.float32) * np.float32(1 / 255)
    ground_3 = _ground(bytes_3P, x_3P)
    d_3P = x_3P - ground_3[:, None]
    energy_P = np.einsum("cp,cp->p", d_3P, d_3P)
    contrast_3 = _contrast(d_3P, energy_P)
    along_P = contrast_3 @ d_3P
    contrast2 = contrast_3 @ contrast_3
    raw_FN = (along_P * (1 / (contrast2 + np.float32(FAINT**2)))).reshape(frames, -1)
    y_N, x_N = (axis.ravel() for axis in np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5))
    plane_N4 = np.stack([np.ones_like(x_N), x_N, y_N, x_N * x_N + y_N * y_N], axis=1)

    # whole frame first: where the form is, how large, how scattered
    centre_F2, area_F, inertia_F = _moments(_sharpen(raw_FN), plane_N4, (width / 2, height / 2))
    compactness = float(np.mean(area_F**2 / (2 * np.pi * inertia_F + EPSILON + area_F**2 / 1e3)))
    radius = float(np.sqrt(np.median(area_F) / np.pi)) + 0.5

    # then within the form's reach only: far noise must not pull on the track
    inside_FN = _reach(x_N, y_N, centre_F2, radius)[2]
    centre_F2, area_F = _refined(raw_FN * inside_FN, plane_N4, centre_F2)
    dx_FN, dy_FN, inside_FN = _reach(x_N, y_N, centre_F2, radius)
    inside_P = inside_FN.reshape(-1)
    cover_P = np.clip(raw_FN, 0, 1).reshape(-1)
    misfit_P = energy_P - cover_P * (2 * along_P - cover_P * contrast2)  # |d - cover·contrast|²
    rim = float(np.vdot(cover_P * (1 - cover_P), inside_P))
    perimeter = 2 * np.sqrt(np.pi * float(np.mean(area_F))) * frames
    harmonic_3, harmonic_4 = _harmonics(raw_FN * inside_FN, dx_FN, dy_FN)
    return Blob(
        width=width,
        contrast=contrast_3.astype(np.float64),
        centre=centre_F2,
        area=area_F,
        compactness=compactness,
        ground_error=_rms(energy_P, 1 - inside_P),
        form_error=_rms(misfit_P, inside_P),
        edge_width=rim / (perimeter + frames),
        harmonic_3=harmonic_3,
        harmonic_4=harmonic_4,
    )


def _ground(bytes_3P: np.ndarray, x_3P: np.ndarray) -> np.ndarray:
    """Colour of the ground [3]: the median, then one pass of averaging what is close to it.

    The median of uint8 is a step function of the clip; the average makes the ground vary with every pixel.
    """
    total_3C = np.cumsum([np.bincount(channel, minlength=256) for channel in bytes_3P], axis=1)
    median_3 = (total_3C < (total_3C[:, -1:] + 1) // 2).sum(1).astype(np.float32) / 255
    away_3P = x_3P - median_3[:, None]
    weight_P = 1 / (1 + np.einsum("cp,cp->p", away_3P, away_3P) * np.float32(1 / GROUND_TOLERANCE**2))
    weight_P *= weight_P
    return (x_3P @ weight_P) / weight_P.sum()


def _contrast(d_3P: np.ndarray, energy_P: np.ndarray) -> np.ndarray:
    """Colour of the form relative to the ground [3]: mean of the differences, weighted by |d|⁴."""
    weight_P = energy_P * energy_P
    return (d_3P @ weight_P) / (weight_P.sum() + np.float32(EPSILON**2))


def _sharpen(raw_FN: np.ndarray) -> np.ndarray:
    """Smooth step c⁴ / (c⁴ + (1-c)⁴) of the clipped coverage: keeps the half-way contour, mutes faint noise."""
    c_FN = np.clip(raw_FN, 0, 1)
    rest_FN = 1 - c_FN
    c_FN *= c_FN
    c_FN *= c_FN
    rest_FN *= rest_FN
    rest_FN *= rest_FN
    return c_FN / (c_FN + rest_FN)


def _reach(
    x_N: np.ndarray, y_N: np.ndarray, centre_F2: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dy from each frame's centre and a soft disc around it: 1 up to 1.7 radii, 0 from 2.2 radii."""
    dx_FN = x_N - centre_F2[:, :1].astype(np.float32)
    dy_FN = y_N - centre_F2[:, 1:].astype(np.float32)
    r2_FN = (dx_FN * dx_FN + dy_FN * dy_FN) * np.float32(1 / radius**2)
    return dx_FN, dy_FN, np.clip(np.float32(2.5) - np.float32(0.5) * r2_FN, 0, 1)


def _moments(
    mass_FN: np.ndarray, plane_N4: np.ndarray, rest: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre [F, 2], mass [F] and moment of inertia [F] about the centre; an empty frame's centre is `rest`."""
    m_F4 = (mass_FN @ plane_N4).astype(np.float64)
    total_F = m_F4[:, 0]
    # one tenth of a pixel's mass sits at the middle of the frame, so that an empty frame has a centre
    prior = 0.1 * np.exp(-total_F)
    centre_F2 = (m_F4[:, 1:3] + prior[:, None] * np.array(rest)) / (total_F + prior)[:, None]
    inertia_F = m_F4[:, 3] - total_F * (centre_F2**2).sum(1)
    return centre_F2, total_F, np.maximum(inertia_F, 0)


def _refined(mass_FN: np.ndarray, plane_N4: np.ndarray, centre_F2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [F, 2] and mass [F] of a signed coverage around a first estimate of the centre.

    Neither clipped nor sharpened: linear in the clip, so a form's sub-pixel motion is exact (a sharpened rim makes
    area and centre wobble as it crosses the pixel grid) and zero-mean noise cancels.
    """
    m_F3 = (mass_FN @ plane_N4[:, :3]).astype(np.float64)
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


def _rms(squares_P: np.ndarray, weight_P: np.ndarray) -> float:
    """Root of the weighted mean over pixels of a squared colour distance, per channel."""
    return float(np.sqrt(max(np.vdot(squares_P, weight_P), 0.0) / (3 * float(weight_P.sum()) + 1.0)))
