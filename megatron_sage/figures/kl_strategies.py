"""What five trust regions do to SAGE's training reward, its spread and its KL, in a study's runs."""

from pathlib import Path

from megatron_sage.figures.output import picture, write_csv
from megatron_sage.figures.study_curves import BAND, HEADER, Line, load, numbers, panel

LINES = (
    Line("b_sage_none", "none", "#555555", "o"),
    Line("b_sage_fixed", "fixed", "#0072B2", "s"),
    Line("b_sage_step", "step", "#E69F00", "D"),
    Line("b_sage_moving", "moving", "#CC79A7", "v"),
    Line("b_sage_dual", "dual", "#009E73", "^"),
)
# none and step measure no KL against a position: curves.csv has 0 for them, which is no finding
WITH_POSITION = tuple(line for line in LINES if line.label in ("fixed", "moving", "dual"))
PANELS = {
    "reward_mean": ("Reward: mean of an iteration's videos", LINES),
    "reward_std": ("Reward: standard deviation of an iteration's videos", LINES),
    "kl_position": ("KL against the strategy's own reference", WITH_POSITION),
}


def kl_strategies(out: Path, study: Path) -> list[Path]:
    """Makes kl_strategies.csv and kl_strategies.png in `out` from the study in the directory `study`.

    UserError where it is no study or has none of the cells.
    """
    found = load(study, [line.cell for line in LINES])
    rows = [row for name, (_, lines) in PANELS.items() for row in numbers(found, [one.cell for one in lines], [name])]
    table = write_csv(out / "kl_strategies.csv", HEADER, rows)
    image = out / "kl_strategies.png"
    with picture(image, width=15, height=5.6) as figure:
        figure.suptitle(f"Trust regions of SAGE (setting B), training; {BAND}")
        panels = figure.subplots(1, len(PANELS))
        for axes, (name, (title, lines)) in zip(panels, PANELS.items(), strict=True):
            panel(axes, found, title, lines, name)
        panels[2].set_ylabel("fixed: initial model; moving, dual: the anchor")
        if panels[2].lines:
            panels[2].set_ylim(0, None)
        entries = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(LINES))
    return [table, image]
