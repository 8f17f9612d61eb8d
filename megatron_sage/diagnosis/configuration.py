"""A configuration on a number of ranks: every rule, its model's files, and the space that its checkpoints take."""

from collections.abc import Iterator
from pathlib import Path

from megatron_sage.config.schema import Config
from megatron_sage.config.validation import rules
from megatron_sage.diagnosis.finding import Finding
from megatron_sage.diagnosis.machine import disk
from megatron_sage.diagnosis.model_files import megatron_checkpoint, pipeline
from megatron_sage.errors import UserError

SECTION = "configuration"
MOMENTS = 12  # bytes that a trained parameter's fp32 weight and two moments take in a checkpoint


def configuration_findings(config: Config, world_size: int) -> Iterator[Finding]:
    """Broken rules first, all of them."""
    broken = list(problems(config, world_size))
    for key, text in broken:
        yield Finding(SECTION, key, "failed", text)
    if not broken:
        yield Finding(SECTION, "rules", "ok", f"all hold on {world_size} rank{'s' * (world_size > 1)}")
    if config.model.pretrained and Path(config.model.pretrained).is_dir():
        yield from pipeline(Path(config.model.pretrained))
    if config.model.weights and Path(config.model.weights).is_dir():
        yield from megatron_checkpoint(Path(config.model.weights))
    yield from _space(config)


def problems(config: Config, world_size: int) -> Iterator[tuple[str, str]]:
    """(key, line) of every rule that is broken.

    Where those stop others from being judged (a wrong type, a world that does not divide), the others are not told.
    """
    broken = False
    for rule, essential in rules(config, world_size):
        try:
            rule()
        except UserError as error:
            text, broken = " ".join(str(error).split()), True
            yield text.partition("=")[0].partition(":")[0], text
        if essential and broken:
            return


def default_world(config: Config) -> int:
    """Ranks of the configured layout with its replicas, one where parallel.data is null."""
    layout = config.parallel
    return layout.tensor * layout.context * layout.pipeline * (layout.data or 1)


def _space(config: Config) -> Iterator[Finding]:
    from megatron_sage.model.config import HunyuanVideoConfig
    from megatron_sage.planning.command import transformer_config
    from megatron_sage.planning.sizes import total_parameters

    try:
        count = total_parameters(HunyuanVideoConfig.from_diffusers(transformer_config(config)))
    except (UserError, ValueError, KeyError, TypeError):  # what is wrong with the model stands above
        return
    element = 4 if config.precision.dtype == "fp32" else 2
    trained = 0 if config.lora.rank is not None else count  # adapters are a thousandth
    copies = 2 if config.kl.strategy in ("moving", "dual") and config.lora.rank is None else 1  # the anchor
    yield from disk(config.output_dir, count * element * copies + trained * MOMENTS, config.training.keep_last)
