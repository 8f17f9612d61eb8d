"""Coefficients against check values, numerical integrals, the autograd score and exact moments of a Gaussian case."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import SDE_TYPES, step_coefficients

REVERSE_SDES = ("dance_grpo", "flow_grpo", "sage_grpo")
CLAMP = 3e-3


@pytest.mark.parametrize(
    ("sde_type", "first_std"),
    [
        ("dance_grpo", 0.05103104),
        ("flow_grpo", 0.5),
        ("cps", 0.98958333 * math.sqrt(0.5)),
        ("sage_grpo", 0.55551286),
        ("ode", 0.0),
    ],
)
def test_known_first_std(sde_type, first_std):
    coefficients = step_coefficients(sde_type, shifted_sigmas(20, 5.0), 0.5)
    assert coefficients.std[0].item() == pytest.approx(first_std, abs=1e-8)
    for values in coefficients:
        assert values.dtype == torch.float64 and values.shape == (20,)


@pytest.mark.parametrize(("steps", "shift", "eta"), [(20, 5.0, 0.5), (13, 1.0, 0.7), (8, 3.0, 1.0), (30, 0.3, 0.2)])
def test_sage_variance_is_the_integral_of_the_diffusion(steps, shift, eta):
    sigmas = shifted_sigmas(steps, shift).tolist()
    std = step_coefficients("sage_grpo", sigmas, eta).std
    for i in range(1, steps):
        integral, _ = quad(lambda s: eta**2 * s / (1 - s), sigmas[i + 1], sigmas[i], epsabs=1e-13)
        assert std[i].item() ** 2 == pytest.approx(integral, rel=1e-9, abs=1e-14)
    # First step, sigma = 1: sigma/(1-sigma) = 1/(1-sigma) - 1, of which only the singular part stops at 1 - c.
    singular, _ = quad(lambda s: 1 / (1 - s), sigmas[1], 1 - CLAMP, epsabs=1e-13)
    assert std[0].item() ** 2 == pytest.approx(eta**2 * (singular - (1 - sigmas[1])), rel=1e-9)


def test_dance_variance_is_the_integral_of_eta_squared():
    sigmas = shifted_sigmas(11, 4.0).tolist()
    std = step_coefficients("dance_grpo", sigmas, 0.6).std
    for i in range(11):
        integral, _ = quad(lambda s: 0.6**2, sigmas[i + 1], sigmas[i])
        assert std[i].item() ** 2 == pytest.approx(integral, rel=1e-12)


def test_flow_variance_is_the_first_order_rule_of_the_same_integral():
    """Left rectangle: above the integral of an increasing rate; halving the steps halves the total excess."""
    excess = []
    for steps in (200, 400):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        total = step_coefficients("flow_grpo", sigmas, 0.5).std.square().sum().item()
        integral, _ = quad(lambda s: 0.25 * s / (1 - s), 0.1, 0.9)
        excess.append(total - integral)
    assert 0 < excess[1] < excess[0]
    assert excess[0] / excess[1] == pytest.approx(2.0, rel=0.02)


def test_flow_first_step_divides_by_one_minus_sigma_1():
    for steps, shift in ((20, 5.0), (10, 1.0), (1, 2.0)):
        sigmas = shifted_sigmas(steps, shift)
        std = step_coefficients("flow_grpo", sigmas, 0.3).std
        assert std[0].item() ** 2 == pytest.approx(0.09 / (1 - sigmas[1].item()) * (1 - sigmas[1].item()), rel=1e-12)
    started_later = step_coefficients("flow_grpo", [0.9, 0.5], 0.3)
    assert started_later.std[0].item() ** 2 == pytest.approx(0.09 * 0.9 / 0.1 * 0.4, rel=1e-12)


@pytest.mark.parametrize(("steps", "shift"), [(40, 9.0), (50, 9.0), (400, 5.0)])
def test_sage_steps_without_variance_run_as_ode(steps, shift):
    sigmas = shifted_sigmas(steps, shift)
    sage, ode = step_coefficients("sage_grpo", sigmas, 0.5), step_coefficients("ode", sigmas, 0.5)
    still = sage.std == 0
    assert still[0] and not still[-1]
    assert (sigmas[1:][still] > 1 - 1.01 * CLAMP).all()
    assert torch.equal(sage.sample[still], ode.sample[still]) and torch.equal(sage.velocity[still], ode.velocity[still])
    assert sage.trained_steps() == [i for i in range(steps) if not still[i]]


def test_sage_first_step_is_trained_just_before_its_variance_ends():
    assert step_coefficients("sage_grpo", shifted_sigmas(37, 9.0), 0.5).std[0] > 0
    assert step_coefficients("sage_grpo", shifted_sigmas(38, 9.0), 0.5).std[0] == 0


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_eta_zero_is_the_ode(sde_type):
    sigmas = shifted_sigmas(15, 5.0)
    coefficients = step_coefficients(sde_type, sigmas, 0.0)
    torch.testing.assert_close(coefficients.sample, torch.ones(15, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(coefficients.velocity, sigmas.diff(), rtol=0, atol=1e-15)
    assert (coefficients.std == 0).all() and coefficients.trained_steps() == []


@pytest.mark.parametrize("sde_type", REVERSE_SDES)
def test_mean_is_the_ode_step_plus_half_the_variance_times_the_autograd_score(sde_type):
    """Any velocity is the exact one of some Gaussian data N(m, s^2): v and the score from log p_sigma by autograd."""
    m, s = 0.7, 0.4
    sigmas = shifted_sigmas(12, 3.0)
    coefficients = step_coefficients(sde_type, sigmas, 0.8)
    for i in range(12):
        a, b, std = coefficients.step(i)
        sigma, delta = sigmas[i].item(), (sigmas[i] - sigmas[i + 1]).item()
        x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
        spread = torch.tensor(math.sqrt(((1 - sigma) * s) ** 2 + sigma**2), dtype=torch.float64)
        marginal = torch.distributions.Normal(torch.full_like(spread, (1 - sigma) * m), spread)
        (score,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
        velocity = _exact_velocity(x.detach(), sigma, m, s)
        expected = x.detach() - delta * velocity + std**2 / 2 * score
        torch.testing.assert_close(a * x.detach() + b * velocity, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_cps_predicts_data_and_noise_and_keeps_the_noise_level(eta):
    sigmas = shifted_sigmas(9, 5.0).tolist()
    coefficients = step_coefficients("cps", sigmas, eta)
    data, noise = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in range(9):
        a, b, std = coefficients.step(i)
        x, velocity = (1 - sigmas[i]) * data + sigmas[i] * noise, noise - data
        mean = a * x + b * velocity
        kept = (mean - (1 - sigmas[i + 1]) * data) / noise
        torch.testing.assert_close(kept, kept[:1].expand(6), rtol=1e-9, atol=1e-12)
        assert kept[0].item() ** 2 + std**2 == pytest.approx(sigmas[i + 1] ** 2, abs=1e-12)
        assert kept[0].item() >= -1e-12
    assert coefficients.std[-1] == 0
    assert coefficients.step(8)[:2] == pytest.approx((1.0, -sigmas[8]))


def _exact_velocity(x: torch.Tensor, sigma: float, m: float, s: float) -> torch.Tensor:
    """E[eps - x0 | x_sigma = x] for x0 ~ N(m, s^2), eps ~ N(0, 1): linear regression of one Gaussian on another."""
    slope, offset = _velocity_line(sigma, m, s)
    return slope * x + offset


def _velocity_line(sigma: float, m: float, s: float) -> tuple[float, float]:
    covariance = sigma - (1 - sigma) * s**2
    variance = (1 - sigma) ** 2 * s**2 + sigma**2
    return covariance / variance, -m - covariance / variance * (1 - sigma) * m


def _moments_at_the_end(sde_type: str, sigmas: torch.Tensor, eta: float, m: float, s: float) -> tuple[float, float]:
    """Mean and variance after all steps, started from the exact marginal: every step is linear, so no sampling."""
    levels, coefficients = sigmas.tolist(), step_coefficients(sde_type, sigmas, eta)
    mean, variance = (1 - levels[0]) * m, ((1 - levels[0]) * s) ** 2 + levels[0] ** 2
    for i in range(len(levels) - 1):
        a, b, std = coefficients.step(i)
        slope, offset = _velocity_line(levels[i], m, s)
        mean, variance = (a + b * slope) * mean + b * offset, (a + b * slope) ** 2 * variance + std**2
    return mean, variance


@pytest.mark.parametrize("sde_type", ["ode", *REVERSE_SDES])
def test_small_steps_keep_the_marginals(sde_type):
    """All the way from sigma 0.95 to data: the mean and variance of N(m, s^2), with an error that falls as 1/N."""
    m, s = 1.3, 0.6
    errors = []
    for steps in (1000, 2000, 4000):
        sigmas = torch.linspace(0.95, 0.0, steps + 1, dtype=torch.float64)
        mean, variance = _moments_at_the_end(sde_type, sigmas, 0.7, m, s)
        errors.append((abs(mean - m), abs(variance - s**2)))
    assert errors[2][0] < 2e-3 and errors[2][1] < 2e-3
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine[0] < 0.55 * coarse[0] + 1e-12 and fine[1] < 0.55 * coarse[1] + 1e-12


def test_small_steps_keep_the_marginals_from_pure_noise():
    for sde_type, tolerance in (("ode", 2e-3), ("dance_grpo", 2e-3), ("sage_grpo", 2e-2)):
        mean, variance = _moments_at_the_end(sde_type, shifted_sigmas(4000, 3.0), 0.5, 1.3, 0.6)
        assert mean == pytest.approx(1.3, abs=tolerance)
        assert variance == pytest.approx(0.36, abs=tolerance)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_cps_is_exact_on_a_single_video(steps):
    """One data point: x0_hat and eps_hat are exact, so the marginal is exact at any number of steps."""
    sigmas = shifted_sigmas(steps + 1, 5.0)[:-1]
    mean, variance = _moments_at_the_end("cps", sigmas, 0.5, 1.3, 0.0)
    assert mean == pytest.approx((1 - sigmas[-1].item()) * 1.3, rel=1e-12)
    assert variance == pytest.approx(sigmas[-1].item() ** 2, rel=1e-12)


@given(st.sampled_from(SDE_TYPES), st.integers(1, 120), st.floats(0.05, 50), st.floats(0, 1))
def test_coefficients_are_finite_and_std_is_not_negative(sde_type, steps, shift, eta):
    sigmas = shifted_sigmas(steps, shift)
    coefficients = step_coefficients(sde_type, sigmas, eta)
    for values in coefficients:
        assert values.shape == (steps,) and values.isfinite().all()
    assert (coefficients.std >= 0).all()
    assert (coefficients.velocity < 0).all()


@given(st.sampled_from(SDE_TYPES), st.integers(1, 50), st.floats(0.5, 12), st.floats(0.01, 0.5))
def test_more_eta_is_more_noise(sde_type, steps, shift, eta):
    sigmas = shifted_sigmas(steps, shift)
    little, much = (step_coefficients(sde_type, sigmas, e).std for e in (eta, 2 * eta))
    assert (much >= little).all()
    if sde_type in REVERSE_SDES:
        torch.testing.assert_close(much, 2 * little, rtol=1e-12, atol=0)


def test_accepts_float32_levels_and_lists():
    reference = step_coefficients("sage_grpo", [1.0, 0.75, 0.5, 0.0], 0.5)
    for sigmas in (torch.tensor([1.0, 0.75, 0.5, 0.0]), torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)):
        for ours, expected in zip(step_coefficients("sage_grpo", sigmas, 0.5), reference, strict=True):
            assert ours.dtype == torch.float64 and torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("sde_type", "eta", "word"),
    [
        ("sage", 0.5, "did you mean 'sage_grpo'"),
        ("flow-grpo", 0.5, "did you mean 'flow_grpo'"),
        ("CPS", 0.5, "Known: ode, dance_grpo"),
        (None, 0.5, "sde_type is None"),
        ("sage_grpo", -0.1, "eta is -0.1"),
        ("sage_grpo", float("nan"), "eta is nan"),
        ("cps", 1.2, "eta is 1.2"),
    ],
)
def test_bad_arguments_are_one_line(sde_type, eta, word):
    with pytest.raises(ValueError, match=word) as error:
        step_coefficients(sde_type, shifted_sigmas(5, 5.0), eta)
    assert "\n" not in str(error.value)


def test_bad_levels_are_refused():
    with pytest.raises(ValueError, match="strictly decrease"):
        step_coefficients("ode", [0.0, 1.0], 0.5)
