"""FP8 linears: padding without effect, weights of other models, keys of checkpoints, which blocks."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_sage.model import TextCondition
from megatron_sage.model.precision import Quantisation, real_rows, runs_fp8
from megatron_sage.parallel.groups import Groups
from tests.fp8_emulation import EmulatedColumn, by_tensor, by_tile, emulated, quantise
from tests.model.fp8 import ODD, calibrate, fp8, parity, rows_of_gemms, with_alignment
from tests.model.parity import Case, assert_parity, build, random_inputs, reference, run_samples, tokens
from tests.parallel.pool import run_on_ranks

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
CASE = Case(grid=(2, 3, 4), qwen=(6, 6), byt5=(3, 3))  # 24 video and 9 text tokens


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_padding_has_no_effect(one_rank: Groups, recipe: str) -> None:
    """Odd token counts and hidden sizes (40, 120, 160): outputs and all gradients are diffusers' to fp32 rounding."""
    case = dataclasses.replace(ODD, heads=5, image_to_video=True)
    assert_parity(*parity(case, reference(case), recipe, {}))


PADDED_LAYOUTS = [
    pytest.param(2, {"tensor": 2}, {"sequence_parallel": True}, id="tp2-sp"),
    pytest.param(3, {"tensor": 3}, {}, id="tp3", marks=pytest.mark.nightly),
    pytest.param(2, {"context": 2}, {}, id="cp2", marks=pytest.mark.nightly),
    pytest.param(4, {"tensor": 2, "context": 2}, {"sequence_parallel": True}, id="tp2-cp2", marks=pytest.mark.nightly),
    pytest.param(2, {"tensor": 2}, {"sequence_parallel": True, "recompute": "selective"}, id="selective"),
    pytest.param(2, {"tensor": 2}, {"recompute": "full"}, id="full", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("ranks", "layout", "options"), PADDED_LAYOUTS)
def test_padding_has_no_effect_on_any_layout(ranks: int, layout: dict[str, int], options: dict[str, Any]) -> None:
    arguments = {"case": ODD, "path": reference(ODD), "recipe": "mxfp8", "layout": layout} | options
    for rank, (output, gradients) in enumerate(run_on_ranks(ranks, "tests.model.fp8:parity", **arguments)):
        # over CP a rank's gradients are partial: data parallelism completes them, `test_parity` shows how
        assert_parity(output, {"": 0.0} if "context" in layout else gradients, rank)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_padding_takes_no_part_in_a_scale(one_rank: Groups, recipe: str) -> None:
    """24 video and 8 text tokens, with no padding and padded to 64: the quantised model computes the same.

    `with_alignment` gives a feature of the MLP a bias of 1000, which real tokens take back and padding does not.
    """
    case = dataclasses.replace(CASE, qwen=(5, 5))
    bare, padded = (with_alignment(multiple, case, one_rank, recipe) for multiple in (8, 64))
    for mine, theirs in zip(padded.velocity, bare.velocity, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5)
    for mine, theirs in zip(padded.input_gradients, bare.input_gradients, strict=True):
        for name in mine:
            assert torch.allclose(mine[name], theirs[name], rtol=0, atol=1e-5 * float(theirs[name].abs().max()))


def assert_padding_is_zero(seen: list[tuple[str, int, int]], real: set[int], multiple: int) -> None:
    assert {direction for direction, _, _ in seen} == {"forward", "backward"}
    assert all(given % multiple == 0 for _, given, _ in seen)
    assert {rows for direction, _, rows in seen if direction == "forward"} == real
    assert all(rows in real for _, _, rows in seen)


def test_padding_that_reaches_a_gemm_is_zero(one_rank: Groups) -> None:
    """2 samples of 24 video and 9 text tokens: so many rows, and not one more, are not zero, gradients included."""
    assert_padding_is_zero(rows_of_gemms(CASE, "tensorwise", {}), {48, 18}, 16)


@pytest.mark.nightly
def test_padding_that_reaches_a_gemm_is_zero_with_sequence_parallelism() -> None:
    options = {"layout": {"tensor": 2}, "sequence_parallel": True}
    for seen in run_on_ranks(2, "tests.model.fp8:rows_of_gemms", case=CASE, recipe="blockwise", **options):
        assert_padding_is_zero(seen, {48, 18}, 128)


def test_real_rows_pass_gradients_of_real_rows_only() -> None:
    x = torch.ones(5, 2, 3, requires_grad=True)
    y = real_rows(x, 3)
    y.sum().backward()
    assert torch.equal(y[:, 0, 0], torch.tensor([1.0, 1, 1, 0, 0]))
    assert torch.equal(x.grad[:, 0, 0], torch.tensor([1.0, 1, 1, 0, 0]))
    assert real_rows(x, 5) is x


def changed(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() * 1.25 + 0.01 for name, p in model.named_parameters()}


def put(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other tensors in the parameters' place; the ones that were there."""
    before = {name: p.data for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data = weights[name]
    return before


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pending", [False, True])
def test_a_reference_is_cast_from_its_own_weights_and_leaves_nothing(
    one_rank: Groups, recipe: str, pending: bool
) -> None:
    """`pending`: the policy's weights have changed and it has not run since."""
    with emulated():
        model, fresh = (build(CASE, one_rank, dtype=torch.bfloat16, **fp8(recipe)) for _ in range(2))
    quantisation = Quantisation([model])
    if recipe == "delayed":
        calibrate(model, CASE, one_rank)
    policy = velocity(model)
    scales = {name: layer.scaling() for name, layer in quantisation.layers.items()}
    before = {(n, k): x.clone() for n, state in scales.items() for k, x in state.items()}
    casts = [layer.casts for layer in quantisation.layers.values()]
    if pending:
        quantisation.weights_changed()
    other = changed(model)
    with quantisation.other_weights():
        mine = put(model, other)
        reference = velocity(model)
        put(model, mine)
    assert all(torch.equal(x, before[name, part]) for name, state in scales.items() for part, x in state.items())
    now = [layer.casts for layer in quantisation.layers.values()]
    assert torch.equal(velocity(model), policy)
    after = [layer.casts for layer in quantisation.layers.values()]
    ran = [a > b for a, b in zip(now, casts, strict=True)]
    assert [a - b for a, b in zip(after, now, strict=True)] == [int(pending and r) for r in ran]
    for name, layer in Quantisation([fresh]).layers.items():
        for part, x in layer.scaling().items():
            x.copy_(before[name, part])
    put(fresh, other)
    assert torch.equal(velocity(fresh), reference)
    assert not torch.equal(reference, policy)


def velocity(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(forward_only(model), dim=1)


def forward_only(model: Any) -> list[torch.Tensor]:
    inputs = random_inputs(CASE)
    names = ("hidden_states", "attention_mask", "hidden_states_2", "attention_mask_2")
    text = TextCondition.from_padded(*(inputs[f"encoder_{name}"] for name in names), inputs["image_embeds"])
    shard = model.image_shard(CASE.grid)
    return list(model(shard.shard(tokens(inputs["hidden_states"])), inputs["timestep"], text, CASE.grid)[: shard.valid])


def test_another_tensor_in_a_parameters_place_is_cast_even_if_nobody_says_so(one_rank: Groups) -> None:
    with emulated():
        model = build(CASE, one_rank, dtype=torch.bfloat16, **fp8("tensorwise"))
    policy = velocity(model)
    mine = put(model, changed(model))
    assert not torch.equal(velocity(model), policy)
    put(model, mine)
    assert torch.equal(velocity(model), policy)


def test_checkpoints_have_the_keys_of_the_model_without_fp8(one_rank: Groups) -> None:
    plain = build(ODD, one_rank)
    with emulated():
        quantised = build(ODD, one_rank, **fp8("delayed"))
    assert Quantisation([quantised]).layers
    mine, theirs = ({name: x.shape for name, x in model.state_dict().items()} for model in (quantised, plain))
    assert mine == theirs
    mine, theirs = (
        {name: x.global_shape for name, x in model.sharded_state_dict().items()} for model in (quantised, plain)
    )
    assert mine == theirs
    quantised.load_state_dict(plain.state_dict(), strict=True)


def test_first_and_last_blocks_stay_bf16(one_rank: Groups) -> None:
    case = Case(layers=5)
    with emulated():
        model = build(case, one_rank, **fp8("delayed", fp8_first_bf16=1, fp8_last_bf16=2))
    assert {name.split(".")[2] for name in Quantisation([model]).layers} == {"1", "2"}
    assert [runs_fp8(model.config, block) for block in range(5)] == [False, True, True, False, False]
    assert not any(runs_fp8(build(case, one_rank).config, block) for block in range(5))


def test_bf16_blocks_compute_what_they_compute_without_fp8(one_rank: Groups) -> None:
    """All blocks but one excluded: only that one's casts are made."""
    case = Case(layers=3)
    with emulated():
        model = build(case, one_rank, **fp8("tensorwise", fp8_first_bf16=1, fp8_last_bf16=1))
    run_samples(model, case)
    casts = {
        name: module.casts
        for name, module in model.transformer_blocks.named_modules()
        if isinstance(module, EmulatedColumn)
    }
    assert {name.split(".")[0] for name, count in casts.items() if count} == {"1"}


@pytest.mark.parametrize(("kind", "bound"), [("e4m3", 2**-4), ("e5m2", 2**-3)])
def test_casts_are_as_exact_as_their_format(kind: str, bound: float) -> None:
    """Half a unit of the last of 3 or 2 bits, but for what lies below the smallest normal number."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 7
    whole = by_tensor(x, kind)
    assert ((whole - x).abs() <= bound * x.abs() + 1e-2).all()
    assert torch.isclose(whole.abs().max(), x.abs().max())
    x[:, 3] *= 1e6  # one outlying channel
    assert (by_tensor(x, kind)[:, :3] - x[:, :3]).abs().max() > 1
    tiles = by_tile(x, 1, 32, kind)
    assert ((tiles - x)[:, 32:].abs() <= bound * x[:, 32:].abs() + 1e-2).all()


def test_a_tile_has_its_own_scale() -> None:
    x = torch.tensor([[1.0] * 32 + [1e-6] * 32] * 4)
    for recipe, exact in (("mxfp8", True), ("tensorwise", False)):
        cast = quantise(x, recipe, 1, "e4m3")
        assert bool(((cast - x).abs() / x < 0.07).all()) is exact
