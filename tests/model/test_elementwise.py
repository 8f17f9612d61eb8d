"""What is between the GEMMs and attention: outputs and gradients against autograd through the plain formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sage.config.schema import PrecisionConfig
from megatron_sage.config.state_rules import check_compiler
from megatron_sage.errors import UserError
from megatron_sage.model.elementwise import (
    Kernels,
    gated_modulated_norm,
    gated_residual,
    kernels,
    modulated_norm,
)
from megatron_sage.model.joint import JointHeads
from megatron_sage.model.rope import rotary_table, rotate
from megatron_sage.parallel.context import WholeAttention, attend
from megatron_sage.parallel.groups import Groups
from megatron_sage.parallel.kept import KeptBytes
from megatron_sage.parallel.sequence import TokenShard
from tests.model.parity import Case, build, run_samples

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def ln(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def plain(name: str, x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor, *rows: torch.Tensor) -> Any:
    gate, shift, scale = rows
    if name == "modulated":
        return (ln(x) * (1 + scale) + shift,)
    if name == "gated":
        return (x + (branch + bias) * gate,)
    y = x + branch * gate
    return y, ln(y) * (1 + scale) + shift


def ours(
    ops: Kernels, name: str, x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor, *rows: torch.Tensor
) -> Any:
    gate, shift, scale = rows
    if name == "modulated":
        return (modulated_norm(ops, x, shift, scale),)
    if name == "gated":
        return (gated_residual(ops, x, branch, bias, gate),)
    return gated_modulated_norm(ops, x, branch, gate, shift, scale)


def inputs(seed: int, tokens: int, batch: int, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, batch, width)] * 2 + [(width,)] + [(rows, width)] * 3
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def results(function: Any, name: str, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = function(name, *leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.float() * torch.randn(x.shape, generator=generator)).sum() for x in out)
    loss.backward()
    return [*(x.detach().float() for x in out), *(None if x.grad is None else x.grad.float() for x in leaves)]


def assert_same(ops: Kernels, name: str, leaves: list[torch.Tensor], close: dict[str, float]) -> None:
    exact = results(plain, name, [x.float() for x in leaves])
    found = results(lambda *args: ours(ops, *args), name, leaves)
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=close["rtol"], atol=close["atol"] * max(1, len(leaves[0])))


def assert_near_in_bf16(ops: Kernels, name: str, leaves: list[torch.Tensor]) -> None:
    exact = results(plain, name, [x.float() for x in leaves])
    for mine, theirs in zip(results(lambda *args: ours(ops, *args), name, leaves), exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert (mine - theirs).norm() <= 4e-3 * theirs.norm()


NAMES = ["modulated", "gated", "gated_modulated"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 99), tokens=st.integers(0, 9), batch=st.integers(1, 3), shared=st.booleans(),
    width=st.sampled_from([2, 7, 48]),
)  # fmt: skip
def test_values_and_gradients(name: str, seed: int, tokens: int, batch: int, shared: bool, width: int) -> None:
    """Of rows of each sample's own and of one row for all; tokens may be none, as on a rank without any."""
    leaves = inputs(seed, tokens, batch, 1 if shared else batch, width, torch.float32)
    assert_same(kernels(), name, leaves, CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_fp32_inside(name: str) -> None:
    """Half a bit of bf16 is 0.2 %; sums over 500 tokens in bf16 would be off by percents."""
    assert_near_in_bf16(kernels(), name, inputs(3, 500, 2, 2, 64, torch.bfloat16))


def heads_by_autograd(image: torch.Tensor, text: torch.Tensor, weights: Any, table: torch.Tensor, last: bool) -> Any:
    made = []
    for kind in range(2):
        of_image = F.rms_norm(image[..., kind, :], image.shape[-1:], weights[kind], 1e-6)
        of_text = F.rms_norm(text[..., kind, :], text.shape[-1:], weights[2 + kind], 1e-6)
        of_image = rotate(of_image, table)
        made.append(of_image if last and kind == 0 else torch.cat([of_image, of_text]))
    return (*made, torch.cat([image[..., 2, :], text[..., 2, :]]))


@pytest.mark.parametrize("rebuild", [False, True])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 99), grid=st.tuples(*[st.integers(1, 4)] * 3), words=st.integers(1, 5), batch=st.integers(1, 2),
    heads=st.integers(1, 3), quarter=st.integers(1, 4), last=st.booleans(),
)  # fmt: skip
def test_joint_heads(
    rebuild: bool, seed: int, grid: Any, words: int, batch: int, heads: int, quarter: int, last: bool
) -> None:
    """Attention's answer and all gradients, with and without making queries, keys and values again."""
    axes = (2 * quarter, 2, 2)
    table, dim = rotary_table(grid, axes, 256.0, torch.device("cpu")), sum(axes)
    tokens = len(table)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, batch, heads, 3, dim), (words, batch, heads, 3, dim)] + [(dim,)] * 4
    leaves = [torch.randn(*shape, generator=generator) for shape in shapes]
    found = []
    for ours_too in (False, True):
        image, text, *weights = (x.clone().requires_grad_() for x in leaves)
        if ours_too:
            maker = JointHeads(kernels(), tuple(weights), 1e-6, (table[:0], table), last, rebuild)
            out = attend(maker(image, text, whole=True))
        else:
            out = F.scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in heads_by_autograd(image, text, weights, table, last))
            ).permute(2, 0, 1, 3).flatten(2)  # fmt: skip
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        (out * weight).sum().backward()
        found.append([out.detach(), *(x.grad for x in (image, text, *weights))])
    for theirs, mine in zip(*found, strict=True):
        if theirs is None or mine is None:
            assert last and theirs is mine
        else:
            torch.testing.assert_close(mine, theirs, **CLOSE)


