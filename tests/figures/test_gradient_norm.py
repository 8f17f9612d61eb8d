"""Gradients by autograd are what the formula says."""

from pathlib import Path

import pytest
import torch

from megatron_sage.errors import UserError
from megatron_sage.figures import gradient_norm as figure
from megatron_sage.figures.gradient_norm import HEADER, measurements, step_gradients
from megatron_sage.grpo.equalizer import gradient_scales
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import step_coefficients

MODEL = Path(__file__).parents[2] / "examples" / "tiny_world" / "model"


@pytest.mark.parametrize("sde_type", ["dance_grpo", "flow_grpo", "sage_grpo", "cps"])
def test_the_velocitys_gradient_is_exactly_the_formula(sde_type):
    """One sample, A = 1: ||d logp / d v|| = |b|/std ||z||/D, and through v = W x the weights' is that times ||x||."""
    torch.manual_seed(0)
    dim, num_steps = 7, 6
    sigmas = shifted_sigmas(num_steps, 5.0)
    coefficients = step_coefficients(sde_type, sigmas, 0.5)
    weight = torch.randn(dim, dim, dtype=torch.float64, requires_grad=True)
    noises = torch.randn(num_steps, 1, dim, dtype=torch.float64)
    seen = []

    def velocity(x, sigma):
        seen.append(x.norm().item())
        return x @ weight.T

    start, one = torch.randn(1, dim, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = step_gradients(velocity, [weight], sigmas, coefficients, start, one, lambda step: noises[step])
    assert [g.step for g in found] == coefficients.trained_steps()
    scales = gradient_scales(coefficients)
    equal = [scales[g.step].item() * g.velocity / noises[g.step].norm().item() for g in found]
    for g in found:
        _, b, std = coefficients.step(g.step)
        expected = abs(b) / std * noises[g.step].norm().item() / dim
        assert g.velocity == pytest.approx(expected, rel=1e-8)
        assert g.parameters == pytest.approx(expected * seen[g.step], rel=1e-8)
    assert equal == pytest.approx([equal[0]] * len(equal), rel=1e-8)


def test_samples_of_opposite_advantage_pull_apart():
    """Two equal samples with A = +1 and -1 cancel in the weights, not in the velocities."""
    sigmas = shifted_sigmas(3, 5.0)
    weight = torch.eye(4, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).expand(2, 4)
    found = step_gradients(
        lambda x, sigma: x @ weight.T,
        [weight],
        sigmas,
        step_coefficients("sage_grpo", sigmas, 0.5),
        x,
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        lambda step: torch.ones(2, 4, dtype=torch.float64),
    )
    assert all(g.velocity > 0.01 and g.parameters < 1e-12 for g in found)


def test_on_the_tiny_model():
    rows = [dict(zip(HEADER, row, strict=True)) for row in measurements(MODEL, repeats=1, num_steps=3)]
    assert [(row["sampler"], row["step"]) for row in rows] == [
        (sampler, step) for sampler in ("dance_grpo", "flow_grpo", "sage_grpo", "cps") for step in range(3)
    ][:-1]  # cps' last step has no noise
    for row in rows:
        # chi^2 with 4 * 4032 degrees of freedom: the norms scatter by 0.6 %
        assert row["grad_velocity"] == pytest.approx(row["formula"], rel=0.03)
        assert row["grad_parameters"] > 0
    for sampler in ("dance_grpo", "flow_grpo", "sage_grpo", "cps"):
        flat = [row["equalized_velocity"] for row in rows if row["sampler"] == sampler]
        assert max(flat) / min(flat) < 1.03


def test_without_the_model_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="examples/tiny_world/model: .* run from the root of the repository"):
        figure.gradient_norm(tmp_path)


def test_the_figure_draws_its_rows(tmp_path, monkeypatch):
    rows = [[s, step, 1 - step / 3, *[0.1 * (step + 1)] * 5, 1] for s in figure.SAMPLERS for step in range(3)]
    monkeypatch.setattr(figure, "measurements", lambda: rows)
    threads = torch.get_num_threads()
    assert [path.name for path in figure.gradient_norm(tmp_path)] == ["gradient_norm.csv", "gradient_norm.png"]
    assert torch.get_num_threads() == threads
    assert (tmp_path / "gradient_norm.csv").read_text().splitlines()[1] == "dance_grpo,0,1,0.1,0.1,0.1,0.1,0.1,1"
