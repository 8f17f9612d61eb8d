"""Prompt files, and the order in which training visits their lines."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sage.errors import UserError


@dataclass(frozen=True)
class PromptRow:
    """What one video is made of: a text, and in image-to-video the image that it begins with."""

    text: str
    image: Path | None = None


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a UTF-8 text file, one a line; blank lines and lines starting with # are comments.

    Duplicates are kept (they weigh double) and warned about once. UserError, in one line, for a file that is
    missing, not text or without prompts.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the prompts ({error.strerror}); expected a text file, one prompt a line"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); expected one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"{path}: no prompt in it; expected one prompt a line")
    doubles = len(prompts) - len(set(prompts))
    if doubles:
        warnings.warn(f"{path}: {doubles} of {len(prompts)} prompts are duplicates; they are kept", stacklevel=2)
    return prompts


class PromptCursor:
    """Which prompts each iteration takes: epochs over all of them, each in its own order drawn from the seed.

    The indices are global: every rank holds the same cursor and picks its own out of what `take` returns. An
    iteration may end one epoch and begin the next.
    """

    def __init__(self, num_prompts: int, per_iteration: int, seed: int = 0) -> None:
        if num_prompts < 1 or per_iteration < 1:
            raise UserError(f"prompts: {per_iteration} an iteration out of {num_prompts}: both must be at least 1")
        self.num_prompts = num_prompts
        self.per_iteration = per_iteration
        self.seed = seed
        self.taken = 0  # prompts since the start of training

    def take(self) -> list[int]:
        """Indices of the next iteration's prompts."""
        indices = [self._at(self.taken + offset) for offset in range(self.per_iteration)]
        self.taken += self.per_iteration
        return indices

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_prompts)
        return int(np.random.default_rng([self.seed, epoch]).permutation(self.num_prompts)[place])

    def state_dict(self) -> dict[str, int]:
        """All that a resumed run needs to go on with the same prompts."""
        return {"taken": self.taken, "num_prompts": self.num_prompts, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; UserError if the prompts or the seed have changed, for the order would too."""
        for key in ("num_prompts", "seed"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"resume: {key} was {state[key]} and is {getattr(self, key)} now: "
                    "the order of the prompts would change; keep it, or start a new run"
                )
        self.taken = int(state["taken"])
