import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_sage.grpo.advantage import NonFiniteGuard, group_advantages

NAN, INF = float("nan"), float("inf")
rewards_of_a_group = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def test_one_group_by_hand():
    result = group_advantages([[1.0, 2.0, 3.0, 6.0]])
    std = math.sqrt((4 + 1 + 0 + 9) / 3)  # ddof = 1, mean 3
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0]], dtype=torch.float64) / (std + 1e-8)
    torch.testing.assert_close(result.advantages, expected, rtol=1e-14, atol=0)
    assert result.mask.all()
    assert (result.nonfinite, result.zero_std_groups, result.dropped_groups) == (0, 0, 0)


def test_groups_do_not_see_each_other():
    both = group_advantages([[1.0, 2.0, 4.0], [700.0, 100.0, 400.0]]).advantages
    assert torch.equal(both[:1], group_advantages([[1.0, 2.0, 4.0]]).advantages)
    assert torch.equal(both[1:], group_advantages([[700.0, 100.0, 400.0]]).advantages)


@pytest.mark.parametrize("value", [0.0, 0.6, -3.25, 1e6])
def test_equal_rewards_give_exactly_zero_and_are_counted(value):
    result = group_advantages([[value] * 4, [1.0, 2.0, 3.0, 4.0]])
    assert (result.advantages[0] == 0).all() and (result.advantages[1] != 0).any()
    assert result.mask.all()
    assert result.zero_std_groups == 1


def test_float32_residue_of_equal_rewards_is_not_a_signal():
    rewards = torch.tensor([[0.6, 0.6, 0.6 + 6e-8, 0.6 - 6e-8], [3e4, 3e4, 3e4 + 2e-3, 3e4]], dtype=torch.float32)
    assert rewards[1].unique().numel() == 2  # the residue is there
    result = group_advantages(rewards)
    assert (result.advantages == 0).all()
    assert result.zero_std_groups == 2


def test_std_floor_is_relative_to_a_large_mean_only():
    pair = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)  # std 1
    for mean, std, flat in [(0.0, 0.99e-4, 1), (0.0, 1.01e-4, 0), (-50.0, 0.99 * 5e-3, 1), (-50.0, 1.01 * 5e-3, 0)]:
        assert group_advantages(mean + std * pair).zero_std_groups == flat


@pytest.mark.parametrize("bad", [NAN, INF, -INF, None])
def test_a_non_finite_reward_leaves_the_statistics_and_gets_no_gradient(bad):
    result = group_advantages([[1.0, bad, 2.0, 4.0], [1.0, 2.0, 3.0, 5.0]])
    without = group_advantages([[1.0, 2.0, 4.0]]).advantages[0]
    assert torch.equal(result.advantages[0, [0, 2, 3]], without)
    assert result.advantages[0, 1] == 0
    assert result.mask.tolist() == [[True, False, True, True], [True] * 4]
    assert (result.nonfinite, result.zero_std_groups, result.dropped_groups) == (1, 0, 0)


def test_groups_with_fewer_than_two_finite_rewards_are_dropped():
    result = group_advantages([[NAN, NAN, INF], [NAN, 2.0, NAN], [NAN, 2.0, 2.0], [NAN, 2.0, 3.0]])
    assert result.mask.tolist() == [[False] * 3, [False] * 3, [False, True, True], [False, True, True]]
    assert (result.advantages[:3] == 0).all() and (result.advantages[3, 1:] != 0).all()
    assert (result.nonfinite, result.zero_std_groups, result.dropped_groups) == (7, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_any_container_and_dtype(dtype):
    values = [[1, 2, 3, 6], [0, 0, 4, 8]]
    expected = group_advantages(np.array(values, dtype=np.float64)).advantages
    for rewards in (torch.tensor(values, dtype=dtype), values, [tuple(row) for row in values], np.float32(values)):
        result = group_advantages(rewards)
        assert result.advantages.dtype == torch.float64 and result.mask.dtype == torch.bool
        assert torch.equal(result.advantages, expected)


def test_the_rewards_are_left_alone():
    rewards = torch.tensor([[1.0, NAN, 3.0]], requires_grad=True)
    assert not group_advantages(rewards).advantages.requires_grad
    assert rewards[0, 1].isnan()


@pytest.mark.parametrize("rewards", [[1.0, 2.0], [[[1.0]]], [[1.0, 2.0], [3.0]], [["a", "b"]], torch.zeros(2, 0)])
def test_wrong_shapes_are_one_line(rewards):
    with pytest.raises(ValueError, match="rewards") as error:
        group_advantages(rewards)
    assert "\n" not in str(error.value)


@given(rewards_of_a_group)
def test_zero_mean_and_unit_std(rewards):
    result = group_advantages([rewards])
    advantages = result.advantages[0]
    assert advantages.sum().item() == pytest.approx(0.0, abs=1e-6)
    if result.zero_std_groups:
        assert (advantages == 0).all()
    else:
        # std + 1e-8 with std at least 1e-4: at most 1e-4 below 1
        assert advantages.std().item() == pytest.approx(1.0, abs=2e-4)


@given(rewards_of_a_group, st.floats(-50, 50), st.floats(0.1, 10))
def test_shift_and_scale_do_not_matter(rewards, shift, scale):
    values = torch.tensor([rewards], dtype=torch.float64)
    assume(values.std() > 0.1)
    base, moved = group_advantages(values).advantages, group_advantages(scale * values + shift).advantages
    torch.testing.assert_close(moved, base, rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(width=64), min_size=2, max_size=6))
@example([1e308, -1e308, 1.7e308, 0.0])
def test_advantages_are_finite_and_bounded_for_any_float(rewards):
    """By Cauchy-Schwarz no standardised value exceeds (G-1)/sqrt(G); rewards of 1e308 must not overflow."""
    result = group_advantages([rewards])
    assert result.advantages.isfinite().all()
    assert (result.advantages.abs() <= (len(rewards) - 1) / math.sqrt(len(rewards)) + 1e-9).all()
    assert (result.advantages[~result.mask] == 0).all()
    assert result.nonfinite == sum(not math.isfinite(r) for r in rewards)
    assert result.dropped_groups == int(len(rewards) - result.nonfinite < 2)


def test_huge_rewards_keep_their_order():
    assert torch.equal(group_advantages([[1e308, -1e308, 0.0]]).advantages, torch.tensor([[1.0, -1.0, 0.0]]).double())


@given(rewards_of_a_group, st.randoms(use_true_random=False))
def test_order_in_the_group_does_not_matter(rewards, random):
    order = list(range(len(rewards)))
    random.shuffle(order)
    base = group_advantages([rewards]).advantages[0]
    shuffled = group_advantages([[rewards[i] for i in order]]).advantages[0]
    torch.testing.assert_close(shuffled, base[order], rtol=1e-9, atol=1e-9)


def test_guard_stops_at_the_third_bad_iteration_running():
    guard = NonFiniteGuard()
    assert [guard.update(n, 8) for n in (5, 8, 4, 5, 5)] == [False] * 5  # exactly half is not more than half
    assert guard.update(5, 8)
    assert guard.update(8, 8)


def test_guard_survives_a_restart():
    guard = NonFiniteGuard()
    guard.update(8, 8), guard.update(8, 8)
    resumed = NonFiniteGuard()
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert resumed.update(8, 8)


def test_guard_refuses_impossible_counts():
    for nonfinite, total in ((9, 8), (-1, 8), (0, 0)):
        with pytest.raises(ValueError, match="non-finite rewards"):
            NonFiniteGuard().update(nonfinite, total)
