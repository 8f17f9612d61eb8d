"""bf16: as close to the fp32 model as diffusers' own bf16 model is, and not hurt by the timestep."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_sage.model.elementwise import kernels, modulated_norm
from megatron_sage.model.embeddings import timestep_sinusoid
from megatron_sage.parallel.groups import Groups
from tests.model.parity import Case, build, reference, run_samples, tokens

# Times that bf16 represents: elsewhere diffusers, which casts the time to the weights' type, computes another time.
EXACT = Case(timesteps=(992.0, 42.5), qwen=(6, 3), byt5=(3, 0), image_to_video=True)
ROUNDED = Case(timesteps=(989.0, 341.0), qwen=(6, 3), byt5=(3, 0), image_to_video=True)


def relative_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def output_errors(groups: Groups, case: Case) -> tuple[float, float]:
    """(ours in bf16, diffusers in bf16), both against diffusers in fp32."""
    model = build(case, groups, dtype=torch.bfloat16)
    velocity = torch.stack(run_samples(model, case).velocity, dim=1)
    exact, theirs = (tokens(load_file(reference(case, dtype))["sample"]) for dtype in (torch.float32, torch.bfloat16))
    return relative_norm(velocity, exact), relative_norm(theirs, exact)


def test_output_is_as_good_as_diffusers_bf16(one_rank: Groups) -> None:
    """Each rounding to bf16 (8 bits) costs up to 2^-9 = 0.2 %; some dozen of them in a row add up to about 1 %.

    Order and number of the roundings differ between the two (ours multiply-adds once where diffusers rounds twice), so
    only the size of the error is comparable, not its digits.
    """
    ours, theirs = output_errors(one_rank, EXACT)
    assert ours < 1.5e-2
    assert ours < 1.25 * theirs


def test_timesteps_are_not_rounded(one_rank: Groups) -> None:
    """989 and 341 become 988 and 342 in bf16: the sinusoid turns by a radian, which diffusers' bf16 model shows."""
    ours, theirs = output_errors(one_rank, ROUNDED)
    assert ours < 1.5e-2
    assert theirs > 3 * ours


def test_gradients_are_as_good_as_diffusers_bf16(one_rank: Groups) -> None:
    model = build(EXACT, one_rank, dtype=torch.bfloat16)
    run_samples(model, EXACT)
    exact, theirs = (load_file(reference(EXACT, dtype)) for dtype in (torch.float32, torch.bfloat16))
    errors = {}
    for name, parameter in model.named_parameters():
        key = f"grad.{name}"
        if key in exact and parameter.grad.shape == exact[key].shape and not name.endswith("to_k.bias"):
            errors[name] = relative_norm(parameter.grad.float(), exact[key]) / relative_norm(theirs[key], exact[key])
    assert len(errors) > 60
    assert sorted(errors.values())[len(errors) // 2] < 1.25
    assert max(errors.values()) < 4, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("width", [16, 72, 2048])
def test_norm_and_modulation_are_fp32_and_rounded_once(width: int) -> None:
    """Values far from 0 with a small spread: statistics in bf16 would be off by a part of the spread."""
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(5, 3, width, generator=generator) + 4).bfloat16()
    shift, scale = (torch.randn(3, width, generator=generator).bfloat16() for _ in range(2))
    grad = torch.randn(x.shape, generator=generator).bfloat16()
    found, exact = [], []
    for cast, out in ((lambda t: t, found), (lambda t: t.float(), exact)):
        leaves = [t.clone().requires_grad_() for t in (x, shift, scale)]
        y = modulated_norm(kernels(), *(cast(t) for t in leaves)).bfloat16()
        out += [y, *torch.autograd.grad(y, leaves, grad)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, exact, strict=True))
    rounded_twice = torch.addcmul(shift, F.layer_norm(x, (width,), eps=1e-6), 1 + scale)
    assert not torch.equal(found[0], rounded_twice)  # what is avoided


def test_sinusoid_of_a_time_is_fp32() -> None:
    table = timestep_sinusoid(torch.tensor([989.0, 341.0]))
    assert table.dtype is torch.float32
    assert torch.allclose(table[:, 0], torch.tensor([989.0, 341.0]).cos(), atol=1e-6)
