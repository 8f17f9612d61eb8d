"""The denoising loop against closed forms, and its log-probabilities against autograd's Gaussian."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_sage.engine import step_table
from megatron_sage.grpo.equalizer import norm_factors
from megatron_sage.model.transformer import TextCondition
from megatron_sage.parallel import noise
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import Network, Prompt, VideoShape
from megatron_sage.rollout.sampler import Flight, rollout, sample_latents, transition_log_prob

MEAN, STD = 0.7, 0.4  # of the data in every element
SHAPE = VideoShape((4, 8, 8), 6, TokenShard(256, 1, 0))
EMPTY = torch.zeros(1, 1, 1)
PROMPT = Prompt("x", TextCondition(EMPTY, EMPTY, EMPTY), TextCondition(EMPTY, EMPTY, EMPTY))
CPU = torch.device("cpu")


def exact_velocity(x: torch.Tensor, sigma: float, prompt: Prompt) -> torch.Tensor:
    """E[noise - x0 | x] for x0 ~ N(MEAN, STD^2)."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    centred = x - (1 - sigma) * MEAN
    return (sigma - (1 - sigma) * STD**2) / variance * centred - MEAN


class ExactNetwork(Network):
    """One stage whose velocity is the exact one."""

    def __init__(self) -> None:
        super().__init__([], SHAPE, 1.0, CPU)
        self.starts = self.ends = True
        self.num_chunks = 1

    def forward(
        self, chunk: int, x: torch.Tensor, sigma: float, prompt: Prompt, *rest: object, **more: object
    ) -> torch.Tensor:
        return exact_velocity(x, sigma, prompt)


def roll(sde_type: str, steps: int, eta: float, samples: list[int]) -> MicroTrajectory:
    table, _ = step_table(sde_type, steps, 3.0, eta)
    flights = [Flight(0, samples, PROMPT)]
    (trajectory,), _ = rollout(ExactNetwork(), table, flights, seed=1, token_group=None)
    assert set(trajectory.latents_SBC) == table.kept_latents
    return trajectory


def final(trajectory: MicroTrajectory) -> torch.Tensor:
    return trajectory.latents_SBC[max(trajectory.latents_SBC)]


@pytest.mark.parametrize("sde_type", ["ode", "dance_grpo", "flow_grpo", "sage_grpo", "cps"])
def test_the_loop_ends_in_the_data_distribution(sde_type: str) -> None:
    """12,288 elements: the standard error of the mean is 0.004, of the std 0.003."""
    x_SBC = final(roll(sde_type, 200, 0.3, [0, 1, 2, 3, 4, 5, 6, 7]))
    assert abs(x_SBC.mean() - MEAN) < 0.03
    assert abs(x_SBC.std() - STD) < 0.03


def test_log_probability_is_the_mean_gaussian_density_of_what_is_stored() -> None:
    table, _ = step_table("sage_grpo", 6, 3.0, 0.5)
    trajectory = roll("sage_grpo", 6, 0.5, [0, 1])
    assert sorted(trajectory.log_prob_B) == table.trained_steps == list(range(6))
    for i, logp_B in trajectory.log_prob_B.items():
        x, following = (trajectory.latents_SBC[k].double() for k in (i, i + 1))
        mean = table.a[i] * x + table.b[i] * exact_velocity(x, table.sigmas[i], PROMPT)
        expected = torch.distributions.Normal(mean, table.std[i]).log_prob(following).mean(dim=(0, 2))
        assert torch.allclose(logp_B.double(), expected, atol=1e-6)


def test_gradient_norm_of_the_log_probability_is_the_equalizer_s_factor() -> None:
    """d logp / d v = N_i z / D element by element, N_i = |b| / std: the quantity that the equalizer divides out."""
    table, coefficients = step_table("flow_grpo", 8, 3.0, 0.5)
    factors = norm_factors(coefficients)
    trajectory = roll("flow_grpo", 8, 0.5, [0])
    for i in (0, 3, 7):
        v = exact_velocity(trajectory.latents_SBC[i], table.sigmas[i], PROMPT).requires_grad_()
        mean = table.a[i] * trajectory.latents_SBC[i] + table.b[i] * v
        transition_log_prob(trajectory.latents_SBC[i + 1], mean, table.std[i], SHAPE, None).sum().backward()
        z = noise.token_noise(256, 6, [0], 1, noise.ROLLOUT, 0, i)
        norm = float(factors[i]) * z.norm() / SHAPE.elements
        assert math.isclose(float(v.grad.norm()), float(norm), rel_tol=1e-3)


def test_a_sample_does_not_depend_on_the_micro_batch() -> None:
    together = roll("sage_grpo", 5, 0.5, [0, 1, 2, 3])
    alone = roll("sage_grpo", 5, 0.5, [2])
    assert torch.equal(final(together)[:, 2:3], final(alone))
    assert torch.allclose(together.log_prob_B[4][2:3], alone.log_prob_B[4], atol=1e-7)


def test_sampling_without_a_record_is_the_same_loop() -> None:
    table, _ = step_table("cps", 5, 3.0, 0.5)
    kept = final(roll("cps", 5, 0.5, [0, 1]))
    flights = [Flight(0, [0, 1], PROMPT)]
    (free,) = sample_latents(ExactNetwork(), table, flights, seed=1, stream=noise.ROLLOUT)
    assert torch.equal(kept, free)


class CountingChunk:
    """In the place of a model: its velocity is the number of text tokens."""

    pp_group = None
    pre_process = post_process = True
    config = SimpleNamespace(in_channels=9, params_dtype=torch.bfloat16)

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def __call__(
        self, video: torch.Tensor, timestep: torch.Tensor, text: TextCondition, grid: object, **rest: None
    ) -> torch.Tensor:
        assert set(rest.values()) == {None}
        assert timestep.dtype == torch.float32 and video.dtype == torch.bfloat16
        assert video.shape[-1] == 9 and not video[..., 6:].any()
        self.calls.append((text.qwen_BLD.shape[1], float(timestep[0])))
        return torch.full((256, 2, 6), float(text.qwen_BLD.shape[1]), dtype=video.dtype)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_guidance_extrapolates_from_the_unconditional_branch(guidance: float) -> None:
    two = Prompt("x", TextCondition(torch.zeros(1, 5, 1), EMPTY, EMPTY), PROMPT.unconditional)
    chunk = CountingChunk()
    network = Network([chunk], SHAPE, guidance, CPU)  # type: ignore[list-item]
    v = network.train_forward(chunk, 0, torch.zeros(256, 2, 6), 0.3001, two, 2, length=0)  # type: ignore[arg-type]
    assert v.dtype == torch.float32 and torch.equal(v, torch.full_like(v, 1 + guidance * (5 - 1)))
    expected = [(5, pytest.approx(300.1)), (1, pytest.approx(300.1))]  # bfloat16 would have made it 300
    assert chunk.calls == expected[: network.branches] and network.branches == (1 if guidance == 1.0 else 2)
