"""The pipeline's slots in the report."""

import json
import re
from pathlib import Path

import pytest

from megatron_sage.errors import UserError
from megatron_sage.parallel.pipeline import plan_slots
from megatron_sage.reporting.record import load_record
from megatron_sage.reporting.schedule import FILE, schedule_section


def made(stages: int, flights: int, steps: int) -> dict:
    plan = plan_slots(flights, steps, 2, stages)
    tasks = [
        [slot, stage, task.chunk, task.flight, task.step, task.branch]
        for slot, row in enumerate(plan)
        for stage, task in enumerate(row)
        if task is not None
    ]
    return {"stages": stages, "bubble_fraction": 0.0123, "tasks": tasks}


def test_every_task_of_the_first_slots_is_drawn_once() -> None:
    schedule = made(2, 2, 3)
    section = schedule_section(schedule)
    assert section.count("<rect") == len(schedule["tasks"]) == 24
    assert "stage 0" in section and "stage 1" in section and "stage 2" not in section
    assert "1.2 % of all slots" in section and "all 13 slots" in section
    assert "slot 0: micro-batch 0, step 0</title>" in section and "step 2, unconditional</title>" in section


def test_a_long_schedule_is_cut_and_says_so() -> None:
    section = schedule_section(made(4, 5, 20))
    assert "the first 60 of 203 slots" in section
    assert max(int(slot) for slot in re.findall(r"slot (\d+):", section)) == 59


def test_without_a_pipeline_there_is_no_section() -> None:
    assert schedule_section({}) == ""


@pytest.mark.parametrize("content", ['{"stages": 2, "tasks": [[1, 2]]}', '{"tasks": [[0, 0, 0, 0, 0, 0]]}', "[1]", "{"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 0}) + "\n")
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match=FILE):
        load_record(tmp_path)
