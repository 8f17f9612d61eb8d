"""sharded_state_dict: every element of every tensor is written by exactly one rank, whatever the layout."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.parallel.groups import initialize
from tests.model.parity import Case, build
from tests.parallel.pool import run_on_ranks

CASE = Case(meanflow=True)


def shards(tensor: int) -> dict[str, Any]:
    groups = initialize(tensor=tensor)
    sharded = build(CASE, groups, sequence_parallel=True).sharded_state_dict()
    return {
        key: (item.global_shape, item.global_offset, tuple(item.data.shape), item.replica_id)
        for key, item in sharded.items()
    }


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_each_element_has_one_owner(tensor: int) -> None:
    ranks = run_on_ranks(4, "tests.parallel.test_checkpoint_layout:shards", tensor=tensor)
    shapes = KeyMap.from_config(CASE.config()).shapes("ours")
    written = defaultdict(list)
    for rank in ranks:
        assert set(rank) == set(shapes)
        for key, (global_shape, offset, shape, replica) in rank.items():
            assert global_shape == shapes[key]
            if not any(replica if isinstance(replica, tuple) else (replica,)):
                written[key].append((offset, shape))
    for key, pieces in written.items():
        owners = torch.zeros(shapes[key])
        for offset, shape in pieces:
            owners[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] += 1
        assert bool((owners == 1).all()), key
    assert set(written) == set(shapes)
