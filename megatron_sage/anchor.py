"""The moving anchor: a copy of the policy, refreshed now and then, that the position KL is measured against.

Each rank keeps its own tensor-parallel shard in host memory (pinned where there is a GPU); nothing is gathered, at
no time. To use it the shard is swapped in whole for the policy's: two copies of the shard are on the device then.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class HostAnchor:
    """This rank's shard of the anchor's parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._shard = {
            name: torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
            for name, parameter in model.named_parameters()
        }
        self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: torch.nn.Module) -> None:
        """Copy the model's present parameters into the anchor."""
        for name, parameter in model.named_parameters():
            self._shard[name].copy_(parameter)

    @contextmanager
    def swapped_in(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside the block the model's parameters are the anchor's; no gradient may be taken there.

        The policy's tensors are put aside by reference and put back, not copied: they come back bit for bit, and
        the optimizer and the gradient buffers never notice.
        """
        policy = {name: parameter.data for name, parameter in model.named_parameters()}
        try:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.data = self._shard[name].to(parameter.device)
                yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = policy[name]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The shard itself, not a copy, by the model's parameter names."""
        return self._shard

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a shard of the same names and shapes."""
        if missing := self._shard.keys() ^ state.keys():
            raise ValueError(f"anchor: parameters {sorted(missing)[:3]} are not in both the checkpoint and the model")
        for name, value in state.items():
            self._shard[name].copy_(value)
