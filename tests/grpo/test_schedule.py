import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.schedule import checked_sigmas, shifted_sigmas


def test_known_levels():
    sigmas = shifted_sigmas(20, 5.0)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (21,)
    assert sigmas[1].item() == pytest.approx(0.98958333, abs=5e-9)
    assert sigmas[19].item() == pytest.approx(0.20833333, abs=5e-9)


def test_equals_diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=[1 - i / 30 for i in range(30)])
    torch.testing.assert_close(shifted_sigmas(30, 7.0).float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@given(st.integers(1, 300), st.floats(1e-3, 1e3))
def test_falls_strictly_from_one_to_zero_and_follows_the_formula(steps, shift):
    sigmas = shifted_sigmas(steps, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    expected = [shift * (1 - i / steps) / (1 + (shift - 1) * (1 - i / steps)) for i in range(steps + 1)]
    torch.testing.assert_close(sigmas, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "shift", "word"),
    [
        (0, 5.0, "num_steps is 0"),
        (-3, 5.0, "num_steps is -3"),
        (2.5, 5.0, "num_steps is 2.5"),
        (10, 0.0, "shift is 0.0"),
        (10, -1.0, "shift is -1.0"),
        (10, float("nan"), "shift is nan"),
        (10, float("inf"), "shift is inf"),
        (10, 1e18, "coincide"),
    ],
)
def test_bad_arguments_are_one_line(steps, shift, word):
    with pytest.raises(ValueError, match=word) as error:
        shifted_sigmas(steps, shift)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sigmas", "word"),
    [
        ([1.0, 0.5, 0.5, 0.0], r"sigmas\[1\] = 0.5"),
        ([0.2, 0.4], "strictly decrease"),
        ([1.1, 0.4], r"1\.1"),
        ([0.4, -0.1], r"-0\.1"),
        ([1.0, float("nan")], "nan"),
        ([1.0], "shape"),
        ([[1.0, 0.0]], "shape"),
    ],
)
def test_bad_levels_are_one_line(sigmas, word):
    with pytest.raises(ValueError, match=word) as error:
        checked_sigmas(sigmas)
    assert "\n" not in str(error.value)
