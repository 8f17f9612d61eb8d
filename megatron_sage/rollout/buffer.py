"""What a rollout leaves behind, on this rank: the shard of every latent, and scalars per (sample, step).

Nothing here is whole: latents and velocities hold this rank's tokens only. They are kept in float32, and what is
scored is exactly what is stored: a latent rounded after its log-probability was taken biases every ratio downwards.
"""

from dataclasses import dataclass, field

import torch

from megatron_sage.rollout.policy import Prompt


@dataclass
class MicroTrajectory:
    """The trajectories of one micro-batch: B samples of one group, N steps."""

    group: int  # number of the group in the whole run, the same at every layout
    samples: list[int]  # which samples of the group
    prompt: Prompt
    latents_SBC: list[torch.Tensor]  # N + 1 tensors, float32
    log_prob_B: dict[int, torch.Tensor]  # trained step -> float64 [B]
    velocity_SBC: dict[int, torch.Tensor] = field(default_factory=dict)  # of the rollout's policy
    reference_SBC: dict[int, torch.Tensor] = field(default_factory=dict)  # of the position reference
    advantage_B: torch.Tensor | None = None  # float64 [B]
    trained_B: torch.Tensor | None = None  # bool [B]; False: non-finite reward, no gradient

    def keep(self, trained_B: torch.Tensor) -> None:
        """Say which samples are trained on; the others' tensors become zeros.

        A zero weight in the loss is not enough: where a dropped sample's latents are nan, zero times nan would put
        nan into every weight's gradient.
        """
        self.trained_B = trained_B
        if bool(trained_B.all()):
            return
        self.latents_SBC = [torch.where(trained_B[None, :, None], x, 0.0) for x in self.latents_SBC]
        self.velocity_SBC = {i: torch.where(trained_B[None, :, None], v, 0.0) for i, v in self.velocity_SBC.items()}
        self.log_prob_B = {i: torch.where(trained_B, p, 0.0) for i, p in self.log_prob_B.items()}

    @property
    def final_SBC(self) -> torch.Tensor:
        """The latents of the finished videos."""
        return self.latents_SBC[-1]
