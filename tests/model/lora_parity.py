"""The judge of adapters: PEFT on diffusers' model with the same random A and B, and ours measured against it."""

import dataclasses
import functools
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_sage.checkpoint.lora import adapter_bindings, gather_adapters
from megatron_sage.model.lora import add_adapters
from megatron_sage.model.lora_targets import TARGETS, AdapterSettings, diffusers_path, is_adapter, linear_sizes
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.groups import Groups, initialize
from megatron_sage.parallel.reductions import complete_gradients
from megatron_sage.verification.inputs import Inputs
from megatron_sage.verification.ours import run_ours
from tests.model.parity import Case, _directory, build_stage, random_inputs, random_weights, relative, tokens

IN_PEFT = ".default.weight"  # PEFT's name of a matrix ends with the adapter's


@dataclasses.dataclass(frozen=True)
class LoraCase:
    """A batch and the adapters on its model."""

    case: Case = dataclasses.field(default_factory=Case)
    rank: int = 4
    alpha: float = 6.0
    targets: tuple[str, ...] = TARGETS

    def settings(self, seed: int = 0) -> AdapterSettings:
        return AdapterSettings(self.rank, self.alpha, self.targets, seed)

    def modules(self) -> list[str]:
        """diffusers' paths of all targets, those in the last block that nothing reads among them."""
        return [f"transformer_blocks.{i}.{diffusers_path(t)}" for i in range(self.case.layers) for t in self.targets]


def random_case(seed: int) -> LoraCase:
    """Sizes, texts, rank, alpha and targets at random; heads that two ranks can share."""
    draw = random.Random(seed)
    batch = draw.randint(1, 2)
    case = Case(
        grid=(draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 5)),
        qwen=tuple(draw.randint(2, 8) for _ in range(batch)),
        byt5=tuple(draw.randint(0, 4) for _ in range(batch)),
        image_to_video=draw.random() < 0.5,
        meanflow=draw.random() < 0.3,
        heads=2 * draw.randint(1, 3),
        head_dim=8 * draw.randint(1, 2),
        layers=draw.randint(2, 4),
    )
    targets = draw.sample(TARGETS, draw.randint(1, len(TARGETS)))
    return LoraCase(case, draw.randint(1, 12), draw.uniform(0.5, 20.0), tuple(targets))


def random_adapters(lora: LoraCase, seed: int = 5) -> dict[str, torch.Tensor]:
    """PEFT's `<module>.lora_A.weight` and B -> numbers that make the update of a weight as large as the weight."""
    rng = np.random.default_rng(seed)
    hidden, found = lora.case.heads * lora.case.head_dim, {}
    for name in lora.modules():
        target = name.split(".", 2)[2].removeprefix("attn.")
        into, out = linear_sizes(target, hidden, 4 * hidden)
        scale = np.float32((into * lora.rank) ** -0.5 * lora.rank / lora.alpha)
        a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((lora.rank, into), (out, lora.rank)))
        found |= {f"{name}.lora_A.weight": torch.from_numpy(a * scale), f"{name}.lora_B.weight": torch.from_numpy(b)}
    return found


def peft_model(lora: LoraCase, fill: bool = True) -> torch.nn.Module:
    """diffusers' model with PEFT's adapters; `fill` False: as PEFT initialises them."""
    from diffusers import HunyuanVideo15Transformer3DModel
    from peft import LoraConfig

    model = HunyuanVideo15Transformer3DModel.from_config(lora.case.config())
    model.load_state_dict(random_weights(lora.case.config()), strict=True)
    model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.modules()))
    if fill:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in random_adapters(lora).items():
                parameters[name.removesuffix(".weight") + IN_PEFT].copy_(value)
    return model


