"""What is divided by at sigma = 1: the three regimes of the paper's appendix A.2, and whom the choice touches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import CEILINGS, FLOW_SIGMA_MAX_INDEX, SAGE_CLAMP, SDE_TYPES, step_coefficients

steps_of = st.integers(1, 100)
shifts = st.floats(0.05, 50)
etas = st.floats(0.01, 1.0)


def _equal(first, second) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_the_constants_are_the_papers():
    assert (SAGE_CLAMP, FLOW_SIGMA_MAX_INDEX, CEILINGS) == (3e-3, 1, ("default", "sigma_max", "clamp"))


@given(steps_of, shifts, etas)
def test_the_default_is_sigma_max_for_flow_and_the_clamp_for_sage(steps, shift, eta):
    sigmas = shifted_sigmas(steps, shift)
    for sde_type, same in (("flow_grpo", "sigma_max"), ("sage_grpo", "clamp")):
        default = step_coefficients(sde_type, sigmas, eta)
        assert _equal(default, step_coefficients(sde_type, sigmas, eta, ceiling="default"))
        assert _equal(default, step_coefficients(sde_type, sigmas, eta, ceiling=same))


@given(st.sampled_from([t for t in SDE_TYPES if t not in ("flow_grpo", "sage_grpo")]), steps_of, shifts, etas)
def test_the_other_samplers_have_no_ceiling(sde_type, steps, shift, eta):
    sigmas = shifted_sigmas(steps, shift)
    default = step_coefficients(sde_type, sigmas, eta)
    assert all(_equal(default, step_coefficients(sde_type, sigmas, eta, ceiling)) for ceiling in CEILINGS)


@given(st.sampled_from(["flow_grpo", "sage_grpo"]), steps_of, shifts, etas)
def test_steps_that_start_below_the_clamp_do_not_depend_on_the_ceiling(sde_type, steps, shift, eta):
    sigmas = shifted_sigmas(steps, shift)
    free = sigmas[:-1] <= 1 - SAGE_CLAMP
    default = step_coefficients(sde_type, sigmas, eta)
    for ceiling in CEILINGS:
        for ours, theirs in zip(step_coefficients(sde_type, sigmas, eta, ceiling), default, strict=True):
            assert torch.equal(ours[free], theirs[free])


@given(steps_of, shifts, etas)
def test_sigma_max_takes_sages_first_step_away_and_leaves_the_others_their_exact_integral(steps, shift, eta):
    """ln((1-s_1)/(1-s_1)) - d = -d at sigma = 1; later steps are not clamped at all, however near to 1."""
    sigmas = shifted_sigmas(steps, shift)
    variance = step_coefficients("sage_grpo", sigmas, eta, "sigma_max").std.square()
    assert variance[0] == 0
    for i in {1, steps - 1} - {0, steps}:
        start, end = sigmas[i].item(), sigmas[i + 1].item()
        integral, _ = quad(lambda s: s / (1 - s), end, start, epsabs=0, epsrel=1e-11)
        assert variance[i].item() == pytest.approx(eta**2 * integral, rel=1e-7)


@given(steps_of, shifts, etas)
def test_flow_at_the_clamp_divides_by_at_least_the_clamp(steps, shift, eta):
    sigmas = shifted_sigmas(steps, shift)
    variance = step_coefficients("flow_grpo", sigmas, eta, "clamp").std.square()
    start, width = sigmas[:-1], -sigmas.diff()
    bottom = (1 - start).clamp(min=SAGE_CLAMP)
    torch.testing.assert_close(variance, eta**2 * start / bottom * width, rtol=1e-9, atol=0)
    first_by_default = step_coefficients("flow_grpo", sigmas, eta).std[0].item() ** 2
    assert first_by_default == pytest.approx(eta**2, rel=1e-9)  # 1/(1 - s_1) times 1 - s_1, whatever the schedule


@pytest.mark.parametrize(("sde_type", "ceiling"), [(t, c) for t in ("flow_grpo", "sage_grpo") for c in CEILINGS])
def test_a_schedule_that_starts_below_one_has_nothing_to_replace(sde_type, ceiling):
    """FlowGRPO replaces sigma = 1 alone, not whatever level comes first."""
    whole, rest = shifted_sigmas(20, 5.0), shifted_sigmas(20, 5.0)[1:]
    later = step_coefficients(sde_type, whole, 0.5, ceiling)
    assert _equal([x[1:] for x in later], step_coefficients(sde_type, rest, 0.5, ceiling))


def test_the_three_regimes_at_the_first_step_of_the_paper():
    """N = 20, k = 5, eta = 1: s_1 = 4.75/4.8, d = 1 - s_1 = 1/96."""
    first = {
        (sde_type, ceiling): step_coefficients(sde_type, shifted_sigmas(20, 5.0), 1.0, ceiling).std[0].item()
        for sde_type in ("flow_grpo", "sage_grpo")
        for ceiling in CEILINGS
    }
    # (a) both with sigma_max: flow's is 1, sage's collapses
    assert first["flow_grpo", "sigma_max"] == pytest.approx(1.0, rel=1e-12)
    assert first["sage_grpo", "sigma_max"] == 0
    # (b) both at the clamp: (1/96) / 0.003 = 3.47222, root 1.86339; ln(3.47222) - 1/96 = 1.23436, root 1.11102
    assert first["flow_grpo", "clamp"] == pytest.approx(1.8633900, rel=1e-7)
    assert first["sage_grpo", "clamp"] == pytest.approx(math.sqrt(math.log(1 / 96 / 0.003) - 1 / 96), rel=1e-12)
    assert first["sage_grpo", "clamp"] == pytest.approx(1.11102, rel=1e-4)
    # (c) each with its own
    assert first["flow_grpo", "default"] == first["flow_grpo", "sigma_max"]
    assert first["sage_grpo", "default"] == first["sage_grpo", "clamp"]


def test_at_the_clamp_flow_explodes_as_the_first_step_widens_and_sage_grows_as_a_logarithm():
    """One step from 1 of width 10c, 100c, 300c: 10, 100 and 300 against ln of them, each less the width for sage."""
    for times in (10, 100, 300):
        levels = [1.0, 1 - times * SAGE_CLAMP, 0.0]
        flow, sage = (step_coefficients(t, levels, 1.0, "clamp").std[0].item() ** 2 for t in ("flow_grpo", "sage_grpo"))
        assert flow == pytest.approx(times, rel=1e-12)
        assert sage == pytest.approx(math.log(times) - times * SAGE_CLAMP, rel=1e-12)


def test_one_step_from_noise_to_data():
    """N = 1: s_1 = 0, so flow's is 1/1, sage's ln(1/c) - 1 at the clamp and nothing with sigma_max."""
    for ceiling, flow, sage in (
        ("default", 1.0, math.log(1 / 3e-3) - 1),
        ("sigma_max", 1.0, 0.0),
        ("clamp", 1 / 3e-3, math.log(1 / 3e-3) - 1),
    ):
        for sde_type, variance in (("flow_grpo", flow), ("sage_grpo", sage)):
            std = step_coefficients(sde_type, [1.0, 0.0], 0.5, ceiling).std
            assert std.square().tolist() == pytest.approx([0.25 * variance], rel=1e-12)


@pytest.mark.parametrize("ceiling", ["sigmamax", "", None, "Clamp"])
def test_an_unknown_ceiling_is_one_line(ceiling):
    with pytest.raises(ValueError, match=f"ceiling is {ceiling!r}: give one of default, sigma_max, clamp") as error:
        step_coefficients("sage_grpo", shifted_sigmas(5, 5.0), 0.5, ceiling)
    assert "\n" not in str(error.value)
