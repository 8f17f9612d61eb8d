"""Bytes that autograd keeps on a rank: the video part divided by TP x CP, the text part by TP."""

from typing import Any

import pytest
import torch

from megatron_sage.parallel.kept import KeptBytes
from megatron_sage.planning.activations import SavedBytes
from tests.model.parity import Case
from tests.parallel.pool import run_on_ranks

SIZES = {"heads": 16, "head_dim": 8, "layers": 5}
GRID, WORDS = (5, 12, 13), (30, 10)  # 780 video tokens, 40 text tokens


def case(grid: tuple[int, int, int] = GRID, words: tuple[int, int] = WORDS) -> Case:
    return Case(grid=grid, qwen=words[:1] * 2, byt5=words[1:] * 2, timesteps=(500.0, 20.0), **SIZES)


def saved_bytes(
    case: Case, tensor: int = 1, context: int = 1, pipeline: int = 1, embedders: bool = False, **options: Any
) -> int:
    """Storages that a forward through this rank's stage keeps, each once; parameters and texts are not counted.

    `embedders`: with what embeds the text; else the blocks and the ends alone.
    """
    from megatron_sage.model.conditions import TextCondition
    from megatron_sage.parallel.groups import initialize
    from tests.model.parity import build_stage, random_inputs, tokens

    groups = initialize(tensor=tensor, context=context, pipeline=pipeline)
    (chunk,) = build_stage(case, groups, sequence_parallel=True, **options)
    inputs = random_inputs(case)
    words = (
        inputs["encoder_hidden_states"][:1, : case.qwen[0]],
        inputs["encoder_hidden_states_2"][:1, : case.byt5[0]],
        inputs["image_embeds"][:1, : case.image if case.image_to_video else 0],
    )
    text = TextCondition(*(x.to(chunk.config.params_dtype) for x in words))
    shard = chunk.image_shard(case.grid)
    # a copy: a slice would keep the whole video's storage
    video = shard.shard(tokens(inputs["hidden_states"])).clone() if chunk.pre_process else None
    packed = None
    if not chunk.pre_process:
        size = (chunk.packed_tokens(text, case.grid), case.batch, chunk.config.hidden_size)
        packed = torch.zeros(size, requires_grad=True)
    known = (*chunk.parameters(), text.qwen_BLD, text.byt5_BLD, text.image_BLD)
    embedded = chunk.embed(text, inputs["timestep"]) if chunk.pre_process and not embedders else None
    with KeptBytes(known) as kept:
        out = chunk(video, inputs["timestep"], text, case.grid, packed_SBH=packed, embedded_LBH=embedded)
    assert out.requires_grad
    return kept.total


def measured(ranks: int, **arguments: Any) -> list[int]:
    return run_on_ranks(ranks, "tests.parallel.test_activations:saved_bytes", **arguments)


@pytest.fixture(scope="module")
def single() -> SavedBytes:
    sizes = [case(), case(grid=(10, 12, 13)), case(words=(60, 20))]
    found = tuple(measured(1, case=size)[0] for size in sizes)
    return SavedBytes.fit((780, 1560), (40, 80), found)


def test_the_single_process_is_linear_in_both_token_counts(single: SavedBytes) -> None:
    (found,) = measured(1, case=case(grid=(7, 12, 13), words=(45, 3)))
    assert found == pytest.approx(single.on_rank(7 * 12 * 13, 48), rel=0.005)


@pytest.mark.parametrize(
    ("tensor", "context", "options"),
    [
        (2, 1, {}),
        pytest.param(4, 1, {}, marks=pytest.mark.nightly),
        (1, 2, {"context_backend": "ulysses"}),
        (1, 2, {"context_backend": "allgather"}),
        (1, 4, {"context_backend": "ulysses"}),
        (1, 4, {"context_backend": "allgather"}),
        (2, 2, {"context_backend": "ulysses"}),
        (2, 2, {"context_backend": "allgather"}),
    ],
    ids=str,
)
def test_a_rank_keeps_its_share(single: SavedBytes, tensor: int, context: int, options: dict[str, Any]) -> None:
    """Ulysses keeps one tensor in 17 more: attention's result before and after the exchange of heads for tokens."""
    expected = single.on_rank(780, 40, tensor, context)
    found = measured(tensor * context, case=case(), tensor=tensor, context=context, **options)
    exchanged = options.get("context_backend") == "ulysses"
    assert found == [pytest.approx(expected, rel=0.075 if exchanged else 0.05)] * len(found)


@pytest.mark.parametrize("pipeline", [2, 4])
def test_the_stages_together_keep_what_one_process_keeps(single: SavedBytes, pipeline: int) -> None:
    found = measured(pipeline, case=case(), pipeline=pipeline)
    assert sum(found) == pytest.approx(single.on_rank(780, 40), rel=0.05)
    assert max(found) <= 1.05 * single.on_rank(780, 40, share_of_blocks=(5 // pipeline + 1) / 5)
