"""Charts: numbers for people, ticks, gaps and scales."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.reporting.figures import (
    HEIGHT,
    WIDTH,
    Series,
    change_bars,
    line_chart,
    nice_ticks,
    number,
    running_mean,
    signed,
    stacked_bars,
)

NAN = math.nan


def svg(chart: str) -> ElementTree.Element:
    """The chart's SVG, parsed as XML; every coordinate must be a number inside the picture."""
    root = ElementTree.fromstring(chart[chart.index("<svg") :])
    for element in root:
        for key, value in element.attrib.items():
            if key in ("x", "x1", "x2", "cx"):
                assert -0.1 <= float(value) <= WIDTH + 0.1
            if key in ("y", "y1", "y2", "cy"):
                assert -0.1 <= float(value) <= HEIGHT + 0.1
            if key == "points":
                assert all(math.isfinite(float(part)) for part in re.split("[ ,]", value))
    return root


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (12.3456, "12.35"),
        (-0.5, "−0.5"),
        (1e-7, "1e−7"),
        (-2.345e-5, "−2.35e−5"),
        (3e9, "3e9"),
        (123456.0, "123456"),
        (NAN, "–"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_number_keeps_zeros_in_columns() -> None:
    assert number(0.5, 3, strip=False) == "0.500" and signed(0.25) == "+0.25" and signed(-0.25) == "−0.25"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-3 * span <= tick <= low + span * 1.001 for tick in ticks)


@given(
    st.lists(st.one_of(st.floats(-1e9, 1e9), st.sampled_from([NAN, math.inf, 0.0, 1e-12])), min_size=1, max_size=30),
    st.booleans(),
)
def test_any_curve_is_drawn_inside_its_picture(values: list[float], spread: bool) -> None:
    x = list(range(len(values)))
    band = [abs(value) for value in values] if spread else None
    chart = line_chart([Series("a", x, values, spread=band)])
    if any(map(math.isfinite, values)):
        svg(chart)
    else:
        assert "not recorded" in chart


def test_a_gap_splits_the_curve() -> None:
    root = svg(line_chart([Series("a", range(7), [1, 2, NAN, 3, 4, NAN, 5])]))
    assert len([e for e in root if e.tag.endswith("polyline")]) == 2
    assert len([e for e in root if e.get("class", "").startswith("dot")]) == 1  # a single point between gaps is seen


def test_wide_positive_ranges_get_a_log_axis_with_decades() -> None:
    text = line_chart([Series("a", range(3), [1e-7, 1e-5, 1e-3])])
    assert all(f">{label}<" in text for label in ("1e−7", "1e−5", "0.001"))
    heights = [float(e.get("cy")) for e in svg(text) if e.tag.endswith("circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_legend_and_hover_text_are_escaped() -> None:
    text = line_chart([Series("<a>", [0], [1.0]), Series("b&c", [0], [2.0])])
    assert "&lt;a&gt;" in text and "b&amp;c" in text and "<a>" not in text


def test_stacked_bars_add_up_and_average_long_runs() -> None:
    root = svg(stacked_bars(range(1000), [("one", [1.0] * 1000), ("two", [NAN, 3.0] * 500)]))
    bars = [float(e.get("height")) for e in root if e.tag.endswith("rect")]
    assert len(bars) == 240
    assert sum(bars[1::2]) == pytest.approx(1.5 * sum(bars[0::2]), rel=0.02)


def test_changes_are_sorted_and_coloured_by_sign() -> None:
    root = svg(change_bars([("a", -0.5), ("b", 1.0), ("c", NAN), ("d", 0.2)]))
    bars = [e for e in root if e.tag.endswith("rect")]
    assert [bar.get("class") for bar in bars] == ["up", "up", "down"]
    assert float(bars[0].get("height")) == pytest.approx(2 * float(bars[2].get("height")), rel=0.01)


@pytest.mark.parametrize(
    "chart", [line_chart([]), stacked_bars([], []), stacked_bars([0], [("a", [NAN])]), change_bars([])]
)
def test_nothing_to_draw_is_said(chart: str) -> None:
    assert "not recorded" in chart


def test_running_mean_leaves_nan_out() -> None:
    assert running_mean([1.0, NAN, 3.0, 5.0], 3) == [1.0, 2.0, 4.0, 4.0]
    assert math.isnan(running_mean([NAN], 3)[0])
