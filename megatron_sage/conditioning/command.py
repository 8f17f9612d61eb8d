"""`megatron-sage encode`: fill the cache of embeddings before training, so that training loads no encoder."""

import argparse
import os
import sys
from typing import NoReturn

import torch

from megatron_sage.conditioning.prepare import cache_directory, check_cache, fill_cache, open_conditions, share
from megatron_sage.config import Config, load_config
from megatron_sage.data.prompts import PromptRow, read_dataset
from megatron_sage.errors import UserError
from megatron_sage.reporting.progress import Reporter

SHOWN = 10  # entries that --check names; the rest is counted


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as every other error of a user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    """Command line of `encode`; see `--help`. With --check, 1 where an entry is missing or damaged."""
    parser = _Parser(
        prog="megatron-sage encode",
        description="Encode prompts (and their images) into the cache that training reads. Interrupt it and start it "
        "again as you like. Under torchrun the work is spread over the processes, one GPU each.",
        epilog="Example: torchrun --nproc-per-node 8 -m megatron_sage encode run.yaml data.embedding_cache=DIR",
    )
    parser.add_argument("settings", metavar="CONFIG key=value", nargs="*", help="YAML of a run, then overrides")
    parser.add_argument("--model", metavar="DIR", help="model directory in the diffusers layout (model.pretrained)")
    parser.add_argument("--cache", metavar="DIR", help="the cache (data.embedding_cache)")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        action="append",
        help="prompts; may be given again (data.prompts and evaluation.prompts)",
    )
    parser.add_argument("--device", help="cpu or cuda (cuda where there is a GPU)")
    parser.add_argument("--check", action="store_true", help="read every entry and count; encode nothing")
    options = parser.parse_intermixed_args(argv)
    config = _config(options)
    rows = _rows(config, options.prompts)
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if options.check:
        return _check(config, rows) if rank == 0 else 0
    device = _device(options.device)
    open_conditions(config, rows)  # what fails here fails on all ranks, and one of them says so
    texts, pictures = share(rows, rank, world)
    reporter = Reporter(True)
    try:
        with Reporter(rank == 0).bar("encode", len(texts) + len(pictures)) as tick:
            counts = fill_cache(config, rows, rank, world, device, tick)
    except UserError as error:
        if _number("LOCAL_RANK", 0) != 0:  # a picture of this rank's share: the machine's first rank cannot know
            print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        raise
    who = f"rank {rank} of {world}: " if world > 1 else ""
    reporter.line(f"{who}{counts['encoded']} encoded, {counts['found']} already in {cache_directory(config)}")
    return 0


def _config(options: argparse.Namespace) -> Config:
    """What the YAML and the options say; only what encoding needs is looked at."""
    paths = [text for text in options.settings if "=" not in text]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one configuration file at most ({paths[0]} is one); overrides are key=value")
    config = load_config(paths[0] if paths else None, [text for text in options.settings if "=" in text])
    if options.model:
        config.model.pretrained = options.model
    if options.cache:
        config.data.embedding_cache = options.cache
    if not config.model.pretrained:
        raise UserError("model.pretrained=: must name a model directory; give a CONFIG, or --model DIR")
    if not paths and not config.data.embedding_cache:
        raise UserError("--cache: must name the cache's directory where there is no CONFIG")
    directory = cache_directory(config)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"data.embedding_cache={directory}: is a file; name a directory")
    return config


def _rows(config: Config, files: list[str] | None) -> list[PromptRow]:
    """All rows; with data.skip_unreadable without those whose image is missing or damaged, as training reads them."""
    files = files or [path for path in (config.data.prompts, config.evaluation.prompts) if path]
    if not files:
        raise UserError("data.prompts=: must name a file of prompts; give it in the CONFIG, or --prompts FILE")
    reports = [read_dataset(config.data, path, decode=config.data.skip_unreadable) for path in files]
    for note in [note for report in reports for note in report.notes]:
        Reporter(_number("RANK", 0) == 0).line(note)
    return [row for report in reports for row in report.rows]


def _check(config: Config, rows: list[PromptRow]) -> int:
    counts, lines = check_cache(config, rows)
    reporter = Reporter(True)
    for line in lines[:SHOWN]:
        reporter.line(line)
    if len(lines) > SHOWN:
        reporter.line(f"... and {len(lines) - SHOWN} more")
    directory = cache_directory(config)
    reporter.line(f"{counts['good']} good, {counts['missing']} missing, {counts['damaged']} damaged in {directory}")
    return 1 if lines else 0


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"--device {name}: choose cpu or cuda")
    if name == "cpu" or not torch.cuda.is_available():
        if name == "cuda":
            raise UserError("--device cuda: PyTorch sees no GPU; `megatron-sage doctor` says more")
        return torch.device("cpu")
    return torch.device("cuda", _number("LOCAL_RANK", 0) % torch.cuda.device_count())


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name}={text}: this environment variable is set by torchrun and must be a number; unset it")
    return int(text)
