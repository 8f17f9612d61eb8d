"""Jobs that stop a run in the middle: signals, gradients that are not numbers, memory that does not suffice."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def settings(root: Path, output: str, **changes: Any) -> list[str]:
    """Two iterations of two updates; every phase has more than one micro-step."""
    from tests.training import world

    base = {"sampler.num_steps": 3, "training.iterations": 2, "kl.anchor_interval": 1}
    return world.overrides(world.settings(root, output, **(base | changes)))


@contextlib.contextmanager
def patched(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """`around(original, *args, **kwargs)` instead of `owner.name`."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


class Events:
    """What a rank did: every forward, decoded video, reward and save, with its phase and iteration."""

    def __init__(self, when: Callable[["Events"], None]) -> None:
        self.control: Any = None
        self.done: list[tuple[str, str, int]] = []  # (what, phase, iteration)
        self.when = when  # called after each

    def count(self, phase: str, iteration: int) -> int:
        return sum(entry[1:] == (phase, iteration) for entry in self.done)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        from megatron_sage.checkpoint.store import CheckpointStore
        from megatron_sage.conditioning.codec import VideoCodec
        from megatron_sage.rollout.policy import Network
        from megatron_sage.training.supervision import Supervision
        from tests.training.world import BrightnessReward

        def entered(original: Any, supervision: Any) -> Any:
            original(supervision)
            self.control = supervision.control
            return supervision

        def event(what: str) -> Callable[..., Any]:
            def around(original: Any, *args: Any, **kwargs: Any) -> Any:
                if self.control is None:
                    return original(*args, **kwargs)
                self.done.append((what, self.control.phase, self.control.iteration))
                self.when(self)
                return original(*args, **kwargs)

            return around

        with contextlib.ExitStack() as stack:
            stack.enter_context(patched(Supervision, "__enter__", entered))
            stack.enter_context(patched(Network, "forward", event("forward")))
            stack.enter_context(patched(VideoCodec, "decode", event("decode")))
            stack.enter_context(patched(BrightnessReward, "__call__", event("reward")))
            stack.enter_context(patched(CheckpointStore, "save", event("save")))
            yield


def run(arguments: list[str], processes: int) -> int:
    """`megatron-sage train`, on this rank."""
    from megatron_sage.config import load_config, validate
    from megatron_sage.training.run import train

    config = load_config(None, arguments)
    validate(config, processes)
    return train(config)


def stop_at(
    arguments: list[str], processes: int, phase: str, iteration: int, step: int, rank: int, number: int
) -> dict[str, Any]:
    """Train; `rank` gets signal `number` in the `step`-th micro-step of a phase. (status, what was done, after it)."""
    import torch.distributed as dist

    sent: list[int] = []

    def when(events: Events) -> None:
        if not sent and dist.get_rank() == rank and events.count(phase, iteration) == step:
            sent.append(len(events.done))
            os.kill(os.getpid(), number)

    events = Events(when)
    with events.recorded():
        status = run(arguments, processes)
    after = events.done[sent[0] :] if sent else None
    return {"status": status, "done": events.done, "after": after}


def chain(arguments: list[str], processes: int, stops: list[dict[str, Any]]) -> dict[str, Any]:
    """One run, stopped and resumed at each of `stops`, then to its end."""
    found = [stop_at([*arguments, "training.resume=auto"], processes, **stop) for stop in stops]
    last = run([*arguments, "training.resume=auto"], processes)
    return {"stops": found, "last": last, **outcome(arguments)}


