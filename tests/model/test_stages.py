"""How the blocks are cut into pipeline stages, and who owns which parameter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.errors import UserError
from megatron_sage.model.stages import TIME_EMBEDDER, balanced_layout, blocks_of_stages, owner, parse_layout
from tests.model.parity import Case
from tests.parallel.pool import run_on_ranks

CASE = Case(layers=5, meanflow=True)


def counts(rows: list[list[str]]) -> list[int]:
    return [row.count("decoder") for row in rows]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 60))
def test_any_number_of_blocks_is_spread_evenly(pipeline: int, virtual: int, more: int) -> None:
    stages = pipeline * virtual
    rows = balanced_layout(stages + more, pipeline, virtual)
    found = counts(rows)
    assert len(rows) == stages and sum(found) == stages + more and max(found) - min(found) <= 1
    assert rows[0][0] == "embedding" and rows[-1][-1] == "loss"
    if stages > 2:
        assert max(found[0], found[-1]) <= max(found[1:-1])
    if pipeline > 1:
        layout = PipelineParallelLayerLayout(rows, pipeline)
        layout.validate_layer_layout(stages + more, None)
        blocks = blocks_of_stages(layout, stages + more)
        virtual_stages = [blocks[rank][chunk] for chunk in range(virtual) for rank in range(pipeline)]
        assert [index for part in virtual_stages for index in part] == list(range(stages + more))


def test_the_released_model_s_54_blocks() -> None:
    assert counts(balanced_layout(54, 4)) == [13, 14, 14, 13]
    assert counts(balanced_layout(54, 8)) == [6, 7, 7, 7, 7, 7, 7, 6]
    assert counts(balanced_layout(5, 2)) == [2, 3]


def test_megatrons_notation() -> None:
    rows = parse_layout("Et*13|(t*14|)*2t*13L", 54, 4, None)
    assert counts(rows) == [13, 14, 14, 13] and rows[0][0] == "embedding" and rows[-1][-1] == "loss"
    assert counts(parse_layout("E|tt|t|ttL", 5, 2, 2)) == [0, 2, 1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Et|tmL", "embedders (E), blocks (t) and a final layer (L) only"),
        ("Et|tL", "holds 2 blocks, the model has 5"),
        ("tE|t*4L", "must start with the only E"),
        ("Et*5|", "must start with the only E and end with the only L"),
        ("Et*5L", "1 parts between the bars, expected 2 stages"),
        ("Ex|t*5L", "not a layout"),
    ],
)
def test_what_is_no_layout_of_this_model(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_layout(text, 5, 2, None)
    assert str(caught.value).startswith(f"parallel.pipeline_layout={text}") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def stage_on_rank(virtual: int | None) -> list[dict[str, tuple[bool, bool, bool]]]:
    """Of each chunk: parameter -> (trained, summed over the pipeline, counted elsewhere)."""
    import torch.distributed as dist

    from megatron_sage.parallel.groups import initialize
    from tests.model.parity import build_stage

    groups = initialize(pipeline=dist.get_world_size(), virtual_pipeline=virtual)
    return [
        {
            name: (p.requires_grad, getattr(p, "pipeline_parallel", False), getattr(p, "shared", False))
            for name, p in chunk.named_parameters()
        }
        for chunk in build_stage(CASE, groups, virtual_pipeline=virtual)
    ]


@pytest.mark.parametrize(("ranks", "virtual"), [(2, None), pytest.param(4, None, marks=pytest.mark.nightly), (2, 2)])
def test_stages_hold_the_model_once_and_the_timestep_s_embedder_each(ranks: int, virtual: int | None) -> None:
    stages = run_on_ranks(ranks, "tests.model.test_stages:stage_on_rank", virtual=virtual)
    whole = set(KeyMap.from_config(CASE.config()).shapes("ours"))
    held = [(rank, name) for rank, chunks in enumerate(stages) for chunk in chunks for name in chunk]
    once = [name for _, name in held if not name.startswith(TIME_EMBEDDER)]
    assert len(once) == len(set(once)) and {name for _, name in held} == whole
    layout = PipelineParallelLayerLayout(balanced_layout(5, ranks, virtual or 1), ranks)
    blocks = blocks_of_stages(layout, 5)
    assert all(owner(name, blocks) == rank for rank, name in held if not name.startswith(TIME_EMBEDDER))
    counted = 0
    for chunks in stages:
        for chunk in chunks:
            assert any(name.startswith(TIME_EMBEDDER) for name in chunk)
            for name, (trained, summed, elsewhere) in chunk.items():
                assert summed == name.startswith(TIME_EMBEDDER)
                counted += summed and not elsewhere
                unused = ("ff_context", "txt_proj", "txt_q_layernorm")
                frozen = name.startswith("transformer_blocks.4.") and any(part in name for part in unused)
                assert trained == (not frozen), name
    assert counted == sum(name.startswith(TIME_EMBEDDER) for name in whole)
