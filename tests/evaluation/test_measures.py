"""Intervals against closed forms and simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats

from megatron_sage.evaluation.measures import (
    difference,
    mean,
    measures,
    prompt_means,
    score_arrays,
    wilson,
    win_rate,
)


def test_columns_stand_in_the_papers_order_and_overall_is_its_sum() -> None:
    names = ("PickScore", "TA", "raw", "VQ", "CLIPScore", "MQ")
    found = measures(names, {"VQ": 0.5, "MQ": 0.5, "TA": 1.0})
    assert list(found) == ["Overall", "VQ", "MQ", "TA", "CLIPScore", "PickScore", "raw", "reward"]
    assert found["Overall"] == {"VQ": 1.0, "MQ": 1.0, "TA": 1.0} and found["reward"]["VQ"] == 0.5
    assert "reward" not in measures(names, {"VQ": 1, "MQ": 1, "TA": 1.0, "raw": 0.0})  # the same sum
    other = measures(("a", "b"), {"a": 2.0, "b": -1.0})
    assert other["Overall"] == {"a": 2.0, "b": -1.0} and list(other) == ["Overall", "a", "b"]


def test_scores_become_arrays_and_an_unknown_term_makes_the_sum_unknown() -> None:
    rows = {(0, 0): {"scores": {"a": 1.0, "b": math.nan}}, (1, 1): {"scores": {"a": 2.0, "b": 3.0}}}
    found = score_arrays(rows, {"Overall": {"a": 1.0, "b": 0.0}, "a": {"a": 1.0}}, 2, 2)
    np.testing.assert_array_equal(found["a"], [[1, math.nan], [math.nan, 2]])
    np.testing.assert_array_equal(found["Overall"], [[math.nan, math.nan], [math.nan, 2]])


def test_mean_is_that_of_the_prompts_and_leaves_unknown_samples_out() -> None:
    values = np.array([[1.0, 3.0], [5.0, math.nan], [math.nan, math.nan], [0.0, 0.0]])
    np.testing.assert_array_equal(prompt_means(values), [2, 5, 0])
    found = mean(values)
    assert found.n == 3 and found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 2) * np.std([2, 5, 0], ddof=1) / math.sqrt(3))
    assert math.isnan(mean(values[:1]).half) and math.isnan(mean(values[2:3]).mean)


def test_difference_is_scipys_paired_interval() -> None:
    rng = np.random.default_rng(3)
    base, other = rng.normal(size=(2, 17, 1))
    expected = stats.ttest_rel(other[:, 0], base[:, 0]).confidence_interval()
    found = difference(other, base)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (3, 7), (7, 7), (40, 90)])
def test_wilson_is_scipys_for_wins_and_losses(wins: int, n: int) -> None:
    expected = stats.binomtest(wins, n).proportion_ci(method="wilson")
    found = wilson([1.0] * wins + [0.0] * (n - wins))
    assert (found.rate, found.low, found.high) == pytest.approx((wins / n, expected.low, expected.high))
    assert found.n == n and 0 <= found.low <= found.rate <= found.high <= 1


def test_ties_are_half_wins_and_unknown_videos_do_not_count() -> None:
    base = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, math.nan], [math.nan, 1.0]])
    other = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 5.0], [2.0, math.nan]])
    found = win_rate(other, base)  # shares 0.75, 0.5, 0; the last prompt is unknown
    assert found.rate == pytest.approx(1.25 / 3) and found.n == 3
    back = win_rate(base, other)
    assert (back.rate, back.low, back.high) == pytest.approx((1 - found.rate, 1 - found.high, 1 - found.low))
    assert wilson([]).n == 0 and math.isnan(wilson([]).rate)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 evaluations of 24 prompts, 3 samples that share their prompt's effect; per-video intervals would fail."""
    rng = np.random.default_rng(11)
    prompts, samples, shift, times = 24, 3, 0.3, 400
    truth = stats.norm.cdf(shift / math.sqrt(0.8**2 + 0.5**2))
    held = {"difference": 0, "win rate": 0, "per video": 0}
    for _ in range(times):
        base = rng.normal(size=(prompts, samples))
        effect = shift + 0.8 * rng.normal(size=(prompts, 1)) + 0.5 * rng.normal(size=(prompts, samples))
        interval, rate = difference(base + effect, base), win_rate(base + effect, base)
        naive = wilson((effect > 0).flatten())
        held["difference"] += interval.low <= shift <= interval.high
        held["win rate"] += rate.low <= truth <= rate.high
        held["per video"] += naive.low <= truth <= naive.high
    assert 0.92 <= held["difference"] / times <= 0.98
    assert held["win rate"] / times >= 0.94  # too wide rather than too narrow
    assert held["per video"] / times < 0.90
