"""A world that is learnt in a second: two Gaussian modes in 16 dimensions, an MLP velocity, and the whole method.

Everything that the method computes comes from megatron_sage.grpo; only the loop, the network and the reward are here.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from megatron_sage.grpo.advantage import group_advantages
from megatron_sage.grpo.equalizer import gradient_scales
from megatron_sage.grpo.objective import policy_loss
from megatron_sage.grpo.order import pair_order, split_updates
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import log_prob, squared_error_sum, step_coefficients, step_mean, step_sample
from megatron_sage.grpo.trust_region import LambdaController, gaussian_kl_from_error

DIMENSIONS = 16
GROUPS, GROUP_SIZE, MICRO_BATCHES = 16, 8, 2
STEPS, SHIFT, ETA = 12, 3.0, 0.5
ITERATIONS, UPDATES_PER_ROLLOUT, ANCHOR_INTERVAL = 60, 2, 10
POSITION_WEIGHT, VELOCITY_WEIGHT = 1.0, 0.1


class Velocity(nn.Module):
    """v(x [B, D], sigma): two layers of width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(DIMENSIONS + 1, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, DIMENSIONS)
        )

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, sigma.expand(len(x), 1)], dim=1))


def draw_data(count: int, generator: torch.Generator) -> torch.Tensor:
    """All coordinates around +1 or all around -1, std 0.3."""
    mode = torch.randint(0, 2, (count, 1), generator=generator) * 2.0 - 1.0
    return mode + 0.3 * torch.randn(count, DIMENSIONS, generator=generator)


def reward(x: torch.Tensor) -> torch.Tensor:
    """[B]; highest, 0, at 1.5 in every coordinate: beyond the nearer mode. About -3.3 for the data."""
    return -(x - 1.5).square().mean(1)


@functools.cache
def pretrained_weights(seed: int) -> dict[str, torch.Tensor]:
    """Flow matching: v(x_sigma, sigma) -> eps - x0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Velocity()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(1000):
        data = draw_data(512, generator)
        noise, sigma = torch.randn(data.shape, generator=generator), torch.rand(512, 1, generator=generator)
        loss = (network((1 - sigma) * data + sigma * noise, sigma) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


def load(weights: dict[str, torch.Tensor]) -> Velocity:
    network = Velocity()
    network.load_state_dict({name: value.clone() for name, value in weights.items()})
    return network


@dataclass
class Trajectory:
    """One rollout of GROUPS x GROUP_SIZE samples; per step [B, D] states and velocities, [B] log-probabilities."""

    states: list[torch.Tensor]
    velocities: list[torch.Tensor]
    log_probs: dict[int, torch.Tensor]


class Toy:
    """The training loop of the method on the toy, one optimizer, no parallelism."""

    def __init__(self, sde_type: str, equalizer: bool, kl_weight: float, seed: int) -> None:
        self.sigmas = shifted_sigmas(STEPS, SHIFT)
        self.coefficients = step_coefficients(sde_type, self.sigmas, ETA)
        self.scales = gradient_scales(self.coefficients) if equalizer else torch.ones(STEPS)
        self.policy, self.anchor = load(pretrained_weights(seed)), load(pretrained_weights(seed))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=3e-4)
        self.lambda_ = LambdaController("fixed", lambda_min=0.0, lambda_max=kl_weight)
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.seed = seed
        self.updates = 0
        self.initial_deviation = 0.0
        self.clipped: list[float] = []

    def sigma(self, step: int) -> torch.Tensor:
        return self.sigmas[step].float()

    @torch.no_grad()
    def rollout(self) -> Trajectory:
        x = torch.randn(GROUPS * GROUP_SIZE, DIMENSIONS, generator=self.generator)
        trajectory = Trajectory([x], [], {})
        for step in range(STEPS):
            a, b, std = self.coefficients.step(step)
            velocity = self.policy(x, self.sigma(step))
            mean = step_mean(x, velocity, a, b)
            x = step_sample(mean, std, torch.randn(x.shape, generator=self.generator))
            trajectory.states.append(x)
            trajectory.velocities.append(velocity)
            if std > 0:
                trajectory.log_probs[step] = log_prob(x, mean, std)
        return trajectory

    def pair_loss(self, trajectory: Trajectory, advantages: torch.Tensor, rows: slice, step: int) -> torch.Tensor:
        a, b, std = self.coefficients.step(step)
        x, x_next = trajectory.states[step][rows], trajectory.states[step + 1][rows]
        velocity = self.policy(x, self.sigma(step))
        new = log_prob(x_next, step_mean(x, velocity, a, b), std)
        policy = policy_loss(new, trajectory.log_probs[step][rows], advantages[rows], clip_range=1e-3)
        if self.updates % UPDATES_PER_ROLLOUT == 0:
            self.initial_deviation = max(self.initial_deviation, (policy.ratio - 1).abs().max().item())
        self.clipped.append(policy.clipped.double().mean().item())
        loss = self.scales[step] * policy.loss.mean()
        if self.lambda_.value > 0:
            loss = loss + self.lambda_.value * self.dual_kl(trajectory, velocity, rows, step)
        return loss

    def dual_kl(self, trajectory: Trajectory, velocity: torch.Tensor, rows: slice, step: int) -> torch.Tensor:
        _, b, std = self.coefficients.step(step)
        with torch.no_grad():
            anchor = self.anchor(trajectory.states[step][rows], self.sigma(step))
        position, step_kl = (
            gaussian_kl_from_error(squared_error_sum(velocity, reference), DIMENSIONS, b, std).mean()
            for reference in (anchor, trajectory.velocities[step][rows])
        )
        return POSITION_WEIGHT * position + VELOCITY_WEIGHT * step_kl

    def iterate(self, iteration: int) -> float:
        """One rollout and its optimizer steps; the rollout's mean reward."""
        trajectory = self.rollout()
        rewards = reward(trajectory.states[-1])
        advantages = group_advantages(rewards.reshape(GROUPS, GROUP_SIZE)).advantages.flatten()
        rows = len(rewards) // MICRO_BATCHES
        pairs = pair_order(MICRO_BATCHES, self.coefficients.trained_steps(), self.seed, iteration)
        for update in split_updates(pairs, UPDATES_PER_ROLLOUT):
            self.optimizer.zero_grad()
            for batch, step in update:
                part = slice(batch * rows, (batch + 1) * rows)
                (self.pair_loss(trajectory, advantages, part, step) / len(update)).backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.updates += 1
            if self.updates % ANCHOR_INTERVAL == 0:
                self.anchor.load_state_dict(self.policy.state_dict())
        return rewards.mean().item()

    def train(self) -> tuple[float, float]:
        """Mean rollout reward of the first and of the last five iterations."""
        history = [self.iterate(iteration) for iteration in range(ITERATIONS)]
        return sum(history[:5]) / 5, sum(history[-5:]) / 5
