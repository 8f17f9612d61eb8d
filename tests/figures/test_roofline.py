"""The roofline's numbers: documented ones are this version's; bytes of device memory are counted by hand once."""

import csv
import math
from pathlib import Path

import pytest
import torch

from megatron_sage.figures.roofline import phase_uses, roofline
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.planning.machine import load_gpu
from megatron_sage.planning.roofline import Use, forward_bytes
from megatron_sage.planning.sizes import chunk_counts
from megatron_sage.planning.traffic import Place

DOCS = Path(__file__).parents[2] / "docs" / "figures"


def test_the_documented_numbers_are_those_of_this_version(tmp_path: Path) -> None:
    roofline(tmp_path)
    fresh, documented = (list(csv.reader((d / "roofline.csv").open())) for d in (tmp_path, DOCS))
    assert fresh[0] == documented[0] and len(fresh) == len(documented) == 1 + 2 * 7
    for new, old in zip(fresh[1:], documented[1:], strict=True):
        for a, b in zip(new, old, strict=True):
            assert a == b or math.isclose(float(a), float(b), rel_tol=1e-4, abs_tol=1e-12)


def test_device_memory_of_a_forward_by_hand() -> None:
    """One rank, 2048 channels in bf16: 10 + 4 + 12 + 16 rows of 4096 bytes a token and block, and the weights."""
    config = HunyuanVideoConfig.from_diffusers({"num_layers": 3}, dtype=torch.bfloat16)
    place = Place(config, 0, 1000, 2)
    weights = 2 * sum(count.elements for count in chunk_counts(config, 0))
    assert forward_bytes(place, 24) == 3 * 1024 * 2 * 4096 * 42 + weights
    config = HunyuanVideoConfig.from_diffusers(
        {"num_layers": 3}, dtype=torch.bfloat16, tensor=4, sequence_parallel=True
    )
    weights = 2 * sum(count.elements for count in chunk_counts(config, 0))
    rows = 10 / 4 + 4 + 28 / 4
    assert forward_bytes(Place(config, 0, 1000, 2), 24) == 3 * 1024 * 2 * 4096 * rows + weights


def test_what_bounds_a_phase_takes_longest() -> None:
    gpu = load_gpu("h100-80")
    use = Use("train", 989.4e12, 3.35e12, 450e9, 2 * 50e9, 64e9, 0.0)
    assert use.seconds(gpu) == pytest.approx(
        {"compute": 1, "memory": 1, "NVLink": 1, "network": 2, "host": 1, "disk": 0}
    )
    assert use.bound(gpu) == "network" and use.intensity == pytest.approx(295.3, abs=0.1)


def test_bytes_grow_with_the_video_and_operations_faster() -> None:
    found = {(size, use.phase): use for size, use, _ in phase_uses()}
    for phase in ("rollout", "reference", "train"):
        small, large = found["480p", phase], found["720p", phase]
        tokens = (21 * 45 * 80 + 306 / 2) / (21 * 30 * 53 + 306 / 2)
        assert 1 < large.device_bytes / small.device_bytes < tokens < large.flops / small.flops < tokens**2
