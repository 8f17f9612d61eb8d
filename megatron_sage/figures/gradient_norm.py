"""How strongly each step pulls on the policy: measured by autograd on the tiny model, beside the formula."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_sage.conditioning.words import WordEncoder
from megatron_sage.errors import UserError
from megatron_sage.figures.output import COLOURS, MARKERS, SAMPLERS, picture, towards_data, write_csv
from megatron_sage.grpo.equalizer import gradient_scales, norm_factors
from megatron_sage.grpo.objective import policy_loss
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import StepCoefficients, log_prob, step_coefficients, step_mean, step_sample
from megatron_sage.parallel import noise

Velocity = Callable[[torch.Tensor, float], torch.Tensor]  # (x, sigma) -> v, differentiable in the parameters

MODEL = Path("examples/tiny_world/model")
PROMPT = "a red circle moving left slowly"
GRID = (21, 2, 3)  # 81 frames of 32x48 pixels
STEPS, SHIFT, ETA = 16, 3.0, 0.5
BATCH, REPEATS = 4, 4  # advantages of -1, -1, 1, 1; each repeat has its own noise
CLIP_RANGE = 1e-4
HEADER = [
    "sampler",
    "step",
    "sigma",
    "formula",  # N_i, scaled to the median of grad_velocity
    "grad_velocity",
    "grad_parameters",
    "equalized_velocity",
    "equalized_parameters",
    "repeats",
]


class StepGradient(NamedTuple):
    """Norms of the policy loss' gradient at one trained step."""

    step: int
    velocity: float
    parameters: float


def step_gradients(
    velocity: Velocity,
    parameters: Iterable[torch.Tensor],
    sigmas: torch.Tensor,
    coefficients: StepCoefficients,
    x: torch.Tensor,
    advantages: torch.Tensor,
    step_noise: Callable[[int], torch.Tensor],
) -> list[StepGradient]:
    """One rollout from `x` [B, ...]; at each trained step the norms of d loss / d v and d loss / d parameters.

    The loss is that of training before its first update (ratio 1, nothing clipped): the mean of `policy_loss` over the
    samples, `advantages` [B]. `step_noise(step)` has the shape of `x`.
    """
    weights, found = list(parameters), []
    for i, sigma in enumerate(sigmas[:-1].tolist()):
        a, b, std = coefficients.step(i)
        v = velocity(x, sigma)
        mean = step_mean(x, v, a, b)
        following = step_sample(mean, std, step_noise(i) if std else None).detach()
        if std:
            logp = log_prob(following, mean, std, batch_dim=0)
            loss = policy_loss(logp, logp.detach(), advantages, CLIP_RANGE).loss.mean()
            # not every parameter has a part in the velocity (the last block's text stream)
            of_v, *of_weights = torch.autograd.grad(loss, [v, *weights], allow_unused=True)
            norms = [g.double().square().sum() for g in of_weights if g is not None]
            found.append(StepGradient(i, of_v.double().norm().item(), torch.stack(norms).sum().sqrt().item()))
        x = following
    return found


def tiny_model(directory: Path) -> tuple[Velocity, list[torch.Tensor]]:
    """The tiny world's velocity of PROMPT without guidance, as diffusers' class in float32, and its parameters."""
    if not (directory / "transformer" / "config.json").is_file():
        raise UserError(f"{directory}: the tiny world's model is not there; run from the root of the repository")
    from diffusers import HunyuanVideo15Transformer3DModel
    from diffusers.utils import logging

    logging.disable_progress_bar()
    path = directory / "transformer"
    model = HunyuanVideo15Transformer3DModel.from_pretrained(path, torch_dtype=torch.float32).eval()
    text = WordEncoder.from_pretrained(directory / "text_encoder").encode(PROMPT)
    images = torch.zeros(1, 1, model.config.image_embed_dim)
    second = torch.zeros(1, 1, text.encoder_hidden_states_2.shape[-1])  # the prompt quotes no text: one masked token

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        batch = len(x)
        condition = x.new_zeros(batch, model.config.in_channels - x.shape[1], *x.shape[2:])
        return model(
            torch.cat([x, condition], 1),
            torch.full((batch,), 1000 * sigma),
            encoder_hidden_states=text.encoder_hidden_states.expand(batch, -1, -1),
            encoder_attention_mask=text.encoder_attention_mask.long().expand(batch, -1),
            encoder_hidden_states_2=second.expand(batch, -1, -1),
            encoder_attention_mask_2=torch.zeros(batch, 1, dtype=torch.long),
            image_embeds=images.expand(batch, -1, -1),
            return_dict=False,
        )[0]

    return velocity, list(model.parameters())


