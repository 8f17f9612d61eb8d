"""One forward and backward of our model on whole inputs, at any layout, results whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_sage.model.attention import TokenLayout
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.reductions import allreduce_replicated_gradients
from megatron_sage.parallel.sequence import gather
from megatron_sage.verification.inputs import Inputs


@dataclass
class Result:
    """Float32, on the CPU. `blocks[i][stream][sample]`: output [valid tokens, H] of block i; stream 0 is the video."""

    sample: Tensor  # [B, C_out, T, H, W]
    input_gradient: Tensor | None = None  # of hidden_states; None without grad_output
    blocks: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = field(default_factory=list)


def run_ours(model: HunyuanVideoDiT, inputs: Inputs, observe_blocks: bool = False) -> Result:
    """The velocity of all samples; with `grad_output`, gradients of sum(sample * grad_output) too.

    The parameters' gradients stay in the model, reduced: read them with `gather_named(model, "grad")`. They are summed
    over the micro-batches in float32 (`main_grad`) where the parameters are not.
    """
    shard = model.image_shard(inputs.grid)
    result = Result(torch.zeros(inputs.batch, model.config.out_channels, *inputs.grid))
    for parameter in model.parameters():
        parameter.grad, parameter.main_grad = None, None  # type: ignore[attr-defined]
    for samples, text in inputs.micro_batches():
        video = shard.shard(_tokens(inputs.hidden_states[samples])).requires_grad_(inputs.grad_output is not None)
        times = [None if t is None else t[samples] for t in (inputs.timestep, inputs.timestep_r)]
        with torch.set_grad_enabled(inputs.grad_output is not None), _observed(model, samples, result, observe_blocks):
            velocity = model(video, times[0], text, inputs.grid, times[1])
        result.sample[samples] = _video(gather(velocity, shard, model.tp_group), inputs.grid)
        if inputs.grad_output is not None:
            velocity.backward(shard.shard(_tokens(inputs.grad_output[samples])).to(velocity.dtype))
            if result.input_gradient is None:
                result.input_gradient = torch.zeros_like(inputs.hidden_states, device="cpu")
            assert video.grad is not None
            result.input_gradient[samples] = _video(gather(video.grad, shard, model.tp_group), inputs.grid)
            _accumulate(model)
    allreduce_replicated_gradients(model, model.tp_group)
    return result


def _accumulate(model: HunyuanVideoDiT) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.dtype != torch.float32:
            total = 0.0 if parameter.main_grad is None else parameter.main_grad
            parameter.main_grad, parameter.grad = parameter.grad.float() + total, None


@contextmanager
def _observed(model: HunyuanVideoDiT, samples: list[int], result: Result, enabled: bool) -> Iterator[None]:
    """Collects what every block hands on, without padding."""
    if not enabled:
        yield
        return
    if not result.blocks:
        result.blocks = [({}, {}) for _ in model.transformer_blocks]

    def hook(index: int) -> Any:
        def collect(block: torch.nn.Module, arguments: tuple, outputs: tuple[Tensor, Tensor]) -> None:
            layout: TokenLayout = arguments[3]
            for stream, (output, shard) in enumerate(zip(outputs, (layout.image, layout.text), strict=True)):
                whole = gather(output, shard, model.tp_group).float().cpu()
                result.blocks[index][stream].update({s: whole[:, i] for i, s in enumerate(samples)})

        return collect

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(model.transformer_blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(video_BCTHW: Tensor) -> Tensor:
    return video_BCTHW.flatten(2).permute(2, 0, 1)


def _video(tokens_SBC: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return tokens_SBC.permute(1, 2, 0).unflatten(2, grid).float().cpu()
