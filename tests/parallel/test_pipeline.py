"""The rollout's pipeline: its plan as properties, its execution on real ranks, counted from what they wrote down."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.parallel.pipeline import Plan, Task, execute, plan_slots
from tests.parallel.pool import run_on_ranks

counts = st.integers(1, 6)


def column(plan: Plan, stage: int) -> list[tuple[int, Task]]:
    return [(slot, task) for slot, row in enumerate(plan) if (task := row[stage]) is not None]


def idle(plan: Plan) -> int:
    """Slots without a task between a stage's first and last one, over all stages."""
    total = 0
    for stage in range(len(plan[0])):
        slots = [slot for slot, _ in column(plan, stage)]
        total += slots[-1] - slots[0] + 1 - len(slots)
    return total


def assert_causal(when: dict[tuple[int, Task], int], stages: int, chunks: int, branches: int, chained: bool) -> None:
    """`when[stage, task]` is its slot: stage by stage, chunk by chunk, and a step after all branches of the last."""
    for (stage, task), slot in when.items():
        if stage > 0:
            assert when[stage - 1, task] < slot
        elif task.chunk > 0:
            assert when[stages - 1, task._replace(chunk=task.chunk - 1)] < slot
        elif chained and task.step > 0:
            for branch in range(branches):
                assert when[stages - 1, Task(task.flight, task.step - 1, branch, chunks - 1)] < slot


