"""Defects of Megatron-core 0.16.1 between its optimizers and their checkpoints, mended in one place.

1. `DistributedOptimizer` over torch's AdamW: loading a `fully_reshardable` checkpoint looks for a tensor `step` among
   each parameter's moments, where it never is: KeyError.
2. Past that, all parameters are given one `step` tensor. AdamW adds 1 to it once for each of them, so the bias
   correction jumps by the number of parameters.
3. Without moments, before the first step, `DistributedOptimizer.state_dict` fails on an assertion, and so does every
   load into a new optimizer; the non-distributed optimizers make moments without `step`, which AdamW cannot use.
4. `HybridDeviceOptimizer` keeps its constructor's arguments, classes among them, in its parameter groups: they would be
   pickled into the checkpoint, which a safe load refuses.
5. The persistent worker for background saves divides by the number of GPUs: without one it ends, and its parent waits
   for ever. Not mended here: `checkpoint/saving.py` writes in a thread.

A defect that a newer Megatron has mended fails its test in tests/checkpoint/test_megatron_defects.py: remove it here.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_PLAIN = (bool, int, float, str, tuple, type(None))  # what a parameter group may hold in a checkpoint


def mend(optimizer: MegatronOptimizer) -> None:
    """Make one Megatron optimizer (not a chain) save and load, from before its first step on. Once, when it is built.

    Torch's AdamW and what behaves like it (the hybrid optimizer) get their moments now; other inner optimizers, such as
    fused ones, keep theirs as Megatron makes them.
    """
    if isinstance(optimizer, DistributedOptimizer):
        optimizer.__class__ = ReshardableOptimizer
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.AdamW):
        initialize_adamw(inner)
    if isinstance(inner, torch.optim.AdamW | HybridDeviceOptimizer):
        inner.register_load_state_dict_pre_hook(separate_steps)


def initialize_adamw(optimizer: torch.optim.AdamW) -> None:
    """Zero moments and step 0, as AdamW itself makes them at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                # on the parameter's device only where the fused kernel reads it there
                "step": torch.zeros((), device=parameter.device if group.get("fused") else "cpu"),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }


def separate_steps(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give every parameter a step tensor of its own; 0 where the checkpoint was written before the first step."""
    for state in state_dict["state"].values():
        state["step"] = state["step"].clone() if "step" in state else torch.zeros(())


class ReshardableOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer without the defects of this module."""

    def state_dict(self) -> dict[str, Any]:
        """What is not a tensor: parameter groups, without classes, and the step."""
        if self.optimizer.state:
            state = super().state_dict()
        else:  # this rank's part of the buffer is padding: there is nothing whose step could be asked
            groups = self.optimizer.state_dict()["param_groups"]
            state = {"optimizer": {"param_groups": [{**group, "step": 0} for group in groups]}}
        groups = state["optimizer"]["param_groups"]
        state["optimizer"]["param_groups"] = [
            {key: value for key, value in group.items() if isinstance(value, _PLAIN)} for group in groups
        ]
        return state

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        """In place, so that a slice of a loaded tensor does not keep the whole of it in memory.

        The step is not among `tensors`: `load_state_dict` has set it.
        """
        held = self._get_main_param_and_optimizer_states(model_param)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            held[name].copy_(tensors[name])
