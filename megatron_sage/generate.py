"""`megatron-sage sample`: videos from prompts, at any layout."""

import argparse
import json
import os
from pathlib import Path

import torch

from megatron_sage import parallel  # noqa: F401  (CPU backend before Megatron)
from megatron_sage.config import Config, load_config, validate
from megatron_sage.data.prompts import read_prompts
from megatron_sage.engine import Engine, build_engine, encode_prompts, initialize_groups, load_codec, step_table
from megatron_sage.errors import UserError
from megatron_sage.grpo.sde import SDE_TYPES
from megatron_sage.parallel import groups as process_groups
from megatron_sage.parallel import noise
from megatron_sage.reporting.progress import Reporter
from megatron_sage.reporting.video import write_mp4
from megatron_sage.rollout.policy import Prompt
from megatron_sage.rollout.sampler import Flight, sample_latents
from megatron_sage.rollout.scoring import whole_latents
from megatron_sage.training.precision import calibrate

AT_ONCE = 4  # videos on the way for each pipeline stage


def main(argv: list[str]) -> int:
    """Command line of `sample`; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="megatron-sage sample",
        description="Sample videos by the ODE, or by one of the rollout's samplers: sampler.num_steps, shift, eta and "
        "guidance_scale of the config apply.",
    )
    parser.add_argument("config", help="YAML of a run: model, layout, video size, sampler")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given again")
    parser.add_argument("--prompts", help="a text file, one prompt a line; default: data.prompts of the config")
    parser.add_argument("--sampler", default="ode", choices=SDE_TYPES, help="ode, or what exploration looks like (ode)")
    parser.add_argument("--samples", type=int, default=1, help="videos of each prompt")
    parser.add_argument("--out", default="runs/samples", help="directory for the mp4 files and index.json")
    parser.add_argument("--scale", type=int, default=1, help="enlarge every pixel this many times")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    if arguments.samples < 1 or arguments.scale < 1:
        raise UserError(f"--samples {arguments.samples} --scale {arguments.scale}: both must be at least 1")
    texts = arguments.prompt or read_prompts(arguments.prompts or config.data.prompts)
    if config.precision.threads:
        torch.set_num_threads(config.precision.threads)
    groups = initialize_groups(config)
    try:
        engine = build_engine(config, groups)
        prompts = encode_prompts(config, engine, texts)
        calibrate(engine, [prompts[text] for text in texts])
        _sample(config, engine, [prompts[text] for text in texts], arguments)
    finally:
        process_groups.shutdown()
    return 0


def _sample(config: Config, engine: Engine, prompts: list[Prompt], arguments: argparse.Namespace) -> None:
    """Prompts are spread over the replicas, the decoding of one prompt's videos over a replica's ranks."""
    reporter = Reporter(engine.groups.rank == 0)
    sampler = config.sampler
    table, _ = step_table(arguments.sampler, sampler.num_steps, sampler.shift, sampler.eta)
    codec = load_codec(config)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    engine.eval()
    mine = range(len(prompts))[engine.groups.dp_rank :: engine.groups.dp_size]
    count, replica = arguments.samples, engine.groups.replica
    flights = [Flight(number, [sample], prompts[number]) for number in mine for sample in range(count)]
    at_once = AT_ONCE * engine.groups.pp_size  # fills the pipeline, and bounds what is lost when a run is interrupted
    with reporter.bar("sample", len(flights) * config.sampler.num_steps) as tick:
        for start in range(0, len(flights), at_once):
            some = flights[start : start + at_once]
            network = engine.network()
            found = sample_latents(network, table, some, seed=config.seed, stream=noise.SAMPLE, on_step=tick)
            for position, (flight, x_SBC) in enumerate(zip(some, found, strict=True), start):
                latents = whole_latents(x_SBC, engine.shape, engine.token_group)[0]
                index = flight.group * count + flight.samples[0]
                if position % replica.size() == replica.rank():
                    file = out / f"{index:04d}.mp4"
                    write_mp4(file, codec.decode(latents), config.video.fps, scale=arguments.scale)
    if engine.groups.rank == 0:
        rows = [
            {"file": f"{number * count + sample:04d}.mp4", "prompt": prompt.text}
            for number, prompt in enumerate(prompts)
            for sample in range(count)
        ]
        (out / "index.json").write_text(json.dumps(rows, indent=1) + "\n")
        reporter.line(f"{len(rows)} videos in {out}")
