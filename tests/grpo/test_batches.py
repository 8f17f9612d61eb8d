"""Pairs of a rollout in batches that share a key: nothing lost, nothing moved but to its batch."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.order import batch_pairs, pair_order, split_updates

# (index, key): the index tells items of one key apart
items = st.lists(st.integers(0, 4), max_size=40).map(lambda keys: list(enumerate(keys)))
sizes = st.integers(1, 8)


def _key(item: tuple[int, int]) -> int:
    return item[1]


@given(items, sizes)
def test_batches_are_a_partition_of_one_key_each_and_never_too_large(pairs, size):
    batches = batch_pairs(pairs, _key, size)
    assert Counter(pair for batch in batches for pair in batch) == Counter(pairs)
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({_key(pair) for pair in batch}) == 1


@given(items, sizes)
def test_first_pairs_keep_their_order_and_so_do_the_pairs_of_a_key(pairs, size):
    batches = batch_pairs(pairs, _key, size)
    firsts = [batch[0] for batch in batches]
    assert firsts == sorted(firsts)
    for key in range(5):
        assert [pair for batch in batches for pair in batch if pair[1] == key] == [p for p in pairs if p[1] == key]


@given(items, sizes)
def test_there_are_as_few_batches_as_the_size_allows(pairs, size):
    """All batches of a key are full but its last."""
    batches = batch_pairs(pairs, _key, size)
    of_key = Counter(_key(batch[0]) for batch in batches)
    assert of_key == {key: -(-count // size) for key, count in Counter(map(_key, pairs)).items()}


@given(items)
def test_size_one_keeps_the_order(pairs):
    assert batch_pairs(pairs, _key, 1) == [[pair] for pair in pairs]


@given(items)
def test_a_key_for_each_pair_keeps_the_order_and_one_key_cuts_it(pairs):
    assert batch_pairs(pairs, lambda pair: pair, 4) == [[pair] for pair in pairs]
    assert batch_pairs(pairs, lambda pair: None, 4) == [pairs[i : i + 4] for i in range(0, len(pairs), 4)]


def test_known_batches():
    """a has three pairs, so a full batch and one more, which opens where its pair stood."""
    batches = batch_pairs(["a1", "b1", "a2", "b2", "a3", "c1"], lambda pair: pair[0], 2)
    assert batches == [["a1", "a2"], ["b1", "b2"], ["a3"], ["c1"]]


def test_pairs_of_one_group_share_a_batch_across_micro_batches_and_steps():
    """As in training: four micro-batches of two groups, shuffled pairs of an update, batched by group."""
    for update in split_updates(pair_order(4, [0, 2, 5], seed=3, iteration=1), 2):
        batches = batch_pairs(update, lambda pair: pair[0] // 2, 3)
        assert sorted(pair for batch in batches for pair in batch) == sorted(update)
        assert all(len({micro_batch // 2 for micro_batch, _ in batch}) == 1 for batch in batches)


def test_the_input_is_left_alone_and_each_call_makes_its_own_lists():
    pairs = [("a", 0), ("a", 1)]
    first = batch_pairs(pairs, lambda pair: pair[0], 2)
    first[0].append(("a", 2))
    assert pairs == [("a", 0), ("a", 1)]
    assert batch_pairs(pairs, lambda pair: pair[0], 2) == [[("a", 0), ("a", 1)]]


@pytest.mark.parametrize("size", [0, -1])
def test_a_bad_size_is_one_line(size):
    with pytest.raises(ValueError, match=f"size is {size}") as error:
        batch_pairs([1], lambda pair: pair, size)
    assert "\n" not in str(error.value)
