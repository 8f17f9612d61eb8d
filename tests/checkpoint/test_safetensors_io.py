"""Writing and reading safetensors, with the library as the judge."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_sage.checkpoint import safetensors_io
from megatron_sage.checkpoint.safetensors_io import (
    DTYPES,
    STEM,
    SafetensorsDirectory,
    SafetensorsWriter,
    Spec,
    plan_files,
)


def tensors() -> dict[str, torch.Tensor]:
    """One of each dtype and of awkward shapes, widest first."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"F64": (3, 5), "F32": (2, 1, 3), "BF16": (7,), "F16": (4, 0)}
    made = {name: torch.randn(shape, generator=generator).to(DTYPES[name]) for name, shape in shapes.items()}
    return made | {"scalar": torch.tensor(1.5, dtype=torch.float16)}


def specs(named: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", specs(tensors())) as writer:
        for name, tensor in tensors().items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "x")
    assert specs(found) == specs(tensors())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_writes_views_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    with SafetensorsWriter(tmp_path / "x", {"t": Spec(torch.float32, (2, 3))}) as writer:
        writer.write("t", whole.T[1:3])
    assert torch.equal(load_file(tmp_path / "x")["t"], whole.T[1:3])


@pytest.mark.parametrize("wrong", ["order", "dtype", "shape", "missing"])
def test_refuses_what_was_not_announced(tmp_path: Path, wrong: str) -> None:
    announced = {"a": Spec(torch.float32, (2,)), "b": Spec(torch.float32, (3,))}
    with pytest.raises(ValueError, match="expected a|1 tensors were not written"):
        with SafetensorsWriter(tmp_path / "x", announced) as writer:
            if wrong == "order":
                writer.write("b", torch.zeros(3))
            writer.write(
                "a", torch.zeros(3 if wrong == "shape" else 2).to(torch.float16 if wrong == "dtype" else torch.float32)
            )


def test_reads_slices_across_remaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "REMAP_AFTER_BYTES", 100)
    named = {f"t{i}": torch.randn(4, 6) for i in range(8)}
    save_file(named, tmp_path / f"{STEM}.safetensors")
    directory = SafetensorsDirectory(tmp_path)
    read = {
        name: (directory.read(name), directory.read(name, (0, 1, 3)), directory.read(name, (1, 2, 6))) for name in named
    }
    for name, (whole, rows, columns) in read.items():  # tensors outlive the mapping they came from
        assert torch.equal(whole, named[name])
        assert torch.equal(rows, named[name][1:3])
        assert torch.equal(columns, named[name][:, 2:6])


@given(sizes=st.lists(st.integers(0, 20), max_size=30), limit=st.integers(1, 40))
def test_plan_files(sizes: list[int], limit: int) -> None:
    runs = plan_files(sizes, limit)
    assert [index for run in runs for index in run] == list(range(len(sizes)))
    for run, following in zip(runs, [*runs[1:], range(0)], strict=True):
        total = sum(sizes[index] for index in run)
        assert total <= limit or sum(sizes[index] > 0 for index in run) == 1
        if following:
            assert total + sizes[following[0]] > limit  # no file is closed early
