"""Tests of the GPU paths. Without a GPU they are skipped, and say so: nothing in this folder was verified here."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip this folder's tests, loudly, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device: the GPU paths are not verified here"))
