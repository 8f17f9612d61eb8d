"""Rules of precision, optimizer, adapters and checkpoints: which settings exclude each other, and what they need."""

from typing import Any

from megatron_sage.config.schema import Config
from megatron_sage.errors import UserError


def _refuse(key: str, value: Any, rule: str) -> None:
    raise UserError(f"{key}={'null' if value is None else value}: {rule}")


def check_precision(config: Config) -> None:
    """FP8 exists where Transformer Engine and a GPU do; without them it would silently do nothing."""


def check_optimizer(config: Config) -> None:
    """Which optimizers go together with which placement of their state."""


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
