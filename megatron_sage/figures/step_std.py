"""How much noise each sampler adds at each step, and what the treatment of sigma = 1 does to the first steps."""

from pathlib import Path
from typing import Any

from megatron_sage.figures.output import COLOURS, MARKERS, SAMPLERS, picture, towards_data, write_csv
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import step_coefficients

STEPS, SHIFT, ETAS = 20, 5.0, (0.5, 1.0)
# regime: (`ceiling` of step_coefficients, its samplers, title)
REGIMES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "sigma_max": ("sigma_max", ("flow_grpo", "sage_grpo"), "(a) both: σ = 1 replaced by σ₁"),
    "clamp": ("clamp", ("flow_grpo", "sage_grpo"), "(b) both: σ clamped below 0.997"),
    "default": ("default", tuple(SAMPLERS), "(c) each with its own default"),
}


def standard_deviations() -> list[tuple[str, str, float, int, float, float]]:
    """Rows (regime, sampler, eta, step, sigma at the step's start, std of the step's noise)."""
    sigmas = shifted_sigmas(STEPS, SHIFT)
    rows = []
    for regime, (ceiling, samplers, _) in REGIMES.items():
        for sampler in samplers:
            for eta in ETAS:
                std = step_coefficients(sampler, sigmas, eta, ceiling=ceiling).std.tolist()
                rows += [(regime, sampler, eta, step, sigmas[step].item(), std[step]) for step in range(STEPS)]
    return rows


def step_std(out: Path) -> list[Path]:
    """Makes step_std.csv and step_std.png in `out` (paper, appendix A.2)."""
    rows = standard_deviations()
    table = write_csv(out / "step_std.csv", ["regime", "sampler", "eta", "step", "sigma", "std"], rows)
    image = out / "step_std.png"
    with picture(image, height=5.2) as figure:
        figure.suptitle(f"Noise of each step: N = {STEPS}, shift {SHIFT:g}")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (regime, (_, _, title)) in zip(panels, REGIMES.items(), strict=True):
            axes.set_title(title)
            _curves(axes, [row for row in rows if row[0] == regime])
            if regime != "default":
                _first_steps(axes, [row for row in rows if row[0] == regime and row[2] == 1 and row[3] == 0])
            towards_data(axes)
        panels[0].set_ylabel("standard deviation of the noise of the step")
        _legend(figure, panels[2])
    return [table, image]


def _curves(axes: Any, rows: list[tuple[str, str, float, int, float, float]]) -> None:
    for sampler in dict.fromkeys(row[1] for row in rows):
        for eta in ETAS:
            points = [(row[4], row[5]) for row in rows if row[1] == sampler and row[2] == eta]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[sampler],
                marker=MARKERS[sampler],
                linestyle="-" if eta == 1 else ":",
                alpha=1 if eta == 1 else 0.6,
                label=f"{SAMPLERS[sampler]}, η = {eta:g}",
            )


def _first_steps(axes: Any, rows: list[tuple[str, str, float, int, float, float]]) -> None:
    """Names the first steps' values: their markers crowd at the left edge."""
    lines = [f"{SAMPLERS[sampler]} {std:.2f}" for _, sampler, _, _, _, std in rows]
    axes.text(0.3, 0.9, "first step, η = 1:\n" + "\n".join(lines), transform=axes.transAxes, va="top")


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
