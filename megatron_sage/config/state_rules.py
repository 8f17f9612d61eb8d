"""Rules of precision, optimizer, adapters and checkpoints: which settings exclude each other, and what they need."""

import importlib.util
import os
import shutil
from typing import Any

from megatron_sage.config.loading import nearest
from megatron_sage.config.schema import Config, PrecisionConfig
from megatron_sage.errors import UserError


def _refuse(key: str, value: Any, rule: str) -> None:
    raise UserError(f"{key}={'null' if value is None else value}: {rule}")


def check_precision(config: Config, here: bool = True) -> None:
    """FP8 exists where Transformer Engine and a GPU do; without them it would silently do nothing.

    `here`: this machine is to run it.
    """
    precision = config.precision
    if here:
        check_compiler(precision)
    for key in ("fp8_first_bf16", "fp8_last_bf16"):
        if getattr(precision, key) < 0:
            _refuse(f"precision.{key}", getattr(precision, key), "must be >= 0")
    if precision.fp8 == "none":
        for key in ("fp8_first_bf16", "fp8_last_bf16"):
            if getattr(precision, key):
                _refuse(f"precision.{key}", getattr(precision, key), "has no effect without precision.fp8; set that")
        return
    if precision.dtype != "bf16":
        rule = f"needs precision.dtype=bf16, not {precision.dtype}: what is no GEMM of a block stays in it"
        _refuse("precision.fp8", precision.fp8, rule)
    if here and (obstacle := fp8_obstacle(precision.fp8_recipe)):
        _refuse("precision.fp8", precision.fp8, obstacle)


def check_compiler(precision: PrecisionConfig) -> None:
    """UserError where `precision.compile` has nothing to compile with on this machine."""
    if not precision.compile:
        return
    import torch

    if torch.cuda.is_available():
        missing = None if importlib.util.find_spec("triton") else "the package triton"
    else:
        compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
        missing = None if any(name and shutil.which(name) for name in compilers) else "a C++ compiler (g++, or CXX)"
    if missing:
        _refuse("precision.compile", True, f"needs {missing}, which is not here; install it or set false")


def check_fp8_blocks(config: Config, num_layers: int) -> None:
    """Some block must be left that runs in FP8."""
    precision = config.precision
    if precision.fp8 != "none" and precision.fp8_first_bf16 + precision.fp8_last_bf16 >= num_layers:
        rule = (
            f"with fp8_last_bf16={precision.fp8_last_bf16} no block of {num_layers} would run in FP8; use fewer, or "
            "precision.fp8=none"
        )
        _refuse("precision.fp8_first_bf16", precision.fp8_first_bf16, rule)


def fp8_obstacle(recipe: str) -> str | None:
    """Why this machine cannot run the recipe, with the cure; None: it can, as far as one can see."""
    import torch

    other = "set precision.fp8=none"
    missing = [] if torch.cuda.is_available() else ["a GPU"]
    if importlib.util.find_spec("transformer_engine") is None:
        missing.append("the package transformer-engine (extra gpu)")
    if missing:
        return f"needs {' and '.join(missing)}, without which Megatron would leave it out unsaid; {other}"
    return fp8_obstacle_of_device(recipe, torch.cuda.get_device_capability(), torch.version.cuda or "0")


def fp8_obstacle_of_device(recipe: str, capability: tuple[int, int], cuda: str) -> str | None:
    """The same of a GPU's compute capability and a CUDA version like "12.9" (Transformer Engine 2.11's own rules)."""
    version = tuple(int(part) for part in cuda.split(".")[:2])
    have = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return f"needs compute capability 8.9 (Ada, Hopper, Blackwell), {have}; set precision.fp8=none"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return f"recipe mxfp8 needs compute capability 10.x (Blackwell), {have}; set precision.fp8_recipe=tensorwise"
    if recipe == "blockwise" and capability < (9, 0):
        return f"recipe blockwise needs compute capability 9.0 (Hopper), {have}; set precision.fp8_recipe=tensorwise"
    if recipe == "blockwise" and version < (12, 9):
        return f"recipe blockwise needs CUDA 12.9, torch has {cuda}; set precision.fp8_recipe=tensorwise"
    return None


