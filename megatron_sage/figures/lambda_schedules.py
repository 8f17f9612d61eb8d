"""What the schedules of the KL weight do with one and the same series of KL values."""

import math
from functools import partial
from pathlib import Path

from megatron_sage.figures.output import picture, write_csv
from megatron_sage.grpo.trust_region import LambdaController

UPDATES, WARMUP, TARGET = 200, 50, 1e-4
LAMBDA_MIN, LAMBDA_MAX = 1e-7, 1e-5
MILDER_MAX = 2e-6  # milder: the same warm-up to a lower ceiling, and no feedback
LOOKS = {  # schedule: (label, colour, line style)
    "fixed": ("fixed", "#555555", "--"),
    "relax": ("two_stage, relax (the paper's text)", "#56B4E9", "-"),
    "tighten": ("two_stage, tighten (PPO's rule)", "#D55E00", "-"),
    "milder": (f"milder (to {MILDER_MAX:g})", "#009E73", "-."),
}


def kl_series() -> list[float]:
    """Made up: the KL of each optimizer step rises to three times its target by step 100, then falls to a fifth."""
    turn, top, bottom = UPDATES // 2, 3 * TARGET, 0.2 * TARGET

    def smooth(share: float) -> float:
        return (1 - math.cos(math.pi * min(share, 1.0))) / 2

    rise = [top * smooth(step / turn) for step in range(1, turn + 1)]
    fall = [top + (bottom - top) * smooth(step / (0.7 * turn)) for step in range(1, UPDATES - turn + 1)]
    return rise + fall


def controllers() -> dict[str, LambdaController]:
    """One fresh controller a schedule, alike in everything that they share."""
    make = partial(LambdaController, lambda_min=LAMBDA_MIN, warmup_steps=WARMUP, target=TARGET)
    return {
        "fixed": make(kind="fixed", lambda_max=LAMBDA_MAX),
        "relax": make(kind="two_stage", lambda_max=LAMBDA_MAX, feedback="relax"),
        "tighten": make(kind="two_stage", lambda_max=LAMBDA_MAX, feedback="tighten"),
        "milder": make(kind="milder", lambda_max=MILDER_MAX),
    }


def lambda_schedules(out: Path) -> list[Path]:
    """Makes lambda_schedules.csv and lambda_schedules.png in `out` (paper, appendix A.6)."""
    series, weights = kl_series(), controllers()
    # a step's row holds the lambda that weighed its KL term, so it is read before the update
    rows: list[list[float]] = []
    for step, kl in enumerate(series, 1):
        rows.append([step, kl, *(controller.value for controller in weights.values())])
        for controller in weights.values():
            controller.update(kl)
    header = ["optimizer_step", "kl", *(f"lambda_{name}" for name in weights)]
    table = write_csv(out / "lambda_schedules.csv", header, rows)
    image = out / "lambda_schedules.png"
    with picture(image, height=7) as figure:
        figure.suptitle("Weight λ of the KL term under each schedule, for the same KL")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
        steps = [row[0] for row in rows]
        above.plot(steps, [kl * 1e4 for kl in series], color="black", label="KL of the step (made up)")
        above.axhline(TARGET * 1e4, color="black", linestyle=":", label="target")
        above.set(ylabel="KL per latent element, 10⁻⁴", ylim=(0, None))
        above.legend(loc="upper left")
        for column, (name, (label, colour, line)) in enumerate(LOOKS.items(), 2):
            assert header[column] == f"lambda_{name}"
            # relax is broad: tighten, drawn over it, has the same warm-up
            width = 4 if name == "relax" else 1.5
            below.plot(steps, [row[column] for row in rows], line, color=colour, label=label, linewidth=width)
        below.set(xlabel="optimizer step", ylabel="λ (log scale)", yscale="log")
        for axes in (above, below):
            axes.axvline(WARMUP, color="#999999", linewidth=0.8)
        below.annotate("end of warm-up", (WARMUP, LAMBDA_MIN), xytext=(4, 2), textcoords="offset points")
        figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return [table, image]