@functools.lru_cache(maxsize=64)
def reference(lora: LoraCase) -> str:
    """Path of a safetensors file with PEFT's `sample`, the base's `base` and every `grad.<matrix>`."""
    model, inputs = peft_model(lora), random_inputs(lora.case)
    arguments = {name: value for name, value in inputs.items() if name != "grad_output"}
    (sample,) = model(**arguments, return_dict=False)
    sample.backward(inputs["grad_output"])
    found = {"sample": sample.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found["grad." + name.replace(IN_PEFT, ".weight")] = gradient
    model.disable_adapters()
    with torch.no_grad():
        found["base"] = model(**arguments, return_dict=False)[0]
    path = str(_directory() / f"lora_{hashlib.sha256(repr(lora).encode()).hexdigest()[:16]}.safetensors")
    save_file({name: value.contiguous() for name, value in found.items()}, path)
    return path


def build_adapted(lora: LoraCase, groups: Groups, fill: bool = True, **options: Any) -> list[HunyuanVideoDiT]:
    """This rank's chunks with the case's weights and adapters."""
    chunks = build_stage(lora.case, groups, **options)
    add_adapters(chunks, lora.settings())
    if fill:
        load_matrices(chunks, random_adapters(lora), groups)
    return chunks


@torch.no_grad()
def load_matrices(chunks: list[HunyuanVideoDiT], whole: dict[str, torch.Tensor], groups: Groups) -> None:
    """Into this rank's adapters, its slices of whole matrices."""
    parameters = {name: p for chunk in chunks for name, p in chunk.named_parameters() if is_adapter(name)}
    for binding in adapter_bindings(chunks):
        if binding.ours[0] in parameters:
            value, bounds = whole[binding.diffusers[0]], binding.slice_bounds(groups.tp_rank, groups.tp_size)
            if bounds is not None:
                value = value.narrow(bounds[0], bounds[1], bounds[2] - bounds[1])
            parameters.pop(binding.ours[0]).copy_(value)
    assert not parameters


def arguments(lora: LoraCase) -> Inputs:
    inputs = random_inputs(lora.case)
    return Inputs(**(inputs | {name: value.bool() for name, value in inputs.items() if "mask" in name}))


def forward_backward(chunks: list[HunyuanVideoDiT], inputs: Inputs) -> torch.Tensor:
    """The velocity, whole. As in training, nothing that the first stage is given wants a gradient."""
    (model,) = chunks
    assert inputs.grad_output is not None
    shard, parts = model.image_shard(inputs.grid), []
    for samples, text in inputs.micro_batches():
        video = shard.shard(tokens(inputs.hidden_states[samples]))
        times = inputs.timestep[samples], None if inputs.timestep_r is None else inputs.timestep_r[samples]
        velocity = model(video, times[0], text, inputs.grid, times[1])
        velocity.backward(shard.shard(tokens(inputs.grad_output[samples])))
        parts.append((samples, velocity.detach()))
    complete_gradients(chunks, model.pg_collection)
    return _whole(model, parts, inputs)


def _whole(model: HunyuanVideoDiT, parts: list[tuple[list[int], torch.Tensor]], inputs: Inputs) -> torch.Tensor:
    from megatron_sage.parallel.sequence import gather

    found = torch.empty(inputs.batch, model.config.out_channels, *inputs.grid)
    for samples, velocity in parts:
        whole = gather(velocity, model.image_shard(inputs.grid), model.token_group)
        found[samples] = whole.permute(1, 2, 0).unflatten(2, inputs.grid)
    return found


def measure(
    lora: LoraCase, path: str, tensor: int = 1, context: int = 1, pipeline: int = 1, **options: Any
) -> tuple[float, dict[str, float]]:
    """On this rank of a layout: error of the output, and on rank 0 of every matrix' gradient."""
    virtual = options.get("virtual_pipeline")
    groups = initialize(tensor=tensor, context=context, pipeline=pipeline, virtual_pipeline=virtual)
    chunks = build_adapted(lora, groups, **options)
    inputs = arguments(lora)
    sample = forward_backward(chunks, inputs) if pipeline == 1 else run_ours(chunks, inputs).sample
    theirs = load_file(path)
    assert all(p.grad is None for chunk in chunks for n, p in chunk.named_parameters() if not is_adapter(n))
    found = {name: gradient for name, gradient in gather_adapters(chunks, "grad") if gradient is not None}
    scale = theirs["sample"].abs().max()
    assert relative(theirs["base"], theirs["sample"], scale) > 1e-3, "the adapters do nothing in this case"
    output = relative(sample, theirs["sample"], scale)
    return output, gradient_errors(found, theirs) if groups.rank == 0 else {}


def gradient_errors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of every matrix of ours; those that we leave out must have no gradient in PEFT either."""
    expected = {name.removeprefix("grad."): value for name, value in theirs.items() if name.startswith("grad.")}
    for name in expected.keys() - ours.keys():
        assert not expected[name].any(), f"{name} has a gradient"
    return {name: relative(value, expected[name], expected[name].abs().max()) for name, value in ours.items()}


def exported(folder: Path | str, lora: LoraCase) -> torch.Tensor:
    """What diffusers computes with the base of the case and an exported adapter directory."""
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel.from_config(lora.case.config())
    model.load_state_dict(random_weights(lora.case.config()), strict=True)
    model.load_lora_adapter(str(folder), use_safetensors=True)
    return run_diffusers(model, lora)


@torch.no_grad()
def run_diffusers(model: torch.nn.Module, lora: LoraCase) -> torch.Tensor:
    given = {name: value for name, value in random_inputs(lora.case).items() if name != "grad_output"}
    return model(**given, return_dict=False)[0]
