"""Ours at TP=1 against diffusers, fp32 and bf16."""

import pytest

from megatron_sage.parallel.groups import Groups
from tests.model.parity import Case, assert_parity, measure, reference

CASES = {
    "text-to-video": Case(),
    "image-to-video": Case(image_to_video=True),
    "ragged": Case(qwen=(7, 1, 4), byt5=(0, 5, 2)),
    "ragged image-to-video": Case(qwen=(2, 5), byt5=(4, 0), image_to_video=True),
    "odd tokens, no glyph text": Case(grid=(3, 3, 5), qwen=(5, 5), byt5=(0, 0)),
    "MeanFlow": Case(meanflow=True, qwen=(3, 9)),
    "16 heads": Case(heads=16, head_dim=8, layers=4, meanflow=True, image_to_video=True),
    "one video token": Case(grid=(1, 1, 1), qwen=(2,), byt5=(0,)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(one_rank: Groups, name: str) -> None:
    output, gradients = measure(one_rank, CASES[name], reference(CASES[name]))
    assert_parity(output, gradients)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(one_rank: Groups, recompute: str) -> None:
    case = CASES["ragged image-to-video"]
    assert_parity(*measure(one_rank, case, reference(case), recompute=recompute))
