"""A reward on a server: the run is that of the local reward, bit for bit, while the rollout goes on beside it."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.config import load_config
from megatron_sage.config.reward_rules import check_reward
from megatron_sage.errors import UserError
from megatron_sage.parallel.pipeline import Occupancy, plan_slots
from megatron_sage.rewards.shapes import ShapesReward
from tests.parallel.pool import run_on_ranks
from tests.rewards.served import PROMPTS, stand_in
from tests.training import world

LOCAL = "megatron_sage.rewards.shapes:ShapesReward"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    (folder / "shapes.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def settings(root: Path, name: str, **changes: Any) -> list[str]:
    base = {
        "data.prompts": str(root / "shapes.txt"),
        "reward.function": LOCAL,
        "sampler.num_steps": 2,
        "training.iterations": 2,
        "grpo.prompts_per_iteration": 3,
        "grpo.updates_per_rollout": 1,
    }
    return world.overrides(world.settings(root, name, **(base | changes)))


def trained(root: Path, name: str, ranks: int, **changes: Any) -> list[dict[str, Any]]:
    arguments = settings(root, name, **changes)
    return run_on_ranks(ranks, "tests.training.remote_runs:outcome", arguments=arguments, processes=ranks, timeout=300)


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row of metrics: what does not depend on the clock, nor on how the rollout was cut."""
    return {k: v for k, v in row.items() if not k.startswith("seconds/") and k != "rollout/bubble_fraction"}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [numbers(row) for row in found["rows"]] == [numbers(row) | {"reward/lost": 0} for row in expected["rows"]]
    assert all(row["reward/std"] > 0 and row["grad_norm"] > 0 for row in expected["rows"]), "something was learnt"
    for name, values in expected["weights"].items():
        assert np.array_equal(found["weights"][name], values), name


class HeldBack(ShapesReward):
    """Answers each request only when the next one has come, but for the last of an iteration."""

    def __init__(self, requests: int) -> None:
        self.requests, self.count, self.come = requests, 0, threading.Condition()

    def __call__(self, videos: Any, prompts: Any, fps: float) -> dict[str, np.ndarray]:
        with self.come:
            self.count += 1
            self.come.notify_all()
            if (number := self.count) % self.requests:
                assert self.come.wait_for(lambda: self.count > number, 60), "no other request came meanwhile"
        return super().__call__(videos, prompts, fps)


