"""The reference of the position KL: the initial model, or an anchor that follows the policy now and then."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_sage.anchor import HostAnchor
from megatron_sage.config.schema import position_reference
from megatron_sage.engine import Engine
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.sampler import reference_velocities
from megatron_sage.rollout.transitions import StepTable


class Reference:
    """Fills in `reference_SBC` of trajectories; does nothing where the strategy has no position term."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kind = position_reference(engine.config.kl)  # "fixed", "moving" or None
        self.anchor = HostAnchor(engine.chunks) if self.kind is not None else None

    def velocities(
        self,
        table: StepTable,
        trajectories: Sequence[MicroTrajectory],
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """At `pairs` (None: all trained steps), with the rollout's micro-batches."""
        if self.anchor is None:
            return
        self.engine.eval()
        with self.anchor.swapped_in(self.engine.chunks):
            reference_velocities(self.engine.training_network(), table, trajectories, pairs)

    @contextmanager
    def during(
        self, table: StepTable, trajectories: Sequence[MicroTrajectory], pairs: Sequence[tuple[int, int]]
    ) -> Iterator[None]:
        """Inside the block the pairs have their velocities: with kl.phase=training they are made and dropped here.

        Of an update, not of a pair: the anchor's weights are swapped in once for all of them.
        """
        if self.anchor is None or self.engine.config.kl.phase == "rollout":
            yield
            return
        self.velocities(table, trajectories, pairs)
        yield
        for number, step in pairs:
            if step in trajectories[number].reference_SBC:  # held by the last stage alone
                del trajectories[number].reference_SBC[step]

    def after_step(self, optimizer_steps: int) -> None:
        """Refresh the moving anchor when it is due."""
        if self.anchor is not None and self.kind == "moving":
            if optimizer_steps % self.engine.config.kl.anchor_interval == 0:
                self.anchor.refresh(self.engine.chunks)
