"""Which figures there are. A figure's function takes the directory for its files and that of a study, where it draws
one, and returns the files' paths."""

from collections.abc import Callable
from pathlib import Path

from megatron_sage.figures.exploration import exploration
from megatron_sage.figures.gradient_norm import gradient_norm
from megatron_sage.figures.kl_strategies import kl_strategies
from megatron_sage.figures.lambda_schedules import lambda_schedules
from megatron_sage.figures.reward_curves import reward_curves
from megatron_sage.figures.roofline import roofline
from megatron_sage.figures.step_std import step_std


def _alone(make: Callable[[Path], list[Path]]) -> Callable[[Path, Path], list[Path]]:
    """A figure that needs no study."""
    return lambda out, _: make(out)


FIGURES: dict[str, tuple[Callable[[Path, Path], list[Path]], str]] = {
    "step_std": (_alone(step_std), "noise of each step against sigma, in three regimes near sigma = 1"),
    "gradient_norm": (
        _alone(gradient_norm),
        "gradient of each step, measured on the tiny model, with and without equalizer",
    ),
    "exploration": (
        _alone(exploration),
        "noise that each sampler injects against how far its samples stray from the data",
    ),
    "lambda_schedules": (
        _alone(lambda_schedules),
        "weight of the KL term under each schedule, for one made-up KL series",
    ),
    "roofline": (_alone(roofline), "what bounds each phase of an iteration on H100, by formula and data sheet"),
    "reward_curves": (reward_curves, "a study's training reward with and without the equalizer, by sampler"),
    "kl_strategies": (kl_strategies, "a study's training reward, its spread and the KL under five trust regions"),
}
