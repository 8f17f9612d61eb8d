"""Held-out prompts, sampled from the same noise before and after: what a run has changed."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.config import EvaluationConfig
from megatron_sage.engine import Engine
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import step_coefficients
from megatron_sage.parallel import noise
from megatron_sage.reporting.progress import Reporter
from megatron_sage.reporting.video import write_mp4
from megatron_sage.rewards.composite import weighted
from megatron_sage.rewards.protocol import Reward
from megatron_sage.rollout.policy import Prompt
from megatron_sage.rollout.sampler import Flight, StepTable, sample_latents
from megatron_sage.rollout.scoring import score

SCALE = 6  # pixels of the written clip for each pixel of a tiny one


def evaluate(
    label: str, engine: Engine, prompts: Sequence[Prompt], codec: VideoCodec, reward: Reward, reporter: Reporter
) -> None:
    """Score held-out samples, write clips and `evaluation.json` in the run. All ranks call."""
    config, groups = engine.config, engine.groups
    engine.control.enter("evaluate")
    rows, videos = held_out(label, engine, prompts, codec, reward, reporter)
    engine.control.end_phase()  # before anything is recorded: a replica that was stopped has no scores
    _write_clips(label, engine, videos, len(prompts))
    everyone: list[Any] = [None] * groups.dp_size
    torch.distributed.all_gather_object(everyone, rows, group=groups.dp)
    if groups.rank == 0:
        ordered = sorted(itertools.chain(*everyone), key=lambda row: row["index"])
        _record(Path(config.output_dir), label, ordered, config.evaluation)


def held_out(
    label: str, engine: Engine, prompts: Sequence[Prompt], codec: VideoCodec, reward: Reward, reporter: Reporter
) -> tuple[list[dict[str, Any]], dict[int, np.ndarray]]:
    """Sample every held-out prompt of this replica by the ODE and score the videos.

    The noise depends on (seed, prompt number, sample) alone, so two calls differ by the weights only. Prompts are
    spread over the model replicas; a replica's videos over its ranks.

    Returns:
        A row for each video of the replica (index, prompt, reward, every dimension), and this rank's decoded ones.
    """
    config, groups = engine.config, engine.groups
    settings = config.evaluation
    sigmas = shifted_sigmas(settings.num_steps, config.sampler.shift)
    table = StepTable.build(sigmas, step_coefficients("ode", sigmas, 0.0))
    mine = list(range(len(prompts)))[groups.dp_rank :: groups.dp_size]
    samples = list(range(settings.samples_per_prompt))
    engine.eval()
    flights = [Flight(number, samples, prompts[number]) for number in mine]
    if not flights:
        return [], {}
    with reporter.bar(f"evaluate {label}", len(flights) * settings.num_steps) as tick:
        latents = sample_latents(
            engine.network(), table, flights, seed=config.seed, stream=noise.EVALUATION, on_step=tick
        )
    texts = [prompts[number].text for number in mine for _ in samples]
    scores = score(
        latents,
        texts,
        engine.shape,
        codec,
        reward,
        config.video.fps,
        engine.token_group,
        groups.replica,
        control=engine.control,
    )
    rewards = weighted(scores.dimensions, config.reward.weights)
    numbers = [number * len(samples) + sample for number in mine for sample in samples]
    rows = [
        {"index": index, "prompt": texts[row], "reward": float(rewards[row])}
        | {name: float(values[row]) for name, values in scores.dimensions.items()}
        for row, index in enumerate(numbers)
    ]
    return rows, {numbers[row]: video for row, video in scores.videos.items()}


def shown(index: int, settings: EvaluationConfig, num_prompts: int) -> bool:
    """Whether the report shows this video: the first samples of all prompts before the second ones."""
    prompt, sample = divmod(index, settings.samples_per_prompt)
    return sample * num_prompts + prompt < settings.videos


def _write_clips(label: str, engine: Engine, videos: dict[int, np.ndarray], num_prompts: int) -> None:
    config = engine.config
    directory = Path(config.output_dir) / "samples" / label
    directory.mkdir(parents=True, exist_ok=True)
    scale = SCALE if config.video.height < 128 else 1
    for index, video in videos.items():
        if shown(index, config.evaluation, num_prompts):
            write_mp4(directory / f"{index:03d}.mp4", video, config.video.fps, scale=scale)


def _record(directory: Path, label: str, rows: list[dict[str, Any]], settings: EvaluationConfig) -> None:
    """Add one evaluation to evaluation.json; with both there, the paired difference and its standard error.

    Samples of one prompt are not independent: the standard errors are those of the prompts' means.
    """
    file = directory / "evaluation.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    names = [key for key in rows[0] if key not in ("index", "prompt", "reward")]
    for row in rows:
        if shown(row["index"], settings, len(rows) // settings.samples_per_prompt):
            row["file"] = f"samples/{label}/{row['index']:03d}.mp4"
    by_prompt = prompt_means(rows, settings.samples_per_prompt)
    content[label] = {
        "mean": float(by_prompt.mean()),
        "stderr": standard_error(by_prompt),
        "per_dimension": {name: float(np.mean([row[name] for row in rows])) for name in names},
        "samples": rows,
    }
    if "before" in content and "after" in content:
        before = prompt_means(content["before"]["samples"], settings.samples_per_prompt)
        change = by_prompt - before
        content["difference"] = {"mean": float(change.mean()), "stderr": standard_error(change)}
    file.write_text(json.dumps(content, indent=1) + "\n")


def describe_evaluation(directory: Path) -> str:
    """The first evaluation in one line."""
    before = json.loads((directory / "evaluation.json").read_text())["before"]
    parts = [f"reward {before['mean']:.4f} ± {before['stderr']:.4f}"]
    return ", ".join(parts + [f"{name} {value:.4f}" for name, value in before["per_dimension"].items()])


def prompt_means(rows: list[dict[str, Any]], samples_per_prompt: int) -> np.ndarray:
    """Mean reward of each prompt, float64 [prompts]; rows in order of their index."""
    return np.array([row["reward"] for row in rows]).reshape(-1, samples_per_prompt).mean(axis=1)


def standard_error(values: np.ndarray) -> float:
    """Of the mean; 0 for a single value, which has none."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
