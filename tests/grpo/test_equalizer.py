import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.equalizer import gradient_scales, norm_factors
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import SDE_TYPES, StepCoefficients, log_prob, step_coefficients, step_mean, step_sample

STOCHASTIC = [sde_type for sde_type in SDE_TYPES if sde_type != "ode"]


def _coefficients(velocity: list[float], std: list[float]) -> StepCoefficients:
    b, s = torch.tensor(velocity, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return StepCoefficients(torch.ones_like(b), b, s)


@pytest.mark.parametrize("sde_type", STOCHASTIC)
def test_factor_is_the_gradient_norm_of_the_log_prob(sde_type):
    """Same noise at every step: |d logp / d v| must be N_i |z| / D, and the scaled norms must all be equal."""
    coefficients = step_coefficients(sde_type, shifted_sigmas(16, 5.0), 0.5)
    factors, scales = norm_factors(coefficients), gradient_scales(coefficients)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 1, 8, dtype=torch.float64, generator=generator)
    equalized = []
    for i in coefficients.trained_steps():
        a, b, std = coefficients.step(i)
        x = torch.randn(5, 1, 8, dtype=torch.float64, generator=generator)
        velocity = torch.randn(5, 1, 8, dtype=torch.float64, generator=generator).requires_grad_()
        x_next = step_sample(step_mean(x, velocity.detach(), a, b), std, noise)
        (gradient,) = torch.autograd.grad(log_prob(x_next, step_mean(x, velocity, a, b), std).sum(), velocity)
        assert gradient.norm().item() == pytest.approx((factors[i] * noise.norm() / 40).item(), rel=1e-9)
        equalized.append(scales[i].item() * gradient.norm().item())
    assert max(equalized) / min(equalized) == pytest.approx(1.0, rel=1e-9)


def test_median_is_the_lower_one_and_steps_without_noise_are_out_of_it():
    scales = gradient_scales(_coefficients([-9.0, -1.0, -2.0, -4.0, -8.0, -7.0], [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(
        scales, torch.tensor([0.0, 2.0, 1.0, 0.5, 0.25, 0.0], dtype=torch.float64), rtol=1e-9, atol=0
    )


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100), st.booleans()), min_size=1, max_size=21))
def test_the_median_is_the_lower_one_of_the_trained_steps_in_any_order(steps):
    velocity, std = [-b for b, _, _ in steps], [s if trained else 0.0 for _, s, trained in steps]
    scales = gradient_scales(_coefficients(velocity, std)).tolist()
    factors = sorted(b / s for b, s, trained in steps if trained)
    for (b, s, trained), scale in zip(steps, scales, strict=True):
        expected = factors[(len(factors) - 1) // 2] / (b / s) if trained else 0.0
        # the term 1e-12 of the median under the fraction takes that share of it off: 1e-12 times the scale, relatively
        assert scale == pytest.approx(expected, rel=1e-12 * (1 + 2 * expected))


def test_nothing_trained_means_all_zero():
    assert torch.equal(gradient_scales(_coefficients([-1.0, -1.0], [0.0, 0.0])), torch.zeros(2, dtype=torch.float64))


def test_cps_last_step_has_scale_zero():
    scales = gradient_scales(step_coefficients("cps", shifted_sigmas(20, 5.0), 0.5))
    assert scales[-1] == 0 and (scales[:-1] > 0).all()


@given(st.sampled_from(STOCHASTIC), st.integers(1, 80), st.floats(0.1, 20), st.floats(0.01, 1.0))
def test_scales_are_finite_zero_exactly_without_noise_and_one_at_the_median(sde_type, steps, shift, eta):
    coefficients = step_coefficients(sde_type, shifted_sigmas(steps, shift), eta)
    scales = gradient_scales(coefficients)
    assert scales.isfinite().all()
    assert torch.equal(scales > 0, coefficients.std > 0)
    trained = scales[coefficients.std > 0]
    if len(trained):
        assert (trained - 1).abs().min() < 1e-9
        equalized = trained * norm_factors(coefficients)[coefficients.std > 0]
        torch.testing.assert_close(equalized, equalized[:1].expand_as(equalized), rtol=1e-9, atol=0)
