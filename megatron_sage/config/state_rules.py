"""Rules of precision, optimizer, adapters and checkpoints: which settings exclude each other, and what they need."""

import importlib.util
from typing import Any

from megatron_sage.config.schema import Config
from megatron_sage.errors import UserError


def _refuse(key: str, value: Any, rule: str) -> None:
    raise UserError(f"{key}={'null' if value is None else value}: {rule}")


def check_precision(config: Config) -> None:
    """FP8 exists where Transformer Engine and a GPU do; without them it would silently do nothing."""


def check_optimizer(config: Config) -> None:
    """Which optimizers go together with which placement of their state."""
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
    if optimizer.offload == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        cure = "pip install 'megatron-sage[deepspeed]', or set hybrid"
        _refuse("optimizer.offload", "deepspeed", f"the package deepspeed is not installed: {cure}")


def check_lora(config: Config) -> None:
    """Targets by name; adapters exclude what would train or move the base."""


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
