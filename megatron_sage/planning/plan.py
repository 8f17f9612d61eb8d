"""All layouts of a number of GPUs: which are legal and fit, what they cost, and why the others do not."""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from megatron_sage.config.schema import Config
from megatron_sage.config.state_rules import fp8_obstacle_of_device
from megatron_sage.config.validation import validate_layout
from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.lora_targets import AdapterSettings
from megatron_sage.planning.estimate import Estimate, estimate
from megatron_sage.planning.flops import Flops, Text, model_forward
from megatron_sage.planning.layout import model_config
from megatron_sage.planning.machine import Gpu
from megatron_sage.planning.sizes import total_parameters
from megatron_sage.planning.traffic import Place
from megatron_sage.planning.wires import Wires
from megatron_sage.planning.workload import Workload

SIZES = ("tensor", "context", "pipeline", "data")


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups; `sequence`: Megatron's sequence parallelism."""

    tensor: int
    context: int
    pipeline: int
    data: int
    sequence: bool

    def __str__(self) -> str:
        sequence = "" if self.tensor == 1 else " SP" if self.sequence else " no SP"
        return f"TP {self.tensor}{sequence} · CP {self.context} · PP {self.pipeline} · DP {self.data}"


@dataclass
class Plan:
    """What was found for one configuration on one kind of GPU."""

    config: Config
    gpu: Gpu
    gpus: int
    transformer: dict[str, Any]
    texts: tuple[Text, Text]  # of the conditional and the unconditional branch
    parameters_total: int = 0
    forward: Flops = field(default_factory=Flops)
    layouts: list[tuple[Layout, Estimate]] = field(default_factory=list)  # the fastest first
    rejected: list[tuple[Layout, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_plan(
    config: Config,
    transformer: dict[str, Any],
    gpus: int,
    gpu: Gpu,
    texts: tuple[Text, Text],
    fixed: frozenset[str] = frozenset(),
) -> Plan:
    """Every layout of `gpus` ranks.

    Args:
        transformer: the model's config.json; empty: HunyuanVideo-1.5.
        fixed: names of `parallel` settings that are taken from `config` as they are, e.g. {"tensor"}.

    Raises UserError where the configuration is wrong whatever the layout is.
    """
    whole = HunyuanVideoConfig.from_diffusers(transformer)
    plan = Plan(config, gpu, gpus, whole.to_diffusers(), texts, total_parameters(whole))
    _check_gpu(config, gpu)
    video = config.video
    tokens = ((video.frames - 1) // 4 + 1) * (video.height // 16) * (video.width // 16)
    plan.forward = model_forward(whole, tokens, texts[0])
    for layout in layouts(config, gpus, fixed):
        try:
            found = evaluate(with_layout(config, layout), plan, layout)
        except UserError as error:
            plan.rejected.append((layout, str(error)))
            continue
        if reason := too_large(found, config, gpu):
            plan.rejected.append((layout, reason))
        else:
            plan.layouts.append((layout, found))
    plan.layouts.sort(key=lambda entry: entry[1].seconds)
    plan.notes = _notes(config)
    return plan


def layouts(config: Config, gpus: int, fixed: frozenset[str]) -> Iterator[Layout]:
    """All products TP·CP·PP·DP = gpus, with and without sequence parallelism; none of them checked."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tensor, context, pipeline in product(divisors, repeat=3):
        if gpus % (tensor * context * pipeline):
            continue
        sizes = (tensor, context, pipeline, gpus // (tensor * context * pipeline))
        if any(key in fixed and getattr(config.parallel, key) != n for key, n in zip(SIZES, sizes, strict=True)):
            continue
        choices = (True, False) if tensor > 1 and "sequence" not in fixed else (config.parallel.sequence,)
        for sequence in choices:
            yield Layout(*sizes, sequence)


def with_layout(config: Config, layout: Layout) -> Config:
    """The configuration at a layout. Settings of one pipeline size alone are dropped at the others."""
    changed = copy.deepcopy(config)
    parallel = changed.parallel
    same = parallel.pipeline == layout.pipeline
    for key, value in dataclasses.asdict(layout).items():
        setattr(parallel, key, value)
    if not same:
        parallel.pipeline_layout = None
    if layout.pipeline == 1:
        parallel.virtual_pipeline = parallel.pipeline_layout = None
    return changed


def places_of(config: Config, transformer: dict[str, Any]) -> list[Place]:
    """The stages of the configured layout; UserError where model and layout do not fit together."""
    parallel, video = config.parallel, config.video
    model = model_config(config, transformer)
    tokens = ((video.frames - 1) // 4 + 1) * (video.height // 16) * (video.width // 16)
    lora = None
    if config.lora.rank is not None:
        lora = AdapterSettings(config.lora.rank, 1.0, tuple(config.lora.targets))
    shared = (tokens, config.sampler.micro_batch, parallel.data or 1, lora, config.optimizer.distributed)
    return [Place(model, stage, *shared) for stage in range(parallel.pipeline)]


def evaluate(config: Config, plan: Plan, layout: Layout) -> Estimate:
    """Raises UserError where the layout breaks a rule."""
    validate_layout(config, plan.gpus, plan.transformer)
    places = places_of(config, plan.transformer)
    work = Workload.of(config, layout.data, *plan.texts)
    wires = Wires(layout.tensor, layout.context, layout.data, layout.pipeline, plan.gpu.gpus_per_node)
    return estimate(config, places, work, plan.gpu, wires)


def too_large(found: Estimate, config: Config, gpu: Gpu) -> str | None:
    """Why it does not fit into memory, and what would help."""
    stage, phase, need = found.worst
    limit = gpu.memory_bytes * gpu.assumptions.usable_memory
    if need > limit:
        parts = {**found.memory[stage].device, **found.memory[stage].phases.get(phase, {})}
        largest = sorted(parts.items(), key=lambda entry: -entry[1])[:3]
        listing = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
        return (
            f"memory: stage {stage} needs {need / 1e9:.1f} GB in {phase} ({listing}), {gpu.name} has "
            f"{limit / 1e9:.1f} usable; {_cure(config, largest[0][0])}"
        )
    host = found.host_bytes * gpu.gpus_per_node
    if host > gpu.host_memory_bytes:
        return (
            f"host memory: {gpu.gpus_per_node} ranks of a node need {host / 1e9:.0f} GB, it has "
            f"{gpu.host_memory_bytes / 1e9:.0f}; set kl.anchor_sharded=true or use more ranks a replica"
        )
    return None


def _cure(config: Config, largest: str) -> str:
    full, split = config.precision.recompute == "full", config.optimizer.distributed
    cures = {
        "activations": "raise parallel.tensor or context" if full else "set precision.recompute=full",
        "optimizer": "set optimizer.offload=hybrid" if split else "set optimizer.distributed=true",
        "anchor": "set kl.anchor_placement=host",
        "ema": "set optimizer.ema_device=host",
        "latents": "set sampler.offload_trajectories=true",
    }
    return cures.get(largest, "raise parallel.tensor, context or pipeline")


def _check_gpu(config: Config, gpu: Gpu) -> None:
    precision = config.precision
    if precision.fp8 == "none":
        return
    major, _, minor = str(gpu.compute_capability).partition(".")
    obstacle = fp8_obstacle_of_device(precision.fp8_recipe, (int(major), int(minor or 0)), gpu.cuda)
    if gpu.fp8_flops <= 0:
        obstacle = f"{gpu.name} has no fp8_flops; set precision.fp8=none"
    if obstacle:
        raise UserError(f"precision.fp8={precision.fp8}: {obstacle}")


def _notes(config: Config) -> list[str]:
    notes = [
        "seconds are computed from data sheets and the assumptions; nothing was measured on a GPU",
        "not included: loading, text encoding, the noise floor of the first iteration, evaluation",
    ]
    if config.reward.url is not None:
        notes.append("reward.url: rewards are counted as if they were on the run's own ranks, one after the other")
    if config.precision.fp8 != "none":
        notes.append("fp8: activations and gathered inputs are counted as bf16, an upper bound")
    if config.lora.rank is not None:
        notes.append("lora: the adapters' own activations and operations are not counted")
    return notes
