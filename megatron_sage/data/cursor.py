"""The order in which training visits prompts."""

from typing import Any

import numpy as np

from megatron_sage.errors import UserError


class PromptCursor:
    """Which prompts each iteration takes: epochs over all of them, each in its own order drawn from the seed.

    The indices are global: every rank holds the same cursor and picks its own out of what `take` returns. An
    iteration may end one epoch and begin the next. `digest` is that of the rows (`DataReport.digest`): with it, a
    file that was edited is refused when a run is resumed.
    """

    def __init__(self, num_prompts: int, per_iteration: int, seed: int = 0, digest: str | None = None) -> None:
        if num_prompts < 1 or per_iteration < 1:
            raise UserError(f"prompts: {per_iteration} an iteration out of {num_prompts}: both must be at least 1")
        self.num_prompts = num_prompts
        self.per_iteration = per_iteration
        self.seed = seed
        self.digest = digest
        self.taken = 0  # prompts since the start of training

    def take(self) -> list[int]:
        """Indices of the next iteration's prompts."""
        indices = [self._at(self.taken + offset) for offset in range(self.per_iteration)]
        self.taken += self.per_iteration
        return indices

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_prompts)
        return int(np.random.default_rng([self.seed, epoch]).permutation(self.num_prompts)[place])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on with the same prompts."""
        return {"taken": self.taken, "num_prompts": self.num_prompts, "seed": self.seed, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; UserError if the prompts or the seed have changed, for the order would too.

        A state without a digest (of an earlier version) is accepted: the number of prompts is all it can be held to.
        """
        for key in ("num_prompts", "seed"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"resume: {key} was {state[key]} and is {getattr(self, key)} now: "
                    "the order of the prompts would change; keep it, or start a new run"
                )
        saved = state.get("digest")
        if saved is not None and self.digest is not None and saved != self.digest:
            raise UserError(
                f"resume: the {self.num_prompts} prompts are not those of the run (SHA-256 {saved[:12]} then, "
                f"{self.digest[:12]} now): put the file of data.prompts back as it was, or start a new run"
            )
        self.taken = int(state["taken"])
