"""The moving anchor: a copy of the policy, refreshed now and then, that the position KL is measured against.

Each rank keeps its own shard (TP and PP) in host memory (pinned where there is a GPU); nothing is gathered, at
no time. To use it the shard is swapped in whole for the policy's: two copies of the shard are on the device then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class HostAnchor:
    """This rank's shard of the anchor's parameters: of all chunks of its pipeline stage."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._shard = {
            name: torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
            for name, parameter in _named(chunks)
        }
        self.refresh(chunks)

    @torch.no_grad()
    def refresh(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Copy the chunks' present parameters into the anchor."""
        for name, parameter in _named(chunks):
            self._shard[name].copy_(parameter)

    @contextmanager
    def swapped_in(self, chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Inside the block the chunks' parameters are the anchor's; no gradient may be taken there.

        The policy's tensors are put aside by reference and put back, not copied: they come back bit for bit, and
        the optimizer and the gradient buffers never notice.
        """
        policy = {name: parameter.data for name, parameter in _named(chunks)}
        try:
            with torch.no_grad():
                for name, parameter in _named(chunks):
                    parameter.data = self._shard[name].to(parameter.device)
                yield
        finally:
            for name, parameter in _named(chunks):
                parameter.data = policy[name]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The shard itself, not a copy: "chunk.parameter" -> tensor."""
        return self._shard

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a shard of the same names and shapes."""
        if missing := self._shard.keys() ^ state.keys():
            raise ValueError(f"anchor: parameters {sorted(missing)[:3]} are not in both the checkpoint and the model")
        for name, value in state.items():
            self._shard[name].copy_(value)


def _named(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Two chunks of a rank have parameters of one name: each has a copy of the timestep's embedder."""
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            yield f"{number}.{name}", parameter
