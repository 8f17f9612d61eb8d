"""diffusers' model on the same weights and inputs, and the comparison with ours."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sage.verification.inputs import Inputs
from megatron_sage.verification.ours import Result

# Largest |ours - diffusers| over largest |diffusers|. Two fp32 implementations reach 2e-7 to 1e-6 and 1e-6 to 5e-6, the
# more the larger the weights, with two blocks; a wrong epsilon or row order is orders of magnitude above that;
# in bf16 the weights and activations of ours carry 8 bits while the reference stays fp32.
TOLERANCES = {torch.float32: (3e-6, 2e-5), torch.bfloat16: (3e-2, 2e-1)}
TOLERANCE_DEPTH = 4  # from 2 to 54 blocks the errors of output and blocks stay, those of the worst gradients double


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN does not."""
        return self.error <= self.tolerance


def tolerances(dtype: torch.dtype, num_layers: int) -> tuple[float, float]:
    """(output and blocks, gradients)."""
    factor = max(1.0, num_layers / TOLERANCE_DEPTH) ** 0.25
    output, gradient = TOLERANCES[dtype]
    return output * factor, gradient * factor


class Reference:
    """diffusers' `HunyuanVideo15Transformer3DModel` in float32 on one device."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        from diffusers import HunyuanVideo15Transformer3DModel
        from diffusers.utils import logging

        logging.disable_progress_bar()
        model = HunyuanVideo15Transformer3DModel.from_pretrained(directory, torch_dtype=torch.float32)
        self.model = model.to(device)

    def run(self, inputs: Inputs) -> Result:
        """As `run_ours`; gradients stay in `self.model`."""
        self.model.zero_grad(set_to_none=True)
        blocks: list[tuple[Tensor, Tensor]] = []
        hooks = [
            block.register_forward_hook(lambda module, arguments, outputs: blocks.append(outputs))
            for block in self.model.transformer_blocks
        ]
        assert inputs.grad_output is not None
        arguments = inputs.forward_arguments()
        hidden_states = arguments.pop("hidden_states").clone().requires_grad_()
        try:
            (sample,) = self.model(hidden_states, **arguments, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        sample.backward(inputs.grad_output)
        assert hidden_states.grad is not None
        result = Result(sample.detach().cpu(), hidden_states.grad.cpu())
        lengths = _text_lengths(inputs)
        for video, text in blocks:
            result.blocks.append(
                (
                    {i: video[i].detach().cpu() for i in range(inputs.batch)},
                    {i: text[i, : lengths[i]].detach().cpu() for i in range(inputs.batch)},  # valid tokens come first
                )
            )
        return result

    def gradients(self) -> dict[str, Tensor]:
        """Every parameter's gradient, zeros where there is none."""
        return {
            name: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu()
            for name, p in self.model.named_parameters()
        }


def compare_outputs(ours: Result, theirs: Result, tolerance: float, gradient_tolerance: float) -> list[Check]:
    """Output, video and text stream behind each block, gradient of the input."""
    checks = [Check("output", relative(ours.sample, theirs.sample), tolerance)]
    last = len(theirs.blocks) - 1
    for index, (mine, other) in enumerate(zip(ours.blocks, theirs.blocks, strict=True)):
        for stream, name in enumerate(("video", "text")):
            if index == last and name == "text":
                continue  # nothing reads it, so ours does not compute it
            pairs = [(mine[stream][sample], other[stream][sample]) for sample in other[stream]]
            scale = max(float(b.abs().max()) for _, b in pairs)
            error = max(relative(a, b, scale) for a, b in pairs)
            checks.append(Check(f"block {index} {name}", error, tolerance))
    assert ours.input_gradient is not None and theirs.input_gradient is not None
    error = relative(ours.input_gradient, theirs.input_gradient)
    checks.append(Check("gradient of hidden_states", error, gradient_tolerance))
    return checks


def compare_gradients(
    ours: Iterable[tuple[str, Tensor | None]], theirs: dict[str, Tensor], tolerance: float
) -> list[Check]:
    """One check a parameter, worst first. `ours`: (diffusers name, whole gradient), consumed one by one."""
    checks = [
        Check(f"gradient of {name}", relative(tensor.cpu(), theirs[name], _scale(name, theirs)), tolerance)
        for name, tensor in ours
        if tensor is not None
    ]
    return sorted(checks, key=lambda check: -check.error if check.error == check.error else -math.inf)


def relative(ours: Tensor, theirs: Tensor, scale: float | None = None) -> float:
    """Largest |ours - theirs| over `scale` (default: largest |theirs|); infinite where theirs is zero and ours not."""
    if ours.shape != theirs.shape:
        return math.inf
    difference = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    scale = float(theirs.abs().max()) if scale is None else scale
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0 else math.inf


def _scale(name: str, gradients: dict[str, Tensor]) -> float:
    # The refiner's key bias shifts all logits of a query alike: its gradient is mathematically zero and what is
    # computed is rounding. The query bias next to it says how large.
    if "refiner_blocks" in name and name.endswith("attn.to_k.bias"):
        name = name.replace("to_k", "to_q")
    return float(gradients[name].abs().max())


def _text_lengths(inputs: Inputs) -> list[int]:
    lengths: list[Any] = [mask.sum(1) for mask in (inputs.encoder_attention_mask, inputs.encoder_attention_mask_2)]
    images = inputs.image_embeds.shape[1] if bool(inputs.image_embeds.any()) else 0
    return (lengths[0] + lengths[1] + images).tolist()
