"""Where a reward's model lives and in which numbers it computes; its files' faults in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_sage.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_dtype(dtype: str | None) -> None:
    """Refuse what is no key of DTYPES, nor null."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: choose from {', '.join(DTYPES)}, or null")


def check_count(name: str, value: int) -> None:
    """Refuse what is not a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise UserError(f"{name}={value}: expected a whole number >= 1")


def default_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device, resident: bool) -> Iterator[None]:
    """The model is on `device` inside the block; one that is not resident goes back to host memory afterwards."""
    model.to(device)
    try:
        yield
    finally:
        if not resident:
            model.to("cpu")


def tokenizer(place: Any, **options: Any) -> Any:
    """A tokenizer from a directory, never from the network; UserError in one line where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True, **options)
    except Exception as error:  # the Rust part raises no narrower one
        raise UserError(f"{place}: its tokenizer cannot be read: {reason(error)}; fetch it again") from error


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
