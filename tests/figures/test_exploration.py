"""The exact flow of a mixture, and what the samplers make of it."""

import math

import pytest
import torch
from scipy.stats import norm, wasserstein_distance

from megatron_sage.figures import exploration as figure
from megatron_sage.figures.exploration import DATA, HEADER, measurements, sample
from megatron_sage.figures.mixture import Mixture, normal_quantiles, wasserstein
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import step_coefficients


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.7, 0.99, 1.0])
def test_velocity_is_the_score_of_the_density(sigma):
    """s = -(x + (1-sigma) v) / sigma, with s by autograd from the density: another formula than the velocity's."""
    x = torch.linspace(-4, 4, 81, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(DATA.log_density(x, sigma).sum(), x)
    with torch.no_grad():
        v = DATA.velocity(x, sigma)
        torch.testing.assert_close(-(x + (1 - sigma) * v) / sigma, score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0])
def test_density_is_the_mixtures(sigma):
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    density = DATA.log_density(x, sigma).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-6)
    components = zip(DATA.weights, DATA.means, DATA.stds, strict=True)
    scales = [(w, (1 - sigma) * m, math.hypot((1 - sigma) * s, sigma)) for w, m, s in components]
    expected = sum(w * norm.pdf(x.numpy(), m, s) for w, m, s in scales)
    torch.testing.assert_close(density, torch.as_tensor(expected), rtol=1e-9, atol=1e-12)


def test_velocity_of_one_gaussian():
    """x0 ~ N(m, s^2): E[x0|x] is linear regression."""
    data, sigma, x = Mixture((1.0,), (2.0,), (0.5,)), 0.25, torch.tensor([-1.0, 0.0, 3.0], dtype=torch.float64)
    slope = 0.75 * 0.25 / (0.75**2 * 0.25 + 0.25**2)
    expected = (x - (2 + slope * (x - 1.5))) / 0.25
    torch.testing.assert_close(data.velocity(x, sigma), expected)


def test_quantiles_are_those_of_the_data():
    quantiles = DATA.quantiles(1000)
    below = sum(
        w * norm.cdf(quantiles.numpy(), m, s) for w, m, s in zip(DATA.weights, DATA.means, DATA.stds, strict=True)
    )
    torch.testing.assert_close(
        torch.as_tensor(below), (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, atol=1e-5, rtol=0
    )
    single = Mixture((1.0,), (0.0,), (1.0,)).quantiles(999)
    torch.testing.assert_close(single, normal_quantiles(999), atol=1e-5, rtol=0)


def test_distance_is_scipys():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = wasserstein_distance(x.numpy(), y.numpy())
    assert wasserstein(x, y.sort().values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("sde_type", "eta"), [("ode", 0.0), ("dance_grpo", 0.5), ("flow_grpo", 0.5), ("sage_grpo", 0.5), ("cps", 0.1)]
)
def test_with_many_steps_every_sampler_reaches_the_data(sde_type, eta):
    """So a distance at few steps is discretisation, not a wrong coefficient."""
    sigmas, count = shifted_sigmas(1000, 5.0), 5000
    found = sample(DATA, sigmas, step_coefficients(sde_type, sigmas, eta), count, seed=0)
    assert wasserstein(found, DATA.quantiles(count)) < 0.04  # draws from the data: 0.02; an error of 5 % in a: 0.1


def test_cps_that_redraws_all_noise_stays_away_from_the_data():
    """Each step puts the posterior's mean in the place of a draw from it; finer steps only do so more often."""
    sigmas, count = shifted_sigmas(500, 5.0), 5000
    found = sample(DATA, sigmas, step_coefficients("cps", sigmas, 1.0), count, seed=0)
    assert wasserstein(found, DATA.quantiles(count)) > 0.1
    assert found[found < -0.6].std() < 0.85 * DATA.stds[0]


def test_measurements():
    rows = [dict(zip(HEADER, row, strict=True)) for row in measurements(samples=4000, seeds=(0, 1), etas=(0.5, 1.0))]
    assert len(rows) == 3 * 4 * 2
    by_key = {(row["sampler"], row["eta"], row["steps"]): row for row in rows}
    dance = by_key["dance_grpo", 0.5, 20]
    assert dance["injected_variance"] == pytest.approx(0.25)  # eta^2 times the whole way
    assert dance["last_std"] == pytest.approx(0.5 * math.sqrt(5 / 24))  # sigma_19 = 5/24
    assert by_key["cps", 0.5, 20]["last_std"] == 0
    for row in rows:
        assert row["w1"] > row["w1_exact"] > 0 and row["w1_ode"] > 0 and row["w1_std"] > 0
    assert by_key["dance_grpo", 1.0, 20]["w1"] > 2 * by_key["sage_grpo", 1.0, 20]["w1"]


def test_the_figure_draws_them(tmp_path, monkeypatch):
    rows = measurements(samples=200, seeds=(0,), etas=(0.5, 1.0))
    monkeypatch.setattr(figure, "measurements", lambda: rows)
    paths = figure.exploration(tmp_path)
    assert [path.name for path in paths] == ["exploration.csv", "exploration.png"]
    assert len(paths[0].read_text().splitlines()) == 1 + len(rows)
