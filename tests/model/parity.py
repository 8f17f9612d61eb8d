"""The judge: diffusers' HunyuanVideo15Transformer3DModel on random weights, and ours measured against it.

The parent process runs diffusers once per case, on one padded and masked batch, and stores output and gradients in a
file; any rank of any layout then runs ours on the unpadded samples and measures its own slices.
"""

import dataclasses
import functools
import hashlib
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_sage.checkpoint.distributed import gather_named
from megatron_sage.checkpoint.keymap import Binding, KeyMap
from megatron_sage.model import HunyuanVideoConfig, HunyuanVideoDiT, TextCondition
from megatron_sage.model.transformer import build_chunks
from megatron_sage.parallel.groups import Groups
from megatron_sage.parallel.reductions import complete_gradients
from megatron_sage.verification.inputs import Inputs
from megatron_sage.verification.ours import run_ours

OUTPUT_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch. `qwen` and `byt5` hold each sample's valid text length; the padded length is the longest plus 2."""

    grid: tuple[int, int, int] = (2, 3, 4)
    qwen: tuple[int, ...] = (6, 6)
    byt5: tuple[int, ...] = (3, 3)
    image: int = 5
    image_to_video: bool = False
    meanflow: bool = False
    heads: int = 4
    head_dim: int = 16
    layers: int = 2
    timesteps: tuple[float, ...] = (987.3, 42.5, 611.0)

    @property
    def batch(self) -> int:
        return len(self.qwen)

    def config(self) -> dict[str, Any]:
        """A complete diffusers config.json."""
        quarter = self.head_dim // 4
        return HunyuanVideoConfig.from_diffusers(
            {
                "num_attention_heads": self.heads,
                "attention_head_dim": self.head_dim,
                "num_layers": self.layers,
                "text_embed_dim": 24,
                "text_embed_2_dim": 20,
                "image_embed_dim": 28,
                "rope_axes_dim": [2 * quarter, quarter, quarter],
                "use_meanflow": self.meanflow,
                "task_type": "i2v" if self.image_to_video else "t2v",
            }
        ).to_diffusers()


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """diffusers name -> fp32 tensor, from numpy: gates, biases and norms are all random and nonzero."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in KeyMap.from_config(config).shapes("diffusers").items():
        draw = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            draw *= np.sqrt(1.0 / np.prod(shape[1:]))
        else:
            is_norm = name.endswith(".weight")
            draw = draw * np.float32(0.2) + np.float32(is_norm)
        weights[name] = torch.from_numpy(np.ascontiguousarray(draw, dtype=np.float32))
    return weights


def random_inputs(case: Case, seed: int = 1) -> dict[str, torch.Tensor]:
    """diffusers' forward arguments and `grad_output`; the padding of the text is garbage, not zeros."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    batch, config = case.batch, case.config()
    inputs = {
        "hidden_states": normal(batch, config["in_channels"], *case.grid),
        "timestep": torch.tensor(case.timesteps[:batch]),
        "encoder_hidden_states": normal(batch, max(case.qwen) + 2, config["text_embed_dim"]),
        "encoder_attention_mask": _prefix_mask(case.qwen),
        "encoder_hidden_states_2": normal(batch, max(case.byt5) + 2, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": _prefix_mask(case.byt5),
        "image_embeds": normal(batch, case.image, config["image_embed_dim"]) * float(case.image_to_video),
        "grad_output": normal(batch, config["out_channels"], *case.grid),
    }
    if case.meanflow:
        inputs["timestep_r"] = inputs["timestep"] * 0.75
    return inputs


def _prefix_mask(lengths: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(max(lengths) + 2)[None] < torch.tensor(lengths)[:, None]).long()


INPUTS_WITH_GRADIENT = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")


@functools.lru_cache(maxsize=1)
def _directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="parity_"))


