"""One line of doctor's report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_sage.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """status: ok, optional (absent, not needed), warning (a run works, but badly), failed (a run cannot work)."""

    section: str
    name: str
    status: str
    detail: str


def tried(section: str, name: str, check: Callable[[], str]) -> Iterator[Finding]:
    """What `check` says, or the UserError that it raises: those name their cure."""
    try:
        yield Finding(section, name, "ok", check())
    except UserError as error:
        yield Finding(section, name, "failed", " ".join(str(error).split()))
