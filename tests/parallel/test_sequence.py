"""TokenShard: its laws, and gathering over real ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.parallel.groups import initialize
from megatron_sage.parallel.sequence import TokenShard, gather, pad_tokens
from tests.parallel.pool import run_on_ranks

sizes = st.integers(0, 70)
parts = st.integers(1, 9)


def shards(num_tokens: int, parts: int) -> list[TokenShard]:
    return [TokenShard(num_tokens, parts, rank) for rank in range(parts)]


@given(num_tokens=sizes, parts=parts)
def test_shards_tile_the_padded_sequence(num_tokens: int, parts: int) -> None:
    ranks = shards(num_tokens, parts)
    assert {shard.padded for shard in ranks} == {ranks[0].local * parts}
    assert num_tokens <= ranks[0].padded < num_tokens + parts
    assert [shard.start for shard in ranks] == [rank * ranks[0].local for rank in range(parts)]
    assert sum(shard.valid for shard in ranks) == num_tokens


@given(num_tokens=sizes, parts=parts)
def test_shards_put_together_are_the_tokens_and_zeros(num_tokens: int, parts: int) -> None:
    tokens = torch.arange(1, num_tokens + 1)
    ranks = shards(num_tokens, parts)
    whole = torch.cat([shard.shard(tokens) for shard in ranks])
    mask = torch.cat([shard.mask() for shard in ranks])
    assert torch.equal(whole[:num_tokens], tokens)
    assert not whole[num_tokens:].any()
    assert torch.equal(mask, whole > 0)


@given(num_tokens=sizes, parts=parts, dim=st.integers(-3, 2))
def test_any_dimension_can_be_the_tokens(num_tokens: int, parts: int, dim: int) -> None:
    tokens = torch.randn(num_tokens, 2, 3)
    for shard in shards(num_tokens, parts):
        expected = shard.shard(tokens).movedim(0, dim)
        assert torch.equal(shard.shard(tokens.movedim(0, dim), dim=dim), expected)


def test_nothing_is_copied_where_nothing_is_missing() -> None:
    tokens = torch.randn(4, 2)
    assert pad_tokens(tokens, 4) is tokens
    assert TokenShard(4, 2, 1).shard(tokens).data_ptr() == tokens[2:].data_ptr()


@pytest.mark.parametrize("arguments", [(-1, 2, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1)])
def test_impossible_shards_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="TokenShard"):
        TokenShard(*arguments)


def test_a_tensor_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dimension 1 of a tensor \(2, 5\) should hold 6 tokens"):
        TokenShard(6, 2, 0).shard(torch.zeros(2, 5), dim=1)


def gather_sizes(sizes: list[int], dim: int) -> list[bool]:
    groups = initialize(tensor=torch.distributed.get_world_size())
    equal = []
    for num_tokens in sizes:
        shard = TokenShard(num_tokens, groups.tp_size, groups.tp_rank)
        whole = torch.randn(num_tokens, 2, 3, generator=torch.Generator().manual_seed(num_tokens)).movedim(0, dim)
        equal.append(torch.equal(gather(shard.shard(whole, dim), shard, groups.tp, dim), whole))
    return equal


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_gather_undoes_shard(world_size: int, dim: int) -> None:
    for rank in run_on_ranks(world_size, "tests.parallel.test_sequence:gather_sizes", sizes=[1, 2, 6, 7], dim=dim):
        assert all(rank)
