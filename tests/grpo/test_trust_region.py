import json
import random

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import log_prob, squared_error_sum, step_coefficients, step_mean, step_sample
from megatron_sage.grpo.trust_region import (
    STRATEGIES,
    LambdaController,
    gaussian_kl_from_error,
    step_kl_log_prob,
    term_weights,
)


def _steps(sde_type: str):
    coefficients = step_coefficients(sde_type, shifted_sigmas(8, 5.0), 0.5)
    return [coefficients.step(i) for i in coefficients.trained_steps()]


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sde_type", ["dance_grpo", "flow_grpo", "sage_grpo", "cps"])
def test_kl_and_its_gradient_equal_the_general_gaussian_formula(sde_type):
    x, reference = _draw(5, 2, 3, seed=0), _draw(5, 2, 3, seed=1)
    for a, b, std in _steps(sde_type):
        velocity = _draw(5, 2, 3, seed=2).requires_grad_()
        ours = gaussian_kl_from_error(squared_error_sum(velocity, reference), 15, b, std)
        theirs = kl_divergence(Normal(step_mean(x, velocity, a, b), std), Normal(step_mean(x, reference, a, b), std))
        theirs = theirs.mean((0, 2))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
        (our_gradient,) = torch.autograd.grad(ours.sum(), velocity)
        (their_gradient,) = torch.autograd.grad(theirs.sum(), velocity)
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-9, atol=1e-14)


def test_kl_of_a_policy_with_itself_is_zero():
    velocity = _draw(5, 2, 3, seed=0)
    assert (gaussian_kl_from_error(squared_error_sum(velocity, velocity), 15, -0.1, 0.2) == 0).all()


def test_log_prob_estimate_has_the_closed_form_as_its_mean():
    """Noise z and -z together cancel the linear term of logp_old - logp_new exactly: no Monte Carlo is needed."""
    x, old_velocity, new_velocity, noise = (_draw(5, 2, 3, seed=seed) for seed in range(4))
    for a, b, std in _steps("sage_grpo"):
        old_mean, new_mean = step_mean(x, old_velocity, a, b), step_mean(x, new_velocity, a, b)
        both = [step_sample(old_mean, std, sign * noise) for sign in (1, -1)]
        estimates = [step_kl_log_prob(log_prob(s, old_mean, std), log_prob(s, new_mean, std)) for s in both]
        closed = gaussian_kl_from_error(squared_error_sum(new_velocity, old_velocity), 15, b, std)
        torch.testing.assert_close((estimates[0] + estimates[1]) / 2, closed, rtol=1e-9, atol=1e-12)


def test_log_prob_estimate_moves_the_new_policy_only():
    old, new = (torch.zeros(2, requires_grad=True) for _ in range(2))
    step_kl_log_prob(old, new).sum().backward()
    assert old.grad is None and new.grad is not None and (new.grad == -1).all()


@pytest.mark.parametrize("sde_type", ["dance_grpo", "flow_grpo", "sage_grpo", "cps"])
def test_log_prob_estimate_has_the_closed_forms_mean_and_far_more_variance(sde_type):
    """200k samples [B, D], a new x and a new pair of policies in each: its variance is that of the KL plus 2 KL / D."""
    count, elements = 200_000, 4
    for a, b, std in _steps(sde_type)[::3]:
        x, old_velocity, change, noise = _draw(4, count, elements, seed=3)
        new_velocity = old_velocity + 0.05 * std / abs(b) * change  # a KL of about 0.00125 at every step
        old_mean, new_mean = step_mean(x, old_velocity, a, b), step_mean(x, new_velocity, a, b)
        x_next = step_sample(old_mean, std, noise)
        estimates = step_kl_log_prob(log_prob(x_next, old_mean, std), log_prob(x_next, new_mean, std))
        closed = gaussian_kl_from_error(squared_error_sum(new_velocity, old_velocity), elements, b, std)
        variance = closed.var() + 2 * closed.mean() / elements
        assert (estimates - closed).mean().item() == pytest.approx(0, abs=5 * (variance.item() / count) ** 0.5)
        assert estimates.var().item() == pytest.approx(variance.item(), rel=0.03)
        assert estimates.var() > 100 * closed.var()
        assert (estimates < 0).double().mean() > 0.4 and (closed >= 0).all()


