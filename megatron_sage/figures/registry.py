"""Which figures there are. A figure's function makes its files in a directory and returns their paths."""

from collections.abc import Callable
from pathlib import Path

from megatron_sage.figures.exploration import exploration
from megatron_sage.figures.gradient_norm import gradient_norm
from megatron_sage.figures.lambda_schedules import lambda_schedules
from megatron_sage.figures.step_std import step_std

FIGURES: dict[str, tuple[Callable[[Path], list[Path]], str]] = {
    "step_std": (step_std, "noise of each step against sigma, in three regimes near sigma = 1"),
    "gradient_norm": (gradient_norm, "gradient of each step, measured on the tiny model, with and without equalizer"),
    "exploration": (exploration, "noise that each sampler injects against how far its samples stray from the data"),
    "lambda_schedules": (lambda_schedules, "weight of the KL term under each schedule, for one made-up KL series"),
}
