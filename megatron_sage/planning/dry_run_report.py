"""What a dry run found beside what the formulas say of the same rank and the same shortened iteration."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

from megatron_sage.config.schema import Config
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.planning.dry_run import DryRun, dry_run, shortened
from megatron_sage.planning.flops import Flops, StageFlops, Text, stage_flops
from megatron_sage.planning.machine import Assumptions
from megatron_sage.planning.memory import rank_memory
from megatron_sage.planning.plan import places_of
from megatron_sage.planning.traffic import Place, Traffic
from megatron_sage.planning.workload import (
    Workload,
    optimizer_traffic,
    reference_traffic,
    rollout_traffic,
    scoring_traffic,
    training_traffic,
)

GB, TERA = 1e9, 1e12
PHASES = ("rollout", "decode", "reference", "train", "optimizer")


def planned(config: Config, transformer: dict[str, Any], texts: tuple[Text, Text], found: DryRun) -> dict[str, Any]:
    """{"traffic", "flops", "memory"} by phase, as the formulas have them for the rank of `found`."""
    transformer = HunyuanVideoConfig.from_diffusers(transformer).to_diffusers()
    config = shortened(config, found.world_size, found.steps, transformer)
    config.parallel.data = found.places["dp_size"]
    place = places_of(config, transformer)[found.places["pp_rank"]]
    work = dataclasses.replace(Workload.of(config, config.parallel.data, *texts), prompts=1)
    traffic: dict[str, Callable[[], Traffic]] = {
        "rollout": lambda: rollout_traffic(place, work),
        "decode": lambda: scoring_traffic(place, work),
        "reference": lambda: reference_traffic(place, work, config.kl.anchor_sharded),
        "train": lambda: training_traffic(place, work),
        "optimizer": lambda: optimizer_traffic(place, work, config.optimizer.name == "muon"),
    }
    # nothing that a dry run does not have: VAE and reward model
    memory = rank_memory(config, place, work, Assumptions(reward_model_bytes=0, decode_bytes_per_pixel=0))
    memory.device["vae"] = 0
    return {
        "traffic": {
            name: {f"{op} {group}": size for (op, group), size in make().items() if size}
            for name, make in traffic.items()
        },
        "flops": _flops(config, place, work, found.places),
        "memory": {name: memory.of_phase(name) for name in PHASES if name != "decode"},
    }


def _flops(config: Config, place: Place, work: Workload, places: dict[str, int]) -> dict[str, dict[str, float]]:
    def stage(text: Text, here: Place) -> StageFlops:
        return stage_flops(here, text, places["cp_rank"], places["tp_rank"], place.lora is not None)

    def without_gradient(texts: tuple[Text, ...], forwards: int, steps: int) -> dict[str, float]:
        return _parts(
            stage(text, place).without_gradient(forwards, work.embedded(texts, branch, steps))
            for branch, text in enumerate(texts)
        )

    ones = [stage(text, work.replayed(place)) for text in work.training_texts]
    found = {
        "rollout": without_gradient(work.rollout_texts, work.flights * work.steps, work.steps),
        "train": _parts((one.forward + one.backward + one.again).times(work.pairs / work.replay) for one in ones),
    }
    if work.references:
        count = len(work.references)
        found["reference"] = without_gradient(work.training_texts, work.pairs * count, work.trained * count)
    return found


def _parts(flops: Iterable[Flops]) -> dict[str, float]:
    total = sum(flops, Flops())
    return {"gemm": total.gemm, "attention": total.attention}


def report(config: Config, transformer: dict[str, Any], texts: tuple[Text, Text], options: argparse.Namespace) -> int:
    """Run and print."""
    found = dry_run(config, transformer, texts, options.gpus, options.rank, options.steps)
    formulas = planned(config, transformer, texts, found)
    if options.json:
        print(json.dumps({**dataclasses.asdict(found), "planned": formulas}))
    else:
        print(as_text(found, formulas))
    return 0


def as_text(found: DryRun, formulas: dict[str, Any]) -> str:
    """For a terminal."""
    places = ", ".join(
        f"{name.upper()} {found.places[name + '_rank']} of {found.places[name + '_size']}"
        for name in ("tp", "cp", "pp", "dp")
    )
    lines = [
        f"rank {found.rank} of {found.world_size}: {places}",
        f"{found.parameters:,} parameters, {found.trained:,} of them trained",
        f"one iteration of {found.steps} steps, one prompt a replica, tensors without data: {found.seconds:.0f} s",
        "shapes: " + ", ".join(f"{name} {shape}" for name, shape in found.shapes.items()),
        "",
        f"{'phase':16} {'peak GB':>9} {'formula':>9} {'end GB':>9} {'TFLOP':>10} {'formula':>10}",
    ]
    for phase, peak in found.peaks.items():
        memory, flops = formulas["memory"].get(phase), formulas["flops"].get(phase, {})
        done = sum(found.flops.get(phase, {}).values())
        lines.append(
            f"{phase:16} {peak / GB:9.3f} {_number(memory, GB):>9} {found.ends.get(phase, 0) / GB:9.3f} "
            f"{done / TERA:10.3f} {_number(sum(flops.values()) or None, TERA):>10}"
        )
    lines += [f"host memory: {found.host / GB:.3f} GB", "", "collectives, payload in GB (calls), formula:"]
    for phase, traffic in found.traffic.items():
        for name, size in traffic.items():
            formula = formulas["traffic"].get(phase, {}).get(name)
            calls = found.calls[phase][name]
            lines.append(f"  {phase:10} {name:24} {size / GB:12.6f} ({calls}) {_number(formula, GB, 6):>12}")
    return "\n".join(lines)


def _number(value: float | None, unit: float, digits: int = 3) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
