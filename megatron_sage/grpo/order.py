"""In which order a rollout's (micro-batch, step) pairs are trained on, and how they are split into optimizer steps."""

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def pair_order(
    micro_batches: int, steps: Sequence[int], seed: int, iteration: int, permute: bool = True
) -> list[tuple[int, int]]:
    """Every (micro-batch, step) pair once, shuffled when ``permute``.

    A function of ``seed`` and ``iteration`` only, so every rank of a model replica takes the same forward at the same
    time and a resumed run continues with the same order. ``steps`` are the trained steps (std above 0).
    """
    if micro_batches < 1 or not steps:
        raise ValueError(f"{micro_batches} micro-batches, {len(steps)} trained steps: need at least one of each")
    if seed < 0 or iteration < 0:
        raise ValueError(f"seed is {seed}, iteration is {iteration}: neither may be negative")
    pairs = [(batch, step) for batch in range(micro_batches) for step in steps]
    if not permute:
        return pairs
    return [pairs[i] for i in np.random.default_rng([seed, iteration]).permutation(len(pairs))]


def split_updates(pairs: Sequence[Item], updates_per_rollout: int) -> list[list[Item]]:
    """``pairs`` in order, cut into ``updates_per_rollout`` optimizer steps whose sizes differ by at most one."""
    if not 1 <= updates_per_rollout <= len(pairs):
        raise ValueError(
            f"updates_per_rollout is {updates_per_rollout}: it must be between 1 and the {len(pairs)}"
            " (micro-batch, step) pairs of a rollout"
        )
    cuts = [i * len(pairs) // updates_per_rollout for i in range(updates_per_rollout + 1)]
    return [list(pairs[start:end]) for start, end in pairwise(cuts)]


def batch_pairs(pairs: Sequence[Item], key: Callable[[Item], Hashable], size: int) -> list[list[Item]]:
    """``pairs`` in batches of at most ``size`` that share a ``key`` (one prompt: one text length, so no mask).

    A batch takes the place of its first pair. With size 1 the order stays as it is.
    """
    if size < 1:
        raise ValueError(f"size is {size}: a batch holds at least one pair")
    batches: list[list[Item]] = []
    open_batches: dict[Hashable, list[Item]] = {}
    for pair in pairs:
        batch = open_batches.get(key(pair))
        if batch is None or len(batch) == size:
            batch = open_batches[key(pair)] = []
            batches.append(batch)
        batch.append(pair)
    return batches
