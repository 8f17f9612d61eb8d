"""What a run leaves for diffusers: whole weights, or adapters to be loaded on the base; and their moving average."""

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_sage.checkpoint.distributed import export_hf
from megatron_sage.checkpoint.lora import export_adapters
from megatron_sage.engine import Engine
from megatron_sage.training.ema import Ema


def write_export(engine: Engine, directory: Path, ema: Ema | None = None) -> Path:
    """`directory`/transformer, or `directory`/transformer_lora with lora.export=separate; what was written.

    The average, where there is one, goes beside it as NAME_ema. All ranks call. An earlier export, of this run before
    it was resumed, is replaced.
    """
    separate = engine.config.lora.rank is not None and engine.config.lora.export == "separate"
    target = directory / ("transformer_lora" if separate else "transformer")
    averaged = target.with_name(f"{target.name}_ema")
    if engine.groups.rank == 0:
        for old in (target, averaged):
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier(group=dist.group.WORLD)
    _write(engine, target, separate)
    if ema is not None:
        with ema.swapped_in():
            _write(engine, averaged, separate)
    return target


def _write(engine: Engine, target: Path, separate: bool) -> None:
    if separate:
        export_adapters(engine.chunks, target)
    else:
        export_hf(engine.chunks, target, engine.model_config.to_diffusers())
