"""Packages that only some rewards need."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sage.errors import UserError


@contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Around an import of an optional package: without it, one line names the extra that installs it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{package} cannot be imported ({error}); pip install 'megatron-sage[{extra}]'") from error
