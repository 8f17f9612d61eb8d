"""What is measured: the released model's width at two resolutions, or all of it tiny."""

from dataclasses import dataclass, field
from typing import Any

RELEASED: dict[str, Any] = {}  # diffusers' defaults are the released model's width
TINY: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_refiner_layers": 1,
    "rope_axes_dim": (4, 6, 6),
    "text_embed_dim": 24,
    "text_embed_2_dim": 16,
    "image_embed_dim": 16,
}


@dataclass(frozen=True)
class Sizes:
    """Of all sections. A grid is latent frames, height, width."""

    transformer: dict[str, Any] = field(default_factory=lambda: dict(RELEASED))
    grids: dict[str, tuple[int, int, int]] = field(
        default_factory=lambda: {"480x848x81": (21, 30, 53), "720x1280x81": (21, 45, 80)}
    )
    text: int = 300
    unconditional: int = 40
    blocks: tuple[int, ...] = (1, 2, 4)
    square: int = 8192
    copy_bytes: int = 2**31
    host_bytes: int = 2**30
    steps: int = 4
    reference_forwards: int = 4
    optimizer_blocks: int = 2
    compiled: int = 2
    """Resolutions at which torch.compile is tried."""
    compile_block: bool = True
    """Whether on a whole block too."""
    seconds: float = 1.0
    """Of repeats for one number, about."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of the sections that look at one resolution."""
        return next(iter(self.grids.values()))


def tokens(grid: tuple[int, int, int]) -> int:
    """Video tokens."""
    return grid[0] * grid[1] * grid[2]


SMALL = Sizes(
    transformer=TINY,
    grids={"small": (2, 3, 4), "larger": (3, 4, 5)},
    text=5,
    unconditional=3,
    blocks=(1, 2),
    square=64,
    copy_bytes=2**16,
    host_bytes=2**16,
    steps=2,
    reference_forwards=2,
    optimizer_blocks=1,
    compiled=1,
    compile_block=False,  # tracing it takes 20 s
    seconds=0.0,
)
