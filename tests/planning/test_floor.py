"""The floor of the traffic: what is moved is above it by named terms only, and by 2 % at most at real sizes."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.planning.floor import (
    Setting,
    excess,
    floor_block,
    floor_forward,
    floor_micro_batch,
    floor_phases,
    moved_phases,
    sent,
)
from megatron_sage.planning.flops import Text
from megatron_sage.planning.traffic import Place, forward_only, micro_batch
from megatron_sage.planning.wires import Wires
from megatron_sage.planning.workload import Workload


def place_of(**options: Any) -> Place:
    """Stage 0 of a model of 16 heads and 6 blocks, 960 video tokens."""
    layers = options.pop("layers", 6)
    stage, tokens, batch = options.pop("stage", 0), options.pop("tokens", 960), options.pop("batch", 1)
    data, distributed = options.pop("data", 1), options.pop("distributed", False)
    options.setdefault("sequence_parallel", True)
    config = HunyuanVideoConfig.from_diffusers({"num_layers": layers}, dtype=torch.bfloat16, **options)
    return Place(config, stage, tokens, batch, data, None, distributed)


def work_of(grid: tuple[int, int, int], texts: tuple[int, int], **changes: Any) -> Workload:
    both = tuple(Text(n) for n in texts)
    base = Workload(
        grid=grid, groups=2, flights=8, batch=1, steps=20, trained=20, kept=21, rollout_texts=both, training_texts=both,
        updates=1, replay=1, references=("moving",), adapters_off=False, keeps_velocity=False, loss_terms=2,
        reference_in_training=False, anchor_interval=10, prompts=4,
    )  # fmt: skip
    return replace(base, **changes)


def test_one_block_by_hand() -> None:
    """1000 video and 10 text tokens of 2048 bf16 channels over two ranks: rows of 4096 bytes."""
    place = place_of(tensor=2, tokens=1000)
    forward, backward = floor_block(place, 10, last=False)
    assert forward == {("all_gather", "tp"): 2020 * 4096, ("reduce_scatter", "tp"): 2020 * 4096}
    assert backward == {("all_gather", "tp"): 4040 * 4096, ("reduce_scatter", "tp"): 2020 * 4096}
    forward, backward = floor_block(place, 10, last=True, gathers_again=False)
    assert forward == {("all_gather", "tp"): 2010 * 4096, ("reduce_scatter", "tp"): 2000 * 4096}
    assert backward == {("all_gather", "tp"): 2000 * 4096, ("reduce_scatter", "tp"): 2010 * 4096}
    place = place_of(tensor=2, context=4, tokens=1000, context_backend="ulysses")
    assert floor_block(place, 10, last=False)[0]["all_to_all", "cp"] == (4 * 250 + 10) * 2048
    place = place_of(tensor=8, context=4, tokens=1000)
    for traffic in floor_block(place, 10, last=False):
        assert traffic["all_gather", "cp"] == 2 * 1000 * 512


@pytest.mark.parametrize("seed", range(8))
def test_where_all_divides_only_modulation_and_scalars_are_above(seed: int) -> None:
    draw = random.Random(seed)
    tensor, context = draw.choice([(2, 1), (4, 2), (8, 1), (8, 2)])
    batch, layers, stages = draw.randint(1, 3), draw.randint(4, 9), draw.choice([1, 2])
    recompute = draw.choice(["none", "full", "selective"])
    tokens = draw.randint(3, 60) * tensor * context
    texts = [draw.randint(1, 20) * tensor, tensor]
    for stage in range(stages):
        place = place_of(
            tensor=tensor, context=context, pipeline=stages, stage=stage, layers=layers, tokens=tokens, batch=batch,
            recompute=recompute,
        )  # fmt: skip
        place = replace(place, times=draw.choice([1, place.batch]))
        blocks, row = len(place.config.stage_blocks[stage][0]), place.times * 2048 * 2
        for text in texts:
            above = Counter(forward_only(place, text))
            above.subtract({k: v for k, v in floor_forward(place, text).items() if k[0] != "send"})
            assert {k: v for k, v in above.items() if v} == {("all_gather", "tp"): 12 * row * blocks}
        above = Counter(micro_batch(place, texts, loss_terms=2))
        above.subtract(floor_micro_batch(place, texts))
        first = 12 * row * blocks * 2 * (2 if recompute == "full" else 1)  # twice: both branches
        expected = {("all_gather", "tp"): first, ("reduce_scatter", "tp"): 12 * row * blocks * 2}
        expected["all_reduce", "tp"] = row * 2 + (2 * row * 2 if stage == stages - 1 else 0)
        if stage == stages - 1:
            expected["all_reduce", "tp_cp"] = 2 * 8 * batch
        assert {k: v for k, v in above.items() if v} == expected


def random_layouts(number: int) -> list[tuple[dict[str, Any], int, tuple[int, int, int], tuple[int, int]]]:
    """Of the released model, at 480p and above."""
    draw, found = random.Random(7), []
    while len(found) < number:
        tensor, context = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 4, 8])
        layout = {
            "tensor": tensor, "context": context, "pipeline": draw.choice([1, 2, 3, 4, 6]),
            "sequence_parallel": draw.random() < 0.8, "recompute": draw.choice(["none", "selective", "full"]),
            "layers": 54, "distributed": draw.random() < 0.5,
        }  # fmt: skip
        grid = (draw.randint(16, 31), draw.randint(30, 45), draw.randint(53, 80))
        found.append((layout, draw.choice([1, 2, 4, 8]), grid, (draw.randint(20, 1000), draw.randint(1, 6))))
    return found


@pytest.mark.parametrize(("layout", "data", "grid", "texts"), random_layouts(12))
def test_at_real_sizes_at_most_two_percent_above(
    layout: dict[str, Any], data: int, grid: tuple[int, int, int], texts: tuple[int, int]
) -> None:
    tokens, work = grid[0] * grid[1] * grid[2], work_of(grid, texts)
    wires = Wires(layout["tensor"], layout["context"], data, layout["pipeline"], 8)
    totals = [0.0, 0.0]
    for stage in range(layout["pipeline"]):
        place, setting = place_of(**layout, stage=stage, tokens=tokens, data=data), Setting()
        moved, least = moved_phases(place, work, setting), floor_phases(place, work, setting)
        above = {name: sent(moved[name], wires) - sent(least[name], wires) for name in moved}
        assert min(above.values()) >= 0, above
        reasons = excess(place, work, setting, wires)
        assert sum(reasons.values()) == pytest.approx(sum(above.values()), rel=1e-6, abs=1e6)
        assert min(reasons.values()) >= -1e6  # rounded bytes of some 1e14
        totals[0] += sum(sent(traffic, wires) for traffic in moved.values())
        totals[1] += sum(sent(traffic, wires) for traffic in least.values())
    assert totals[0] <= 1.02 * totals[1]


def test_what_the_second_gather_costs() -> None:
    """Of training at TP with `full`, a seventh."""
    place = place_of(tensor=8, recompute="full", tokens=33390, layers=54)
    one, bare = (floor_micro_batch(place, [300], gathers_again) for gathers_again in (True, False))
    ratio = sum(one.values()) / sum(bare.values())
    assert ratio == pytest.approx(7 / 6, rel=2e-3)  # 4 gathers, 3 scatters of 2 S r; without: 3 and 3
