import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.order import pair_order, split_updates


@given(st.integers(1, 6), st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True), st.integers(0, 2**32))
def test_every_pair_once_and_the_same_again(micro_batches, steps, seed):
    pairs = pair_order(micro_batches, steps, seed, 3)
    assert sorted(pairs) == sorted((batch, step) for batch in range(micro_batches) for step in steps)
    assert pairs == pair_order(micro_batches, steps, seed, 3)


def test_seed_and_iteration_both_change_the_order():
    steps = list(range(20))
    orders = [tuple(pair_order(2, steps, seed, iteration)) for seed in range(3) for iteration in range(3)]
    assert len(set(orders)) == 9


def test_without_permutation_in_order():
    assert pair_order(2, [0, 1, 4], 0, 0, permute=False) == [(0, 0), (0, 1), (0, 4), (1, 0), (1, 1), (1, 4)]


@given(st.integers(1, 60), st.data())
def test_split_keeps_the_order_and_is_as_equal_as_possible(count, data):
    pairs = list(range(count))
    parts = data.draw(st.integers(1, count))
    updates = split_updates(pairs, parts)
    assert len(updates) == parts
    assert [pair for update in updates for pair in update] == pairs
    sizes = [len(update) for update in updates]
    assert max(sizes) - min(sizes) <= 1


def test_bad_arguments_are_one_line():
    cases = [
        ("updates_per_rollout is 0", lambda: split_updates([1, 2], 0)),
        ("updates_per_rollout is 3", lambda: split_updates([1, 2], 3)),
        ("trained steps", lambda: pair_order(2, [], 0, 0)),
        ("0 micro-batches", lambda: pair_order(0, [1], 0, 0)),
        ("seed is -1", lambda: pair_order(1, [1], -1, 0)),
    ]
    for word, case in cases:
        with pytest.raises(ValueError, match=word) as error:
            case()
        assert "\n" not in str(error.value)
