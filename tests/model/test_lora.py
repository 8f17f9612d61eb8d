"""Adapters on one rank: PEFT's numbers, base off and on, merged and exported."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_sage.checkpoint.convert import hf_to_megatron
from megatron_sage.checkpoint.distributed import export_hf, load_weights, save_weights
from megatron_sage.checkpoint.keymap import TABLE
from megatron_sage.checkpoint.lora import FILE, export_adapters, gather_adapters
from megatron_sage.model.lora import adapters_off, add_adapters, has_adapters
from megatron_sage.model.lora_targets import LINEARS, TARGETS, diffusers_path, is_adapter
from megatron_sage.parallel.groups import Groups
from megatron_sage.verification.ours import run_ours
from tests.model.lora_parity import (
    LoraCase,
    arguments,
    build_adapted,
    exported,
    forward_backward,
    gradient_errors,
    load_matrices,
    measure,
    random_adapters,
    random_case,
    reference,
    run_diffusers,
)
from tests.model.parity import Case, assert_parity, build_stage, relative

EVERYTHING = LoraCase(Case(qwen=(6, 5), byt5=(3, 0), layers=3))
# only one of q, k and v; the last block has no adapter of its own
PARTIAL = LoraCase(Case(grid=(1, 3, 5), qwen=(4,), byt5=(2,)), rank=3, alpha=1.5, targets=("to_k", "add_q_proj"))


@pytest.mark.parametrize("lora", [EVERYTHING, PARTIAL], ids=["all targets", "two targets"])
def test_equals_peft(one_rank: Groups, lora: LoraCase) -> None:
    assert_parity(*measure(lora, reference(lora)))


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes_ranks_and_targets(one_rank: Groups, seed: int) -> None:
    lora = random_case(seed)
    assert_parity(*measure(lora, reference(lora)))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3, 23))
def test_more_random_sizes_ranks_and_targets(one_rank: Groups, seed: int) -> None:
    lora = random_case(seed)
    assert_parity(*measure(lora, reference(lora)))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("targets", [TARGETS, ("ff.net.0.proj",)], ids=["all targets", "mlp alone"])
def test_recompute_changes_no_gradient(one_rank: Groups, recompute: str, targets: tuple[str, ...]) -> None:
    """Nothing in front of the first adapter wants a gradient: Megatron's checkpoint would drop those of its block."""
    lora = LoraCase(PARTIAL.case, targets=targets)
    plain, other = (build_adapted(lora, one_rank, recompute=mode) for mode in ("none", recompute))
    outputs = [forward_backward(chunks, arguments(lora)) for chunks in (plain, other)]
    assert torch.equal(*outputs)
    expected = dict(gather_adapters(plain, "grad"))
    for name, gradient in gather_adapters(other, "grad"):
        assert gradient.any() and torch.equal(gradient, expected[name]), name


def test_table_is_the_checkpoints_table() -> None:
    rows = {row.ours or row.diffusers: row for row in TABLE}
    for path, linear in LINEARS.items():
        row = rows["transformer_blocks.{i}." + path]
        names = (row.diffusers,) if isinstance(row.diffusers, str) else row.diffusers
        assert names == tuple("transformer_blocks.{i}." + diffusers_path(target) for target in linear.targets)
        assert row.split == linear.split


def test_initial_values_are_pefts(one_rank: Groups) -> None:
    """B = 0; A uniform in +-1/sqrt(in), as nn.init.kaiming_uniform_(a=sqrt(5)) draws it; another for another seed."""
    lora = LoraCase(Case(heads=8, head_dim=16), rank=64)
    chunks = build_adapted(lora, one_rank, fill=False)
    found = dict(gather_adapters(chunks, "param"))
    for name, value in found.items():
        bound = value.shape[1] ** -0.5
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert value.abs().max() <= bound and value.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    a = [value for name, value in found.items() if "to_q.lora_A" in name or "to_k.lora_A" in name]
    assert len({x.numpy().tobytes() for x in a}) == len(a)
    other = build_stage(lora.case, one_rank)
    add_adapters(other, lora.settings(seed=1))
    again = dict(gather_adapters(other, "param"))
    assert not any(torch.equal(again[name], value) for name, value in found.items() if ".lora_A." in name)


