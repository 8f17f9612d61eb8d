"""A moving average of the policy's weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Ema:
    """ema ← decay·ema + (1 - decay)·weights after every optimizer step, in fp32, of this rank's shard (TP and PP).

    It starts from the weights at hand. Of the weights that the forward uses: with bf16 weights, of their rounded
    values, alike whatever optimizer holds the masters. Frozen parameters are their own average and are left out.
    Nothing is communicated: replicas average equal weights.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], decay: float, on_host: bool) -> None:
        self.decay, self._chunks = decay, chunks
        self._average = {name: _copy(parameter, on_host) for name, parameter in self._named()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the present weights into the average."""
        for name, parameter in self._named():
            average = self._average[name]
            average.lerp_(parameter.to(average.device, torch.float32), 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the policy's weights are the average, in their own dtype: to sample with it or export it.

        No optimizer step and no gradient there. The policy's tensors are put aside by reference and come back as they
        were.
        """
        policy = {name: parameter.data for name, parameter in self._named()}
        try:
            with torch.no_grad():
                for name, parameter in self._named():
                    parameter.data = self._average[name].to(parameter.device, parameter.dtype)
                yield
        finally:
            for name, parameter in self._named():
                parameter.data = policy[name]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average itself, not a copy: "chunk.parameter" -> fp32 tensor."""
        return self._average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over an average of the same names and shapes; ValueError where a name is in one of them only."""
        if missing := self._average.keys() ^ state.keys():
            raise ValueError(f"ema: parameters {sorted(missing)[:3]} are not in both the checkpoint and the model")
        for name, value in state.items():
            self._average[name].copy_(value)

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Two chunks of a rank have parameters of one name: each has a copy of the timestep's embedder."""
        for number, chunk in enumerate(self._chunks):
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    yield f"{number}.{name}", parameter


def _copy(parameter: torch.nn.Parameter, on_host: bool) -> torch.Tensor:
    where = torch.device("cpu") if on_host else parameter.device
    average = torch.empty(parameter.shape, dtype=torch.float32, device=where, pin_memory=on_host and parameter.is_cuda)
    return average.copy_(parameter.detach())
