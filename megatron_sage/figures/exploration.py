"""Exploration against fidelity: noise that a sampler injects, and how far its samples then stray from the data."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sage.figures.mixture import Mixture, normal_quantiles, wasserstein
from megatron_sage.figures.output import COLOURS, MARKERS, SAMPLERS, picture, write_csv
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import StepCoefficients, step_coefficients, step_mean, step_sample

SHIFT, STEPS = 5.0, (10, 20, 100)
ETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MARKED_ETA = 0.5  # the default
SAMPLES, SEEDS = 20_000, (0, 1, 2, 3)
# Two narrow modes of unequal weight and a broad one: strayed samples fall into the gaps, and modes can be confused.
DATA = Mixture(weights=(0.5, 0.3, 0.2), means=(-1.5, 0.5, 2.0), stds=(0.15, 0.15, 0.3))
HEADER = [
    "sampler",
    "eta",
    "steps",
    "injected_variance",
    "last_std",
    "w1",
    "w1_std",
    "w1_ode",
    "w1_exact",
    "samples",
    "seeds",
]


def sample(data: Mixture, sigmas: torch.Tensor, coefficients: StepCoefficients, count: int, seed: int) -> torch.Tensor:
    """`count` samples of a sampler under the exact velocity, float64 [count].

    The initial noise is the normal's quantiles, not a draw: the ODE's error is then free of chance.
    """
    random = np.random.Generator(np.random.Philox(seed))
    x = normal_quantiles(count)
    for i, sigma in enumerate(sigmas[:-1].tolist()):
        a, b, std = coefficients.step(i)
        noise = torch.from_numpy(random.standard_normal(count))
        x = step_sample(step_mean(x, data.velocity(x, sigma), a, b), std, noise)
    return x


def measurements(
    data: Mixture = DATA, samples: int = SAMPLES, seeds: tuple[int, ...] = SEEDS, etas: tuple[float, ...] = ETAS
) -> list[list[Any]]:
    """Rows as HEADER. w1: mean over the seeds of the Wasserstein-1 distance to the data; w1_std: its spread.

    injected_variance: sum of std^2 over the steps; last_std: of the last step, whose noise nothing takes out again.
    w1_ode: the same of the ODE, what the step's length alone costs; w1_exact: of independent draws from the data, the
    least that so many samples can show.
    """
    target = data.quantiles(samples)
    exact = float(np.mean([wasserstein(_draw(target, seed), target) for seed in seeds]))
    rows: list[list[Any]] = []
    for steps in STEPS:
        sigmas = shifted_sigmas(steps, SHIFT)
        ode = wasserstein(sample(data, sigmas, step_coefficients("ode", sigmas, 0.0), samples, 0), target)
        for sampler in SAMPLERS:
            for eta in etas:
                coefficients = step_coefficients(sampler, sigmas, eta)
                found = [wasserstein(sample(data, sigmas, coefficients, samples, seed), target) for seed in seeds]
                injected = [coefficients.std.square().sum().item(), coefficients.std[-1].item()]
                spread = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
                distances = [float(np.mean(found)), spread, ode, exact]
                rows.append([sampler, eta, steps, *injected, *distances, samples, len(seeds)])
    return rows


def _draw(quantiles: torch.Tensor, seed: int) -> torch.Tensor:
    """As many independent draws from the data: quantiles picked at random, with repetition."""
    picks = np.random.Generator(np.random.Philox(seed)).integers(len(quantiles), size=len(quantiles))
    return quantiles[torch.from_numpy(picks)]


def exploration(out: Path) -> list[Path]:
    """Makes exploration.csv and exploration.png in `out`."""
    rows = measurements()
    table = write_csv(out / "exploration.csv", HEADER, rows)
    image = out / "exploration.png"
    with picture(image, height=5.6) as figure:
        etas = f"each line: η from {ETAS[0]} to {ETAS[-1]:g}, {MARKED_ETA} ringed"
        figure.suptitle(
            f"Exploration against fidelity: three Gaussians in 1-D, exact velocity, shift {SHIFT:g}; {etas}"
        )
        panels = figure.subplots(1, len(STEPS), sharey=True)
        for axes, steps in zip(panels, STEPS, strict=True):
            axes.set_title(f"N = {steps} steps")
            _panel(axes, [dict(zip(HEADER, row, strict=True)) for row in rows if row[2] == steps])
        panels[0].set_ylabel("Wasserstein-1 distance of the samples to the data (log)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return [table, image]


def _panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    for sampler, label in SAMPLERS.items():
        mine = [row for row in rows if row["sampler"] == sampler]
        x, y = [row["injected_variance"] for row in mine], [row["w1"] for row in mine]
        axes.plot(x, y, color=COLOURS[sampler], marker=MARKERS[sampler], label=label)
        middle = [row["eta"] for row in mine].index(MARKED_ETA)
        axes.plot(x[middle], y[middle], MARKERS[sampler], color=COLOURS[sampler], markersize=11, fillstyle="none")
    axes.axhline(rows[0]["w1_ode"], color="black", linestyle="--", linewidth=1, label="ODE (no noise)")
    axes.axhline(rows[0]["w1_exact"], color="#888888", linestyle=":", linewidth=1, label="draws from the data")
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
    axes.set(xscale="log", yscale="log", ylim=(0.8 * rows[0]["w1_exact"], None))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("injected variance, Σ std² over the steps (log)")
