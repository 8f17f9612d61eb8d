"""What a rollout leaves behind, on this rank: the shard of every latent, and scalars per (sample, step).

Nothing here is whole: latents and velocities hold this rank's tokens only, and only the stages that need them hold
any: the first one reads latents, the last one scores them, those between have none. What is scored is exactly what is
stored: a latent rounded after its log-probability was taken biases every ratio downwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from megatron_sage.rollout.policy import Prompt


class Kept:
    """Tensors by step. With `offload` they wait in (pinned) host memory; in `dtype`; read back as float32."""

    def __init__(self, dtype: torch.dtype = torch.float32, offload: bool = False) -> None:
        self.dtype, self.offload = dtype, offload
        self._tensors: dict[int, torch.Tensor] = {}
        self._device = torch.device("cpu")

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """What `x` will be when it is read back."""
        return x.to(self.dtype).float()

    def __setitem__(self, step: int, x: torch.Tensor) -> None:
        self._device, stored = x.device, x.to(self.dtype)
        if self.offload and x.device.type != "cpu":
            # pinned, so that the copy runs beside the next forward; reading back is ordered behind it by the stream
            host = torch.empty_like(stored, device="cpu", pin_memory=True)
            stored = host.copy_(stored, non_blocking=True)
        self._tensors[step] = stored

    def __getitem__(self, step: int) -> torch.Tensor:
        return self._tensors[step].to(self._device, non_blocking=True).float()

    def __delitem__(self, step: int) -> None:
        del self._tensors[step]

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by a function of it."""
        for step in self._tensors:
            self[step] = function(self[step])

    @property
    def bytes(self) -> int:
        """Stored, wherever."""
        return sum(x.nbytes for x in self._tensors.values())


@dataclass
class MicroTrajectory:
    """The trajectories of one micro-batch: B samples of one group, N steps."""

    group: int  # number of the group in the whole run, the same at every layout
    samples: list[int]  # which samples of the group
    prompt: Prompt
    latents_SBC: Kept = field(default_factory=Kept)  # around trained steps, and N; first and last stage
    log_prob_B: dict[int, torch.Tensor] = field(default_factory=dict)  # trained step -> float64 [B]; every stage
    velocity_SBC: Kept = field(default_factory=Kept)  # of the rollout's policy; last stage
    reference_SBC: dict[str, Kept] = field(default_factory=dict)  # velocities of each reference; last stage
    advantage_B: torch.Tensor | None = None  # float64 [B]
    trained_B: torch.Tensor | None = None  # bool [B]; False: non-finite reward, no gradient

    def keep(self, trained_B: torch.Tensor, everything: bool | None = None) -> None:
        """Say which samples are trained on; the others' tensors become zeros.

        A zero weight in the loss is not enough: where a dropped sample's latents are nan, zero times nan would put
        nan into every weight's gradient. `everything`: whether that is all of them; None: asked of the tensor, for
        which the host waits.
        """
        self.trained_B = trained_B
        if bool(trained_B.all()) if everything is None else everything:
            return
        for kept in (self.latents_SBC, self.velocity_SBC, *self.reference_SBC.values()):
            kept.change(lambda x: torch.where(trained_B[None, :, None], x, 0.0))
        self.log_prob_B = {i: torch.where(trained_B, p, 0.0) for i, p in self.log_prob_B.items()}