@given(counts, counts, st.integers(1, 2), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_everything_once_and_in_order(
    flights: int, steps: int, branches: int, stages: int, chunks: int, chained: bool
) -> None:
    plan = plan_slots(flights, steps, branches, stages, chunks, chained)
    for stage in range(stages):
        tasks = [task for _, task in column(plan, stage)]
        assert len(tasks) == len(set(tasks)) == flights * steps * branches * chunks
    when = {(stage, task): slot for stage in range(stages) for slot, task in column(plan, stage)}
    assert_causal(when, stages, chunks, branches, chained)


@given(st.integers(1, 8), st.integers(0, 6), st.integers(2, 30), st.integers(1, 2))
def test_no_bubble_with_as_many_flights_as_stages(stages: int, more: int, steps: int, branches: int) -> None:
    assert idle(plan_slots(stages + more, steps, branches, stages)) == 0


def missing_slots(flights: int, steps: int, branches: int, stages: int) -> int:
    """A flight's next round enters when its last branch is back, S + B - 1 slots after its first one entered."""
    return stages * (steps - 1) * max(0, stages + branches - 1 - flights * branches)


@given(st.integers(1, 10), st.integers(2, 20), st.integers(1, 3), st.integers(1, 8))
def test_the_bubble_of_too_few_flights(flights: int, steps: int, branches: int, stages: int) -> None:
    assert idle(plan_slots(flights, steps, branches, stages)) == missing_slots(flights, steps, branches, stages)


@given(counts, counts, st.integers(1, 2), st.integers(1, 5))
def test_independent_steps_leave_no_bubble(flights: int, steps: int, branches: int, stages: int) -> None:
    assert idle(plan_slots(flights, steps, branches, stages, chained=False)) == 0


class Toy:
    """Each (stage, chunk) applies its own affine map, each step adds its branches: any wrong order changes the end."""

    def __init__(self, rank: int, stages: int, chunks: int, branches: int, steps: int, chained: bool) -> None:
        self.rank, self.stages, self.chunks, self.branches = rank, stages, chunks, branches
        self.steps, self.chained = steps, chained
        self.state: dict[int, torch.Tensor] = {}
        self.sums: dict[tuple[int, int], torch.Tensor] = {}

    def start(self, flight: int) -> torch.Tensor:
        return torch.linspace(0.1, 1.0, 3 + flight, dtype=torch.float64)

    def forward(self, task: Task, packed: torch.Tensor | None) -> torch.Tensor:
        if packed is None:
            assert self.rank == 0 and task.chunk == 0
            x = self.state.get(task.flight, self.start(task.flight)) if self.chained else self.start(task.flight)
            packed = torch.cat([x, torch.full((task.branch,), 0.5, dtype=torch.float64)]) + 0.1 * task.step
        place = task.chunk * self.stages + self.rank
        out = torch.sin(packed * (1.1 + place) + 0.3 * task.branch)
        if self.rank == self.stages - 1 and task.chunk == self.chunks - 1:
            key = task.flight, task.step
            part = out[: 3 + task.flight]
            self.sums[key] = self.sums[key] * 2 + part if key in self.sums else part
            if task.branch == self.branches - 1:
                self.state[task.flight] = self.sums[key]
        return out

    def packed_like(self, task: Task) -> torch.Tensor:
        return torch.empty(3 + task.flight + task.branch, dtype=torch.float64)

    def result(self, task: Task) -> torch.Tensor | None:
        goes_on = self.chained and task.branch == self.branches - 1 and task.step + 1 < self.steps
        return self.state[task.flight] if goes_on else None

    def result_like(self, task: Task) -> torch.Tensor | None:
        goes_on = self.chained and task.branch == self.branches - 1 and task.step + 1 < self.steps
        return torch.empty(3 + task.flight, dtype=torch.float64) if goes_on else None

    def receive(self, task: Task, result: torch.Tensor) -> None:
        self.state[task.flight] = result


def run_toy(flights: int, steps: int, branches: int, chunks: int, chained: bool) -> dict[str, Any]:
    import torch.distributed as dist

    from megatron_sage.parallel.pipeline import bubble_fraction

    group = dist.group.WORLD
    work = Toy(group.rank(), group.size(), chunks, branches, steps, chained)
    plan = plan_slots(flights, steps, branches, group.size(), chunks, chained)
    occupancy = execute(plan, work, group, chunks)
    entries = [(slot, tuple(task)) for slot, task, *_ in occupancy.entries]
    return {
        "sums": {key: value.numpy() for key, value in work.sums.items()},
        "entries": entries,
        "bubble": bubble_fraction(occupancy, group),
    }


def plain_loop(flights: int, steps: int, branches: int, virtual: int, chained: bool) -> dict[tuple[int, int], Any]:
    """One process: every virtual stage one after the other."""
    found = {}
    for flight in range(flights):
        x = torch.linspace(0.1, 1.0, 3 + flight, dtype=torch.float64)
        for step in range(steps):
            total = None
            for branch in range(branches):
                y = torch.cat([x, torch.full((branch,), 0.5, dtype=torch.float64)]) + 0.1 * step
                for place in range(virtual):
                    y = torch.sin(y * (1.1 + place) + 0.3 * branch)
                part = y[: 3 + flight]
                total = part if total is None else total * 2 + part
            found[flight, step] = total.numpy()
            x = total if chained else x
    return found


@pytest.mark.parametrize("chained", [True, False], ids=["rollout", "reference pass"])
@pytest.mark.parametrize(
    ("ranks", "flights", "branches", "chunks"),
    [(1, 3, 2, 1), (2, 2, 1, 1), (2, 3, 2, 1), (4, 4, 1, 1), (4, 5, 2, 1), (4, 2, 2, 1), (2, 4, 1, 2), (4, 4, 2, 2)],
)
def test_ranks_compute_what_one_process_does_and_stay_busy(
    ranks: int, flights: int, branches: int, chunks: int, chained: bool
) -> None:
    steps = 20
    found = run_on_ranks(
        ranks,
        "tests.parallel.test_pipeline:run_toy",
        flights=flights,
        steps=steps,
        branches=branches,
        chunks=chunks,
        chained=chained,
    )
    expected = plain_loop(flights, steps, branches, ranks * chunks, chained)
    assert found[-1]["sums"].keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[-1]["sums"][key], value), key
    when = {(stage, Task(*task)): slot for stage, rank in enumerate(found) for slot, task in rank["entries"]}
    assert len(when) == ranks * flights * steps * branches * chunks
    assert_causal(when, ranks, chunks, branches, chained)
    busy = [len({slot for slot, _ in rank["entries"]}) for rank in found]
    span = [rank["entries"][-1][0] - rank["entries"][0][0] + 1 for rank in found]
    counted = 1 - sum(busy) / sum(span)
    assert all(rank["bubble"] == pytest.approx(counted) for rank in found)
    if chained and chunks == 1:
        assert sum(span) - sum(busy) == missing_slots(flights, steps, branches, ranks)
    assert counted < 0.02 or (chained and flights < ranks)


