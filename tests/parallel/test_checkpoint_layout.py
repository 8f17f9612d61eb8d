"""sharded_state_dict: every element of every tensor is written by exactly one rank, whatever the layout."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.parallel.groups import initialize
from tests.model.parity import Case, build_stage
from tests.parallel.pool import run_on_ranks

CASE = Case(meanflow=True, layers=4)


def shards(tensor: int, context: int, pipeline: int, virtual: int | None) -> list[tuple[str, Any, Any, Any, Any]]:
    groups = initialize(tensor=tensor, context=context, pipeline=pipeline, virtual_pipeline=virtual)
    chunks = build_stage(CASE, groups, sequence_parallel=True, virtual_pipeline=virtual)
    return [
        (key, item.global_shape, item.global_offset, tuple(item.data.shape), item.replica_id)
        for chunk in chunks
        for key, item in chunk.sharded_state_dict().items()
    ]


LAYOUTS = [(1, 1, 1, None), (2, 1, 1, None), (4, 1, 1, None), (1, 2, 2, None), (2, 1, 2, None), (1, 2, 2, 2)]


@pytest.mark.parametrize(("tensor", "context", "pipeline", "virtual"), LAYOUTS)
def test_each_element_has_one_owner(tensor: int, context: int, pipeline: int, virtual: int | None) -> None:
    function = "tests.parallel.test_checkpoint_layout:shards"
    ranks = run_on_ranks(4, function, tensor=tensor, context=context, pipeline=pipeline, virtual=virtual)
    shapes = KeyMap.from_config(CASE.config()).shapes("ours")
    written = defaultdict(list)
    for rank in ranks:
        assert pipeline > 1 or {key for key, *_ in rank} == set(shapes)
        for key, global_shape, offset, shape, replica in rank:
            assert global_shape == shapes[key]
            if not any(replica if isinstance(replica, tuple) else (replica,)):
                written[key].append((offset, shape))
    for key, pieces in written.items():
        owners = torch.zeros(shapes[key])
        for offset, shape in pieces:
            owners[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] += 1
        assert bool((owners == 1).all()), key
    assert set(written) == set(shapes)
