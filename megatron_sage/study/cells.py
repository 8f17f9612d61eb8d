"""What a study compares: cells, each a variant of `megatron_sage.recipes` on the tiny world, and their order."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sage.config import Config, load_config
from megatron_sage.config.loading import nearest
from megatron_sage.errors import UserError
from megatron_sage.recipes import SAMPLERS, SETTINGS, VARIANTS, recipe

GRID = [f"{letter}_{name}_{kl}" for letter in SETTINGS for name in SAMPLERS for kl in ("none", "fixed", "dual")]
ABLATIONS = [
    *(f"b_{name}_none_no_equalizer" for name in SAMPLERS),
    *(f"b_sage_{kl}" for kl in ("step", "moving", "dual_fixed")),
    *(f"b_sage_dual_lambda_{schedule}" for schedule in ("fixed", "milder", "tighten")),
]
CHOICES = {"grid": GRID, "ablations": ABLATIONS, "all": GRID + ABLATIONS}

# A run of a study is smaller than the quickstart's, so that a hundred of them fit in hours: shorter clips, fewer
# videos, and with them a lower learning rate (at 1.5e-3 the noise of so small a batch undid what was learnt).
SETTINGS_OF_A_RUN = [
    "video.frames=21",
    "grpo.prompts_per_iteration=4",
    "grpo.replay_batch=4",
    "optimizer.lr=5e-4",
    "optimizer.warmup_steps=4",
    "training.iterations=16",
]


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    cell: str
    seed: int

    def config(self, overrides: Sequence[str] = (), embedding_cache: str | None = None) -> Config:
        """Its configuration: the tiny recipe, the study's sizes, then `overrides`."""
        config = load_config(None, [*SETTINGS_OF_A_RUN, *overrides, f"seed={self.seed}"], recipe(f"tiny_{self.cell}"))
        config.data.embedding_cache = embedding_cache
        return config


def chosen_cells(text: str) -> list[str]:
    """`grid`, `ablations`, `all`, or names of cells with commas between."""
    if text in CHOICES:
        return CHOICES[text]
    cells = [cell.strip() for cell in text.split(",") if cell.strip()]
    for cell in cells:
        if cell not in VARIANTS or cell == "base":
            match = nearest(cell, [*CHOICES["all"], *CHOICES])
            cure = f"did you mean {match}? " if match else ""
            raise UserError(
                f"--cells {cell}: unknown; {cure}choose from {', '.join(CHOICES)}, {', '.join(CHOICES['all'])}"
            )
    if not cells:
        raise UserError(f"--cells {text!r}: names no cell; choose from {', '.join(CHOICES)} or list cells with commas")
    return cells


def planned_runs(cells: Sequence[str], seeds: int) -> list[Run]:
    """Seed by seed: an interrupted study has fewer seeds, not fewer cells."""
    return [Run(cell, seed) for seed in range(seeds) for cell in cells]
