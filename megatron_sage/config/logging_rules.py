"""Rules of `logging`: what is asked for must be installed before hours of training depend on it."""

import importlib.util
from typing import Any

from megatron_sage.config.loading import nearest
from megatron_sage.config.schema import Config
from megatron_sage.errors import UserError

WANDB_KEYS = {"project": str, "entity": str, "name": str, "group": str, "job_type": str, "notes": str, "tags": list}


def check_logging(config: Config) -> None:
    """Raises UserError at the first rule that is broken."""
    settings = config.logging
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logging.tensorboard=true: tensorboard is not installed; make setup, or set it to false")
    if settings.wandb is None:
        return
    for key, value in settings.wandb.items():
        _check_key(key, value)
    if not settings.wandb.get("project"):
        raise UserError("logging.wandb: project is missing; logging.wandb.project=NAME, or logging.wandb=null")
    if importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb: wandb is not installed; pip install 'megatron-sage[wandb]', or set it to null")


def _check_key(key: str, value: Any) -> None:
    if key not in WANDB_KEYS:
        match = nearest(key, WANDB_KEYS)
        cure = f"did you mean {match}?" if match else f"known here: {', '.join(WANDB_KEYS)}"
        raise UserError(f"logging.wandb.{key}: unknown key; {cure}")
    kind = WANDB_KEYS[key]
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, str) for item in value)):
        expected = "a list of texts" if kind is list else "text"
        raise UserError(f"logging.wandb.{key}={value}: expects {expected}")