def check_optimizer(config: Config, here: bool = True) -> None:
    """Which optimizers go together with which placement of their state. `here`: this machine is to run it."""
    optimizer = config.optimizer
    if optimizer.name == "muon":
        if optimizer.distributed:
            _refuse("optimizer.distributed", True, "splits matrices, which optimizer.name=muon needs whole: set false")
        if optimizer.offload != "none":
            _refuse("optimizer.offload", optimizer.offload, "is for AdamW: set none, or optimizer.name=adamw")
        if config.lora.rank is not None:
            _refuse("optimizer.name", "muon", "trains the blocks' matrices, which lora.rank freezes: set adamw")
    if optimizer.offload != "none" and not optimizer.distributed:
        _refuse("optimizer.offload", optimizer.offload, "works on distributed shards: set optimizer.distributed=true")
    if optimizer.offload_fraction != 1 and optimizer.offload != "hybrid":
        _refuse("optimizer.offload_fraction", optimizer.offload_fraction, "is of optimizer.offload=hybrid: set 1")
    if here and optimizer.offload == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        cure = "pip install 'megatron-sage[deepspeed]', or set hybrid"
        _refuse("optimizer.offload", "deepspeed", f"the package deepspeed is not installed: {cure}")


def check_lora(config: Config) -> None:
    """Targets by name; settings that would have no effect."""
    lora = config.lora
    if lora.rank is None:
        if lora.alpha is not None:
            _refuse("lora.alpha", lora.alpha, "has no effect without adapters; set lora.rank")
        return
    from megatron_sage.model.lora_targets import TARGETS  # imports Megatron: only where it is needed

    if not lora.targets:
        _refuse("lora.targets", "[]", f"must name at least one linear layer; choose from {', '.join(TARGETS)}")
    for number, target in enumerate(lora.targets):
        if target not in TARGETS:
            match = nearest(target.removeprefix("attn."), TARGETS)
            cure = f"did you mean {match}? " if match else ""
            _refuse(f"lora.targets[{number}]", target, f"no such layer; {cure}choose from {', '.join(TARGETS)}")
        if target in lora.targets[:number]:
            _refuse(f"lora.targets[{number}]", target, "is named twice; leave one out")


def check_lora_sizes(config: Config, transformer: dict[str, Any]) -> None:
    """The rank against the model's sizes, and that every pipeline stage has something to train.

    `transformer`: the model's config.json. A stage without a trained parameter has no optimizer; before the first
    adapter there is no gradient for Megatron's schedule to send back.
    """
    lora, parallel = config.lora, config.parallel
    if lora.rank is None:
        return
    from megatron_sage.model.config import HunyuanVideoConfig
    from megatron_sage.model.lora_targets import AdapterSettings, linear_sizes

    model = HunyuanVideoConfig.from_diffusers(
        transformer,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        pipeline_layout=parallel.pipeline_layout,
    )
    for target in lora.targets:
        sizes = linear_sizes(target, model.hidden_size, model.ffn_hidden_size)
        if lora.rank > min(sizes):
            rule = f"must be <= {min(sizes)}, the smaller size of {target} ({sizes[0]} to {sizes[1]} channels)"
            _refuse("lora.rank", lora.rank, rule)
    settings, last = AdapterSettings(lora.rank, 1.0, tuple(lora.targets)), model.num_layers - 1
    for rank, chunks in enumerate(model.stage_blocks):
        trained = [any(settings.in_block(index == last) for index in blocks) for blocks in chunks]
        if not any(trained) or (rank == 0 and not trained[0]):
            where = f"pipeline stage {rank}" if parallel.pipeline > 1 else "the model"
            rule = f"leaves {where} without a trained adapter (nothing reads the last block's text output)"
            _refuse("lora.targets", lora.targets, f"{rule}; add to_q, or give the stage another block")


def check_state(config: Config) -> None:
    """Checkpoints and references."""
    kl, training = config.kl, config.training
    if kl.position == "both" and kl.strategy != "dual":
        _refuse("kl.position", kl.position, "is of kl.strategy=dual only; set that, or leave it out")
    if kl.initial_weight and kl.position != "both":
        _refuse("kl.initial_weight", kl.initial_weight, "needs kl.position=both")
    if kl.anchor_sharded and kl.anchor_placement == "device":
        _refuse("kl.anchor_sharded", True, "splits host memory; set kl.anchor_placement=host")
    if training.keep_every is not None and training.keep_last is None:
        _refuse("training.keep_every", training.keep_every, "has no effect while all are kept; set training.keep_last")
