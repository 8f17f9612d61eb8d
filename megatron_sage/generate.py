"""`megatron-sage sample`: videos from prompts, and in image-to-video from images, at any layout."""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_sage import parallel  # noqa: F401  (CPU backend before Megatron)
from megatron_sage.config import Config, load_config, validate
from megatron_sage.config.model_defaults import WIDE, model_defaults
from megatron_sage.data.images import read_image
from megatron_sage.data.prompts import PromptRow, read_dataset
from megatron_sage.engine import (
    Engine,
    build_engine,
    encode_prompts,
    initialize_groups,
    load_codec,
    prepare_embeddings,
    step_table,
)
from megatron_sage.errors import UserError
from megatron_sage.grpo.sde import SDE_TYPES
from megatron_sage.parallel import groups as process_groups
from megatron_sage.parallel import noise
from megatron_sage.reporting.progress import Reporter
from megatron_sage.reporting.video import write_mp4
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import Prompt, VideoShape
from megatron_sage.rollout.sampler import Flight, sample_latents
from megatron_sage.rollout.scoring import whole_latents
from megatron_sage.training.precision import calibrate

AT_ONCE = 4  # videos on the way for each pipeline stage


def main(argv: list[str]) -> int:
    """Command line of `sample`; see `--help`."""
    arguments = _parser().parse_intermixed_args(argv)
    for name in ("samples", "scale", "steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    rows = _rows(arguments.prompt, arguments.image)
    config = _config(arguments.settings, rows)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")), training=False)
    if not rows:
        path = arguments.prompts or config.data.prompts
        if not path:
            raise UserError("sample: nothing to make a video of; give --prompt TEXT, --prompts FILE or data.prompts")
        rows = read_dataset(config.data, path, decode=config.data.skip_unreadable).rows
    if config.precision.threads:
        torch.set_num_threads(config.precision.threads)
    given = read_noise(arguments.noise, config, len(rows) * arguments.samples) if arguments.noise else None
    if given is not None and arguments.sampler != "ode":
        raise UserError(
            f"--noise: --sampler {arguments.sampler} draws noise at every step; only ode begins with it alone"
        )
    groups = initialize_groups(config)
    try:
        prepare_embeddings(config, groups, rows, arguments.negative_prompt)
        engine = build_engine(config, groups)
        prompts = encode_prompts(config, engine, rows, negative=arguments.negative_prompt)
        calibrate(engine, prompts)
        _sample(config, engine, prompts, arguments, given)
    finally:
        process_groups.shutdown()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-sage sample",
        description="Sample videos by the ODE, or by one of the rollout's samplers: sampler.num_steps, shift, eta and "
        "guidance_scale of the config apply.",
        epilog="Without CONFIG the settings are those of diffusers' pipeline for the directory model.pretrained=DIR: "
        "its shift, its guidance, 50 steps, 121 frames, its 16:9 size or, in image-to-video, the first image's shape.",
    )
    add = parser.add_argument
    add("settings", metavar="CONFIG key=value", nargs="*", help="YAML of a run, then dotted overrides; either may miss")
    add("--prompt", action="append", default=[], help="a prompt; may be given again")
    add("--image", action="append", default=[], help="image-to-video: one for each --prompt, or one for all")
    add("--prompts", help="a file of prompts (txt, csv, jsonl, parquet); default: data.prompts of the config")
    add("--negative-prompt", default="", help="what the unconditional branch reads (nothing)")
    add("--sampler", default="ode", choices=SDE_TYPES, help="ode, or what exploration looks like (ode)")
    add("--steps", type=int, help="in place of sampler.num_steps")
    add("--samples", type=int, default=1, help="videos of each prompt")
    add("--out", default="runs/samples", help="directory for the mp4 files and index.json")
    add("--scale", type=int, default=1, help="enlarge every pixel this many times")
    add("--noise", metavar="FILE", help='safetensors with "latents" [videos, C, T, h, w]: where the ODE begins')
    add("--latents", action="store_true", help="write the finished latents beside each mp4, as NNNN.safetensors")
    return parser


def _rows(texts: list[str], images: list[str]) -> list[PromptRow]:
    if images and len(images) not in (1, len(texts)):
        raise UserError(f"--image: {len(images)} of them for {len(texts)} --prompt; give one for each, or one for all")
    paths: list[Path | None] = [Path(path) for path in images] or [None]
    if len(paths) == 1:
        paths *= len(texts)
    return [PromptRow(text, image) for text, image in zip(texts, paths, strict=True)]


