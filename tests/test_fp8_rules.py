"""Settings of FP8: refused in one line where they cannot hold, before anything is built."""

from typing import Any

import pytest

from megatron_sage.config import load_config
from megatron_sage.config.state_rules import check_fp8_blocks, check_precision, fp8_obstacle, fp8_obstacle_of_device
from megatron_sage.errors import UserError
from tests.fp8_emulation import emulated

FP8 = {"precision.fp8": "hybrid", "precision.dtype": "bf16"}


def config(**changes: Any) -> Any:
    return load_config(None, [f"{key}={value}" for key, value in changes.items()])


def test_fp8_is_refused_where_megatron_would_leave_it_out_unsaid() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"precision\.fp8=hybrid: needs a GPU .*set precision\.fp8=none") as error:
        check_precision(config(**FP8))
    assert "\n" not in str(error.value)
    assert fp8_obstacle("tensorwise") is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision.fp8": "e4m3", "precision.dtype": "fp32"}, r"precision\.fp8=e4m3: needs precision\.dtype=bf16"),
        ({**FP8, "precision.fp8_first_bf16": -1}, r"precision\.fp8_first_bf16=-1: must be >= 0"),
        ({"precision.fp8_last_bf16": 2}, r"precision\.fp8_last_bf16=2: has no effect without precision\.fp8"),
        ({"precision.fp8_first_bf16": 1}, r"precision\.fp8_first_bf16=1: has no effect without precision\.fp8"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with emulated(), pytest.raises(UserError, match=message):
        check_precision(config(**changes))


def test_a_block_must_be_left_for_fp8() -> None:
    settings = config(**FP8, **{"precision.fp8_first_bf16": 2, "precision.fp8_last_bf16": 3})
    with emulated():
        check_precision(settings)
    check_fp8_blocks(settings, 6)
    with pytest.raises(UserError, match=r"fp8_first_bf16=2: with fp8_last_bf16=3 no block of 5"):
        check_fp8_blocks(settings, 5)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "obstacle"),
    [
        ("tensorwise", (8, 0), "13.0", "8.9"),
        ("delayed", (8, 9), "12.4", None),
        ("mxfp8", (9, 0), "13.0", "Blackwell"),
        ("mxfp8", (10, 0), "12.8", None),
        ("mxfp8", (12, 0), "13.0", "10.x"),
        ("blockwise", (9, 0), "12.8", "CUDA 12.9"),
        ("blockwise", (9, 0), "12.10", None),
        ("blockwise", (8, 9), "13.0", "Hopper"),
    ],
)
def test_what_a_gpu_can_run(recipe: str, capability: tuple[int, int], cuda: str, obstacle: str | None) -> None:
    found = fp8_obstacle_of_device(recipe, capability, cuda)
    assert found is None if obstacle is None else (found is not None and obstacle in found)
