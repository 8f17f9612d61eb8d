"""The window of trained steps: where it stands in each iteration, and what the steps outside it are."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.equalizer import gradient_scales, norm_factors
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import SDE_TYPES, step_coefficients, step_mean, step_sample
from megatron_sage.grpo.window import STRATEGIES, window_steps, windowed
from tests.grpo.test_properties import DRAWS, M, S, closed_moments, exact_velocity, marginal

STOCHASTIC = [sde_type for sde_type in SDE_TYPES if sde_type != "ode"]
REVERSE_SDES = ("dance_grpo", "flow_grpo", "sage_grpo")


@st.composite
def windows(draw) -> dict:
    """Arguments of window_steps but the strategy; the trained steps need not be neighbours of each other."""
    trained = sorted(draw(st.sets(st.integers(0, 30), min_size=1, max_size=16)))
    size = draw(st.integers(1, len(trained)))
    return {
        "trained": trained,
        "size": size,
        "start": draw(st.integers(0, len(trained) - size)),
        "stride": draw(st.integers(1, 6)),
        "interval": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**40)),
    }


def _positions(trained: list[int], size: int, start: int, stride: int) -> int:
    """start, start + stride, ... up to the last whole window, and that one."""
    return 1 + -(-(len(trained) - size - start) // stride)


@given(st.sampled_from(STRATEGIES), windows(), st.integers(0, 200))
def test_every_window_is_whole_and_made_of_neighbours_among_the_trained(strategy, arguments, iteration):
    steps = window_steps(**arguments, strategy=strategy, iteration=iteration)
    trained, first = arguments["trained"], arguments["trained"].index(steps[0])
    assert steps == trained[first : first + arguments["size"]] and len(steps) == arguments["size"]
    assert first >= arguments["start"]
    last = len(trained) - arguments["size"]
    assert first == last or (first - arguments["start"]) % arguments["stride"] == 0


@given(windows(), st.integers(0, 200))
def test_a_fixed_window_stays_at_its_start(arguments, iteration):
    start, size = arguments["start"], arguments["size"]
    steps = window_steps(**arguments, strategy="fixed", iteration=iteration)
    assert steps == arguments["trained"][start : start + size]


@given(windows())
def test_a_progressive_window_walks_forward_stays_for_its_interval_and_begins_again(arguments):
    trained, interval = arguments["trained"], arguments["interval"]
    count = _positions(trained, arguments["size"], arguments["start"], arguments["stride"])
    path = [window_steps(**arguments, iteration=i) for i in range(2 * count * interval)]
    assert path[count * interval :] == path[: count * interval]
    visited = path[: count * interval : interval]
    assert path[: count * interval] == [steps for steps in visited for _ in range(interval)]
    firsts = [trained.index(steps[0]) for steps in visited]
    assert firsts[0] == arguments["start"] and firsts[-1] == len(trained) - arguments["size"]
    assert all(0 < later - earlier <= arguments["stride"] for earlier, later in pairwise(firsts))
    if arguments["stride"] <= arguments["size"]:
        assert sorted({step for steps in visited for step in steps}) == trained[arguments["start"] :]


def test_a_stride_above_the_size_leaves_steps_out():
    """Seven steps, windows of 2 at 0, 4 and, the last moved back to be whole, 5: step 2 and 3 have no turn."""
    path = [window_steps(range(7), 2, stride=4, iteration=i) for i in range(4)]
    assert path == [[0, 1], [4, 5], [5, 6], [0, 1]]


def test_known_progressive_path():
    """Five trained steps, size 2, stride 2, two iterations each: at 0, 2 and, moved back from 4, 3."""
    path = [window_steps([1, 2, 5, 6, 9], 2, stride=2, interval=2, iteration=i) for i in range(8)]
    assert path == [[1, 2]] * 2 + [[5, 6]] * 2 + [[6, 9]] * 2 + [[1, 2]] * 2


@given(windows(), st.lists(st.integers(0, 100), min_size=2, max_size=5))
def test_a_random_window_depends_on_seed_and_iteration_alone(arguments, iterations):
    """Not on what was drawn before it, nor on the global generator: a resumed run has the same windows."""
    np.random.seed(len(iterations))
    first = [window_steps(**arguments, strategy="random", iteration=i) for i in iterations]
    again = [window_steps(**arguments, strategy="random", iteration=i) for i in reversed(iterations)]
    assert first == again[::-1]
    other = {**arguments, "interval": arguments["interval"] + 1}
    assert first == [window_steps(**other, strategy="random", iteration=i) for i in iterations]


@pytest.mark.parametrize(
    ("size", "stride", "start", "firsts"), [(3, 1, 0, range(8)), (3, 3, 1, (1, 4, 7)), (10, 1, 0, (0,))]
)
def test_random_windows_visit_every_position_about_equally_often(size, stride, start, firsts):
    """Chi-squared of 1000 draws over the positions, below its 0.9999 quantile (7 degrees of freedom: 29.9)."""
    counts = dict.fromkeys(firsts, 0)
    for iteration in range(1000):
        counts[window_steps(range(10), size, stride, "random", start, seed=7, iteration=iteration)[0]] += 1
    assert set(counts) == set(firsts)
    expected = 1000 / len(firsts)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 29.9


def test_another_seed_draws_other_windows():
    paths = {
        tuple(window_steps(range(20), 2, strategy="random", seed=seed, iteration=i)[0] for i in range(20))
        for seed in range(10)
    }
    assert len(paths) == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": "progresive"}, "strategy is 'progresive': give one of fixed, random, progressive"),
        ({"size": 0}, "size 0, start 0: .* 5 steps with noise, so 1 <= size <= 5"),
        ({"size": 6}, "size 6"),
        ({"size": 3, "start": 3}, "start <= 2"),
        ({"start": -1}, "start -1"),
        ({"trained": []}, "0 steps with noise"),
        ({"stride": 0}, "stride 0"),
        ({"interval": 0}, "interval 0"),
        ({"iteration": -1}, "iteration -1"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments_are_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        window_steps(**{"trained": [0, 1, 2, 4, 5], "size": 2, **changes})
    assert "\n" not in str(error.value)


@given(st.sampled_from(SDE_TYPES), st.integers(1, 40), st.floats(0.05, 50), st.floats(0.01, 1), st.data())
def test_windowed_is_the_sampler_inside_and_exactly_the_ode_outside(sde_type, steps, shift, eta, data):
    sigmas = shifted_sigmas(steps, shift)
    inside = data.draw(st.sets(st.integers(0, steps - 1)))
    sampler, ode = (step_coefficients(t, sigmas, eta) for t in (sde_type, "ode"))
    ours = windowed(sampler, sigmas, sorted(inside))
    for i in range(steps):
        assert ours.step(i) == (sampler if i in inside else ode).step(i)
    assert ours.trained_steps() == [i for i in sampler.trained_steps() if i in inside]
    assert all(values.dtype == torch.float64 for values in ours)


def test_windowed_changes_nothing_it_was_given():
    sigmas = shifted_sigmas(6, 5.0)
    sampler = step_coefficients("dance_grpo", sigmas, 0.5)
    before = [values.clone() for values in sampler]
    windowed(sampler, sigmas.tolist(), [2])
    assert all(torch.equal(x, y) for x, y in zip(before, sampler, strict=True))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("sde_type", STOCHASTIC)
def test_the_equalizer_takes_its_median_over_the_windows_steps_only(sde_type, normalized):
    sigmas = shifted_sigmas(16, 5.0)
    sampler = step_coefficients(sde_type, sigmas, 0.5)
    for iteration in range(6):
        steps = window_steps(sampler.trained_steps(), 4, stride=3, iteration=iteration)
        scales = gradient_scales(windowed(sampler, sigmas, steps), normalized)
        factors = norm_factors(sampler, normalized)[steps]
        expected = factors.sort().values[1] / factors  # the lower median of four
        torch.testing.assert_close(scales[steps], expected, rtol=1e-9, atol=0)
        assert scales.nonzero().flatten().tolist() == steps


# Moments: the ODE outside and the SDE inside have the same marginals.


@given(st.sampled_from(SDE_TYPES), st.integers(1, 12), st.floats(0.2, 10), st.floats(0.01, 1), st.data())
def test_the_mean_is_exact_at_every_step_of_every_window(sde_type, steps, shift, eta, data):
    sigmas = shifted_sigmas(steps, shift)
    inside = sorted(data.draw(st.sets(st.integers(0, steps - 1))))
    coefficients = windowed(step_coefficients(sde_type, sigmas, eta), sigmas, inside)
    mean = 0.0  # of x at sigma = 1
    for i, sigma in enumerate(sigmas.tolist()[:-1]):
        a, b, _ = coefficients.step(i)
        at = torch.tensor(mean, dtype=torch.float64)
        mean = a * mean + b * exact_velocity(at, sigma).item()
        assert mean == pytest.approx(marginal(sigmas[i + 1].item())[0], abs=1e-9)


@pytest.mark.parametrize("sde_type", STOCHASTIC)
def test_a_simulated_windowed_step_has_the_closed_moments(sde_type):
    """200k draws of the step inside and of its neighbours, which need no noise, to five standard errors."""
    sigmas = shifted_sigmas(6, 3.0)
    coefficients = windowed(step_coefficients(sde_type, sigmas, 0.8), sigmas, [2])
    generator = torch.Generator().manual_seed(1)
    for i, formula in ((1, "ode"), (2, sde_type), (3, "ode")):
        start, end = sigmas[i].item(), sigmas[i + 1].item()
        a, b, std = coefficients.step(i)
        x, z = torch.randn(2, DRAWS, dtype=torch.float64, generator=generator)
        x = marginal(start)[0] + marginal(start)[1] ** 0.5 * x
        x_next = step_sample(step_mean(x, exact_velocity(x, start), a, b), std, z if i == 2 else None)
        mean, variance = closed_moments(formula, start, end, std)
        assert (std > 0) is (i == 2)
        assert x_next.mean().item() == pytest.approx(mean, abs=5 * (variance / DRAWS) ** 0.5)
        assert x_next.var().item() == pytest.approx(variance, rel=5 * (2 / DRAWS) ** 0.5)


def _variance_at_the_end(sde_type: str, sigmas: torch.Tensor, steps: list[int]) -> float:
    coefficients = windowed(step_coefficients(sde_type, sigmas, 0.7), sigmas, steps)
    variance = marginal(sigmas[0].item())[1]
    for i, sigma in enumerate(sigmas.tolist()[:-1]):
        a, b, std = coefficients.step(i)
        slope = (sigma - (1 - sigma) * S**2) / marginal(sigma)[1]
        variance = (a + b * slope) ** 2 * variance + std**2
    return variance


@pytest.mark.parametrize("sde_type", REVERSE_SDES)
@pytest.mark.parametrize("place", [0.0, 0.4, 0.8])
def test_ode_outside_and_sde_inside_keep_the_marginal_in_the_limit_of_fine_steps(sde_type, place):
    """A fifth of the way from sigma 0.95 to data is the window; the error of the last variance falls as 1/N."""
    errors = []
    for count in (500, 1000, 2000):
        sigmas = torch.linspace(0.95, 0.0, count + 1, dtype=torch.float64)
        steps = window_steps(range(count), count // 5, strategy="fixed", start=int(place * count))
        errors.append(abs(_variance_at_the_end(sde_type, sigmas, steps) - S**2))
    assert errors[2] < 2e-3
    assert all(fine < 0.55 * coarse for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("inside", [[0], [1, 2], [4], [0, 1, 2, 3, 4]])
def test_cps_in_a_window_is_exact_on_a_single_video(inside):
    """Data at M alone: straight paths, so Euler's ode is exact too, at any number of steps."""
    sigmas = shifted_sigmas(5, 5.0)
    coefficients = windowed(step_coefficients("cps", sigmas, 0.5), sigmas, inside)
    mean, variance = 0.0, 1.0
    for i, sigma in enumerate(sigmas.tolist()[:-1]):
        a, b, std = coefficients.step(i)
        # x = (1-sigma) M + sigma eps, so v = eps - M = (x - M) / sigma
        mean, variance = a * mean + b * (mean - M) / sigma, (a + b / sigma) ** 2 * variance + std**2
        level = sigmas[i + 1].item()
        assert mean == pytest.approx((1 - level) * M, abs=1e-12)
        assert variance == pytest.approx(level**2, abs=1e-12)


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_of_another_schedule_is_refused(step):
    sigmas = shifted_sigmas(5, 3.0)
    with pytest.raises(ValueError, match=f"step {step} is none of the 5 steps"):
        windowed(step_coefficients("sage_grpo", sigmas, 0.5), sigmas, [step])
