"""The table against diffusers' and our own parameter lists, and the algebra of its rules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sage.checkpoint.keymap import Binding, KeyMap
from megatron_sage.checkpoint.rules import Rule
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.groups import Groups
from tests.checkpoint.synthetic import official_from_diffusers, random_tensors, tiny_config

CONFIGS = {
    "tiny": tiny_config(),
    "MeanFlow": tiny_config(use_meanflow=True),
    "one block each": tiny_config(num_layers=1, num_refiner_layers=1),
    "other widths": tiny_config(num_layers=3, num_refiner_layers=1, mlp_ratio=2.5, in_channels=9, out_channels=4),
}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_describes_diffusers(name: str) -> None:
    from diffusers import HunyuanVideo15Transformer3DModel

    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel.from_config(CONFIGS[name])
    assert KeyMap.from_config(CONFIGS[name]).shapes("diffusers") == shapes_of(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_describes_our_model(one_rank: Groups, name: str) -> None:
    model = HunyuanVideoDiT(HunyuanVideoConfig.from_diffusers(CONFIGS[name]), one_rank.collection)
    assert KeyMap.from_config(CONFIGS[name]).shapes("ours") == shapes_of(model)
    sharded = {item.key: tuple(item.global_shape) for item in model.sharded_state_dict().values()}
    assert KeyMap.from_config(CONFIGS[name]).shapes("ours") == sharded


@pytest.mark.parametrize(("meanflow", "diffusers", "official"), [(True, 1805, 1797), (False, 1801, 1793)])
def test_released_size(meanflow: bool, diffusers: int, official: int) -> None:
    """54 blocks at full width: the numbers of tensors and of parameters of the two code bases."""
    keymap = KeyMap.from_config(HunyuanVideoConfig.from_diffusers({"use_meanflow": meanflow}).to_diffusers())
    assert len(keymap.shapes("diffusers")) == diffusers
    assert len(keymap.shapes("official")) == official
    expected = 8_331_330_848 if meanflow else 8_326_608_160
    for layout in ("ours", "diffusers", "official"):
        assert sum(math.prod(shape) for shape in keymap.shapes(layout).values()) == expected
    special = [b for b in keymap.bindings if b.official_rule is not Rule.IDENTITY]
    assert sum(len(b.diffusers) for b in special) == 14


@pytest.mark.parametrize("meanflow", [False, True])
def test_official_equals_renaming_by_hand(meanflow: bool) -> None:
    config = tiny_config(use_meanflow=meanflow)
    tensors = random_tensors(config)
    expected = official_from_diffusers(tensors)
    found = {}
    for binding in KeyMap.from_config(config).bindings:
        parts = [tensors[name] for name in binding.diffusers]
        found |= dict(zip(binding.official, binding.convert(parts, "diffusers", "official"), strict=True))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def binding_of(rule: Rule, parts: int, rows: int, columns: tuple[int, ...], head_dim: int) -> Binding:
    names = tuple(f"part{index}" for index in range(parts))
    return Binding(("whole",), names, ("whole",), (rows, *columns), head_dim, 0, rule, Rule.IDENTITY)


SHAPES = {
    "heads": st.integers(1, 5),
    "head_dim": st.integers(1, 4),
    "columns": st.lists(st.integers(1, 3), max_size=3).map(tuple),
    "seed": st.integers(0, 2**16),
}


@given(rule=st.sampled_from(list(Rule)), **SHAPES)
@settings(deadline=None, max_examples=60)
def test_rules_invert_and_preserve_inner_products(
    rule: Rule, heads: int, head_dim: int, columns: tuple[int, ...], seed: int
) -> None:
    """A permutation of entries: exact both ways, and gradients convert like weights."""
    if rule is Rule.SWAP_HALVES:
        head_dim *= 2
    if rule is Rule.FLATTEN:
        columns = (*columns, 2)  # a convolution's weight
    count = 3 if rule.fuses else 1
    binding = binding_of(rule, count, heads * head_dim, columns, head_dim)
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = (
        [torch.randn(binding.shape, generator=generator, dtype=torch.float64) for _ in range(count)] for _ in range(2)
    )
    (packed,), (packed_gradient,) = (binding.convert(x, "diffusers", "ours") for x in (weights, gradients))
    assert tuple(packed.shape) == binding.shape_in("ours")
    for back, part in zip(binding.convert([packed], "ours", "diffusers"), weights, strict=True):
        assert torch.equal(back, part)
    inner = sum((w * g).sum() for w, g in zip(weights, gradients, strict=True))
    torch.testing.assert_close((packed * packed_gradient).sum(), inner)


@given(**SHAPES)
@settings(deadline=None, max_examples=60)
def test_fused_rows_are_head_part_channel(heads: int, head_dim: int, columns: tuple[int, ...], seed: int) -> None:
    binding = binding_of(Rule.INTERLEAVE_HEADS, 3, heads * head_dim, columns, head_dim)
    parts = [torch.randn(binding.shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]
    (fused,) = binding.convert(parts, "diffusers", "ours")
    for head in range(heads):
        for index, part in enumerate(parts):
            rows = slice((3 * head + index) * head_dim, (3 * head + index + 1) * head_dim)
            assert torch.equal(fused[rows], part[head * head_dim : (head + 1) * head_dim])


@given(size=st.sampled_from([1, 2, 4]), **SHAPES)
@settings(deadline=None, max_examples=60)
def test_slices_convert_like_the_whole(
    size: int, heads: int, head_dim: int, columns: tuple[int, ...], seed: int
) -> None:
    binding = binding_of(Rule.INTERLEAVE_HEADS, 3, size * heads * head_dim, columns, head_dim)
    parts = [torch.randn(binding.shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]
    (fused,) = binding.convert(parts, "diffusers", "ours")
    for rank, expected in enumerate(fused.chunk(size)):
        bounds = binding.slice_bounds(rank, size)
        local = parts if bounds is None else [part.narrow(0, bounds[1], bounds[2] - bounds[1]) for part in parts]
        (mine,) = binding.convert(local, "diffusers", "ours")
        assert torch.equal(mine, expected)
        for back, part in zip(binding.convert([mine], "ours", "diffusers"), local, strict=True):
            assert torch.equal(back, part)
