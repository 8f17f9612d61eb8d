"""What the equalizer does to the training reward of each sampler, in a study's runs."""

from pathlib import Path

from megatron_sage.figures.output import COLOURS, SAMPLERS, picture, write_csv
from megatron_sage.figures.study_curves import BAND, HEADER, Line, load, numbers, panel

QUANTITY = "reward_mean"


def lines(sampler: str) -> tuple[Line, Line]:
    """A sampler's cells with and without the equalizer: setting B, no KL."""
    cell = f"b_{sampler.removesuffix('_grpo')}_none"
    return (
        Line(cell, "with equalizer", COLOURS[sampler], "o"),
        Line(f"{cell}_no_equalizer", "without", "#666666", "s", "--"),
    )


def reward_curves(out: Path, study: Path) -> list[Path]:
    """Makes reward_curves.csv and reward_curves.png in `out` from the study in the directory `study`.

    UserError where it is no study or has none of the cells.
    """
    cells = [line.cell for sampler in SAMPLERS for line in lines(sampler)]
    found = load(study, cells)
    table = write_csv(out / "reward_curves.csv", HEADER, numbers(found, cells, [QUANTITY]))
    image = out / "reward_curves.png"
    with picture(image, height=8) as figure:
        figure.suptitle(f"Training reward with and without the equalizer (setting B, no KL)\n{BAND}")
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, (sampler, name) in zip(panels.flat, SAMPLERS.items(), strict=True):
            panel(axes, found, name, lines(sampler), QUANTITY)
            if axes.lines:
                axes.legend(loc="best")
            axes.set_xlabel(axes.get_xlabel() if axes in panels[1] else "")
        for axes in panels[:, 0]:
            axes.set_ylabel("mean reward of the iteration's videos")
    return [table, image]
