"""The rollout's pipeline as it was executed: written by the ranks, drawn in the report."""

import json
from html import escape
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sage.parallel.pipeline import Occupancy

FILE = "pipeline_schedule.json"
SHOWN_SLOTS = 60
CELL, ROW, LEFT, TOP = 12, 26, 64, 8


def write_schedule(occupancy: Occupancy, group: dist.ProcessGroup, directory: Path) -> None:
    """FILE in `directory`: every task of the pipeline that rank 0 is in. All ranks of all PP groups call.

    Without an entry (a finished run was resumed) a file that is there stays.
    """
    if not occupancy.entries:
        return
    mine = [[slot, group.rank(), task.chunk, *task[:3]] for slot, task, *_ in occupancy.entries]
    every: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(mine, every, group_dst=0, group=group)
    if every is None or dist.get_rank() != 0:
        return
    tasks = sorted(entry for stage in every for entry in stage)
    busy = span = 0
    for stage in range(group.size()):
        slots = [entry[0] for entry in tasks if entry[1] == stage]
        busy, span = busy + len(slots), span + (max(slots) - min(slots) + 1 if slots else 0)
    content = {
        "columns": ["slot", "stage", "chunk", "flight", "step", "branch"],
        "stages": group.size(),
        "bubble_fraction": 1 - busy / span if span else 0.0,
        "tasks": tasks,
    }
    (directory / FILE).write_text(json.dumps(content) + "\n")


def schedule_section(schedule: dict[str, Any]) -> str:
    """The first slots of the last rollout, a row for each stage; empty without a schedule."""
    tasks = schedule.get("tasks") or []
    if not tasks:
        return ""
    stages, slots = int(schedule["stages"]), 1 + max(task[0] for task in tasks)
    shown = min(slots, SHOWN_SLOTS)
    rows = [
        f'<text x="{LEFT - 8}" y="{TOP + stage * ROW + 17}" text-anchor="end">stage {stage}</text>'
        for stage in range(stages)
    ]
    flights = max(1, 1 + max(task[3] for task in tasks))
    for slot, stage, chunk, flight, step, branch in tasks:
        if slot >= shown:
            continue
        colour = f"hsl({round(360 * flight / flights)} 55% {52 if branch == 0 else 66}%)"
        title = f"slot {slot}: micro-batch {flight}, step {step}" + (", unconditional" if branch else "")
        title += f", chunk {chunk}" if any(task[2] for task in tasks) else ""
        rows.append(
            f'<rect x="{LEFT + slot * CELL}" y="{TOP + stage * ROW}" width="{CELL - 1}" height="{ROW - 4}" rx="2" '
            f'fill="{colour}"><title>{escape(title)}</title></rect>'
        )
    width, height = LEFT + shown * CELL + 4, TOP + stages * ROW + 4
    bubble = 100 * float(schedule.get("bubble_fraction", 0.0))
    more = f"the first {shown} of {slots} slots" if shown < slots else f"all {slots} slots"
    return f"""<section class="card"><h2>The rollout's pipeline</h2>
<div style="overflow-x:auto"><svg viewBox="0 0 {width} {height}" style="width:{width}px" role="img"
aria-label="slots of the pipeline's stages">{"".join(rows)}</svg></div>
<p class="soft">What each stage computed, {more} of the last rollout; one colour a micro-batch, the unconditional branch
lighter. Idle between a stage's first and last task: {bubble:.1f} % of all slots.</p></section>"""