def half_rollout(arguments: list[str], processes: int, folder: str) -> dict[str, Any]:
    """A rollout that keeps bf16 latents, and the schedule's file."""
    from megatron_sage.config import load_config, validate
    from megatron_sage.data.prompts import read_rows
    from megatron_sage.engine import build_engine, encode_prompts, initialize_groups, prepare_embeddings, step_table
    from megatron_sage.reporting.schedule import write_schedule
    from megatron_sage.rollout.sampler import Flight, rollout, transition_log_prob

    config = load_config(None, arguments)
    validate(config, processes)
    rows, groups = read_rows(config.data.prompts)[:1], initialize_groups(config)
    prepare_embeddings(config, groups, rows)
    engine = build_engine(config, groups)
    (prompt,) = encode_prompts(config, engine, rows)
    table, _ = step_table("sage_grpo", config.sampler.num_steps, config.sampler.shift, config.sampler.eta)
    flights = [Flight(number, [0], prompt) for number in range(4)]
    options = {"seed": 3, "token_group": engine.token_group, "keep_velocity": True, "dtype": torch.bfloat16}
    trajectories, occupancy = rollout(engine.network(), table, flights, **options)
    write_schedule(occupancy, engine.groups.pp, Path(folder))
    found: dict[str, Any] = {"latents": [[t.latents_SBC[i].numpy() for i in t.latents_SBC] for t in trajectories]}
    if engine.groups.is_last_stage:
        found["again"], found["log_prob"] = [], []
        for t in trajectories:
            for i in table.trained_steps:
                mean = table.a[i] * t.latents_SBC[i] + table.b[i] * t.velocity_SBC[i]
                following = t.latents_SBC[i + 1]
                again = transition_log_prob(following, mean, table.std[i], engine.shape, engine.token_group)
                found["again"].append(float(again))
                found["log_prob"].append(float(t.log_prob_B[i]))
    return found


def real_rollout(arguments: list[str], processes: int, offload: bool) -> dict[str, Any]:
    """A rollout of the random tiny world; what this rank holds of it."""
    from megatron_sage.config import load_config, validate
    from megatron_sage.data.prompts import read_rows
    from megatron_sage.engine import build_engine, encode_prompts, initialize_groups, prepare_embeddings, step_table
    from megatron_sage.parallel import noise
    from megatron_sage.parallel.pipeline import bubble_fraction
    from megatron_sage.rollout.sampler import Flight, final_latents, reference_velocities, rollout, sample_latents

    config = load_config(None, arguments)
    validate(config, processes)
    rows, groups = read_rows(config.data.prompts), initialize_groups(config)
    prepare_embeddings(config, groups, rows)
    engine = build_engine(config, groups)
    prompts = encode_prompts(config, engine, rows)
    table, _ = step_table("sage_grpo", config.sampler.num_steps, config.sampler.shift, config.sampler.eta)
    flights = [Flight(number, [0], prompts[number % 3]) for number in range(4)]
    network = engine.network()
    options = {"seed": 3, "token_group": engine.token_group, "keep_velocity": True, "offload": offload}
    trajectories, occupancy = rollout(network, table, flights, **options)
    reference_velocities(network, table, trajectories)
    ode, _ = step_table("ode", config.sampler.num_steps, config.sampler.shift, 0.0)
    sampled = sample_latents(network, ode, flights, seed=3, stream=noise.SAMPLE)
    return {
        "latents": [len(t.latents_SBC) for t in trajectories],
        "velocities": [len(t.velocity_SBC) for t in trajectories],
        "references": [len(t.reference_SBC["position"]) for t in trajectories],
        "same": all(
            torch.allclose(t.velocity_SBC[i], t.reference_SBC["position"][i], atol=1e-6)
            for t in trajectories
            for i in t.velocity_SBC
        ),
        "log_prob": [[float(t.log_prob_B[i]) for i in table.trained_steps] for t in trajectories],
        "final": [final_latents(network, table, t).numpy() for t in trajectories],
        "sampled": [x_SBC.numpy() for x_SBC in sampled],
        "bubble": bubble_fraction(occupancy, groups.pp),
        "steps": len(table.std),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder, num_layers=5)
    return folder


