"""The numbers behind step_std and lambda_schedules."""

import math

import pytest
from scipy.integrate import quad

from megatron_sage.figures.lambda_schedules import (
    LAMBDA_MAX,
    LAMBDA_MIN,
    MILDER_MAX,
    TARGET,
    UPDATES,
    WARMUP,
    controllers,
    kl_series,
)
from megatron_sage.figures.step_std import standard_deviations
from megatron_sage.grpo.schedule import shifted_sigmas


@pytest.fixture(scope="module")
def std():
    rows = standard_deviations()
    table = {(regime, sampler, eta, step): value for regime, sampler, eta, step, _, value in rows}
    assert len(table) == len(rows) == (2 + 2 + 4) * 2 * 20
    return table


def test_the_three_regimes_of_the_first_step(std):
    """N = 20, shift 5: sigma_1 = 95/96, so Delta_0 = 1/96."""
    first = {(regime, sampler): value for (regime, sampler, eta, step), value in std.items() if (eta, step) == (1.0, 0)}
    assert first["sigma_max", "sage_grpo"] == 0  # nothing is left between sigma_1 and sigma_1
    assert first["sigma_max", "flow_grpo"] == pytest.approx(1.0)
    assert first["clamp", "flow_grpo"] == pytest.approx(math.sqrt(1 / 3e-3 / 96), rel=1e-9)  # 1.86
    integral = -1 / 96 + math.log((1 / 96) / 3e-3)
    assert first["clamp", "sage_grpo"] == pytest.approx(math.sqrt(integral), rel=1e-9)  # 1.11
    assert first["default", "flow_grpo"] == first["sigma_max", "flow_grpo"]
    assert first["default", "sage_grpo"] == first["clamp", "sage_grpo"]


def test_later_steps_do_not_depend_on_the_regime(std):
    sigmas = shifted_sigmas(20, 5.0).tolist()
    for sampler in ("flow_grpo", "sage_grpo"):
        for step in range(1, 20):
            found = {std[regime, sampler, 0.5, step] for regime in ("sigma_max", "clamp", "default")}
            assert len(found) == 1
            start, end = sigmas[step], sigmas[step + 1]
            exact = quad(lambda s: s / (1 - s), end, start)[0]
            variance = exact if sampler == "sage_grpo" else start / (1 - start) * (start - end)
            assert found.pop() == pytest.approx(0.5 * math.sqrt(variance), rel=1e-9)


def test_the_kl_rises_above_its_target_and_falls_below():
    series = kl_series()
    assert len(series) == UPDATES
    top = series.index(max(series))
    assert series[0] < TARGET / 10 and max(series) == pytest.approx(3 * TARGET) and series[-1] < TARGET / 2
    assert series[: top + 1] == sorted(series[: top + 1]) and series[top:] == sorted(series[top:], reverse=True)


def test_the_schedules_answer_the_kl_as_they_say():
    series, weights = kl_series(), controllers()
    values = {name: [c.value, *(c.update(kl) for kl in series)] for name, c in weights.items()}
    above = next(i for i, kl in enumerate(series) if kl == max(series))
    assert set(values["fixed"]) == {LAMBDA_MAX}
    assert values["milder"][0] == LAMBDA_MIN and set(values["milder"][WARMUP:]) == {MILDER_MAX}
    for name in ("relax", "tighten"):
        assert values[name][0] == LAMBDA_MIN and values[name][WARMUP] == LAMBDA_MAX
    assert values["relax"][above] < values["relax"][WARMUP] / 10 and values["relax"][-1] > 10 * LAMBDA_MIN
    assert values["tighten"][above] == LAMBDA_MAX and values["tighten"][-1] < LAMBDA_MAX / 10