def outcome(arguments: list[str]) -> dict[str, Any]:
    """Metrics, exported weights and status of a finished run."""
    from safetensors.torch import load_file

    from megatron_sage.config import load_config

    directory = Path(load_config(None, arguments).output_dir)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(directory / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    return {
        "rows": [{key: value for key, value in row.items() if not key.startswith("seconds/")} for row in rows],
        "weights": {name: value.float().numpy() for name, value in weights.items()},
        "run_status": json.loads((directory / "status.json").read_text()),
    }


def whole(arguments: list[str], processes: int) -> dict[str, Any]:
    """The run without any stop."""
    assert run(arguments, processes) == 0
    return outcome(arguments)


def agreements(arguments: list[str], processes: int) -> tuple[int, int, bool]:
    """(agreements counted in an update, those expected, whether control traffic is among the counted bytes)."""
    import torch

    from megatron_sage.parallel.control import build_control
    from megatron_sage.parallel.traffic import CollectiveCounter
    from tests.parallel.iterations import prepare

    trainer = prepare(arguments, processes)
    engine, groups = trainer.engine, trainer.engine.groups
    trajectories, _ = trainer._roll_out()
    for trajectory in trajectories:
        trajectory.advantage_B = torch.ones(len(trajectory.samples), dtype=torch.float64)
        trajectory.keep(torch.ones(len(trajectory.samples), dtype=torch.bool))
    trainer._reference_pass(trajectories)
    pairs = [(number, trainer.table.trained_steps[0]) for number in range(3)]
    with CollectiveCounter(groups) as before:
        trainer.replay.gradients(trajectories, pairs, lambda count: None)
    engine.control = build_control(groups, 100.0)
    with CollectiveCounter(groups) as counter:
        trainer.replay.gradients(trajectories, pairs, lambda count: None)
    in_stage = 3 * len(engine.chunks) if groups.tp_size * groups.cp_size > 1 else 0
    return counter.control, in_stage + 1, counter.bytes != before.bytes


def poisoned(arguments: list[str], processes: int, updates: list[int], rank: int, exception: bool) -> dict[str, Any]:
    """Train; the gradients of some updates (by their number in this process) have one nan, on one rank."""
    import torch
    import torch.distributed as dist

    from megatron_sage.errors import UserError
    from megatron_sage.training.replay import Replay
    from megatron_sage.training.trainer import Trainer

    number, seen = [-1], []

    def gradients(original: Any, replay: Any, *args: Any) -> Any:
        found = original(replay, *args)
        if replay.engine.control.phase == "train":
            number[0] += 1
            if number[0] in updates and dist.get_rank() == rank:
                # replicated over TP where there is any, so that on rank 1 the norm does not see it
                parameter = dict(replay.engine.chunks[0].named_parameters())[
                    "time_embed.timestep_embedder.linear_1.bias"
                ]
                parameter.main_grad[0] = torch.nan
        return found

    def step(original: Any, trainer: Any, statistics: Any) -> Any:
        before = picture(trainer)
        norms = original(trainer, statistics)
        after = picture(trainer)
        seen.append((bool(norms), all(np.array_equal(before[key], after[key]) for key in before)))
        return norms

    message = ""
    with patched(Replay, "gradients", gradients), patched(Trainer, "_step", step):
        try:
            run(arguments, processes)
        except UserError as error:
            assert exception
            message = str(error)
    return {"seen": seen, "message": message}


def picture(trainer: Any) -> dict[str, np.ndarray]:
    """Weights, moments, anchor, counters: everything that an update may change."""
    found = {name: p.detach().numpy().copy() for c in trainer.engine.chunks for name, p in c.named_parameters()}
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for number, state in enumerate(part.optimizer.state.values()):
            for key, value in state.items():
                found[f"{number}.{key}"] = np.array(value)
    found["counters"] = np.array([trainer.optimizer_steps, trainer.controller.value])
    return found


def out_of_memory(arguments: list[str], phase: str, step: int, text: str) -> str:
    """Train; the `step`-th micro-step of a phase finds no memory. The whole message."""
    import torch

    from megatron_sage.errors import OutOfMemory

    def when(events: Events) -> None:
        if events.count(phase, int(phase == "save")) == step:  # an iteration has ended when it is saved
            raise torch.OutOfMemoryError(text) if "CUDA" in text else RuntimeError(text)

    events = Events(when)
    with events.recorded():
        try:
            run(arguments, 1)
        except OutOfMemory as error:
            return str(error)
    raise AssertionError(f"{phase}: nothing was raised; {events.done}")
