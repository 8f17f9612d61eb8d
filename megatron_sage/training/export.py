"""What a run leaves for diffusers: whole weights, or adapters to be loaded on the base."""

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_sage.checkpoint.distributed import export_hf
from megatron_sage.checkpoint.lora import export_adapters
from megatron_sage.engine import Engine


def write_export(engine: Engine, directory: Path) -> Path:
    """`directory`/transformer, or `directory`/transformer_lora with lora.export=separate; what was written.

    All ranks call. An earlier export, of this run before it was resumed, is replaced.
    """
    separate = engine.config.lora.rank is not None and engine.config.lora.export == "separate"
    target = directory / ("transformer_lora" if separate else "transformer")
    if engine.groups.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
    dist.barrier(group=dist.group.WORLD)
    if separate:
        export_adapters(engine.chunks, target)
    else:
        export_hf(engine.chunks, target, engine.model_config.to_diffusers())
    return target
