import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.objective import policy_loss

CLIP = 1e-4


def _loss(log_ratio: float, advantage: float, **kwargs: float):
    old = torch.tensor([-0.7], dtype=torch.float64)
    new = (old + log_ratio).requires_grad_()
    result = policy_loss(new, old, torch.tensor([advantage]), kwargs.pop("clip_range", CLIP), **kwargs)
    (gradient,) = torch.autograd.grad(result.loss.sum(), new)
    return result, gradient.item()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "active"),
    [
        (5e-5, 2.0, False),
        (-5e-5, -2.0, False),
        (2e-4, 2.0, True),  # already raised beyond the range: no more
        (-2e-4, 2.0, False),  # lowered although good: pull it back
        (2e-4, -2.0, False),  # raised although bad: pull it back
        (-2e-4, -2.0, True),  # already lowered beyond the range: no more
    ],
)
def test_clip_stops_only_moves_in_the_rewarded_direction(log_ratio, advantage, active):
    result, gradient = _loss(log_ratio, advantage)
    ratio = math.exp(log_ratio)
    assert bool(result.clipped) is active
    assert result.ratio.item() == pytest.approx(ratio, rel=1e-12)
    bound = 1 + math.copysign(CLIP, log_ratio)
    assert result.loss.item() == pytest.approx(-advantage * (bound if active else ratio), rel=1e-12)
    assert gradient == pytest.approx(0.0 if active else -advantage * ratio, rel=1e-12)


def test_at_ratio_one_the_gradient_is_minus_the_advantage():
    for advantage in (1.5, -1.5, 0.0):
        result, gradient = _loss(0.0, advantage)
        assert (result.ratio.item(), bool(result.clipped)) == (1.0, False)
        assert gradient == -advantage


def test_advantages_are_clamped():
    assert _loss(0.0, 40.0)[1] == -5.0
    assert _loss(0.0, -40.0)[1] == 5.0
    assert _loss(0.0, 40.0, advantage_clip=7.0)[1] == -7.0


def test_nothing_flows_into_the_old_log_prob_or_the_advantages():
    new, old, advantages = (torch.zeros(2, requires_grad=True) for _ in range(3))
    policy_loss(new, old, advantages + 1, CLIP).loss.sum().backward()
    assert new.grad is not None and old.grad is None and advantages.grad is None


@given(st.floats(-0.5, 0.5), st.floats(-20, 20), st.floats(1e-5, 0.5))
def test_loss_is_the_larger_of_both_and_never_rewards_leaving_the_range(log_ratio, advantage, clip):
    result, gradient = _loss(log_ratio, advantage, clip_range=clip)
    a, ratio = torch.tensor(advantage).clamp(-5, 5).double().item(), math.exp(log_ratio)
    clamped = min(max(ratio, 1 - clip), 1 + clip)
    assert result.loss.item() == pytest.approx(max(-a * ratio, -a * clamped), rel=1e-9, abs=1e-12)
    assert bool(result.clipped) == (gradient == 0 and a != 0)


def test_bad_arguments_are_one_line():
    x = torch.zeros(2)
    cases = [
        ("clip_range is 0", lambda: policy_loss(x, x, x, 0.0)),
        ("clip_range is 1.5", lambda: policy_loss(x, x, x, 1.5)),
        ("advantage_clip is -1", lambda: policy_loss(x, x, x, CLIP, advantage_clip=-1.0)),
        ("shapes", lambda: policy_loss(x, x, x[:, None], CLIP)),
        ("log_prob_new is torch.bfloat16", lambda: policy_loss(x.bfloat16(), x, x, CLIP)),
        ("log_prob_old is torch.float16", lambda: policy_loss(x, x.half(), x, CLIP)),
    ]
    for word, case in cases:
        with pytest.raises(ValueError, match=word) as error:
            case()
        assert "\n" not in str(error.value)
