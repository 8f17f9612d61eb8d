"""Ours at TP=1 against diffusers, fp32 and bf16."""

import random

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


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    batch = draw.randint(1, 3)
    return Case(
        grid=(draw.randint(1, 4), draw.randint(1, 5), draw.randint(1, 5)),
        qwen=tuple(draw.randint(2, 9) for _ in range(batch)),
        byt5=tuple(draw.randint(0, 4) for _ in range(batch)),
        image=draw.randint(1, 6),
        image_to_video=draw.random() < 0.5,
        meanflow=draw.random() < 0.5,
        heads=draw.randint(1, 5),
        head_dim=8 * draw.randint(1, 3),
        layers=draw.randint(1, 3),
        timesteps=tuple(draw.uniform(0, 1000) for _ in range(3)),
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_sizes(one_rank: Groups, seed: int) -> None:
    case = random_case(seed)
    assert_parity(*measure(one_rank, case, reference(case)))
