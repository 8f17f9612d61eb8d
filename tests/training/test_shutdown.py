"""A stop signal at any micro-step: nothing is lost, nobody hangs, and the resumed run is the uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.pool import run_on_ranks
from tests.training import stops, world

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def stop(phase: str, iteration: int, step: int, rank: int = 0, number: int = signal.SIGTERM) -> dict[str, Any]:
    return {"phase": phase, "iteration": iteration, "step": step, "rank": rank, "number": int(number)}


# The first ones before the first optimizer step of their iteration, which is dropped and begun again ...
DROPPED = [
    stop("rollout", 0, 3),
    stop("reward", 0, 1, number=signal.SIGUSR1),
    stop("train", 0, 2, number=signal.SIGUSR2),
    stop("decode", 0, 2),
    stop("noise floor", 0, 1),
]
# ... these behind it or while saving, where the iteration is finished: the next one begins with iteration 1.
FINISHED = [stop("train", 0, 14, number=signal.SIGUSR1), stop("reference", 1, 2), stop("save", 2, 1)]


def check_chain(root: Path, ranks: int, all_stops: list[dict[str, Any]], kept: int, **changes: Any) -> list[Any]:
    """`all_stops` of which the first `kept` drop iteration 0."""
    name = f"chain_{ranks}_" + "_".join(f"{key[-4:]}{value}" for key, value in changes.items()).replace(".", "")
    whole = stops.settings(root, f"{name}_whole", **changes)
    chained = stops.settings(root, name, **changes)
    expected = run_on_ranks(ranks, "tests.training.stops:whole", arguments=whole, processes=ranks)[0]
    found = run_on_ranks(
        ranks, "tests.training.stops:chain", arguments=chained, processes=ranks, stops=all_stops, timeout=400
    )
    for rank, one in enumerate(found):
        assert one["last"] == 0
        for number, (wanted, was) in enumerate(zip(all_stops, one["stops"], strict=True)):
            assert was["status"] == 75, (rank, wanted)
            assert (was["after"] is not None) == (rank == wanted["rank"]), "the signal was sent"
            if number >= kept or was["after"] is None:
                continue
            # the micro-step in progress is finished: in training it is both branches of the guidance. Then nothing is
            # computed any more, only the state is saved.
            rest = [entry[0] for entry in was["after"] if entry[0] != "save"]
            assert len(rest) <= (wanted["phase"] in ("train", "noise floor")), (rank, wanted, was["after"])
        for wanted, was in list(zip(all_stops, one["stops"], strict=True))[:kept]:
            phases = [phase for what, phase, _ in was["done"] if what != "save"]
            assert phases[-1] == wanted["phase"], "no rank begins another phase"
    assert found[0]["rows"] == expected["rows"]
    for key, value in expected["weights"].items():
        assert np.array_equal(found[0]["weights"][key], value), key
    assert found[0]["run_status"]["state"] == "finished" and found[0]["run_status"]["exit_code"] == 0
    return found


def test_stopped_anywhere_and_resumed_is_the_uninterrupted_run(root: Path) -> None:
    (found,) = check_chain(root, 1, DROPPED + FINISHED, len(DROPPED))
    second_update = found["stops"][len(DROPPED)]["after"]
    assert {entry[1:] for entry in second_update} == {("train", 0), ("save", 1)}, "the iteration is finished"


def test_a_signal_to_one_pipeline_stage_stops_all(root: Path) -> None:
    some = [stop("rollout", 0, 4, rank=1), stop("train", 0, 3, rank=0), stop("reward", 0, 1, rank=1)]
    check_chain(root, 2, [*some, stop("reference", 1, 3, rank=0)], 3, **{"parallel.pipeline": 2})


@pytest.mark.nightly
def test_a_signal_to_one_tensor_rank_stops_all(root: Path) -> None:
    some = [stop("rollout", 0, 3, rank=1), stop("train", 0, 2, rank=1)]
    check_chain(root, 2, some, 2, **{"parallel.tensor": 2})


WIDE = [
    pytest.param(2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}, 4, id="interleaved"),
    pytest.param(2, {"kl.phase": "training"}, 2, id="dp2"),
    pytest.param(2, {"parallel.context": 2, "grpo.replay_batch": 2}, 2, id="cp2"),
    pytest.param(4, {"parallel.pipeline": 2, "parallel.tensor": 2}, 2, id="pp2-tp2"),
    pytest.param(4, {"parallel.pipeline": 2, "precision.recompute": "full"}, 2, id="pp2-dp2"),
    pytest.param(4, {"parallel.pipeline": 4}, 4, id="pp4"),
]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("ranks", "layout", "layers"), WIDE)
def test_random_stops_on_wider_layouts(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, layout: dict[str, Any], layers: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder, seed=seed, num_layers=layers)
    rng = np.random.default_rng(seed)
    phases = rng.permutation(["rollout", "train", "reward", "noise floor"])
    some = [
        stop(phase, 0, 1 if phase == "reward" else int(rng.integers(1, 4)), int(rng.integers(ranks)))
        for phase in phases
    ]
    check_chain(folder, ranks, some, len(some), seed=seed, **layout)


def test_agreements_are_one_for_each_micro_step_and_one_for_the_phase(root: Path) -> None:
    for name, layout in {"tp2": {"parallel.tensor": 2}, "pp2": {"parallel.pipeline": 2}}.items():
        arguments = stops.settings(root, f"agreements_{name}", **layout)
        for counted, expected, mixed in run_on_ranks(
            2, "tests.training.stops:agreements", arguments=arguments, processes=2
        ):
            assert counted == expected and not mixed, name


def started(command: list[str], directory: Path) -> subprocess.Popen[str]:
    """A process that has begun its first reward, which takes long."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TEST_RUN": str(directory)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=directory.parent)
    deadline = time.monotonic() + 300
    while not list(directory.glob("in_reward_*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    return process


def slow(root: Path, name: str, **changes: Any) -> list[str]:
    return stops.settings(root, name, **{"reward.function": "tests.training.stall_rewards:SlowReward", **changes})


def test_the_command_line_returns_75_and_says_so(root: Path) -> None:
    directory = root / "command"
    command = [sys.executable, "-m", "megatron_sage", "train", *slow(root, "command")]
    process = started(command, directory)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert said.count("SIGTERM: the rest of this phase (reward) is skipped") == 1
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["signal"], status["iteration"]) == ("stopped", "SIGTERM", 0)
    assert (directory / "checkpoints" / "iteration_000000").is_dir()


@pytest.mark.nightly
def test_torchrun_hands_the_signal_on(root: Path) -> None:
    directory = root / "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["--shutdown-timeout", "120", "-m", "megatron_sage", "train"]
    process = started([*command, *slow(root, "torchrun", **{"parallel.pipeline": 2})], directory)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0, "torchrun has a status of its own: status.json tells"
    assert json.loads((directory / "status.json").read_text())["state"] == "stopped", said
    assert (directory / "checkpoints" / "iteration_000000").is_dir()


def test_faulthandler_keeps_its_signals() -> None:
    run_on_ranks(1, "tests.training.test_shutdown:signals_come_back")


def signals_come_back() -> None:
    import faulthandler

    from megatron_sage.parallel.control import Control
    from megatron_sage.training.shutdown import SIGNALS, StopSignals

    control, before = Control(), [signal.getsignal(number) for number in SIGNALS]
    with StopSignals(control, 1):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert control.signal == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # is borne, too
        assert control.signal == signal.SIGUSR1
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert faulthandler.unregister(signal.SIGUSR1), "the pool's own handler"
    faulthandler.register(signal.SIGUSR1, all_threads=True)


assert world  # its rewards are named in settings
