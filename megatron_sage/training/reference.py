"""References of the position KL: the initial model, an anchor that follows the policy now and then, or both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_sage.anchor import Anchor, BaseModel
from megatron_sage.config.schema import position_references
from megatron_sage.engine import Engine
from megatron_sage.model.lora import has_adapters
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.sampler import reference_velocities
from megatron_sage.rollout.transitions import StepTable


class Reference:
    """Fills in the references' velocities of trajectories; does nothing where the strategy has no position term.

    `kinds`: where a trajectory keeps them ("position", "initial") -> which reference it is ("fixed", "moving").
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kinds = position_references(engine.config.kl)
        self.anchors = {kind: self._source(kind) for kind in self.kinds.values()}
        self.used: dict[str, str] = {}  # checksums of what the present iteration measures against

    def _source(self, kind: str) -> Anchor | BaseModel:
        engine, kl = self.engine, self.engine.config.kl
        if kind == "fixed" and has_adapters(engine.chunks):
            return BaseModel(engine.chunks, engine.groups)
        return Anchor(engine.chunks, engine.groups, kl.anchor_placement == "device", kl.anchor_sharded)

    @property
    def moving(self) -> Anchor | None:
        """The one that is part of a run's state: the initial model is read again from where it came."""
        found = self.anchors.get("moving")
        return found if isinstance(found, Anchor) else None

    @property
    def checksums(self) -> dict[str, str]:
        """Kind -> checksum of its weights, the same at every layout if they are."""
        for anchor in self.anchors.values():
            anchor.finish()
        return {kind: f"{anchor.checksum:016x}" for kind, anchor in self.anchors.items()}

    def velocities(
        self,
        table: StepTable,
        trajectories: Sequence[MicroTrajectory],
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """At `pairs` (None: all trained steps), with the rollout's micro-batches."""
        self.engine.eval()
        for place, kind in self.kinds.items():
            with self.anchors[kind].swapped_in():
                reference_velocities(self.engine.training_network(), table, trajectories, pairs, place)

    @contextmanager
    def during(
        self, table: StepTable, trajectories: Sequence[MicroTrajectory], pairs: Sequence[tuple[int, int]]
    ) -> Iterator[None]:
        """Inside the block the pairs have their velocities: with kl.phase=training they are made and dropped here.

        Of an update, not of a pair: the weights are streamed for all of them at once, before their gradients.
        """
        if not self.kinds or self.engine.config.kl.phase == "rollout":
            yield
            return
        self.velocities(table, trajectories, pairs)
        yield
        for number, step in pairs:
            for place in self.kinds:
                kept = trajectories[number].reference_SBC[place]
                if step in kept:  # held by the last stage alone
                    del kept[step]

    def before_step(self) -> None:
        """The policy is about to change: copies of it that are under way must be complete."""
        for anchor in self.anchors.values():
            anchor.finish()

    def after_step(self, optimizer_steps: int) -> None:
        """Begin to refresh the moving anchor when it is due."""
        if self.moving is not None and optimizer_steps % self.engine.config.kl.anchor_interval == 0:
            self.moving.refresh()