def test_at_the_old_policy_the_closed_form_has_no_gradient_and_the_log_prob_estimate_has_noise():
    """d/dv of logp_old - logp_new is -(b/std) z / D: zero over z and -z, not for any one z."""
    x, old_velocity, noise = (_draw(5, 2, 3, seed=seed) for seed in range(3))
    for a, b, std in _steps("sage_grpo"):
        velocity = old_velocity.clone().requires_grad_()
        closed = gaussian_kl_from_error(squared_error_sum(velocity, old_velocity), 15, b, std)
        assert (torch.autograd.grad(closed.sum(), velocity)[0] == 0).all()
        old_mean = step_mean(x, old_velocity, a, b)
        gradients = []
        for sign in (1, -1):
            x_next = step_sample(old_mean, std, sign * noise)
            estimate = step_kl_log_prob(
                log_prob(x_next, old_mean, std), log_prob(x_next, step_mean(x, velocity, a, b), std)
            )
            gradients.append(torch.autograd.grad(estimate.sum(), velocity)[0])
        torch.testing.assert_close(gradients[0], -b / std * noise / 15, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(gradients[0] + gradients[1], torch.zeros_like(noise), rtol=0, atol=1e-12)
        assert gradients[0].norm() > 0


def test_impossible_kl_is_one_line():
    for count, std in ((15, 0.0), (15, float("nan")), (0, 0.1)):
        with pytest.raises(ValueError, match="no KL|at least one element"):
            gaussian_kl_from_error(torch.zeros(2), count, -0.1, std)
    with pytest.raises(ValueError, match="must agree"):
        step_kl_log_prob(torch.zeros(2), torch.zeros(3))


def test_each_strategy_has_its_terms():
    """Of the KL to the initial model or anchor and of the KL to the rollout's policy; dual alone takes the weights."""
    terms = {strategy: term_weights(strategy, 0.7, 0.3) for strategy in STRATEGIES}
    assert terms == {"none": (0, 0), "fixed": (1, 0), "step": (0, 1), "moving": (1, 0), "dual": (0.7, 0.3)}


def test_an_unknown_strategy_is_one_line():
    with pytest.raises(ValueError, match="strategy is 'duel': give one of none, fixed, step, moving, dual") as error:
        term_weights("duel", 1.0, 0.1)
    assert "\n" not in str(error.value)


def _controller(**changes) -> LambdaController:
    settings = dict(lambda_min=1e-7, lambda_max=1e-5, warmup_steps=4, window=2, target=1e-3, gain=0.5)
    return LambdaController(**{**settings, **changes})


def test_fixed_stays_at_lambda_max():
    controller = _controller(kind="fixed")
    assert [controller.value, *(controller.update(kl) for kl in (0.0, 1.0, -1.0))] == [1e-5] * 4


def test_warm_up_is_linear_and_ignores_the_kl():
    controller = _controller()
    values = [controller.value, *(controller.update(kl) for kl in (5.0, 0.0, 5.0, 0.0))]
    assert values == pytest.approx([1e-7 + share * 9.9e-6 for share in (0, 0.25, 0.5, 0.75, 1)], rel=1e-12)
    assert values[-1] == 1e-5


@pytest.mark.parametrize("feedback", ["relax", "tighten"])
def test_feedback_follows_the_formula_with_window_and_clips(feedback):
    controller = _controller(warmup_steps=0, lambda_max=1.0, lambda_min=0.01, feedback=feedback)
    controller.value = expected = 0.2
    kls, sign = [1.2e-3, 1.4e-3, 0.9e-3, 5e-3, -4e-3, 1e-3, 2e-3], {"relax": -1, "tighten": 1}[feedback]
    for i, kl in enumerate(kls):
        recent = kls[max(0, i - 1) : i + 1]
        error = (sum(recent) / len(recent) - 1e-3) / 1e-3
        expected = min(max(expected * (1 + sign * 0.5 * min(max(error, -1), 1)), 0.01), 1.0)
        assert controller.update(kl) == pytest.approx(expected, rel=1e-12)


def test_direction_of_both_feedbacks():
    for feedback, kl, falls in [("relax", 2e-3, True), ("relax", 1e-4, False), ("tighten", 2e-3, False)]:
        controller = _controller(warmup_steps=0, feedback=feedback)
        controller.value = 1e-6
        assert (controller.update(kl) < 1e-6) is falls


def test_lambda_stays_within_its_bounds():
    controller = _controller(warmup_steps=0)
    assert [controller.update(1e9) for _ in range(40)][-1] == 1e-7
    assert [controller.update(-1e9) for _ in range(40)][-1] == 1e-5


def test_window_reaches_back_into_the_warm_up():
    controller = _controller(warmup_steps=2, window=3)
    controller.update(3e-3), controller.update(3e-3)
    assert controller.update(0.0) == pytest.approx(1e-5 * (1 - 0.5), rel=1e-12)  # mean 2e-3, e = 1


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_kl_is_refused_and_changes_nothing(kl):
    controller = _controller()
    controller.update(1e-3)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="KL of optimizer step 2 is"):
        controller.update(kl)
    assert controller.state_dict() == before


@pytest.mark.parametrize("stop", [0, 2, 4, 9])
def test_a_resumed_controller_gives_the_same_numbers(stop):
    kls = [random.Random(i).uniform(0, 3e-3) for i in range(14)]
    whole, first, resumed = _controller(window=3), _controller(window=3), _controller(window=3)
    expected = [whole.update(kl) for kl in kls]
    for kl in kls[:stop]:
        first.update(kl)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.value == first.value
    assert [resumed.update(kl) for kl in kls[stop:]] == expected[stop:]


def test_a_state_of_another_schedule_is_refused():
    with pytest.raises(ValueError, match="'fixed'"):
        _controller().load_state_dict(_controller(kind="fixed").state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "mild"},
        {"feedback": "up"},
        {"lambda_min": 2e-5},
        {"lambda_min": -1.0},
        {"lambda_max": float("inf")},
        {"warmup_steps": -1},
        {"window": 0},
        {"target": 0.0},
        {"gain": 0.0},
        {"gain": 1.5},
    ],
)
def test_bad_settings_are_one_line(changes):
    with pytest.raises(ValueError, match=next(iter(changes)).split("_")[0]) as error:
        _controller(**changes)
    assert "\n" not in str(error.value)
