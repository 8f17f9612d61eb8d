"""Log-probabilities of sharded latents: the same number on every rank, the whole loss's gradient on each shard.

Runs before the first update cannot show a missing sum: there the ratio is 1 whatever both log-probabilities are.
"""

import pytest
import torch

from tests.parallel.pool import run_on_ranks

TOKENS, SAMPLES, CHANNELS, STD = 15, 3, 4, 0.3  # 15 tokens: padding on 2 and on 4 ranks


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, TOKENS, SAMPLES, CHANNELS, generator=generator).unbind(0)


def sharded_log_prob() -> tuple[torch.Tensor, torch.Tensor]:
    """log p of every sample and the gradient of its weighted sum, this rank's tokens."""
    import torch.distributed as dist

    from megatron_sage.parallel.groups import initialize
    from megatron_sage.parallel.sequence import TokenShard
    from megatron_sage.rollout.policy import VideoShape
    from megatron_sage.rollout.sampler import transition_log_prob

    groups = initialize(tensor=dist.get_world_size())
    shard = TokenShard(TOKENS, groups.tp_size, groups.tp_rank)
    shape = VideoShape((1, 3, 5), CHANNELS, shard)
    x_SBC, mean_SBC = (shard.shard(whole) for whole in tensors())
    mean_SBC.requires_grad_()
    log_prob_B = transition_log_prob(x_SBC, mean_SBC, STD, shape, groups.tp)
    (log_prob_B * torch.arange(1, SAMPLES + 1)).sum().backward()
    assert mean_SBC.grad is not None
    return log_prob_B.detach(), mean_SBC.grad[: shard.valid]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sharded_log_probability_is_the_whole_one(ranks: int) -> None:
    x_SBC, mean_SBC = tensors()
    mean_SBC = mean_SBC.clone().requires_grad_()
    expected_B = torch.distributions.Normal(mean_SBC, STD).log_prob(x_SBC).mean(dim=(0, 2))
    (expected_B * torch.arange(1, SAMPLES + 1)).sum().backward()
    found = run_on_ranks(ranks, "tests.parallel.test_log_prob:sharded_log_prob")
    for log_prob_B, _ in found:
        torch.testing.assert_close(log_prob_B, expected_B.detach().double(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([shard for _, shard in found])
    torch.testing.assert_close(gradient, mean_SBC.grad, rtol=1e-5, atol=1e-7)
