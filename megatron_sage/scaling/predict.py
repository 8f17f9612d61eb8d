"""What the planner says of a cell: its time and memory on a kind of GPU, or why it is impossible."""

from typing import Any

from megatron_sage.config import Config
from megatron_sage.planning.flops import Text
from megatron_sage.planning.machine import load_gpu
from megatron_sage.planning.plan import make_plan
from megatron_sage.planning.printing import mfu, videos

FIXED = frozenset({"tensor", "context", "pipeline", "sequence"})


def predict(
    config: Config, transformer: dict[str, Any], gpus: int, gpu: str, texts: tuple[Text, Text]
) -> tuple[dict[str, Any], str]:
    """(numbers, reason): empty numbers and the planner's reason where the layout is rejected."""
    plan = make_plan(config, transformer, gpus, load_gpu(gpu), texts, FIXED)
    if not plan.layouts:
        return {}, plan.rejected[0][1] if plan.rejected else "the planner knows no such layout"
    _, found = plan.layouts[0]
    return {
        "seconds": found.seconds,
        "phases": {name: phase.seconds for name, phase in found.phases.items() if phase.seconds},
        "videos_per_hour": videos(plan) * 3600 / found.seconds,
        "mfu": mfu(plan, found),
        "memory_bytes": found.worst[2],
        "device": plan.gpu.name,
    }, ""
