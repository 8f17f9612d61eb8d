"""Section `syncs`: how often the host waits for the device within a rollout, a reference pass and an update.

On a GPU torch warns at every call that waits (torch.cuda.set_sync_debug_mode). Without one the same phases run, and
counted is each number that Python reads out of a tensor: those of host tensors too, which cost nothing on a GPU, and
not the copies from pageable memory, which wait there.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.bench import TYPE, Bench, Row
from benchmarks.gpu.models import network_of, random_dit, random_prompt
from benchmarks.gpu.sizes import SMALL
from megatron_sage.anchor import Anchor
from megatron_sage.rollout.sampler import Flight, reference_velocities, rollout

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
SAID = "synchronizing CUDA operation"
ROOT, TORCH = Path(__file__).parents[2], Path(torch.__file__).parent


@dataclass
class Syncs:
    """How many, and from which lines."""

    count: int = 0
    places: Counter[str] = field(default_factory=Counter)


class _Reads(TorchDispatchMode):
    def __init__(self, found: Syncs) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            self.found.count += 1
            self.found.places[_caller()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(cuda: bool) -> Iterator[Syncs]:
    """Inside, every wait (without a GPU: every number read) is counted."""
    found = Syncs()
    if not cuda:
        with _Reads(found):
            yield found
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in said:
        if SAID in str(warning.message):
            found.count += 1
            found.places[_place(warning.filename, warning.lineno)] += 1


def _place(filename: str, line: int) -> str:
    path = Path(filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{name}:{line}"


def _caller() -> str:
    """The innermost line that is neither torch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not Path(frame.filename).is_relative_to(TORCH):
            return _place(frame.filename, frame.lineno or 0)
    return "torch"


def syncs(bench: Bench) -> Iterator[Row]:
    """Each phase once before, to warm up: caches and communicators are made with waits."""
    phases = _Phases(bench)
    kind = "calls that wait" if bench.cuda else "numbers read out of tensors: waits are not known without CUDA"
    for name, expected, phase in phases.listed():
        phase()
        with counted(bench.cuda) as found:
            phase()
        row = {"name": name, "count": found.count, "expected": expected, "counted": kind}
        yield row | {"places": dict(found.places.most_common(8))}


class _Phases:
    """A tiny model and what a run does with it; the parts of an iteration as the trainer calls them."""

    def __init__(self, bench: Bench) -> None:
        from megatron_sage.config.schema import Config, GrpoConfig, KlConfig, SamplerConfig
        from megatron_sage.engine import Engine, iteration_steps
        from megatron_sage.training.loss import Objective
        from megatron_sage.training.optimizer import build_optimizer, wrap
        from megatron_sage.training.replay import Replay

        sizes = SMALL  # waiting does not depend on the size
        tiny = Bench(sizes, bench.groups, bench.device)
        config = Config(
            grpo=GrpoConfig(group_size=2), kl=KlConfig(strategy="moving"), sampler=SamplerConfig(num_steps=3)
        )
        dit = random_dit(tiny, 2)
        ddp = wrap([dit], bench.groups)
        self.optimizer = build_optimizer(config, ddp, TYPE)
        shape = network_of(tiny, dit, sizes.grid).shape
        self.engine = Engine(config, bench.groups, [dit], TYPE, bench.device, shape, None)
        self.table, scales = iteration_steps(config, 0)
        objective = Objective(config, shape, None)
        objective.use(self.table, scales)
        objective.weight = 1e-5
        self.replay = Replay(self.engine, ddp, self.optimizer, objective)
        self.anchor = Anchor([dit], bench.groups)
        self.flights = [Flight(0, [sample], random_prompt(tiny)) for sample in range(2)]
        self.trajectories: list[Any] = []

    def listed(self) -> list[tuple[str, int | str, Callable[[], None]]]:
        """(name, waits expected, phase) in the order of an iteration.

        Megatron's finalize_model_grads asks once an update whether any sample was counted.
        """
        return [
            ("rollout", 0, self.rollout),
            ("reference pass", 0, self.reference),
            ("forwards and backwards of an update", 1, self.gradients),
            ("optimizer step", "no number: the gradients' norm is read before the step", self.step),
        ]

    def rollout(self) -> None:
        self.engine.eval()
        network = self.engine.rollout_network()
        self.trajectories, _ = rollout(network, self.table, self.flights, seed=0, token_group=None)

    def reference(self) -> None:
        with self.anchor.swapped_in():
            reference_velocities(self.engine.training_network(), self.table, self.trajectories)

    def gradients(self) -> None:
        device = self.engine.device
        for trajectory in self.trajectories:
            trajectory.advantage_B = torch.ones(1, dtype=torch.float64, device=device)
            trajectory.trained_B = torch.ones(1, dtype=torch.bool, device=device)
        pairs = [(n, step) for n in range(len(self.trajectories)) for step in self.table.trained_steps]
        self.replay.gradients(self.trajectories, pairs, lambda count: None)

    def step(self) -> None:
        self.optimizer.prepare_grads()
        self.optimizer.step_prepared(float(self.optimizer.get_grad_norm()))
