"""`megatron-sage evaluate`: checkpoints compared on held-out prompts, resumable, at any layout."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sage import parallel  # noqa: F401  (CPU backend before Megatron)
from megatron_sage.config import Config, load_config, validate
from megatron_sage.config.reward_rules import check_reward
from megatron_sage.data.prompts import PromptRow, read_dataset
from megatron_sage.engine import (
    build_engine,
    check_task,
    encode_prompts,
    initialize_groups,
    load_codec,
    prepare_embeddings,
)
from megatron_sage.errors import UserError
from megatron_sage.evaluation import store
from megatron_sage.evaluation.gallery import write_gallery
from megatron_sage.evaluation.sources import Source, find_sources, load_source
from megatron_sage.evaluation.tables import load_results, remarks, shown, write_tables
from megatron_sage.evaluation.work import Studio, missing
from megatron_sage.parallel import groups as process_groups
from megatron_sage.parallel.device import device
from megatron_sage.reporting.progress import Reporter
from megatron_sage.rewards.build import accounts, build_reward
from megatron_sage.training.precision import calibrate

SCALE = 6  # pixels of a written clip for each of a tiny one


def main(argv: list[str]) -> int:
    """Command line of `evaluate`; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="megatron-sage evaluate",
        description="Make videos of held-out prompts with the base model (model.weights) and with checkpoints, from "
        "the same noise, score them by the config's rewards, and compare: results.md, .csv, .json and gallery.html. "
        "The same command goes on where it was interrupted.",
    )
    parser.add_argument("config", help="YAML of the run: model, layout, video size, rewards")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="RUN/checkpoints/iteration_NNNNNN, a Megatron weights directory, or a diffusers transformer; repeatable",
    )
    parser.add_argument("--no-base", action="store_true", help="leave the base out; the first checkpoint replaces it")
    parser.add_argument("--prompts", help="file of held-out prompts; default: evaluation.prompts")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--samples", type=int, help="videos of each prompt; default: evaluation.samples_per_prompt")
    parser.add_argument("--steps", type=int, help="denoising steps; default: evaluation.num_steps")
    parser.add_argument("--out", default="runs/evaluation", help="directory of everything that is written")
    parser.add_argument("--scale", type=int, help="enlarge every pixel this many times; default: tiny clips 6 times")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    _apply(config, arguments)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")), training=False)
    check_reward(config)
    assert config.evaluation.prompts is not None
    data = read_dataset(config.data, config.evaluation.prompts, decode=config.data.skip_unreadable)
    rows = data.rows[: arguments.limit]
    check_task(config, rows)
    sources = find_sources(config, arguments.checkpoint, not arguments.no_base)
    out, settings = Path(arguments.out), store.settings_of(config, rows)
    store.check_directory(out, settings, rows, sources)
    scale = arguments.scale or (SCALE if config.video.height < 128 else 1)
    if config.precision.threads:
        torch.set_num_threads(config.precision.threads)
    groups = initialize_groups(config)
    try:
        reporter = Reporter(groups.rank == 0)
        for note in data.notes:
            reporter.line(note)
        if groups.rank == 0:
            store.write_settings(out, settings, rows, sources)
        dist.barrier(group=dist.group.WORLD)
        _evaluate(config, groups, sources, rows, out, scale, reporter)
        if groups.rank == 0:
            _conclude(out, sources, reporter)
        dist.barrier(group=dist.group.WORLD)
    finally:
        process_groups.shutdown()
    return 0


def _apply(config: Config, arguments: argparse.Namespace) -> None:
    """Arguments stand for settings, so that they are checked by the same rules; UserError for those that cannot."""
    settings = config.evaluation
    for name, given in (("limit", arguments.limit), ("scale", arguments.scale)):
        if given is not None and given < 1:
            raise UserError(f"--{name} {given}: must be at least 1")
    settings.prompts = arguments.prompts or settings.prompts
    settings.num_steps = settings.num_steps if arguments.steps is None else arguments.steps
    settings.samples_per_prompt = settings.samples_per_prompt if arguments.samples is None else arguments.samples
    if settings.prompts is None:
        raise UserError("--prompts: name a file of held-out prompts, or set evaluation.prompts in the config")


def _evaluate(
    config: Config,
    groups: process_groups.Groups,
    sources: Sequence[Source],
    rows: Sequence[PromptRow],
    out: Path,
    scale: int,
    reporter: Reporter,
) -> None:
    """Every checkpoint's missing videos; nothing is built where nothing is missing. All ranks call."""
    samples = config.evaluation.samples_per_prompt
    todo = [[missing(out, s.name, len(rows), samples) for s in sources] if groups.rank == 0 else None]
    dist.broadcast_object_list(todo, src=0, group=dist.group.WORLD)  # one rank's view: the disk may be a network's
    assert todo[0] is not None
    total = len(rows) * samples
    for source, keys in zip(sources, todo[0], strict=True):
        before = f", {total - len(keys)} of them finished before" if len(keys) < total else ""
        reporter.line(f"{source.name}: {total} videos{before} ({source.path})")
    if not any(todo[0]):
        return
    prepare_embeddings(config, groups, rows)
    engine = build_engine(config, groups)
    prompts, reward = encode_prompts(config, engine, rows), build_reward(config.reward, device())
    for line in accounts(reward):
        reporter.line(line)
    studio = Studio(engine, load_codec(config), reward, out, scale, reporter)
    for source, keys in zip(sources, todo[0], strict=True):
        if keys:
            load_source(engine, source)
            calibrate(engine, prompts)
            studio.make(source.name, keys, prompts)


def _conclude(out: Path, sources: Sequence[Source], reporter: Reporter) -> None:
    """Tables, gallery, and the means on the terminal."""
    results = load_results(out, [source.name for source in sources])
    write_tables(results)
    gallery = write_gallery(results)
    width = max(len(c.name) for c in results.checkpoints)
    for name, cells in results.means().items():
        reporter.line(f"{name:{width}}  " + "  ".join(f"{column} {shown(cell)}" for column, cell in cells.items()))
    for remark in remarks(results):
        reporter.line(remark)
    reporter.line(f"{out / 'results.md'}, {gallery}")
