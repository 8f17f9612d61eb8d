"""What doctor's command line asks for beyond the machine: a configuration, a directory, all ranks of a job."""

import argparse
import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sage.diagnosis.finding import Finding
from megatron_sage.errors import UserError

if TYPE_CHECKING:  # doctor must run where packages are missing that importing this takes
    from megatron_sage.config.schema import Config


def given(settings: list[str], recipe: str | None, world_size: int | None) -> Iterator[Finding]:
    """The configuration or the directory of the command line."""
    names = [text for text in settings if "=" not in text]
    if len(names) == 1 and Path(names[0]).is_dir():
        from megatron_sage.diagnosis.model_files import directory_findings

        yield from directory_findings(Path(names[0]))
    elif settings or recipe:
        from megatron_sage.diagnosis.configuration import configuration_findings, default_world

        try:
            config = config_of(settings, recipe)
        except UserError as error:
            yield Finding("configuration", "keys", "failed", " ".join(str(error).split()))
            return
        started = int(os.environ.get("WORLD_SIZE", "0"))
        yield from configuration_findings(config, world_size or started or default_world(config))


def config_of(settings: list[str], name: str | None) -> "Config":
    """UserError for an unknown key or an unreadable file."""
    from megatron_sage.config import load_config
    from megatron_sage.recipes import recipe

    paths = [text for text in settings if "=" not in text]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one configuration file at most ({paths[0]} is one); overrides are key=value")
    base = recipe(name) if name else None
    return load_config(paths[0] if paths else None, [text for text in settings if "=" in text], base)


def on_all_ranks(
    options: argparse.Namespace, examine: Callable[[argparse.Namespace], Iterator[Finding]]
) -> Iterator[Finding]:
    """Under torchrun, on every rank: rank 0's machine, what is wrong on other nodes, then the collectives."""
    import torch.distributed as dist

    from megatron_sage.diagnosis.collectives import collective_findings
    from megatron_sage.parallel import groups as process_groups

    world_size = int(os.environ["WORLD_SIZE"])
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    mine = list(examine(options)) if first else []
    layout = (1, 1, 1)
    if options.settings or options.recipe:
        try:
            parallel = config_of(options.settings, options.recipe).parallel
            layout = parallel.tensor, parallel.context, parallel.pipeline
        except UserError:  # told above; the plain world is tried all the same
            pass
    if world_size % (layout[0] * layout[1] * layout[2]):
        layout = (1, 1, 1)
    groups = process_groups.initialize(*layout, timeout_seconds=max(60, int(10 * options.seconds)))
    try:
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, (socket.gethostname(), mine), group=dist.group.WORLD)
        found = list(every[0][1])
        for host, findings in every[1:]:
            wrong = [f for f in findings if f.status in ("failed", "warning")]
            found += [dataclasses.replace(f, section=f"{f.section} of {host}") for f in wrong]
        yield from found
        yield from collective_findings(groups, options.seconds)
    finally:
        process_groups.shutdown()
