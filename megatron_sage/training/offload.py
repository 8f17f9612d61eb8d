"""Optimizer state in host memory: Megatron's hybrid optimizer, with torch's or DeepSpeed's AdamW on the host.

Megatron's distributed optimizer hands over this rank's part of the weights, split over DP·CP. For the offloaded ones
fp32 masters and moments live on the host: gradients go there, AdamW runs there, new weights come back.
"""

import functools
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_sage.checkpoint.megatron_defects import initialize_adamw


class HostOptimizer(HybridDeviceOptimizer):
    """Megatron's `HybridDeviceOptimizer` where it would fail: on a machine without a GPU, and with fp32 weights.

    The device's part runs torch's AdamW like the host's, so that both have one layout of state: with a fused Adam there
    Megatron would lose its step on loading.
    """

    def __init__(self, params: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(params, **settings)
        for optimizer in self.sub_optimizers:
            initialize_adamw(optimizer)
        self._sync_sub_optimizers_state_to_hdo()

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[Any, ...]:
        """The first parameters, up to the fraction, get fp32 copies on the host.

        Megatron tells by `is_cuda` what can be offloaded: without a GPU nothing, and its step fails on the rest. It has
        no masters for fp32 parameters, which its loading then looks for.
        """
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        wanted = offload_fraction * sum(parameter.numel() for parameter in every)
        taken = 0
        host_groups, device_groups = [], []
        device_to_host, host_to_device, masters = {}, {}, {}
        for group in self.param_groups:
            on_host, on_device = [], []
            for parameter in group["params"]:
                if taken < wanted:
                    taken += parameter.numel()
                    master = torch.empty(parameter.shape, dtype=torch.float32, pin_memory=self.pin_cpu_params)
                    master.copy_(parameter.detach())
                    device_to_host[parameter], host_to_device[master] = master, parameter
                    on_host.append(master)
                else:
                    master = parameter.detach().to(torch.float32, copy=True)
                    on_device.append(master)
                masters[parameter] = master
            host_groups += [group | {"params": on_host}] if on_host else []
            device_groups += [group | {"params": on_device}] if on_device else []
        return host_groups, device_groups, device_to_host, host_to_device, masters

    def _move_new_state_to_right_device(self) -> None:
        """Beside its master. Megatron asks the optimizer's class, which is the same here for host and device."""
        for optimizer in self.sub_optimizers:
            for master, state in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = state[name].to(master.device)


class DeepSpeedAdamW(torch.optim.AdamW):
    """AdamW on the host by DeepSpeed's vectorised kernel, with the state of torch's AdamW: checkpoints are the same.

    It is an AdamW by type because Megatron asks for the type before it saves the step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; `closure` is not used."""
        kernel, stranger = _deepspeed_adam()
        groups = [{**self.param_groups[0], "params": [stranger]}, *self.param_groups]
        kernel.param_groups = [{**group, "bias_correction": True} for group in groups]
        moments = {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
        kernel.state[stranger] = {"step": _FAR, **moments}
        for parameter, state in self.state.items():
            if parameter.grad is not None:
                # DeepSpeed counts with an int, in the state itself
                moments = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                kernel.state[parameter] = {"step": int(state["step"]), **moments}
        kernel.step()
        del kernel.state[stranger]
        for parameter, state in kernel.state.items():
            self.state[parameter]["step"].fill_(state["step"])
        kernel.param_groups = []
        kernel.state.clear()


_FAR = 2**30  # a step that no run comes near


@functools.cache
def _deepspeed_adam() -> tuple[Any, torch.Tensor]:
    """DeepSpeed's optimizer, one for the process, that owns no parameter; and a parameter that makes it forget.

    From one step to the next the kernel multiplies the powers of beta up, in fp32; where the step jumps it computes
    them anew, with another last bit. A resumed run would differ from the one that went on. The stranger's step is far
    away: with it in front, each step is a jump.

    Made at the first use: DeepSpeed compiles its kernel then.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    stranger = torch.zeros(1)
    stranger.grad = torch.zeros(1)
    return DeepSpeedCPUAdam([stranger], adamw_mode=True), stranger


def move_to_host(optimizer: DistributedOptimizer, settings: OptimizerConfig, deepspeed: bool) -> None:
    """Give `optimizer` a `HostOptimizer` in place of the AdamW, without state as yet, that Megatron has put into it.

    Not by Megatron's own switch: that makes host copies of all weights first, those of other DP·CP ranks included, and
    cannot be used with fp32 weights.
    """
    groups = optimizer.optimizer.param_groups
    for group in groups:
        for shard in group["params"]:
            if not shard.is_leaf:
                shard.retain_grad()  # of fp32 weights it is a view, which torch's optimizers take only like this
    gpu = torch.cuda.is_available()
    optimizer.optimizer = HostOptimizer(
        [{key: value for key, value in group.items() if key not in optimizer.optimizer.defaults} for group in groups],
        offload_fraction=settings.optimizer_offload_fraction,
        cpu_optimizer_cls=DeepSpeedAdamW if deepspeed else torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        pin_cpu_grads=gpu,
        pin_cpu_params=gpu,
        overlap_cpu_optimizer_d2h_h2d=False,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,  # torch's vectorised kernel on the host
    )
