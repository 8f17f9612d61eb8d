"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# before torch is imported: the machines that run this have two cores, and the workers of the pool share them
os.environ.setdefault("OMP_NUM_THREADS", "1")

LIST = Path(__file__).with_name("nightly.txt")
NIGHTLY = {line for line in LIST.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"}


@pytest.fixture(scope="session")
def one_rank() -> Iterator["object"]:
    """This process as a world of its own: `megatron_sage.parallel.groups.Groups` with TP = 1."""
    from megatron_sage.parallel.groups import initialize, shutdown

    yield initialize()
    shutdown()


# A shared or busy machine makes single examples slow; that is no fault of what they test.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    """tests/nightly.txt must name tests that exist."""
    for name in NIGHTLY:
        path, function = name.split("[")[0].split("::")
        if f"def {function}(" not in (config.rootpath / path).read_text(encoding="utf-8"):
            raise pytest.UsageError(f"tests/nightly.txt: {name}: no such test; correct the line or remove it")


@pytest.hookimpl(tryfirst=True)  # before the markers are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What tests/nightly.txt names is nightly."""
    for item in items:
        if item.nodeid in NIGHTLY:
            item.add_marker(pytest.mark.nightly)
