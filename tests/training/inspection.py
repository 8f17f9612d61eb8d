"""Iterations of the random tiny world on this rank, and what they computed on the way."""

from typing import Any

import numpy as np
import torch

from tests.parallel.iterations import prepare


class ByPlace:
    """A reward of eight videos whose values are given by their place: two groups of four."""

    dimensions = ("VQ", "MQ", "TA")
    values: tuple[float, ...] = (0.1, 0.4, 0.2, 0.6, 0.9, 0.3, 0.5, 0.8)

    def __call__(self, videos: list[np.ndarray], prompts: list[str], fps: float) -> dict[str, np.ndarray]:
        assert len(videos) == 8
        values = np.array(self.values)
        return {"VQ": values, "MQ": np.zeros(8), "TA": np.zeros(8)}


class OneNan(ByPlace):
    """Sample 1 of the first group has no reward."""

    values = (0.1, np.nan, 0.2, 0.6, 0.9, 0.3, 0.5, 0.8)


class OneInfinite(ByPlace):
    """Sample 1 of the first group has an infinite one."""

    values = (0.1, np.inf, 0.2, 0.6, 0.9, 0.3, 0.5, 0.8)


class AllEqual(ByPlace):
    """The first group's rewards are equal but for float32 residue."""

    values = (0.6, float(np.float32(0.6)), 0.6, 0.6, 0.9, 0.3, 0.5, 0.8)


class OneFinite(ByPlace):
    """One reward of the first group is a number."""

    values = (np.nan, 0.4, np.inf, -np.inf, 0.9, 0.3, 0.5, 0.8)


class Reversed(ByPlace):
    """Scores in which trained and watched rewards differ."""

    values = tuple(1.5 - value for value in reversed(ByPlace.values))


def whole(chunks: Any, which: Any) -> dict[str, np.ndarray]:
    """Parameters or gradients under their global names."""
    from megatron_sage.checkpoint.distributed import gather_named

    return {name: value.numpy().copy() for name, value in gather_named(chunks, which) if value is not None}


def inspect(arguments: list[str], processes: int, noise: float = 0.0) -> dict[str, Any]:
    """Train `training.iterations`; `noise` is added to the velocity of the training path."""
    from megatron_sage.rollout.policy import Network
    from megatron_sage.rollout.sampler import StepTable
    from megatron_sage.training.trainer import Trainer

    found: dict[str, Any] = {"advantages": [], "trained": [], "kept": [], "scored": [], "forwards": [], "steps": []}
    phase = [""]
    counts: dict[str, int] = {}

    class Inspected(Trainer):
        """Writes down what an iteration computes."""

        def _phase(self, name: str, total: int) -> Any:
            phase[0] = name
            return super()._phase(name, total)

        def _roll_out(self) -> Any:
            trajectories, row = super()._roll_out()
            table: StepTable = self.table
            found["steps"].append(table.trained_steps)
            found["kept"].append(sorted(trajectories[0].latents_SBC))
            found["scored"].append(sorted(trajectories[0].log_prob_B))
            return trajectories, row

        def _update(self, trajectories: Any) -> Any:
            found["advantages"].append(torch.cat([t.advantage_B for t in trajectories]).tolist())
            found["trained"].append(torch.cat([t.trained_B for t in trajectories]).tolist())
            row = super()._update(trajectories)
            found["forwards"].append(dict(counts))
            counts.clear()
            found["references_left"] = [len(t.reference_SBC["position"]) for t in trajectories if t.reference_SBC]
            if len(found["trained"]) == 1 and self.engine.config.name.startswith("dropped"):
                found["without"] = without_dropped(self, trajectories)
            if self.engine.config.name == "equalized":
                found["pull"] = {step: pull_of_step(self, trajectories, step) for step in self.table.trained_steps}
            return row

        def _step(self, statistics: Any) -> list[float]:
            if self.optimizer_steps == 0:
                found["gradients"] = whole(self.engine.chunks, "grad")
            return super()._step(statistics)

    trainer = prepare(arguments, processes, Inspected)
    forward, train_forward = Network.forward, Network.train_forward

    def counted(self: Network, *rest: Any, **named: Any) -> torch.Tensor:
        out = forward(self, *rest, **named)
        counts[phase[0]] = counts.get(phase[0], 0) + out.shape[1]
        return out

    def noisy(self: Network, *rest: Any, **named: Any) -> torch.Tensor:
        return train_forward(self, *rest, **named) + noise

    Network.forward, Network.train_forward = counted, noisy  # type: ignore[method-assign]
    try:
        before = whole(trainer.engine.chunks, "param")
        found["rows"] = [trainer.run_iteration()[0] for _ in range(trainer.engine.config.training.iterations)]
    finally:
        Network.forward, Network.train_forward = forward, train_forward  # type: ignore[method-assign]
    after = whole(trainer.engine.chunks, "param")
    found["before"], found["after"] = before, after
    found["change"] = {name: after[name] - before[name] for name in after}
    if trainer.reference.anchors:
        (anchor,) = trainer.reference.anchors.values()
        shard = anchor.state_dict()
        policy = {f"{i}.{n}": p for i, c in enumerate(trainer.engine.chunks) for n, p in c.named_parameters()}
        found["anchor_is_policy"] = all(torch.equal(shard[name], policy[name]) for name in shard)
        drift = [float((shard[name] - policy[name]).abs().max()) for name in shard]
        found["anchor_drift"] = max(drift)
        own = {name: policy[name].data for name in shard}
        for name, tensor in shard.items():
            policy[name].data = tensor
        now = whole(trainer.engine.chunks, "param")
        for name, tensor in own.items():
            policy[name].data = tensor
        found["anchor_is_initial"] = all(np.array_equal(now[name], before[name]) for name in before)
    return found


def without_dropped(trainer: Any, trajectories: list[Any]) -> dict[str, np.ndarray]:
    """Gradients at the present weights over the kept samples' trajectories alone (micro-batches of one sample)."""
    kept = [trajectory for trajectory in trajectories if bool(trajectory.trained_B.all())]
    found = []
    for some in (trajectories, kept):
        pairs = [(number, step) for number in range(len(some)) for step in trainer.table.trained_steps]
        statistics = trainer.replay.gradients(some, pairs, lambda count: None)
        samples = sum(float(one.sums[0]) for one in statistics)
        found.append((whole(trainer.engine.chunks, "grad"), samples))
    return {"all": found[0], "kept": found[1]}


def pull_of_step(trainer: Any, trajectories: list[Any], step: int) -> tuple[float, float]:
    """Norms of one step's gradient with the run's scales and with none."""
    pairs, scales, norms = [(number, step) for number in range(len(trajectories))], trainer.objective.scales, []
    for some in (scales, [1.0] * len(scales)):
        trainer.objective.use(trainer.table, some)
        trainer.replay.gradients(trajectories, pairs, lambda count: None)
        gradients = whole(trainer.engine.chunks, "grad").values()
        norms.append(float(np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in gradients))))
    trainer.objective.use(trainer.table, scales)
    return norms[0], norms[1]