@functools.lru_cache(maxsize=64)
def reference(case: Case, dtype: torch.dtype = torch.float32) -> str:
    """Path of a safetensors file with diffusers' `sample`, `grad.<parameter>` and `grad_input.<argument>`.

    Parameters without gradient are absent.
    """
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel.from_config(case.config())
    model.load_state_dict(random_weights(case.config()), strict=True)
    if dtype is not torch.float32:
        model.to(dtype)
    inputs = random_inputs(case)
    arguments = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
        if name != "grad_output"
    }
    for name in INPUTS_WITH_GRADIENT:
        arguments[name].requires_grad_()
    (sample,) = model(**arguments, return_dict=False)
    sample.backward(inputs["grad_output"].to(dtype))
    result = {"sample": sample.detach()}
    result |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    result |= {f"grad_input.{name}": arguments[name].grad for name in INPUTS_WITH_GRADIENT}
    key = hashlib.sha256(repr((case, dtype)).encode()).hexdigest()[:16]
    path = str(_directory() / f"{key}.safetensors")
    save_file({name: value.float().contiguous() for name, value in result.items()}, path)
    return path


def build(case: Case, groups: Groups, **options: Any) -> HunyuanVideoDiT:
    """Our model with the case's weights, this rank's slices; one stage."""
    (model,) = build_stage(case, groups, **options)
    return model


def build_stage(case: Case, groups: Groups, **options: Any) -> list[HunyuanVideoDiT]:
    """The chunks of this rank's pipeline stage."""
    config = HunyuanVideoConfig.from_diffusers(
        case.config(), tensor=groups.tp_size, context=groups.cp_size, pipeline=groups.pp_size, **options
    )
    chunks = build_chunks(config, groups.collection)
    weights = random_weights(case.config())
    state: dict[str, torch.Tensor] = {}
    for binding in KeyMap.from_config(case.config()).bindings:
        parts = [_slice(weights[name], binding, groups) for name in binding.diffusers]
        state.update(zip(binding.ours, binding.convert(parts, "diffusers", "ours"), strict=True))
    for chunk in chunks:
        chunk.load_state_dict({name: state[name] for name in chunk.state_dict()}, strict=True)
    return chunks


def _slice(tensor: torch.Tensor, binding: Binding, groups: Groups) -> torch.Tensor:
    bounds = binding.slice_bounds(groups.tp_rank, groups.tp_size)
    return tensor if bounds is None else tensor.narrow(bounds[0], bounds[1], bounds[2] - bounds[1])


@dataclasses.dataclass
class Run:
    """What one rank computed, per sample: velocity and input gradients at its tokens."""

    velocity: list[torch.Tensor]
    input_gradients: list[dict[str, torch.Tensor]]


def run_samples(model: HunyuanVideoDiT, case: Case) -> Run:
    """Forward and backward, samples of equal text lengths together, others in micro-batches of their own."""
    inputs = random_inputs(case)
    shard = model.image_shard(case.grid)
    by_length: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in range(case.batch):
        by_length[case.qwen[index], case.byt5[index]].append(index)
    run = Run([torch.empty(0)] * case.batch, [{} for _ in range(case.batch)])
    for samples in by_length.values():
        part = {name: value[samples] for name, value in inputs.items()}
        for name in INPUTS_WITH_GRADIENT[1:]:
            part[name].requires_grad_()
        text = TextCondition.from_padded(
            part["encoder_hidden_states"],
            part["encoder_attention_mask"],
            part["encoder_hidden_states_2"],
            part["encoder_attention_mask_2"],
            part["image_embeds"],
        )
        video = shard.shard(tokens(part["hidden_states"])).requires_grad_()
        velocity = model(video, part["timestep"], text, case.grid, part.get("timestep_r"))
        gradient = shard.shard(tokens(part["grad_output"]))
        gradient[shard.valid :] = 1e3  # whatever arrives at padding must not matter
        velocity.backward(gradient.to(velocity.dtype))
        for name in INPUTS_WITH_GRADIENT[1:]:
            if part[name].grad is not None:  # text: partial on each context-parallel rank
                torch.distributed.all_reduce(part[name].grad, group=model.cp_group)
        for position, index in enumerate(samples):
            run.velocity[index] = velocity[: shard.valid, position].detach().float()
            run.input_gradients[index] = {
                "hidden_states": video.grad[: shard.valid, position],
                **{
                    name: part[name].grad[position]
                    for name in INPUTS_WITH_GRADIENT[1:]
                    if part[name].grad is not None  # text-to-video never looks at the image
                },
            }
    complete_gradients([model], model.pg_collection)
    return run


