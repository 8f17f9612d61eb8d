"""Laws of every schedule: where there is noise, how much, in which order, and what a step does to the moments."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import (
    CEILINGS,
    SAGE_CLAMP,
    SDE_TYPES,
    StepCoefficients,
    is_normalized,
    step_coefficients,
    step_mean,
    step_sample,
)

REVERSE_SDES = ("dance_grpo", "flow_grpo", "sage_grpo")
M, S = 1.3, 0.6  # the data of the moment tests: N(M, S^2)
DRAWS = 200_000

etas = st.floats(0.01, 1.0)


@st.composite
def schedules(draw) -> torch.Tensor:
    """Shifted schedules of 1 to 80 steps, shift 0.02 to 50; some start below sigma = 1, some end above 0."""
    sigmas = shifted_sigmas(draw(st.integers(1, 80)), draw(st.floats(0.02, 50)))
    first = draw(st.sampled_from([0, 0, 1])) if len(sigmas) > 2 else 0
    last = draw(st.sampled_from([0, 0, 1])) if len(sigmas) > 3 else 0
    return sigmas[first : len(sigmas) - last]


@st.composite
def even_schedules(draw) -> torch.Tensor:
    """2 to 60 steps of one width within [0, 1], both ends included now and then."""
    top, bottom = draw(st.sampled_from([1.0, 0.99, 0.6])), draw(st.sampled_from([0.0, 0.01, 0.3]))
    return torch.linspace(top, bottom, draw(st.integers(3, 61)), dtype=torch.float64)


def _variance(sde_type: str, sigmas, eta: float) -> torch.Tensor:
    return step_coefficients(sde_type, sigmas, eta).std.square()


@given(st.sampled_from(SDE_TYPES), st.sampled_from(CEILINGS), schedules(), st.floats(0, 1))
def test_variance_is_finite_and_not_negative_for_every_sampler_and_ceiling(sde_type, ceiling, sigmas, eta):
    coefficients = step_coefficients(sde_type, sigmas, eta, ceiling)
    assert all(values.isfinite().all() and values.shape == (len(sigmas) - 1,) for values in coefficients)
    assert (coefficients.std >= 0).all()
    assert (coefficients.velocity < 0).all()  # v points to noise, every step to data
    assert coefficients.trained_steps() == [i for i in range(len(sigmas) - 1) if coefficients.std[i] > 0]


@given(st.sampled_from(["dance_grpo", "flow_grpo"]), st.sampled_from(CEILINGS), schedules(), etas)
def test_dance_and_flow_have_noise_on_every_step(sde_type, ceiling, sigmas, eta):
    assert (step_coefficients(sde_type, sigmas, eta, ceiling).std > 0).all()


@given(schedules(), etas)
def test_sage_has_noise_unless_the_step_ends_within_the_clamp(sigmas, eta):
    """ln((1-s')/c) > s - s' is 1 - s' > c exp(s - s'): c itself but for the step's width."""
    std = step_coefficients("sage_grpo", sigmas, eta).std
    assert (std[sigmas[1:] < 1 - SAGE_CLAMP - 1e-5] > 0).all()
    for i, (start, end) in enumerate(zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False)):
        if start > 1 - SAGE_CLAMP:
            left, right = 1 - end, SAGE_CLAMP * math.exp(start - end)
            assert abs(left - right) < 1e-12 or bool(std[i] > 0) is (left > right)
        else:
            assert std[i] > 0


@given(schedules(), etas)
def test_cps_has_noise_on_every_step_but_one_that_ends_at_zero(sigmas, eta):
    assert torch.equal(step_coefficients("cps", sigmas, eta).std > 0, sigmas[1:] > 0)


@given(st.sampled_from(REVERSE_SDES), st.sampled_from(CEILINGS), schedules(), etas, st.floats(0.01, 5))
def test_variance_scales_as_eta_squared(sde_type, ceiling, sigmas, eta, factor):
    once, scaled = (step_coefficients(sde_type, sigmas, e, ceiling).std for e in (eta, factor * eta))
    torch.testing.assert_close(scaled.square(), factor**2 * once.square(), rtol=1e-12, atol=0)