def test_queries_keys_and_values_are_not_kept() -> None:
    """Of a token's width D · N: the projection 3, attention's answer 1; without making again 3 more."""
    image, text = (torch.randn(n, 1, 2, 3, 16, requires_grad=True) for n in (40, 8))
    table, kept = torch.ones(40, 8, dtype=torch.complex64), {}
    for rebuild in (False, True):
        weights = tuple(torch.ones(16, requires_grad=True) for _ in range(4))
        maker = JointHeads(kernels(), weights, 1e-6, (table, table), False, rebuild)
        with KeptBytes([*weights, table], lambda x: x.dim() > 2 and x.shape[-1] == 16) as found:
            WholeAttention()(image, text, TokenShard(40, 1, 0), maker)
        kept[rebuild] = found.total
    width = 48 * 2 * 16 * 4
    assert kept == {False: 7 * width, True: 4 * width}


@pytest.mark.parametrize("sign", [1, -1])
def test_real_and_complex_rotation_are_the_same(sign: int) -> None:
    from megatron_sage.model.elementwise import _rotated, _rotated_complex

    table = rotary_table((2, 3, 4), (2, 6, 4), 256.0, torch.device("cpu"))
    x = torch.randn(24, 2, 3, 3, 12)[:, :, :, 1]  # as it lies in the fused projection
    pairs = torch.view_as_real(table)
    torch.testing.assert_close(_rotated(x, pairs, sign), _rotated_complex(x, pairs, sign), rtol=0, atol=1e-6)


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check_compiler(PrecisionConfig())
    with pytest.raises(UserError, match=r"precision.compile=True: needs a C\+\+ compiler .* set false"):
        check_compiler(PrecisionConfig(compile=True))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_kernels_are_the_plain_ones(dtype: torch.dtype) -> None:
    """By inductor, where a C++ compiler is: other sizes must not be compiled again and again."""
    for tokens, batch, rows in [(33, 2, 2), (57, 3, 1), (5, 1, 1), (128, 2, 1)]:
        for name in NAMES:
            leaves = inputs(1, tokens, batch, rows, 64, dtype)
            if dtype is torch.float32:
                assert_same(kernels(True), name, leaves, CLOSE)
            else:
                assert_near_in_bf16(kernels(True), name, leaves)


@pytest.mark.nightly
def test_a_compiled_model_is_the_plain_one(one_rank: Groups) -> None:
    case = Case(grid=(3, 3, 5), qwen=(6, 2), byt5=(3, 0), layers=3)
    plain, compiled = (build(case, one_rank, compile_elementwise=flag) for flag in (False, True))
    runs = [run_samples(model, case) for model in (plain, compiled)]
    for theirs, mine in zip(runs[0].velocity, runs[1].velocity, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))
    for (name, theirs), mine in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if theirs.grad is not None:
            scale = max(1.0, float(theirs.grad.abs().max()))
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * scale, msg=name)
