"""When a run that learns nothing any more stops itself: rewards, and gradients, that are not finite."""

from megatron_sage.grpo.advantage import NonFiniteGuard


class RunGuard(NonFiniteGuard):
    """Iterations with bad rewards and skipped updates, each counted in a row; part of the state of a run."""

    def __init__(self, max_nonfinite: int) -> None:
        """`max_nonfinite`: skipped updates in a row that are borne."""
        super().__init__()
        self.max_nonfinite = max_nonfinite
        self.skipped_updates = 0

    def updated(self, finite: bool) -> None:
        """Count an update that was made, or was skipped for a gradient that is not finite."""
        self.skipped_updates = 0 if finite else self.skipped_updates + 1

    def reason_to_stop(self, bad_rewards: bool, function: str) -> str | None:
        """Why training should save and stop. `bad_rewards`: what `update` said of the rewards of `function`."""
        if bad_rewards:
            return (
                f"{function}: more than half of the rewards were not finite in three iterations running: look at the "
                "reward model"
            )
        if self.skipped_updates > self.max_nonfinite:
            return (
                f"optimizer.max_nonfinite={self.max_nonfinite}: {self.skipped_updates} updates in a row were skipped, "
                "for their gradients were not finite: lower optimizer.lr, go on from an earlier checkpoint, or look "
                "for the overflow with precision.dtype=fp32"
            )
        return None

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs."""
        return super().state_dict() | {"skipped_updates": self.skipped_updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up saved counts."""
        super().load_state_dict(state)
        self.skipped_updates = int(state.get("skipped_updates", 0))  # not in checkpoints of earlier versions
