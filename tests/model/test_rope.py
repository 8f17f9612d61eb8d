"""RoPE and the time sinusoid against diffusers."""

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_timestep_embedding
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15RotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sage.model.embeddings import timestep_sinusoid
from megatron_sage.model.rope import rotary_table, rotate

CPU = torch.device("cpu")
half_axes = st.integers(1, 4)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    halves=st.tuples(half_axes, half_axes, half_axes),
)
def test_rotation_is_diffusers(grid: tuple[int, int, int], halves: tuple[int, int, int]) -> None:
    axes = tuple(2 * half for half in halves)
    theirs = HunyuanVideo15RotaryPosEmbed(1, 1, list(axes), 256.0)(torch.empty(1, 1, *grid))
    heads = torch.randn(grid[0] * grid[1] * grid[2], 2, 3, sum(axes))
    expected = apply_rotary_emb(heads.transpose(0, 1), theirs, sequence_dim=1).transpose(0, 1)
    torch.testing.assert_close(rotate(heads, rotary_table(grid, axes, 256.0, CPU)), expected, rtol=0, atol=2e-6)


def test_rotation_of_bf16_rounds_once() -> None:
    heads = torch.randn(6, 1, 2, 6).bfloat16()
    table = rotary_table((1, 2, 3), (2, 2, 2), 256.0, CPU)
    assert torch.equal(rotate(heads, table), rotate(heads.float(), table).bfloat16())


def test_a_table_made_in_inference_mode_serves_training() -> None:
    grid = (7, 1, 1)  # used nowhere else: the table is made here
    with torch.inference_mode():
        rotary_table(grid, (2, 2, 2), 256.0, CPU)
    heads = torch.randn(7, 1, 1, 6, requires_grad=True)
    rotate(heads, rotary_table(grid, (2, 2, 2), 256.0, CPU)).sum().backward()
    assert heads.grad is not None


def test_tables_are_made_once() -> None:
    assert rotary_table((2, 2, 2), (2, 2, 2), 256.0, CPU) is rotary_table((2, 2, 2), (2, 2, 2), 256.0, CPU)


@given(timestep=st.floats(0, 1000, width=32))
def test_sinusoid_is_bitwise_diffusers(timestep: float) -> None:
    times = torch.tensor([timestep])
    assert torch.equal(
        timestep_sinusoid(times), get_timestep_embedding(times, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    )