def rolled(root: Path, ranks: int, offload: bool = False, **changes: Any) -> list[dict[str, Any]]:
    from tests.training import world

    settings = {"sampler.micro_batch": 1, "sampler.num_steps": 20, "parallel.pipeline": ranks} | changes
    arguments = world.overrides(world.settings(root, f"pipeline_{ranks}", **settings))
    function = "tests.parallel.test_pipeline:real_rollout"
    return run_on_ranks(ranks, function, arguments=arguments, processes=ranks, offload=offload, timeout=300)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rollout_keeps_the_stages_busy_and_its_parts_where_they_are_needed(root: Path, ranks: int) -> None:
    (single,) = rolled(root, 1)
    stages = rolled(root, ranks, offload=True)
    assert single["bubble"] == 0 and all(stage["bubble"] < 0.02 for stage in stages)
    inputs, whole, none = [single["steps"]] * 4, [single["steps"] + 1] * 4, [0] * 4
    assert [stage["latents"] for stage in stages] == [inputs, *[none] * (ranks - 2), whole]
    assert stages[-1]["velocities"] == stages[-1]["references"] == single["references"] and single["same"]
    assert all(stage["velocities"] == stage["references"] == none for stage in stages[:-1])
    for stage in stages:
        assert stage["log_prob"] == stages[-1]["log_prob"]
        np.testing.assert_allclose(stage["log_prob"], single["log_prob"], rtol=1e-6)
        for key in ("final", "sampled"):
            for mine, last, theirs in zip(stage[key], stages[-1][key], single[key], strict=True):
                assert np.array_equal(mine, last)
                np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_half_precision_latents_are_scored_as_they_are_kept(root: Path, tmp_path: Path) -> None:
    import json

    from tests.training import world

    settings = {"sampler.micro_batch": 1, "sampler.num_steps": 5, "parallel.pipeline": 2}
    arguments = world.overrides(world.settings(root, "half", **settings))
    function = "tests.parallel.test_pipeline:half_rollout"
    first, last = run_on_ranks(2, function, arguments=arguments, processes=2, folder=str(tmp_path))
    for mine, theirs in zip(first["latents"], last["latents"], strict=True):
        assert len(mine) == 5 and len(theirs) == 6
        for a, b in zip(mine, theirs, strict=False):
            assert np.array_equal(a, b)
            assert torch.equal(torch.from_numpy(b).bfloat16().float(), torch.from_numpy(b))
    np.testing.assert_allclose(last["again"], last["log_prob"], rtol=1e-6)
    schedule = json.loads((tmp_path / "pipeline_schedule.json").read_text())
    plan = plan_slots(4, 5, 2, 2)
    expected = [
        [slot, stage, task.chunk, task.flight, task.step, task.branch]
        for slot, row in enumerate(plan)
        for stage, task in enumerate(row)
        if task is not None
    ]
    assert schedule["tasks"] == expected and schedule["stages"] == 2 and schedule["bubble_fraction"] == 0
