"""Charts as inline SVG: they follow the page's light or dark colours and need neither network nor script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 34
MAX_BARS = 120  # more iterations than this are averaged into so many bars
MAX_MARKS = 250  # beyond so many points only the line is drawn, no hover text


@dataclass(frozen=True)
class Series:
    """One curve; NaN in `y` is a gap. `spread` draws a band of y ± spread; `faint` a thin line under a bold one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    spread: Sequence[float] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(v) for v in (self.low, self.high)) if self.log else (self.low, self.high)
        here = math.log10(value) if self.log else value
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range: 1, 2 or 5 times a power of ten, or the decades."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first < 2:
                fine = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
                return [tick for tick in fine if self.low <= tick <= self.high]
            return [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 5))]
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round values between low and high, low < high."""
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float | None, digits: int = 4, strip: bool = True) -> str:
    """A number for people: `digits` significant digits, a real minus sign, a dash for what is unknown.

    `strip` drops zeros at the end; a column of a table keeps them.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    text = f"{value:.{places}f}"
    text = text.rstrip("0").rstrip(".") if "." in text and strip else text
    return text.replace("-", "−")


def line_chart(series: Sequence[Series], x_label: str = "iteration", log: bool | None = None) -> str:
    """An SVG of curves; a legend where there are several. `log=None` picks a log axis for positive wide ranges."""
    curves = [_finite(one) for one in series]
    curves = [one for one in curves if len(one.x)]
    if not curves:
        return '<p class="empty">not recorded in this run</p>'
    x_scale, y_scale = _scales(curves, log)
    parts = [_axes(x_scale, y_scale, x_label)]
    for one in curves:
        parts.append(_curve(one, x_scale, y_scale))
    return _legend([(one.label, one.colour) for one in curves if not one.faint]) + _svg("".join(parts))