def test_the_next_part_is_denoised_while_one_is_scored_and_nothing_changes(root: Path) -> None:
    (expected,) = trained(root, "local", 1)
    with stand_in(HeldBack(3)) as server:
        (found,) = trained(root, "remote", 1, **{"reward.url": server.url, "reward.overlap_groups": 1})
    assert server.requests == [4] * 6 and server.most_open == 2, "two parts at once are on their way, no more"
    assert_same(found, expected)
    first = found["phases"][found["phases"].index("rollout") :]
    part = ["rollout", "reward", "decode"]
    assert first[:10] == [*part * 3, "reward"], "three parts of one group, then their scores"
    with stand_in() as server:
        changes = {"reward.overlap_groups": 2, "reward.in_flight": 1, "sampler.micro_batch": 4}
        (uneven,) = trained(root, "uneven", 1, **{"reward.url": server.url, **changes})
        (local4,) = trained(root, "local4", 1, **{"sampler.micro_batch": 4})
    assert server.requests == [8, 4] * 2 and server.most_open == 1
    assert_same(uneven, local4)


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel.pipeline": 2},
        pytest.param({"parallel.tensor": 2}, marks=pytest.mark.nightly),
        pytest.param({"parallel.context": 2}, marks=pytest.mark.nightly),
        pytest.param({"parallel.data": 2, "grpo.prompts_per_iteration": 4}, marks=pytest.mark.nightly),
    ],
    ids=lambda layout: "-".join(layout),
)
def test_parts_on_two_ranks_give_the_local_run(root: Path, layout: dict[str, Any]) -> None:
    name = "_".join(layout).replace(".", "")
    expected = trained(root, f"{name}_local", 2, **layout)[0]
    with stand_in() as server:
        changes = {"reward.url": server.url, "reward.overlap_groups": 1}
        found = trained(root, f"{name}_remote", 2, **layout, **changes)[0]
    assert_same(found, expected)
    replicas = layout.get("parallel.data", 1)
    groups = layout.get("grpo.prompts_per_iteration", 3) // replicas
    assert sum(server.requests) == 2 * 4 * groups * replicas, "each video is sent once, by the rank that owns it"
    assert set(server.requests) == {4 * replicas // 2}
    if "parallel.pipeline" in layout:
        branches, flights = 2, 2
        slots = groups * len(plan_slots(flights, 2, branches, 2))
        tasks = groups * flights * branches * 2
        for row in found["rows"]:
            assert np.isclose(row["rollout/bubble_fraction"], 1 - tasks / (slots - 1), rtol=1e-12)
            assert row["rollout/bubble_fraction"] > expected["rows"][0]["rollout/bubble_fraction"]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_occupancy_of_parts_counts_the_slots_between_them(stages: int, chunks: int) -> None:
    for stage in range(stages):
        whole, flights, busy = Occupancy(), 0, 0
        for count in (3, 1, 2):
            plan = plan_slots(count, 2, 2, stages, chunks)
            tasks = [(slot, row[stage], 0.0, 0.0) for slot, row in enumerate(plan) if row[stage] is not None]
            whole.follow(Occupancy(tasks, len(plan)), flights)
            flights += count
            busy += len(tasks)
        found, span = whole.busy_and_span()
        assert found == busy == len({task for _, task, *_ in whole.entries}), "no task stands for two flights"
        assert span == whole.slots - (stages - 1), "from a stage's first task to its last"
        assert {task.flight for _, task, *_ in whole.entries} == set(range(6))


def test_a_server_that_is_gone_ends_the_run_after_three_iterations_that_are_saved(root: Path) -> None:
    changes = {"reward.retries": 0, "reward.overlap_groups": 2, "training.iterations": 6}
    with stand_in(fault=lambda number: None if number <= 2 else "reset") as server:
        arguments = settings(root, "gone", **{"reward.url": server.url, **changes})
        (found,) = run_on_ranks(1, "tests.training.remote_runs:refused", arguments=arguments, processes=1)
    assert [row["reward/lost"] for row in found["rows"]] == [0, 12, 12, 12]
    assert [row["reward/bad_iterations"] for row in found["rows"]] == [0, 1, 2, 3]
    assert [row["optimizer_steps"] for row in found["rows"]] == [1, 1, 1, 1], "nothing is learnt from no reward"
    assert "three iterations running" in found["said"] and "the run is saved in" in found["said"]
    assert server.url in found["said"]


def test_a_lost_part_leaves_the_others(root: Path) -> None:
    with stand_in(fault=lambda number: 503 if number == 2 else None) as server:
        changes = {"reward.url": server.url, "reward.retries": 0, "reward.overlap_groups": 1, "reward.in_flight": 1}
        (found,) = trained(root, "patchy", 1, **changes)
    assert [row["reward/lost"] for row in found["rows"]] == [4, 0]
    assert [row["reward/nonfinite"] for row in found["rows"]] == [4, 0]
    assert found["rows"][0]["reward/dropped_groups"] == 1 and np.isfinite(found["rows"][0]["loss"])


def test_what_the_server_refuses_ends_the_run_in_one_line(root: Path) -> None:
    with stand_in(fault=lambda number: 422) as server:
        arguments = settings(root, "refused", **{"reward.url": server.url})
        (found,) = run_on_ranks(1, "tests.training.remote_runs:refused", arguments=arguments, processes=1)
    assert "422 as the test said" in found["said"] and not found["rows"] and len(server.requests) == 1


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_stop_does_not_wait_for_an_answer_and_the_resumed_run_is_the_local_one(
    root: Path, tmp_path: Path, ranks: int
) -> None:
    layout = {"parallel.pipeline": ranks}
    expected = trained(root, f"whole{ranks}", ranks, **layout)[0]
    over, asked = threading.Event(), tmp_path / "asked"

    def hold(number: int) -> None:
        if number == 2:
            asked.touch()
            over.wait(60)

    with stand_in(fault=hold) as server:
        changes = layout | {"reward.url": server.url, "reward.overlap_groups": 2, "training.resume": "auto"}
        found = run_on_ranks(
            ranks,
            "tests.training.remote_runs:stop_while_waiting",
            arguments=settings(root, f"stopped{ranks}", **changes),
            processes=ranks,
            asked=str(asked),
        )
        over.set()
        assert [one["status"] for one in found] == [75] * ranks and found[-1]["seconds"] < 30, found
        resumed = trained(root, f"stopped{ranks}", ranks, **changes)[0]
    assert_same(resumed, expected)


def rules(*overrides: str) -> None:
    check_reward(load_config(None, list(overrides)))


def test_rules_of_the_keys() -> None:
    rules("reward.url=http://host:8400", "reward.function=not.here:Reward")  # it is on the server
    rules("reward.url=https://[::1]:8400/prefix", "training.stall_seconds=null")
    for url in ("host:8400", "ftp://host", "http://", "http://host:x", "http://host:8400/?a=b", "http://h o:1", "''"):
        with pytest.raises(UserError, match="reward.url=.*must be http"):
            rules(f"reward.url={url}")
    with pytest.raises(UserError, match="must not hold a password") as error:
        rules("reward.url=http://me:secret@host:8400")
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="reward.overlap_groups=1: needs reward.url"):
        rules("reward.overlap_groups=1")
    with pytest.raises(UserError, match="reward.token_env=a-b"):
        rules("reward.token_env=a-b")
    with pytest.raises(UserError, match="reward.timeout_seconds=240.0: .*training.stall_seconds"):
        rules("reward.url=http://host:8400", "training.stall_seconds=600")
    with pytest.raises(UserError, match="reward.timeout_seconds=600.0"):
        rules("reward.url=http://host:8400", "training.stall_seconds=null", "reward.timeout_seconds=600")