def _config(settings: list[str], rows: list[PromptRow]) -> Config:
    paths = [text for text in settings if "=" not in text]
    overrides = [text for text in settings if "=" in text]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one configuration file at most ({paths[0]} is one); overrides are key=value")
    if paths:
        return load_config(paths[0], overrides)
    pretrained = load_config(None, overrides).model.pretrained
    if not pretrained:
        raise UserError("sample: no configuration file: name the model, model.pretrained=DIR model.weights=DIR")
    image = next((row.image for row in rows if row.image is not None), None)
    aspect = WIDE if image is None else read_image(image).shape[:2]
    return load_config(None, overrides, model_defaults(pretrained, aspect))


def read_noise(path: str, config: Config, videos: int) -> torch.Tensor:
    """Initial latents of all videos, float32 [videos, C, T, h, w]; UserError, in one line, where they do not fit."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--noise {path}: cannot be read ({error}); expected a safetensors file") from error
    video = config.video
    grid = [(video.frames - 1) // 4 + 1, video.height // 16, video.width // 16]
    if list(found) != ["latents"] or [found["latents"].shape[0], *found["latents"].shape[2:]] != [videos, *grid]:
        shapes = {name: list(tensor.shape) for name, tensor in found.items()}
        raise UserError(f'--noise {path}: holds {shapes}; expected "latents" [{videos} videos, channels, {grid}]')
    return found["latents"].float()


def _from_file(
    noise_NCTHW: torch.Tensor, shape: VideoShape, count: int, device: torch.device, flight: MicroTrajectory, step: int
) -> torch.Tensor:
    """This rank's tokens of a flight's initial latents, [S, B, C]; see `sample_latents`."""
    assert step == noise.INITIAL
    whole = torch.stack([noise_NCTHW[flight.group * count + sample] for sample in flight.samples])
    return shape.shard.shard(whole.flatten(2).permute(2, 0, 1)).contiguous().to(device)  # it may be sent


def _sample(
    config: Config, engine: Engine, prompts: Sequence[Prompt], arguments: argparse.Namespace, given: torch.Tensor | None
) -> None:
    """Prompts are spread over the replicas, the decoding of one prompt's videos over a replica's ranks."""
    reporter = Reporter(engine.groups.rank == 0)
    sampler, count = config.sampler, arguments.samples
    table, _ = step_table(arguments.sampler, arguments.steps or sampler.num_steps, sampler.shift, sampler.eta)
    codec = load_codec(config)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    engine.eval()
    mine, replica = range(len(prompts))[engine.groups.dp_rank :: engine.groups.dp_size], engine.groups.replica
    noise_of = None if given is None else partial(_from_file, given, engine.shape, count, engine.device)
    flights = [Flight(number, [sample], prompts[number]) for number in mine for sample in range(count)]
    at_once = AT_ONCE * engine.groups.pp_size  # fills the pipeline, and bounds what is lost when a run is interrupted
    with reporter.bar("sample", len(flights) * len(table.std)) as tick:
        for start in range(0, len(flights), at_once):
            some = flights[start : start + at_once]
            found = sample_latents(
                engine.network(), table, some, seed=config.seed, stream=noise.SAMPLE, on_step=tick, noise_of=noise_of
            )
            for position, (flight, x_SBC) in enumerate(zip(some, found, strict=True), start):
                latents = whole_latents(x_SBC, engine.shape, engine.token_group)[0]
                if position % replica.size() == replica.rank():
                    file = out / f"{flight.group * count + flight.samples[0]:04d}.mp4"
                    write_mp4(file, codec.decode(latents), config.video.fps, scale=arguments.scale)
                    if arguments.latents:
                        save_file({"latents": latents.cpu().contiguous()}, file.with_suffix(".safetensors"))
    if engine.groups.rank == 0:
        rows = [
            {"file": f"{number * count + sample:04d}.mp4", "prompt": prompt.text}
            for number, prompt in enumerate(prompts)
            for sample in range(count)
        ]
        (out / "index.json").write_text(json.dumps(rows, indent=1) + "\n")
        reporter.line(f"{len(rows)} videos in {out}")
