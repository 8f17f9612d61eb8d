"""What all figures share: how the numbers and the picture are written, and the samplers' names and colours."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
SAMPLERS = {"dance_grpo": "DanceGRPO", "flow_grpo": "FlowGRPO", "sage_grpo": "SAGE", "cps": "CPS"}
# Okabe and Ito's colours, told apart by colour-blind readers too; the marker says it again.
COLOURS = {"dance_grpo": "#0072B2", "flow_grpo": "#D55E00", "sage_grpo": "#009E73", "cps": "#CC79A7"}
MARKERS = {"dance_grpo": "o", "flow_grpo": "s", "sage_grpo": "^", "cps": "D"}
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.titlesize": 13,
}


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """A header row and the numbers, floats with six significant digits: the same file from the same numbers."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    return path


@contextmanager
def picture(path: Path, width: float = 12, height: float = 5) -> Iterator[Figure]:
    """An empty matplotlib figure of `width` x `height` hundred pixels, written to `path` on the way out.

    The reader's own matplotlib settings do not count, and the file names neither date nor version: equal numbers give
    equal bytes on one machine.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    # a context, so that neither the settings nor pyplot's list of figures outlives this picture
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure
        figure.savefig(path, format="png", metadata={"Software": None})


def towards_data(axes: Any) -> None:
    """A sigma axis as sampling goes: noise on the left, data on the right."""
    axes.set_xlim(1.03, -0.03)
    axes.set_xlabel("noise level σ at the start of the step")
