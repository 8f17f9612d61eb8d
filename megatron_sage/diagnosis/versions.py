"""What is installed against requirements.lock, the versions that the tests ran with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import megatron_sage
from megatron_sage.diagnosis.finding import Finding

LOCK = Path(megatron_sage.__file__).resolve().parent.parent / "requirements.lock"
SHOWN = 4


def against_lock(installed: Callable[[str], str | None], lock: Path = LOCK) -> Iterator[Finding]:
    """`installed`: a distribution's version, None where it is absent."""
    if not lock.is_file():
        yield Finding("packages", "lock", "optional", "no requirements.lock beside the package: versions not compared")
        return
    wanted = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("#")[0].partition(";")[0].strip().partition("==")
        if equals:
            wanted[name.strip()] = version.strip()
    other = [(name, version, installed(name)) for name, version in wanted.items() if installed(name) != version]
    if not other:
        yield Finding("packages", "lock", "ok", f"all {len(wanted)} packages as in {lock.name}")
        return
    listing = ", ".join(f"{name} {found or 'missing'} (locked {version})" for name, version, found in other[:SHOWN])
    more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
    detail = f"{len(other)} of {len(wanted)} packages differ from {lock.name}: {listing}{more}; make setup"
    yield Finding("packages", "lock", "warning", detail)