def stacked_bars(x: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]], x_label: str = "iteration") -> str:
    """An SVG of one bar per x, its layers from bottom to top; NaN counts as nothing."""
    values = np.nan_to_num(np.array([layer for _, layer in layers], np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if not len(x) or not len(layers) or values.max(initial=0.0) <= 0:
        return '<p class="empty">not recorded in this run</p>'
    edges = np.linspace(0, len(x), min(len(x), MAX_BARS) + 1).astype(int)
    means = np.array([values[:, a:b].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=True)])  # [bars, layers]
    places = [float(np.mean(x[a:b])) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    step = (max(x) - min(x)) / max(len(places) - 1, 1) or 1.0
    x_scale = Scale(min(places) - step / 2, max(places) + step / 2, LEFT, WIDTH - RIGHT)
    y_scale = Scale(0, float(means.sum(1).max()) * 1.05, HEIGHT - BOTTOM, TOP)
    width = abs(x_scale(places[0] + step) - x_scale(places[0])) * 0.82
    parts = [_axes(x_scale, y_scale, x_label)]
    for place, bar in zip(places, means, strict=True):
        base = 0.0
        for colour, value in enumerate(bar):
            top, bottom = y_scale(base + value), y_scale(base)
            hover = escape(f"{layers[colour][0]}: {number(value)} ({x_label} {number(place)})")
            parts.append(
                f'<rect class="fill c{colour}" x="{x_scale(place) - width / 2:.1f}" y="{top:.1f}" '
                f'width="{width:.1f}" height="{max(bottom - top, 0):.1f}"><title>{hover}</title></rect>'
            )
            base += value
    return _legend([(name, colour) for colour, (name, _) in enumerate(layers)]) + _svg("".join(parts))


def change_bars(changes: Sequence[tuple[str, float]]) -> str:
    """An SVG of one bar per named change, largest first: how many improved, and by how much."""
    kept = sorted(((name, value) for name, value in changes if math.isfinite(value)), key=lambda item: -item[1])
    if not kept:
        return '<p class="empty">not recorded in this run</p>'
    values = [value for _, value in kept]
    low, high = min(0.0, *values), max(0.0, *values)
    pad = 0.06 * (high - low) or 1.0
    x_scale = Scale(0, len(kept), LEFT, WIDTH - RIGHT)
    y_scale = Scale(low - pad, high + pad, HEIGHT - BOTTOM, TOP)
    width = (x_scale(1) - x_scale(0)) * 0.8
    parts = [_axes(x_scale, y_scale, "held-out samples, by change", x_ticks=False)]
    for place, (name, value) in enumerate(kept):
        top, bottom = sorted((y_scale(value), y_scale(0)))
        kind = "up" if value >= 0 else "down"
        parts.append(
            f'<rect class="{kind}" x="{x_scale(place + 0.5) - width / 2:.1f}" y="{top:.1f}" '
            f'width="{width:.1f}" height="{max(bottom - top, 0.8):.1f}">'
            f"<title>{escape(name)}: {signed(value)}</title></rect>"
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_scale(0):.1f}" y2="{y_scale(0):.1f}"/>')
    return _svg("".join(parts))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window that shrinks at the ends; NaN are left out."""
    array, half = np.asarray(values, np.float64), window // 2
    pieces = [array[max(0, i - half) : i + half + 1] for i in range(len(array))]
    return [float(np.mean(p[np.isfinite(p)])) if np.isfinite(p).any() else math.nan for p in pieces]


def signed(value: float | None, digits: int = 3) -> str:
    """A change: always with its sign."""
    text = number(value, digits)
    return text if text.startswith(("−", "–")) else "+" + text


def _finite(one: Series) -> Series:
    """The curve without non-finite x; gaps in y stay, but a curve that is all gaps has no points."""
    y = np.asarray(one.y, np.float64)
    if not np.isfinite(y).any():
        return Series(one.label, [], [])
    return one


def _scales(curves: Sequence[Series], log: bool | None) -> tuple[Scale, Scale]:
    xs = np.concatenate([np.asarray(one.x, np.float64) for one in curves])
    ys = []
    for one in curves:
        y, spread = np.asarray(one.y, np.float64), np.nan_to_num(np.asarray(one.spread or [0.0], np.float64))
        ys += [y - spread, y + spread]
    values = np.concatenate(ys)
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if log is None:
        log = low > 0 and high / low > 30
    log = log and low > 0
    if log:
        low, high = low / 1.3, high * 1.3
    else:
        pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    left, right = float(xs.min()), float(xs.max())
    if left == right:
        left, right = left - 0.5, right + 0.5
    return Scale(left, right, LEFT, WIDTH - RIGHT), Scale(low, high, HEIGHT - BOTTOM, TOP, log)


def _axes(x_scale: Scale, y_scale: Scale, x_label: str, x_ticks: bool = True) -> str:
    parts = []
    for tick in y_scale.ticks():
        y = y_scale(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick, 3)}</text>'
        )
    if x_ticks:
        whole = [tick for tick in x_scale.ticks() if abs(tick - round(tick)) < 1e-9]
        for tick in whole:
            parts.append(
                f'<text x="{x_scale(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>'
            )
        bottom = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def _curve(one: Series, x_scale: Scale, y_scale: Scale) -> str:
    runs: list[list[tuple[float, float, float]]] = [[]]
    spread = one.spread or [0.0] * len(one.x)
    for x, y, s in zip(one.x, one.y, spread, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y, s if math.isfinite(s) else 0.0))
        else:
            runs.append([])
    parts, style = [], "faint" if one.faint else "line"
    for run in filter(None, runs):
        points = [(x_scale(x), y_scale(y)) for x, y, _ in run]
        if one.spread is not None:
            upper = [(x_scale(x), y_scale(y + s)) for x, y, s in run]
            lower = [(x_scale(x), y_scale(y - s)) for x, y, s in reversed(run)]
            parts.append(f'<polygon class="band c{one.colour}" points="{_points(upper + lower)}"/>')
        if len(points) > 1:
            parts.append(f'<polyline class="{style} c{one.colour}" points="{_points(points)}"/>')
        if len(one.x) <= MAX_MARKS:
            radius = 3 if len(points) == 1 else 6
            kind = "dot" if len(points) == 1 else "hover"
            for (x, y), (at, value, _) in zip(points, run, strict=True):
                hover = escape(f"{one.label}: {number(value)} at {number(at)}")
                parts.append(
                    f'<circle class="{kind} c{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                    f"<title>{hover}</title></circle>"
                )
    return "".join(parts)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _legend(entries: Sequence[tuple[str, int]]) -> str:
    if len(entries) < 2:
        return ""
    keys = "".join(f'<span><i class="c{colour}"></i>{escape(label)}</span>' for label, colour in entries)
    return f'<div class="legend">{keys}</div>'


def _svg(content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" preserveAspectRatio="xMidYMid meet">{content}</svg>'
