"""Noise is a function of what it is for: the same bits for every layout and order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.parallel import noise
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.rollout.policy import VideoShape
from megatron_sage.rollout.sampler import step_noise


@given(tokens=st.integers(1, 50), parts=st.integers(1, 8), channels=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_shards_of_any_layout_are_pieces_of_one_draw(tokens: int, parts: int, channels: int, seed: int) -> None:
    pieces = []
    for rank in range(parts):
        shape = VideoShape((1, 1, tokens), channels, TokenShard(tokens, parts, rank))
        pieces.append(step_noise(shape, [3, 5], seed, noise.ROLLOUT, 2, 7, torch.device("cpu")))
    whole = torch.cat(pieces)
    assert torch.equal(whole[:tokens], noise.token_noise(tokens, channels, [3, 5], seed, noise.ROLLOUT, 2, 7))
    assert not whole[tokens:].any()  # padding


def test_every_index_gives_other_noise() -> None:
    base = (4, noise.ROLLOUT, 1, 2, 3)  # seed, stream, group, sample, step
    draws = [noise.gaussian((64,), *base)]
    for place in range(len(base)):
        changed = list(base)
        changed[place] += 1
        draws.append(noise.gaussian((64,), *changed))
    draws.append(noise.gaussian((64,), 4, noise.ROLLOUT, 1, 2, noise.INITIAL))
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert not torch.equal(first, second)


def test_a_sample_does_not_depend_on_its_companions() -> None:
    both = noise.token_noise(9, 2, [0, 1], 1, noise.ROLLOUT, 0, 0)
    assert torch.equal(both[:, 1:], noise.token_noise(9, 2, [1], 1, noise.ROLLOUT, 0, 0))


def test_noise_is_standard_normal() -> None:
    draw = noise.gaussian((200_000,), 0, 0, 0)
    assert abs(draw.mean()) < 0.01 and abs(draw.std() - 1) < 0.01 and draw.dtype == torch.float32


def test_recorded_bits() -> None:
    """Recorded on purpose: a change of these numbers changes every run of every user."""
    found = noise.gaussian((3,), 7, noise.EVALUATION, 1, 2, 3)
    assert found.tolist() == [-1.3564878702163696, -1.1261305809020996, -1.1159148216247559]


def test_negative_indices_are_refused() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        noise.gaussian((1,), 0, 0, -1)
