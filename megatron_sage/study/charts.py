"""The charts of study.html: cells with their intervals, and curves over iterations by question."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_sage.reporting.figures import Scale, Series, line_chart, number, running_mean, signed
from megatron_sage.study.claims import NAMES
from megatron_sage.study.statistics import MIN_SEEDS, CurveRow, Interval, RunRow, cell_interval, t_interval
from megatron_sage.study.tables import sampler_name

WIDTH, ROW, TOP, BOTTOM, RIGHT = 560, 20, 6, 36, 12
LETTER, LONGEST = 6.6, 30  # pixels a letter of the labels; a longer name is cut and whole in the hover text
COLOURS = {f"{short}_grpo" if short != "cps" else short: place for place, short in enumerate(NAMES)}
SMOOTHED = ("reward_mean", "reward_std")


@dataclass(frozen=True)
class Chart:
    """Curves of one column of curves.csv, one for each (label, cell)."""

    title: str
    column: str
    cells: tuple[tuple[str, str], ...]
    note: str = ""


_KL = (
    *((kl, f"b_sage_{kl}") for kl in ("none", "fixed", "step", "moving", "dual")),
    ("dual, fixed position", "b_sage_dual_fixed"),
)
# none and step measure no KL against a position: curves.csv has 0 for them, which is no finding
_POSITION = tuple((label, cell) for label, cell in _KL if label not in ("none", "step"))
_SCHEDULES = (
    ("two_stage", "b_sage_dual"),
    ("fixed", "b_sage_dual_lambda_fixed"),
    ("milder", "b_sage_dual_lambda_milder"),
    ("two_stage, tighten", "b_sage_dual_lambda_tighten"),
)
QUESTIONS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "With and without the equalizer",
        tuple(
            Chart(
                f"{name}: training reward (B, no KL)",
                "reward_mean",
                (("with", f"b_{short}_none"), ("without", f"b_{short}_none_no_equalizer")),
            )
            for short, name in NAMES.items()
        ),
    ),
    (
        "Samplers",
        tuple(
            Chart(
                f"Training reward (setting {setting.upper()}, no KL)",
                "reward_mean",
                tuple((name, f"{setting}_{short}_none") for short, name in NAMES.items()),
                "the videos hold each sampler's own noise: compare the rise, not the level",
            )
            for setting in "ab"
        ),
    ),
    (
        "Trust regions of SAGE (B)",
        (
            Chart("Training reward, mean", "reward_mean", _KL),
            Chart("Training reward, standard deviation over an iteration's videos", "reward_std", _KL),
            Chart(
                "KL against the strategy's own reference",
                "kl_position",
                _POSITION,
                "fixed: from the model as it was given; else from the anchor, no distance from the start",
            ),
        ),
    ),
    (
        "λ schedules of SAGE with dual KL (B)",
        (
            Chart("λ, weight of the KL", "lambda_", _SCHEDULES),
            Chart("Training reward, mean", "reward_mean", _SCHEDULES),
        ),
    ),
)


def forest(rows: Sequence[RunRow], measure: str) -> str:
    """An SVG of one line a cell: the mean change and its 95 % interval, the colour by sampler, from top to bottom.

    A heading stands over each setting's cells: their rewards are not comparable.
    """
    ordered = sorted(rows, key=lambda row: (row.setting, row.cell))
    cells = {row.cell: row.sampler for row in ordered}
    settings = {row.cell: row.setting for row in ordered}
    found = {cell: cell_interval(rows, cell, measure) for cell in cells}
    scale = _forest_scale(list(found.values()), LETTER * min(max(map(len, cells)), LONGEST) + 14)
    if scale is None:
        return '<p class="empty">no finite result in this study</p>'
    bottom = TOP + ROW * (len(cells) + len(set(settings.values())))
    parts = []
    for tick in scale.ticks():
        x = f"{scale(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>'
            f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{number(tick, 3)}</text>'
        )
    zero = f"{scale(0):.1f}"
    parts.append(f'<line class="axis" x1="{zero}" x2="{zero}" y1="{TOP}" y2="{bottom}"/>')
    y, heading = TOP - ROW / 2, ""
    for cell, sampler in cells.items():
        if settings[cell] != heading:
            heading, y = settings[cell], y + ROW
            parts.append(f'<text class="label" x="0" y="{y + 4:.1f}">setting {escape(heading)}</text>')
        y += ROW
        parts.append(_forest_row(cell, found[cell], scale, y, COLOURS.get(sampler, 4)))
    label = escape(f"change of {measure}, after − before")
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{bottom + BOTTOM - 4}" text-anchor="end">{label}</text>')
    samplers = list(dict.fromkeys(cells.values()))
    keys = "".join(
        f'<span><i class="c{COLOURS.get(one, 4)}"></i>{escape(sampler_name(one))}</span>' for one in samplers
    )
    return (
        f'<div class="legend">{keys}</div><svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(parts)}</svg>'
    )


def _forest_scale(intervals: Sequence[Interval], left: float) -> Scale | None:
    """Holds zero, every mean and every interval of MIN_SEEDS or more: a wider one would hide all others."""
    values = [0.0]
    for one in intervals:
        if math.isfinite(one.mean):
            values += [one.low, one.high] if one.n >= MIN_SEEDS else [one.mean]
    if len(values) == 1:
        return None
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 1.0
    return Scale(low - pad, high + pad, left, WIDTH - RIGHT)


def _forest_row(cell: str, interval: Interval, scale: Scale, y: float, colour: int) -> str:
    name = cell if len(cell) <= LONGEST else cell[: LONGEST - 1] + "…"
    hover = escape(f"{cell}: {signed(interval.mean)} ± {number(interval.half, 2)}, runs: {interval.n}")
    parts = [f'<text x="{scale.start - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>']
    if math.isfinite(interval.half):
        low, high = (scale(min(max(value, scale.low), scale.high)) for value in (interval.low, interval.high))
        parts.append(f'<line class="line c{colour}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if math.isfinite(interval.mean):
        parts.append(f'<circle class="dot c{colour}" cx="{scale(interval.mean):.1f}" cy="{y:.1f}" r="4"/>')
    else:
        parts.append(f'<text x="{scale(0) + 8:.1f}" y="{y + 4:.1f}">no finite result</text>')
    return f"<g><title>{hover}</title>{''.join(parts)}</g>"


def by_iteration(
    rows: Sequence[RunRow], curves: Sequence[CurveRow], cell: str, column: str, smooth: bool = False
) -> dict[int, Interval]:
    """The 95 % t-interval of a column over a cell's finished runs, for each iteration; values not finite are left out.

    Smoothed: first within each run, by smoothing_window of its iterations.
    """
    runs: dict[int, dict[int, float]] = {row.seed: {} for row in rows if row.cell == cell}
    for one in curves:
        if one.cell == cell and one.seed in runs:
            runs[one.seed][one.iteration] = getattr(one, column)  # of an iteration that was run twice, the last
    for points in runs.values():
        order = sorted(points)
        window = smoothing_window(len(order)) if smooth else 1
        values = running_mean([points[iteration] for iteration in order], window)
        points.update(zip(order, values, strict=True))
    found = {}
    for iteration in sorted({iteration for points in runs.values() for iteration in points}):
        here = [points.get(iteration, math.nan) for points in runs.values()]
        found[iteration] = t_interval([value for value in here if math.isfinite(value)])
    return found


def smoothing_window(iterations: int) -> int:
    """Iterations in the running mean of a run's reward: about a fifteenth; 1 (none) below 30."""
    return max(1, iterations // 15)


def curve(
    rows: Sequence[RunRow], curves: Sequence[CurveRow], cell: str, column: str
) -> tuple[list[int], list[float], list[float], int]:
    """Iterations, mean over the finished seeds, half-width of its 95 % t-interval, and the number of seeds.

    The half-width is NaN (no band) where fewer than MIN_SEEDS seeds have a finite value. Columns of SMOOTHED are
    smoothed.
    """
    found = by_iteration(rows, curves, cell, column, smooth=column in SMOOTHED)
    halves = [one.half if one.n >= MIN_SEEDS else math.nan for one in found.values()]
    seeds = {one.seed for one in curves if one.cell == cell} & {row.seed for row in rows if row.cell == cell}
    return list(found), [one.mean for one in found.values()], halves, len(seeds)


def curve_sections(rows: Sequence[RunRow], curves: Sequence[CurveRow]) -> str:
    """The charts of QUESTIONS whose cells the study has; a question without any is left out."""
    sections = []
    for question, charts in QUESTIONS:
        cards = "".join(_card(rows, curves, chart) for chart in charts)
        if cards:
            sections.append(f'<h2>{escape(question)}</h2><div class="grid">{cards}</div>')
    return "".join(sections)


def _card(rows: Sequence[RunRow], curves: Sequence[CurveRow], chart: Chart) -> str:
    series, seeds = [], []
    for colour, (label, cell) in enumerate(chart.cells):
        x, mean, half, count = curve(rows, curves, cell, chart.column)
        if any(math.isfinite(value) for value in mean):
            series.append(Series(label, x, mean, colour, half))
            seeds.append(count)
    if not series:
        return ""
    several = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    only = f"{series[0].label}; " if len(series) == 1 else ""  # a single curve has no legend
    note = f"{chart.note}; " if chart.note else ""
    text = escape(f"{only}{note}seeds: {several}")
    return f'<div class="card chart"><h3>{escape(chart.title)}</h3><p class="note">{text}</p>{line_chart(series)}</div>'
