"""A plan as one JSON object, and as text for a terminal."""

import dataclasses
from collections import Counter
from typing import Any

from megatron_sage.planning.estimate import Estimate
from megatron_sage.planning.plan import Layout, Plan, with_layout
from megatron_sage.planning.wires import Wires

GB, PETA = 1e9, 1e15


def as_json(plan: Plan) -> dict[str, Any]:
    """Keys: docs/planning.md."""
    config = plan.config
    return {
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "parameters_total": plan.parameters_total,
        "flops_forward": plan.forward.total,
        "flops_forward_parts": dataclasses.asdict(plan.forward),
        "text_tokens": dataclasses.asdict(plan.texts[0]),
        "negative_tokens": dataclasses.asdict(plan.texts[1]),
        "video": dataclasses.asdict(config.video),
        "assumptions": dataclasses.asdict(plan.gpu.assumptions),
        "notes": plan.notes,
        "layouts": [_layout(plan, layout, found) for layout, found in plan.layouts],
        "rejected": [{**dataclasses.asdict(layout), "reason": reason} for layout, reason in plan.rejected],
    }


def _layout(plan: Plan, layout: Layout, found: Estimate) -> dict[str, Any]:
    stage, phase, peak = found.worst
    ranks = layout.tensor * layout.context * layout.data
    memory = found.memory[stage]
    wires = Wires(layout.tensor, layout.context, layout.data, layout.pipeline, plan.gpu.gpus_per_node)
    count = found.counts[stage]
    return {
        **dataclasses.asdict(layout),
        "configured": is_configured(plan, layout),
        "seconds_per_iteration": found.seconds,
        "videos_per_hour": videos(plan) * 3600 / found.seconds,
        "mfu": mfu(plan, found),
        "model_flops": found.model_flops,
        "rollout_busy_fraction": found.busy,
        "groups_across_nodes": wires.crossing(),
        "phases": {name: dataclasses.asdict(phase) for name, phase in found.phases.items()},
        "memory": {
            "peak_bytes": peak,
            "peak_phase": phase,
            "peak_stage": stage,
            "peak_rank": stage * ranks,  # the first rank of that stage
            "usable_bytes": plan.gpu.memory_bytes * plan.gpu.assumptions.usable_memory,
            "parameters": count.elements,
            "trained_parameters": count.trained,
            "device": memory.device,
            "phases": memory.phases,
            "host": memory.host,
            "parameters_of_stages": [counts.elements for counts in found.counts],
            "peak_of_stages": [memory.peak[1] for memory in found.memory],
        },
    }


def is_configured(plan: Plan, layout: Layout) -> bool:
    """Whether it is the configuration's own layout."""
    parallel, changed = plan.config.parallel, with_layout(plan.config, layout).parallel
    changed.data = parallel.data
    return parallel == changed


def videos(plan: Plan) -> int:
    """Of an iteration."""
    return plan.config.grpo.prompts_per_iteration * plan.config.grpo.group_size


def mfu(plan: Plan, found: Estimate) -> float:
    """Model operations of an iteration over what the GPUs could do in its time, at the bf16 peak."""
    return found.model_flops / (plan.gpus * plan.gpu.bf16_flops * found.seconds)


def as_text(plan: Plan, top: int) -> str:
    """The fastest layouts, the first one in detail, and why the others were rejected."""
    config, forward = plan.config, plan.forward
    lines = [
        f"{config.name}: {plan.gpus} x {plan.gpu.name}; {plan.parameters_total:,} parameters; one forward of one video "
        f"({config.video.frames}x{config.video.height}x{config.video.width}, {plan.texts[0].total} text tokens): "
        f"{forward.total / PETA:.3f} PFLOP, {forward.attention / forward.total:.0%} of it attention",
        f"an iteration: {videos(plan)} videos, {config.sampler.num_steps} steps, {config.grpo.updates_per_rollout} "
        f"updates; recompute {config.precision.recompute}, {config.precision.dtype}, fp8 {config.precision.fp8}",
        "",
    ]
    if plan.layouts:
        lines += _table(plan, top) + ["", f"the first, {plan.layouts[0][0]}:"] + _detail(plan, plan.layouts[0][1])
    else:
        lines += ["no layout is legal and fits"]
    lines += ["", f"rejected: {len(plan.rejected)} layouts"] + _rejections(plan)
    lines += ["", "assumptions: " + ", ".join(f"{k} {v:g}" for k, v in vars(plan.gpu.assumptions).items())]
    return "\n".join(lines + plan.notes)


def _table(plan: Plan, top: int) -> list[str]:
    lines = [f"{'':38} {'s/iter':>8} {'rollout':>8} {'ref.':>8} {'train':>8} {'MFU':>6} {'GB':>6} {'host GB':>8}  peak"]
    for layout, found in plan.layouts[:top]:
        stage, phase, peak = found.worst
        seconds = [found.phases[name].seconds for name in ("rollout", "reference", "train")]
        lines.append(
            f"{layout!s:38} {found.seconds:8.1f} "
            + " ".join(f"{value:8.1f}" for value in seconds)
            + f" {mfu(plan, found):6.1%} {peak / GB:6.1f} {found.host_bytes / GB:8.1f}  {phase}, stage {stage}"
            + (" *" if is_configured(plan, layout) else "")
        )
    more = len(plan.layouts) - top
    notes = [f"{more} more fit (--top, --json)"] if more > 0 else []
    return [*lines, *notes, "* the configuration's own"]


def _detail(plan: Plan, found: Estimate) -> list[str]:
    stage, phase, peak = found.worst
    memory = found.memory[stage]
    lines = [
        f"  {'phase':10} {'seconds':>9} {'PFLOP':>9} {'GB':>7} {'NVLink GB':>10} {'network GB':>11} {'host GB':>9}"
    ]
    for name, one in found.phases.items():
        lines.append(
            f"  {name:10} {one.seconds:9.2f} {one.flops / PETA:9.2f} {one.memory_bytes / GB:7.1f} "
            f"{one.nvlink_bytes / GB:10.1f} {one.network_bytes / GB:11.1f} {one.host_bytes / GB:9.1f}"
        )
    device = {**memory.device, **memory.phases.get(phase, {})}
    for title, parts in (("device", device), ("host", memory.host)):
        listing = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
        where = f"stage {stage}, {phase}: {peak / GB:.1f} of " + f"{plan.gpu.memory_bytes / GB:.0f} GB" * (
            title == "device"
        )
        lines.append(f"  {title}, {where if title == 'device' else f'stage {stage}'}: {listing or 'nothing'}")
    return lines


def _rejections(plan: Plan) -> list[str]:
    """Each kind of reason once, with its first example."""
    kinds: dict[str, list[tuple[Layout, str]]] = {}
    for layout, reason in plan.rejected:
        key = reason.split("=")[0].split(":")[0]
        kinds.setdefault(key, []).append((layout, reason))
    counts = Counter({key: len(found) for key, found in kinds.items()})
    return [f"  {count} x {key}, e.g. {kinds[key][0][0]}: {kinds[key][0][1]}" for key, count in counts.most_common()]