@torch.no_grad()
def test_off_is_the_base_and_new_adapters_change_nothing(one_rank: Groups) -> None:
    inputs = dataclasses.replace(arguments(EVERYTHING), grad_output=None)
    base = build_stage(EVERYTHING.case, one_rank)
    assert not has_adapters(base)
    with pytest.raises(ValueError, match="no adapters"), adapters_off(base):
        pass
    base[0].requires_grad_(False)  # torch.matmul folds its batch by it: other rounding
    expected = run_ours(base, inputs).sample
    chunks = build_adapted(EVERYTHING, one_rank)
    on = run_ours(chunks, inputs).sample
    with adapters_off(chunks):
        off = run_ours(chunks, inputs).sample
    assert torch.equal(off, expected) and not torch.allclose(on, expected)
    assert torch.equal(run_ours(chunks, inputs).sample, on)  # and they are back
    assert torch.equal(run_ours(build_adapted(EVERYTHING, one_rank, fill=False), inputs).sample, expected)


def test_merged_and_separate_exports_give_diffusers_the_same_model(one_rank: Groups, tmp_path: Path) -> None:
    from diffusers import HunyuanVideo15Transformer3DModel

    lora = EVERYTHING
    chunks, sample = build_adapted(lora, one_rank), load_file(reference(lora))["sample"]
    export_adapters(chunks, tmp_path / "lora")
    export_hf(chunks, tmp_path / "merged")
    separate = exported(tmp_path / "lora", lora)
    merged = run_diffusers(HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "merged"), lora)
    assert relative(separate, sample, sample.abs().max()) <= 1e-6
    assert relative(merged, sample, sample.abs().max()) <= 3e-6
    hf_to_megatron(tmp_path / "merged", tmp_path / "back")  # and ours again, e.g. to sample from
    again = build_stage(lora.case, one_rank)
    load_weights(again, tmp_path / "back")
    back = run_ours(again, dataclasses.replace(arguments(lora), grad_output=None)).sample
    assert relative(back.detach(), sample, sample.abs().max()) <= 3e-6
    with safe_open(tmp_path / "lora" / FILE, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (lora.rank, lora.alpha)
    for name, value in load_file(tmp_path / "lora" / FILE).items():
        assert torch.equal(value, random_adapters(lora)[name.removeprefix("transformer.")]), name


def test_base_weights_load_into_a_model_with_adapters(one_rank: Groups, tmp_path: Path) -> None:
    chunks = build_adapted(PARTIAL, one_rank)
    save_weights(chunks, tmp_path / "saved")  # the base alone: it is what `load_weights` takes
    plain = build_stage(PARTIAL.case, one_rank)
    expected = {name: p.clone() for name, p in plain[0].named_parameters()}
    for model in (plain, chunks):
        with torch.no_grad():
            for name, parameter in model[0].named_parameters():
                if not is_adapter(name):
                    parameter.zero_()
        load_weights(model, tmp_path / "saved")
        for name, parameter in model[0].named_parameters():
            assert is_adapter(name) or torch.equal(parameter, expected[name]), name
    matrices = random_adapters(PARTIAL)
    for name, value in gather_adapters(chunks, "param"):
        assert torch.equal(value, matrices[name])


def test_the_comparison_notices_a_wrong_scale(one_rank: Groups) -> None:
    """A test that cannot fail is none: alpha off by a hundredth is seen."""
    wrong = build_stage(PARTIAL.case, one_rank)
    add_adapters(wrong, LoraCase(targets=PARTIAL.targets, rank=PARTIAL.rank, alpha=1.515).settings())
    load_matrices(wrong, random_adapters(PARTIAL), one_rank)
    forward_backward(wrong, arguments(PARTIAL))
    found = {name: value for name, value in gather_adapters(wrong, "grad") if value is not None}
    assert max(gradient_errors(found, load_file(reference(PARTIAL))).values()) > 1e-3
