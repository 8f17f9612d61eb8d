"""Drawing a step and scoring it: against torch.distributions, and with the tokens split over ranks."""

import math

import pytest
import torch

from megatron_sage.grpo.objective import policy_loss
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import (
    element_count,
    log_prob,
    log_prob_from_error,
    log_prob_sum,
    squared_error_sum,
    step_coefficients,
    step_mean,
    step_sample,
)


def _tokens(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[S=7, B=3, C=4]"""
    return torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_log_prob_is_the_mean_of_the_normal_log_density():
    x, mean = _tokens(0, torch.float64), _tokens(1, torch.float64)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x)
    torch.testing.assert_close(log_prob(x, mean, 0.3), expected.mean((0, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_prob_sum(x, mean, 0.3), expected.sum((0, 2)), rtol=1e-12, atol=1e-12)
    by_batch = log_prob(x.transpose(0, 1), mean.transpose(0, 1), 0.3, batch_dim=0)
    torch.testing.assert_close(by_batch, expected.mean((0, 2)), rtol=1e-12, atol=1e-12)


def test_flat_samples_need_no_batch_dim():
    x, mean = _tokens(0)[:, 0], _tokens(1)[:, 0]  # [B=7, D=4]
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).mean(1)
    torch.testing.assert_close(log_prob(x, mean, 0.3).float(), expected, rtol=1e-5, atol=1e-5)


def test_shards_add_up_whatever_the_padding_holds():
    x, mean = _tokens(0), _tokens(1)
    whole = log_prob(x, mean, 0.2)
    padded_x = torch.cat([x, torch.full((1, 3, 4), float("nan"))])
    padded_mean = torch.cat([mean, torch.full((1, 3, 4), float("inf"))])
    valid = torch.tensor([True] * 7 + [False])
    error, summed, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for rank in range(4):
        part = slice(2 * rank, 2 * rank + 2)
        shard = padded_x[part], padded_mean[part]
        error += squared_error_sum(*shard, token_mask_S=valid[part])
        summed += log_prob_sum(*shard, 0.2, token_mask_S=valid[part])
        count += element_count(shard[0], token_mask_S=valid[part])
    assert count == 28
    torch.testing.assert_close(log_prob_from_error(error, count, 0.2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(summed / count, whole, rtol=1e-12, atol=1e-12)


def test_a_rank_of_padding_only_adds_nothing():
    x = torch.full((2, 3, 4), float("nan"))
    valid = torch.tensor([False, False])
    assert torch.equal(log_prob_sum(x, x, 0.2, token_mask_S=valid), torch.zeros(3, dtype=torch.float64))


def test_padding_gets_no_gradient():
    x, velocity = _tokens(0), _tokens(1).requires_grad_()
    valid = torch.tensor([True] * 5 + [False] * 2)
    x[5:] = float("nan")
    log_prob(x, step_mean(torch.zeros(7, 3, 4), velocity, 1.0, -0.1), 0.2, token_mask_S=valid).sum().backward()
    assert velocity.grad is not None
    assert (velocity.grad[5:] == 0).all() and (velocity.grad[:5] != 0).all()


def test_half_precision_velocities_and_states_are_computed_with_in_float32():
    x, velocity, target = _tokens(0, torch.bfloat16), _tokens(1, torch.bfloat16), _tokens(2, torch.bfloat16)
    mean = step_mean(x, velocity, 0.9, -0.1)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, step_mean(x.float(), velocity.float(), 0.9, -0.1))
    assert torch.equal(step_mean(x.float(), velocity, 0.9, -0.1), mean)
    assert torch.equal(squared_error_sum(x, target), squared_error_sum(x.float(), target.float()))
    assert step_mean(x.double(), velocity, 0.9, -0.1).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sde_type", ["dance_grpo", "flow_grpo", "sage_grpo", "cps"])
def test_ratio_is_one_before_the_first_update(sde_type, dtype):
    """Scoring the stored sample with the same velocity gives the rollout's log-probability back, bit for bit."""
    coefficients = step_coefficients(sde_type, shifted_sigmas(10, 5.0), 0.5)
    for i in coefficients.trained_steps():
        a, b, std = coefficients.step(i)
        x, velocity, noise = _tokens(i), _tokens(100 + i, dtype), _tokens(200 + i)
        mean = step_mean(x, velocity, a, b)
        assert mean.dtype == torch.float32
        x_next = step_sample(mean, std, noise)
        old = log_prob(x_next, mean, std)
        new = log_prob(x_next, step_mean(x, velocity, a, b), std)
        assert torch.equal(policy_loss(new, old, torch.ones(3), 1e-4).ratio, torch.ones(3, dtype=torch.float64))
        expected = -noise.double().square().mean((0, 2)) / 2 - math.log(std) - math.log(2 * math.pi) / 2
        torch.testing.assert_close(old, expected, rtol=1e-4, atol=1e-4)


def test_a_step_without_noise_is_its_mean_and_has_no_log_prob():
    mean = _tokens(0)
    assert torch.equal(step_sample(mean, 0.0, None), mean)
    assert torch.equal(step_sample(mean, 0.0, torch.full_like(mean, float("nan"))), mean)
    with pytest.raises(ValueError, match="std is 0.0"):
        log_prob(mean, mean, 0.0)


def test_wrong_shapes_are_one_line():
    x = _tokens(0)
    cases = [
        lambda: step_sample(x, 0.1, None),
        lambda: step_sample(x, 0.1, x[:1]),
        lambda: squared_error_sum(x, x[:1]),
        lambda: squared_error_sum(x, x, token_mask_S=torch.ones(6, dtype=torch.bool)),
        lambda: squared_error_sum(x, x, token_mask_S=torch.ones(7)),
        lambda: squared_error_sum(x, x, batch_dim=0, token_mask_S=torch.ones(7, dtype=torch.bool)),
        lambda: log_prob_from_error(x[0, 0], 0, 0.1),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r".") as error:
            case()
        assert "\n" not in str(error.value)
