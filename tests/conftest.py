"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# before torch is imported: the machines that run this have two cores, and the workers of the pool share them
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def one_rank() -> Iterator["object"]:
    """This process as a world of its own: `megatron_sage.parallel.groups.Groups` with TP = 1."""
    from megatron_sage.parallel.groups import initialize, shutdown

    yield initialize()
    shutdown()


# A shared or busy machine makes single examples slow; that is no fault of what they test.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