def tokens(video_BCTHW: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [S, B, C]."""
    return video_BCTHW.flatten(2).permute(2, 0, 1).contiguous()


def output_error(model: HunyuanVideoDiT, run: Run, case: Case, path: str) -> float:
    """max |ours - theirs| / max |theirs| over this rank's tokens of all samples."""
    shard = model.image_shard(case.grid)
    theirs = tokens(load_file(path)["sample"])
    mine = theirs[shard.start : shard.start + shard.valid]
    return relative(torch.stack(run.velocity, dim=1), mine, theirs.abs().max())


def gradient_errors(model: HunyuanVideoDiT, run: Run, case: Case, path: str, groups: Groups) -> dict[str, float]:
    """Relative error of every parameter's and every input's gradient on this rank, by diffusers' names."""
    expected = load_file(path)
    errors = {}
    ours = dict(model.named_parameters())
    for binding in KeyMap.from_config(case.config()).bindings:
        grads = [_gradient(ours[name]) for name in binding.ours]
        for name, grad in zip(binding.diffusers, binding.convert(grads, "ours", "diffusers"), strict=True):
            whole = expected.get(f"grad.{name}")
            if whole is None:
                errors[name] = float(grad.abs().max())
                continue
            errors[name] = relative(grad, _slice(whole, binding, groups), _scale(name, expected))
    shard = model.image_shard(case.grid)
    for index, inputs in enumerate(run.input_gradients):
        for name in INPUTS_WITH_GRADIENT:
            whole = expected[f"grad_input.{name}"]
            theirs = whole[index]
            if name == "hidden_states":
                theirs = theirs.flatten(1).T[shard.start : shard.start + shard.valid]
            mine = inputs.get(name, torch.zeros_like(theirs))
            errors[f"{name}[{index}]"] = relative(mine, theirs, whole.abs().max())
    return errors


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()


def _scale(name: str, expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """What an error of this gradient is measured by: the largest entry of the whole tensor.

    The refiner's key bias shifts all logits of a query alike (no qk norm, no RoPE there): its true gradient is zero,
    what is computed is rounding. The query bias next to it tells the scale.
    """
    if "refiner_blocks" in name and name.endswith("attn.to_k.bias"):
        name = name.replace("to_k", "to_q")
    return expected[f"grad.{name}"].abs().max()


def relative(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> float:
    """max |ours - theirs| / scale; where theirs is exactly zero, ours has to be so too (else infinity)."""
    if ours.numel() == 0:
        return 0.0
    difference = (ours - theirs).abs().max()
    return float(difference / scale) if difference > 0 else 0.0


def measure(groups: Groups, case: Case, path: str, **options: Any) -> tuple[float, dict[str, float]]:
    """Build, run and compare on this rank: output error, gradient errors."""
    model = build(case, groups, **options)
    run = run_samples(model, case)
    return output_error(model, run, case, path), gradient_errors(model, run, case, path, groups)


def measure_schedule(groups: Groups, case: Case, path: str, **options: Any) -> tuple[float, dict[str, float]]:
    """Like `measure`, through Megatron's schedule and put together: gradients on rank 0, none elsewhere."""
    chunks = build_stage(case, groups, **options)
    inputs = random_inputs(case)
    masks = {name: value.bool() for name, value in inputs.items() if "mask" in name}
    result = run_ours(chunks, Inputs(**(inputs | masks)))
    theirs = load_file(path)
    assert result.input_gradient is not None
    scale = theirs["grad_input.hidden_states"].abs().max()
    errors = {"hidden_states": relative(result.input_gradient, theirs["grad_input.hidden_states"], scale)}
    for name, gradient in gather_named(chunks, "grad"):
        whole = theirs.get(f"grad.{name}")
        if gradient is not None and whole is None:
            errors[name] = float(gradient.abs().max())
        elif gradient is not None:
            errors[name] = relative(gradient, whole, _scale(name, theirs))
    return relative(result.sample, theirs["sample"], theirs["sample"].abs().max()), errors


def assert_parity(output: float, gradients: dict[str, float], rank: int = 0) -> None:
    """Within the tolerances; the message names the worst tensors."""
    assert output <= OUTPUT_TOLERANCE, f"rank {rank}: output is off by {output:.2e}"
    worst = sorted(gradients.items(), key=lambda item: -item[1])[:5]
    assert worst[0][1] <= GRADIENT_TOLERANCE, f"rank {rank}: " + ", ".join(f"{n} {e:.2e}" for n, e in worst)
