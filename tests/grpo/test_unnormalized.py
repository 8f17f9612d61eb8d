"""The log-probability without its constants (cps_unnormalized): value, gradient, its own equalizer, and its KL."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.equalizer import gradient_scales, norm_factors
from megatron_sage.grpo.objective import policy_loss
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import (
    SDE_TYPES,
    log_prob,
    log_prob_from_error,
    squared_error_sum,
    step_coefficients,
    step_mean,
    step_sample,
)
from megatron_sage.grpo.trust_region import gaussian_kl_from_error, step_kl_log_prob

STOCHASTIC = [sde_type for sde_type in SDE_TYPES if sde_type != "ode"]
SHAPE, COUNT = (5, 3, 8), 40  # [S, B, C] and the elements of one sample


def _draws(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _score(x_next: torch.Tensor, mean: torch.Tensor, std: float, normalized: bool) -> torch.Tensor:
    return log_prob_from_error(squared_error_sum(x_next, mean), COUNT, std, normalized)


def test_it_is_minus_the_mean_squared_error_whatever_the_std():
    x, mean = _draws(2)
    expected = -(x - mean).square().mean((0, 2))
    for std in (1e-3, 0.3, 1.0, 7.0):
        torch.testing.assert_close(_score(x, mean, std, False), expected, rtol=1e-12, atol=0)


@given(st.floats(1e-3, 10))
def test_the_constants_put_back_give_the_gaussian(std):
    x, mean = _draws(2)
    constants = -math.log(std) - math.log(2 * math.pi) / 2
    restored = _score(x, mean, std, False) / (2 * std**2) + constants
    torch.testing.assert_close(restored, log_prob(x, mean, std), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_score(x, mean, std, True), log_prob(x, mean, std), rtol=1e-12, atol=1e-12)


def test_both_agree_at_the_std_where_half_the_inverse_variance_is_one():
    """1/(2 std^2) = 1 at std = 1/sqrt(2): the gradients are then the same, which pins the factor 2."""
    std = math.sqrt(0.5)
    gradients = []
    for normalized in (True, False):
        x, mean = _draws(2)
        mean.requires_grad_()
        gradients.append(torch.autograd.grad(_score(x, mean, std, normalized).sum(), mean)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_it_refuses_the_same_arguments():
    with pytest.raises(ValueError, match="std is 0"):
        log_prob_from_error(torch.zeros(2), 4, 0.0, normalized=False)
    with pytest.raises(ValueError, match="count is 0"):
        log_prob_from_error(torch.zeros(2), 0, 0.1, normalized=False)


@given(
    st.sampled_from(STOCHASTIC),
    st.integers(1, 30),
    st.floats(0.05, 50),
    st.floats(0.05, 1),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_factor_is_the_norm_of_the_gradient(sde_type, steps, shift, eta, normalized, seed):
    """|d logp / dv| = N_i |z| / D, (2 |b| std |z| / D without the constants), in each sample of the batch."""
    coefficients = step_coefficients(sde_type, shifted_sigmas(steps, shift), eta)
    factors = norm_factors(coefficients, normalized)
    x, velocity, z = _draws(3, seed)
    trained = coefficients.trained_steps()
    for i in trained[:: max(1, len(trained) // 3)]:
        a, b, std = coefficients.step(i)
        x_next = step_mean(x, velocity, a, b) + std * z
        v = velocity.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_score(x_next, step_mean(x, v, a, b), std, normalized).sum(), v)
        # x_next - mean has lost the digits of std z below those of x: 1e-16 / std relatively
        expected = factors[i] * z.pow(2).sum((0, 2)).sqrt() / COUNT
        torch.testing.assert_close(gradient.pow(2).sum((0, 2)).sqrt(), expected, rtol=1e-9 + 1e-14 / std, atol=0)


@given(st.sampled_from(STOCHASTIC), st.integers(1, 60), st.floats(0.05, 50), st.floats(0.01, 1), st.booleans())
def test_the_equalizer_of_each_log_prob_makes_its_own_factors_equal(sde_type, steps, shift, eta, normalized):
    coefficients = step_coefficients(sde_type, shifted_sigmas(steps, shift), eta)
    factors, scales = norm_factors(coefficients, normalized), gradient_scales(coefficients, normalized)
    trained = coefficients.std > 0
    assert torch.equal(scales > 0, trained) and torch.equal(factors > 0, trained)
    if trained.any():
        median = factors[trained].sort().values[(int(trained.sum()) - 1) // 2]
        equalized = (scales * factors)[trained]
        torch.testing.assert_close(equalized, median.expand_as(equalized), rtol=1e-9, atol=0)


def test_the_equalizer_of_the_other_log_prob_does_not():
    """What a mismatch would do: factors differ by 2 std^2, so the pull of the steps by (s_1/s_19)^2 = 4.75^2."""
    coefficients = step_coefficients("cps", shifted_sigmas(20, 5.0), 0.5)
    trained = coefficients.trained_steps()
    for normalized in (True, False):
        mismatched = (gradient_scales(coefficients, not normalized) * norm_factors(coefficients, normalized))[trained]
        matched = (gradient_scales(coefficients, normalized) * norm_factors(coefficients, normalized))[trained]
        assert (matched.max() / matched.min()).item() == pytest.approx(1, rel=1e-9)
        assert (mismatched.max() / mismatched.min()).item() == pytest.approx(4.75**2, rel=1e-9)


@given(st.sampled_from(STOCHASTIC), st.integers(1, 40), st.floats(0.05, 50), st.floats(0.01, 1))
def test_the_factors_differ_by_twice_the_variance(sde_type, steps, shift, eta):
    coefficients = step_coefficients(sde_type, shifted_sigmas(steps, shift), eta)
    expected = norm_factors(coefficients) * 2 * coefficients.std.square()
    torch.testing.assert_close(norm_factors(coefficients, normalized=False), expected, rtol=1e-12, atol=0)


def test_ratio_is_one_before_the_first_update_and_then_the_power_two_variances_of_the_true_one():
    """exp(mse_old - mse_new) = (true ratio)^(2 std^2): the clip range means something else at every step."""
    coefficients = step_coefficients("cps_unnormalized", shifted_sigmas(8, 5.0), 0.5)
    x, old_velocity, change, z = _draws(4)
    for i in coefficients.trained_steps():
        a, b, std = coefficients.step(i)
        old_mean = step_mean(x, old_velocity, a, b)
        x_next = step_sample(old_mean, std, z)
        ratios = []
        for normalized in (True, False):
            old = _score(x_next, old_mean, std, normalized)
            again = _score(x_next, step_mean(x, old_velocity, a, b), std, normalized)
            assert (policy_loss(again, old, torch.ones(3), 1e-4).ratio == 1).all()
            new = _score(x_next, step_mean(x, old_velocity + 0.1 * change, a, b), std, normalized)
            ratios.append(policy_loss(new, old, torch.ones(3), 1e-4).ratio)
        torch.testing.assert_close(ratios[1], ratios[0] ** (2 * std**2), rtol=1e-9, atol=0)


def test_its_step_kl_divided_by_twice_the_variance_is_the_true_one_in_every_sample():
    coefficients = step_coefficients("cps_unnormalized", shifted_sigmas(8, 5.0), 0.5)
    x, old_velocity, new_velocity, z = _draws(4)
    for i in coefficients.trained_steps():
        a, b, std = coefficients.step(i)
        old_mean, new_mean = step_mean(x, old_velocity, a, b), step_mean(x, new_velocity, a, b)
        x_next = step_sample(old_mean, std, z)
        bare, true = (
            step_kl_log_prob(_score(x_next, old_mean, std, n), _score(x_next, new_mean, std, n)) for n in (False, True)
        )
        torch.testing.assert_close(bare / (2 * std**2), true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", [0, 3, 6])
def test_the_mean_of_its_step_kl_is_the_closed_form(step):
    """100k samples [B, D]; the estimate's variance is 2 KL / D, so five standard errors of the mean."""
    a, b, std = step_coefficients("cps_unnormalized", shifted_sigmas(8, 5.0), 0.5).step(step)
    generator = torch.Generator().manual_seed(step)
    x, old_velocity, change = torch.randn(3, 1, 6, dtype=torch.float64, generator=generator)
    new_velocity = old_velocity + 0.5 * change
    old_mean, new_mean = step_mean(x, old_velocity, a, b), step_mean(x, new_velocity, a, b)
    samples = 100_000
    x_next = old_mean + std * torch.randn(samples, 6, dtype=torch.float64, generator=generator)
    old, new = (
        log_prob_from_error(squared_error_sum(x_next, mean.expand_as(x_next)), 6, std, normalized=False)
        for mean in (old_mean, new_mean)
    )
    estimates = step_kl_log_prob(old, new) / (2 * std**2)
    closed = gaussian_kl_from_error(squared_error_sum(new_velocity, old_velocity), 6, b, std).item()
    assert estimates.mean().item() == pytest.approx(closed, abs=5 * math.sqrt(2 * closed / 6 / samples))
    assert estimates.var().item() == pytest.approx(2 * closed / 6, rel=5 * math.sqrt(2 / samples))