def measurements(directory: Path = MODEL, repeats: int = REPEATS, num_steps: int = STEPS) -> list[list[Any]]:
    """Rows as HEADER: root mean squares of the norms over `repeats` rollouts of BATCH samples."""
    velocity, parameters = tiny_model(directory)
    sigmas = shifted_sigmas(num_steps, SHIFT)
    shape = (32, *GRID)
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)

    def draw(repeat: int, step: int) -> torch.Tensor:
        return torch.stack([noise.gaussian(shape, 0, noise.SAMPLE, repeat, b, step) for b in range(BATCH)])

    rows: list[list[Any]] = []
    for sampler in SAMPLERS:
        coefficients = step_coefficients(sampler, sigmas, ETA)
        squares = torch.zeros(num_steps, 2, dtype=torch.float64)
        for repeat in range(repeats):
            x, step_noise = draw(repeat, noise.INITIAL), lambda step, repeat=repeat: draw(repeat, step)
            for g in step_gradients(velocity, parameters, sigmas, coefficients, x, advantages, step_noise):
                squares[g.step] += torch.tensor([g.velocity, g.parameters], dtype=torch.float64) ** 2 / repeats
        trained = coefficients.trained_steps()
        norms, factors = squares.sqrt(), norm_factors(coefficients)
        formula = factors * norms[trained, 0].median() / factors[trained].median()
        equalized = gradient_scales(coefficients)[:, None] * norms
        for i in trained:
            values = [formula[i], *norms[i], *equalized[i]]
            rows.append([sampler, i, sigmas[i].item(), *(float(v) for v in values), repeats])
    return rows


def gradient_norm(out: Path) -> list[Path]:
    """Makes gradient_norm.csv and gradient_norm.png in `out`; about a minute. UserError without the tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits depend on how a sum is split
    try:
        rows = measurements()
    finally:
        torch.set_num_threads(threads)
    table = write_csv(out / "gradient_norm.csv", HEADER, rows)
    image = out / "gradient_norm.png"
    with picture(image, height=8) as figure:
        figure.suptitle(f"Gradient of the policy loss by step: tiny model, N = {STEPS}, shift {SHIFT:g}, η = {ETA:g}")
        panels = figure.subplots(2, 2, sharex=True, sharey="row")
        for line, (of, what) in enumerate((("velocity", "velocity"), ("parameters", "all parameters"))):
            panels[line, 0].set_ylabel(f"norm of d loss / d {of} (log)")
            for axes, kind in zip(panels[line], ("grad", "equalized"), strict=True):
                axes.set_title(f"{what}: {'with' if kind == 'equalized' else 'without'} the equalizer")
                _panel(axes, [dict(zip(HEADER, row, strict=True)) for row in rows], f"{kind}_{of}")
                axes.set_xlabel(axes.get_xlabel() if line else "")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return [table, image]


def _panel(axes: Any, rows: list[dict[str, Any]], column: str) -> None:
    with_formula = column == "grad_velocity"
    for sampler, label in SAMPLERS.items():
        mine = [row for row in rows if row["sampler"] == sampler]
        x, y = [row["sigma"] for row in mine], [row[column] for row in mine]
        line = "" if with_formula else "-"
        axes.plot(x, y, line, color=COLOURS[sampler], marker=MARKERS[sampler], linewidth=1, label=label)
        if with_formula:
            # black only in the legend: the line has its sampler's colour
            axes.plot(x, [row["formula"] for row in mine], color=COLOURS[sampler], linewidth=1)
    if with_formula:
        axes.plot([], [], color="black", linewidth=1, label="line in the first panel: |b| / std, scaled")
    axes.set_yscale("log")
    towards_data(axes)