@given(schedules(), etas)
def test_cps_redraws_the_same_share_of_the_noise_at_every_step(sigmas, eta):
    """With data at 0, x = sigma eps and v = eps, so x' = (a sigma + b) eps + std z: both parts make up sigma'^2."""
    coefficients = step_coefficients("cps", sigmas, eta)
    kept = coefficients.sample * sigmas[:-1] + coefficients.velocity
    torch.testing.assert_close(kept.square() + coefficients.std.square(), sigmas[1:].square(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(coefficients.std, math.sin(eta * math.pi / 2) * sigmas[1:], rtol=1e-12, atol=0)


@given(schedules(), etas)
def test_cps_unnormalized_has_the_coefficients_of_cps(sigmas, eta):
    ours, theirs = step_coefficients("cps_unnormalized", sigmas, eta), step_coefficients("cps", sigmas, eta)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_only_cps_unnormalized_lacks_its_constants():
    assert [sde_type for sde_type in SDE_TYPES if not is_normalized(sde_type)] == ["cps_unnormalized"]


@given(schedules(), etas)
def test_cps_noise_falls_along_the_schedule(sigmas, eta):
    assert (step_coefficients("cps", sigmas, eta).std.diff() < 0).all()


@given(even_schedules(), etas)
def test_over_steps_of_one_width_flow_noise_grows_with_sigma_and_dance_noise_is_constant(sigmas, eta):
    """sigma = 1 included: 1/(1 - sigma_1) is above sigma_1/(1 - sigma_1)."""
    assert (_variance("flow_grpo", sigmas, eta).diff() < 0).all()
    dance = _variance("dance_grpo", sigmas, eta)
    torch.testing.assert_close(dance, dance[:1].expand_as(dance), rtol=1e-9, atol=0)


@given(even_schedules(), etas)
def test_over_steps_of_one_width_sage_noise_grows_with_sigma_below_the_clamp(sigmas, eta):
    free = sigmas[:-1] <= 1 - SAGE_CLAMP
    assert (_variance("sage_grpo", sigmas, eta)[free].diff() < 0).all()


def test_a_clamped_sage_step_is_the_largest_only_if_wider_than_twice_the_clamp():
    """Even steps from 1: ln(d/c) - d against ln(2) - d, so the order of the first two turns at d = 2c."""
    for width, largest in ((2.1 * SAGE_CLAMP, True), (1.9 * SAGE_CLAMP, False)):
        variance = _variance("sage_grpo", [1.0, 1 - width, 1 - 2 * width], 0.5)
        assert bool(variance[0] > variance[1]) is largest


@given(st.integers(2, 60), st.floats(0.02, 50), etas)
def test_dance_noise_grows_along_a_schedule_shifted_towards_noise(steps, shift, eta):
    """It follows the width of the steps, which a shift above 1 moves to the end and one below 1 to the start."""
    widening = _variance("dance_grpo", shifted_sigmas(steps, shift), eta).diff()
    assert (widening > 0).all() if shift > 1.01 else (widening < 0).all() if shift < 0.99 else True


@given(schedules(), etas)
def test_sage_variance_lies_between_the_rectangles_of_its_step(sigmas, eta):
    start, end = sigmas[:-1], sigmas[1:]
    free = start <= 1 - SAGE_CLAMP
    variance, step = _variance("sage_grpo", sigmas, eta), start - end
    assert (variance < _variance("flow_grpo", sigmas, eta))[free].all()
    assert (variance > eta**2 * end / (1 - end) * step)[free].all()


@given(st.just(1.0) | st.floats(0.01, 1.0), st.floats(0.05, 0.95), st.floats(0.0, 0.9), etas)
def test_exact_integrals_add_up_over_a_split_step_and_flow_rectangles_do_not(start, share, bottom, eta):
    """Any split whose middle is below the clamp, of the singular first step too; the left rectangle shrinks."""
    end = bottom * start
    middle = end + share * (start - end)
    if middle > 1 - 2 * SAGE_CLAMP:
        return
    for sde_type in ("sage_grpo", "dance_grpo"):
        whole, parts = (
            _variance(sde_type, levels, eta).sum().item() for levels in ([start, end], [start, middle, end])
        )
        assert parts == pytest.approx(whole, rel=1e-9, abs=1e-16)
    whole, parts = (_variance("flow_grpo", levels, eta).sum().item() for levels in ([start, end], [start, middle, end]))
    if start < 1:
        assert parts < whole
    else:  # sigma = 1 is replaced by the level after it, so the smaller step stops nearer to the pole
        assert parts > whole


# Moments of one step with the exact velocity of Gaussian data.


def marginal(sigma: float) -> tuple[float, float]:
    """Mean and variance of x_sigma = (1-sigma) x0 + sigma eps."""
    return (1 - sigma) * M, ((1 - sigma) * S) ** 2 + sigma**2


def exact_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[eps - x0 | x]."""
    mean, variance = marginal(sigma)
    return (sigma - (1 - sigma) * S**2) / variance * (x - mean) - M


def _closed_variance(sde_type: str, start: float, end: float, noise: float) -> float:
    """Variance after a step from the marginal at ``start``; ``noise`` is the variance that the step adds.

    Reverse SDEs: x' = x - d v + noise/2 score + z with score = -(x - mean)/variance. cps: (1-s') x0_hat + r eps_hat + z
    with the posterior means of x0 and eps. Both are linear in x.
    """
    _, variance = marginal(start)
    if sde_type.startswith("cps"):
        kept = math.sqrt(max(end**2 - noise, 0.0))
        slope = (1 - end) * (1 - start) * S**2 / variance + kept * start / variance
    else:
        slope = 1 - (start - end) * (start - (1 - start) * S**2) / variance - noise / 2 / variance
    return slope**2 * variance + noise


def closed_moments(sde_type: str, start: float, end: float, std: float) -> tuple[float, float]:
    """Every sampler keeps the mean exactly: the score has mean 0, E[x0_hat] = m, E[eps_hat] = 0."""
    return marginal(end)[0], _closed_variance(sde_type, start, end, std**2)


def propagate(coefficients: StepCoefficients, i: int, sigma: float) -> tuple[float, float]:
    """Mean and variance after step i from the marginal at ``sigma``, by (a, b, std) alone."""
    a, b, std = coefficients.step(i)
    mean, variance = marginal(sigma)
    slope = (sigma - (1 - sigma) * S**2) / variance
    return a * mean - b * M, (a + b * slope) ** 2 * variance + std**2


@given(st.sampled_from(SDE_TYPES), schedules(), etas)
def test_a_step_has_the_closed_moments(sde_type, sigmas, eta):
    coefficients = step_coefficients(sde_type, sigmas, eta)
    levels = sigmas.tolist()
    for i, (start, end) in enumerate(zip(levels, levels[1:], strict=False)):
        expected = closed_moments(sde_type, start, end, coefficients.std[i].item())
        assert propagate(coefficients, i, start) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_simulated_steps_have_the_closed_moments(sde_type):
    """First, middle and last step by 200k draws, to five standard errors of mean and variance."""
    sigmas = shifted_sigmas(6, 3.0)
    coefficients = step_coefficients(sde_type, sigmas, 0.8)
    generator = torch.Generator().manual_seed(0)
    for i in (0, 3, 5):
        start, end = sigmas[i].item(), sigmas[i + 1].item()
        a, b, std = coefficients.step(i)
        x, z = torch.randn(2, DRAWS, dtype=torch.float64, generator=generator)
        x = marginal(start)[0] + math.sqrt(marginal(start)[1]) * x
        x_next = step_sample(step_mean(x, exact_velocity(x, start), a, b), std, z)
        mean, variance = closed_moments(sde_type, start, end, std)
        assert x_next.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / DRAWS))
        assert x_next.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / DRAWS))
