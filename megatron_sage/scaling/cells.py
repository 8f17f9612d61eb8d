"""The grid of a scaling study: numbers of devices, layouts, and whether the work grows with them."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sage.config import Config, dump
from megatron_sage.config.loading import nearest
from megatron_sage.errors import UserError

STRONG, WEAK = "strong", "weak"
SIZES = ("tensor", "context", "pipeline")


@dataclass(frozen=True)
class Layout:
    """How one replica is cut; the rest of the devices are replicas."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    @property
    def replica(self) -> int:
        """Devices of one replica."""
        return self.tensor * self.context * self.pipeline


@dataclass(frozen=True)
class Cell:
    """One measurement. strong: the configured prompts, whatever the devices; weak: as many for every replica."""

    mode: str
    gpus: int
    layout: Layout

    @property
    def data(self) -> int:
        """Model replicas; 0 where the devices are no multiple of one."""
        return self.gpus // self.layout.replica if self.gpus % self.layout.replica == 0 else 0

    @property
    def name(self) -> str:
        """Of its directory."""
        layout = self.layout
        return f"{self.mode}_gpus{self.gpus:04d}_tp{layout.tensor}_cp{layout.context}_pp{layout.pipeline}"


def grid(gpus: Sequence[int], layouts: Sequence[Layout], modes: Sequence[str]) -> list[Cell]:
    """Every combination. With one replica (or none) weak and strong are the same: strong stands for both."""
    cells = [Cell(mode, count, layout) for mode in modes for count in gpus for layout in layouts]
    both = set(modes) == {STRONG, WEAK}
    return [cell for cell in cells if not (both and cell.mode == WEAK and cell.data < 2)]


def parse_gpus(text: str) -> list[int]:
    """1,2,4 -> [1, 2, 4]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--gpus {text}: expects numbers such as 1,2,4")
    return sorted({int(part) for part in parts})


def parse_layouts(text: str) -> list[Layout]:
    """tensor=2,context=1;pipeline=2 -> two layouts; what is not named is 1."""
    return [_layout(part, text) for part in text.split(";") if part.strip()]


def _layout(part: str, text: str) -> Layout:
    sizes: dict[str, int] = {}
    for item in part.split(","):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if key not in SIZES:
            match = nearest(key, SIZES)
            cure = f"did you mean {match}?" if match else f"known here: {', '.join(SIZES)}"
            raise UserError(f"--layouts {text}: {key or item}: unknown; {cure}")
        if not equals or not value.isdigit() or int(value) < 1:
            raise UserError(f"--layouts {text}: {key}={value}: expects a whole number >= 1")
        sizes[key] = int(value)
    return Layout(**sizes)


def cell_config(config: Config, cell: Cell, out: Path, warmup: int, iterations: int) -> Config:
    """The run of a cell: short, without evaluation, checkpoints and charts. Raises UserError where it cannot be cut."""
    if cell.data == 0:
        raise UserError(f"{cell.gpus} devices are no multiple of TP·CP·PP = {cell.layout.replica}")
    changed = copy.deepcopy(config)
    parallel, same = changed.parallel, config.parallel.pipeline == cell.layout.pipeline
    for key in SIZES:
        setattr(parallel, key, getattr(cell.layout, key))
    parallel.data = None
    if not same or cell.layout.pipeline == 1:  # settings of one pipeline size alone
        parallel.pipeline_layout = None
    if cell.layout.pipeline == 1:
        parallel.virtual_pipeline = None
    if cell.mode == WEAK:
        changed.grpo.prompts_per_iteration *= cell.data
    changed.name, changed.output_dir = cell.name, str(out / "cells" / cell.name)
    changed.evaluation.prompts = None
    changed.training.iterations, changed.training.save_interval = warmup + iterations, 0
    changed.training.resume = "no"
    changed.logging.tensorboard, changed.logging.wandb = False, None
    if changed.data.embedding_cache is None:
        changed.data.embedding_cache = str(out / "embeddings")
    return changed


def fingerprint(config: Config, warmup: int) -> str:
    """Of what is measured: a result of other settings is not taken for this cell's."""
    return hashlib.sha256(f"{dump(config)}\n{warmup}".encode()).hexdigest()[:16]


def layouts_of(config: Config) -> Iterator[Layout]:
    """Without --layouts: the configuration's own."""
    parallel = config.parallel
    yield Layout(parallel.tensor, parallel.context, parallel.pipeline)
