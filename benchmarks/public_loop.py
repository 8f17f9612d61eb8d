"""SAGE-GRPO as a straightforward loop on diffusers' `HunyuanVideo15Transformer3DModel`: what ours is compared with.

It does what public implementations (SAGE-GRPO, DanceGRPO) do. Texts are padded to the tokenizer's maximum and masked,
text-to-video has its zero image tokens, and every forward embeds its text anew. Guidance is two forwards one after the
other, conditional first, as in diffusers' pipeline (SAGE-GRPO makes one forward of batch 2 of the same texts: the same
operations). One video and one step at a time, in sampling and in training; the reference is a second resident model.

The mathematics is ours: schedule, samplers, loss, KL and λ are the functions of `megatron_sage.grpo`, and noise,
prompts and the order of the pairs follow from the same seed. So both sides must end with the same weights.
Shapes: latents [1, C, T, H, W].
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_sage.config import Config
from megatron_sage.config.schema import lambda_max
from megatron_sage.data.cursor import PromptCursor
from megatron_sage.grpo.advantage import group_advantages
from megatron_sage.grpo.equalizer import gradient_scales
from megatron_sage.grpo.objective import policy_loss
from megatron_sage.grpo.order import pair_order, split_updates
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import (
    is_normalized,
    log_prob_from_error,
    squared_error_sum,
    step_coefficients,
    step_mean,
    step_sample,
)
from megatron_sage.grpo.trust_region import LambdaController, gaussian_kl_from_error, step_kl_log_prob, term_weights
from megatron_sage.parallel import noise

Arguments = dict[str, torch.Tensor]  # keyword arguments of the model's forward that one text becomes


@dataclass
class Trajectory:
    """One sample of a group, and what training needs of it."""

    group: int
    sample: int
    text: Arguments
    latents: list[torch.Tensor] = field(default_factory=list)  # N + 1
    log_prob: dict[int, torch.Tensor] = field(default_factory=dict)  # trained step -> float64 [1]
    reference: dict[int, torch.Tensor] = field(default_factory=dict)  # trained step -> the reference's velocity
    advantage: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    trained: bool = True  # False: its reward was no number


class PublicLoop:
    """A run: `run_iteration` rolls out, rewards, asks the reference and trains."""

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        texts: Sequence[Arguments],
        negative: Arguments,
        reward: Callable[[int, int], float],
        grid: tuple[int, int, int],
        together: int = 1,
        on_enter: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """The same `config` as ours.

        Args:
            model: the policy, in float32.
            texts: of each prompt of the file, padded; `negative`: the unconditional one.
            reward: of (number of the group in the run, sample).
            grid: latent frames, height, width.
            together: samples whose pairs are neighbours in the order, ours' sampler.micro_batch: with several
                updates a rollout it decides which pairs an update has.
            on_enter: told of each phase that begins.
        """
        check(config)
        self.config, self.model, self.texts, self.negative = config, model, texts, negative
        self.reward, self.grid, self.together, self.on_enter = reward, grid, together, on_enter
        sampler, kl, optimizer = config.sampler, config.kl, config.optimizer
        sigmas = shifted_sigmas(sampler.num_steps, sampler.shift)
        coefficients = step_coefficients(sampler.sde_type, sigmas, sampler.eta)
        self.normalized = is_normalized(sampler.sde_type)
        self.sigmas, self.trained_steps = sigmas.tolist(), coefficients.trained_steps()
        self.steps = [coefficients.step(i) for i in range(sampler.num_steps)]  # (a, b, std) of each
        scales = gradient_scales(coefficients, self.normalized).tolist()
        self.scales = scales if config.grpo.equalizer else [1.0] * sampler.num_steps
        self.position_weight, self.velocity_weight = term_weights(kl.strategy, kl.position_weight, kl.velocity_weight)
        self.moving = kl.strategy == "moving" or (kl.strategy == "dual" and kl.position == "moving")
        self.reference = copy.deepcopy(model).requires_grad_(False) if self.position_weight else None
        self.controller = LambdaController(
            kl.schedule, kl.lambda_min, lambda_max(kl), kl.warmup_steps, kl.window, kl.target, kl.gain, kl.feedback
        )
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1]},
                {"params": [p for p in self.parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.device = self.parameters[0].device
        self.cursor = PromptCursor(len(texts), config.grpo.prompts_per_iteration, config.seed)
        self.iteration = self.optimizer_steps = 0
        self.trajectories: list[Trajectory] = []  # of the last iteration
        self.pairs: list[tuple[Trajectory, int, dict[str, torch.Tensor]]] = []  # visited in the last iteration

    def run_iteration(self) -> dict[str, float]:
        """Metrics, under the names that ours have."""
        grpo = self.config.grpo
        self.on_enter("rollout")
        indices = self.cursor.take()
        self.trajectories = trajectories = [
            self.roll_out(Trajectory(self.iteration * len(indices) + place, sample, self.texts[prompt]))
            for place, prompt in enumerate(indices)
            for sample in range(grpo.group_size)
        ]
        self.on_enter("reward")
        rewards = torch.tensor([self.reward(t.group, t.sample) for t in trajectories], dtype=torch.float64)
        found = group_advantages(rewards.view(-1, grpo.group_size))
        for t, advantage, trained in zip(trajectories, found.advantages.view(-1), found.mask.view(-1), strict=True):
            t.advantage, t.trained = advantage.view(1).to(self.device), bool(trained)
        if self.reference is not None:
            self.on_enter("reference")
            for trajectory in trajectories:
                self.ask_reference(trajectory)
        row = self.update(trajectories)
        self.on_enter("")
        self.iteration += 1
        return row

    def velocity(self, model: torch.nn.Module, x: torch.Tensor, step: int, text: Arguments) -> torch.Tensor:
        """Guided, [1, C, T, H, W]."""
        guidance = self.config.sampler.guidance_scale
        condition = x.new_zeros(1, x.shape[1] + 1, *self.grid)  # no image: zero latents and mask
        timestep = torch.full((1,), 1000 * self.sigmas[step], device=self.device)
        inputs = {"hidden_states": torch.cat([x, condition], dim=1), "timestep": timestep, "return_dict": False}
        conditional = model(**inputs, **text)[0]
        if guidance == 1:
            return conditional
        unconditional = model(**inputs, **self.negative)[0]
        return unconditional + guidance * (conditional - unconditional)

    def log_prob(self, x_next: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
        """float64 [1]."""
        return log_prob_from_error(squared_error_sum(x_next, mean, 0), mean.numel(), std, self.normalized)

    def noise(self, trajectory: Trajectory, step: int) -> torch.Tensor:
        """The numbers that ours draws for this sample's step; there a token's channels lie side by side."""
        channels, seed = self.model.config.out_channels, self.config.seed
        shape = (*self.grid, channels)
        drawn = noise.gaussian(shape, seed, noise.ROLLOUT, trajectory.group, trajectory.sample, step)
        return drawn.movedim(-1, 0)[None].contiguous().to(self.device)

    @torch.no_grad()
    def roll_out(self, trajectory: Trajectory) -> Trajectory:
        """All steps of one sample."""
        x = self.noise(trajectory, noise.INITIAL)
        trajectory.latents.append(x)
        for step, (a, b, std) in enumerate(self.steps):
            mean = step_mean(x, self.velocity(self.model, x, step, trajectory.text), a, b)
            x = step_sample(mean, std, self.noise(trajectory, step) if std > 0 else None)
            trajectory.latents.append(x)
            if std > 0:
                trajectory.log_prob[step] = self.log_prob(x, mean, std)
        return trajectory

    @torch.no_grad()
    def ask_reference(self, trajectory: Trajectory) -> None:
        """The reference's velocities at the trained steps."""
        assert self.reference is not None
        for step in self.trained_steps:
            x = trajectory.latents[step]
            trajectory.reference[step] = self.velocity(self.reference, x, step, trajectory.text)

    def update(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Every (sample, step) pair once, in `updates_per_rollout` optimizer steps."""
        grpo, weight = self.config.grpo, self.controller.value
        order = pair_order(
            len(trajectories) // self.together,
            self.trained_steps,
            self.config.seed,
            self.iteration,
            grpo.timestep_permutation,
        )
        self.pairs, norms, first = [], [], 0
        for update in split_updates(order, grpo.updates_per_rollout):
            self.on_enter("train")
            begin = len(self.pairs)
            chosen = [(trajectories[i * self.together + j], step) for i, step in update for j in range(self.together)]
            chosen = [(trajectory, step) for trajectory, step in chosen if trajectory.trained]
            for trajectory, step in chosen:
                terms = self.loss(trajectory, step)
                (terms["loss"] / len(chosen)).backward()
                self.pairs.append((trajectory, step, {name: value.detach() for name, value in terms.items()}))
            if chosen:
                norms.append(self.step(self.pairs[begin:]))
            first = first or len(self.pairs)
        return self.metrics(first) | {"lambda": weight, "grad_norm": sum(norms) / max(1, len(norms))}

    def loss(self, trajectory: Trajectory, step: int) -> dict[str, torch.Tensor]:
        """The loss of one pair and what it is made of, each a scalar."""
        grpo, (a, b, std) = self.config.grpo, self.steps[step]
        x, x_next, old = trajectory.latents[step], trajectory.latents[step + 1], trajectory.log_prob[step]
        velocity = self.velocity(self.model, x, step, trajectory.text)
        new = self.log_prob(x_next, step_mean(x, velocity, a, b), std)
        policy = policy_loss(new, old, trajectory.advantage, grpo.clip_range, grpo.advantage_clip)
        position = past = torch.zeros_like(new)
        if self.position_weight:
            error = squared_error_sum(velocity, trajectory.reference[step], 0)
            position = gaussian_kl_from_error(error, x.numel(), b, std)
        if self.velocity_weight:
            past = step_kl_log_prob(old, new)
            if not self.normalized:
                past = past / (2 * std**2)
        divergence = self.position_weight * position + self.velocity_weight * past
        loss = self.scales[step] * policy.loss + self.controller.value * divergence
        named = {"loss": loss, "loss/policy": policy.loss, "kl/position": position, "kl/velocity": past}
        named |= {"ratio": policy.ratio, "clipped": policy.clipped, "log_prob": new, "divergence": divergence}
        return {name: value.squeeze() for name, value in named.items()}

    def step(self, pairs: list[tuple[Trajectory, int, dict[str, torch.Tensor]]]) -> float:
        """Clip, step, λ, reference; the gradient's norm."""
        self.on_enter("optimizer")
        settings = self.config.optimizer
        # summed in float64, as in ours: torch's norm of millions of float32 values is off by 1e-4 on a CPU
        squares = [p.grad.square().sum(dtype=torch.float64) for p in self.parameters if p.grad is not None]
        norm = float(torch.stack(squares).sum().sqrt())
        if settings.grad_clip > 0 and norm > settings.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.grad_clip, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (self.optimizer_steps + 1) / max(1, settings.warmup_steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        if self.config.kl.strategy != "none":
            self.controller.update(float(torch.stack([terms["divergence"] for _, _, terms in pairs]).mean()))
        if self.reference is not None and self.moving and self.optimizer_steps % self.config.kl.anchor_interval == 0:
            self.reference.load_state_dict(self.model.state_dict())
        return norm

    def metrics(self, first: int) -> dict[str, float]:
        """Means over the iteration's pairs; `first`: pairs before the first optimizer step."""
        if not self.pairs:
            return {}
        columns = {name: torch.stack([terms[name].double() for _, _, terms in self.pairs]) for name in self.pairs[0][2]}
        ratio = columns["ratio"]
        row = {name: float(columns[name].mean()) for name in ("loss", "loss/policy", "kl/position", "kl/velocity")}
        row |= {"ratio/mean": float(ratio.mean()), "ratio/min": float(ratio.min()), "ratio/max": float(ratio.max())}
        row["ratio/initial_deviation"] = float((ratio[:first] - 1).abs().max())
        return row | {"clip_fraction": float(columns["clipped"].mean())}


def check(config: Config) -> None:
    """ValueError for what the loop does not have."""
    wanted: dict[str, tuple[Any, Any]] = {
        "grpo.cfg_in_training": (config.grpo.cfg_in_training, "on"),
        "sampler.sde_window.size": (config.sampler.sde_window.size, None),
        "sampler.latent_dtype": (config.sampler.latent_dtype, "fp32"),
        "kl.step_kl": (config.kl.step_kl, "logprob"),
        "kl.phase": (config.kl.phase, "rollout"),
        "optimizer.name": (config.optimizer.name, "adamw"),
        "optimizer.ema_decay": (config.optimizer.ema_decay, None),
        "precision.dtype": (config.precision.dtype, "fp32"),
        "lora.rank": (config.lora.rank, None),
    }
    for key, (found, needed) in wanted.items():
        if found != needed:
            raise ValueError(f"{key}={found}: the public loop has {needed} alone")
    if config.kl.strategy == "dual" and config.kl.position == "both":
        raise ValueError("kl.position=both: the public loop has one reference; give moving or fixed")
