"""One checkpoint at every tensor-parallel size: slices, saves, exports and gathers, on real gloo ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sage.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_sage.checkpoint.distributed import export_hf, gather_named, load_hf_weights, load_weights, save_weights
from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.transformer import HunyuanVideoDiT, build_chunks
from megatron_sage.parallel.groups import initialize
from tests.checkpoint.synthetic import assert_identical, random_tensors, read_all, tiny_config, write_hf
from tests.parallel import pool

CONFIG = tiny_config(use_meanflow=True, num_layers=4)


def run_on_ranks(world: int, function: str, **kwargs: Any) -> list[Any]:
    """On a busy machine the workers' first imports alone can take minutes."""
    return pool.run_on_ranks(world, f"tests.parallel.test_convert:{function}", timeout=400, **kwargs)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "transformer", CONFIG, random_tensors(CONFIG), files=2)


def build(tensor: int, sequence: bool = False) -> HunyuanVideoDiT:
    config = HunyuanVideoConfig.from_diffusers(CONFIG, tensor=tensor, dtype=torch.bfloat16, sequence_parallel=sequence)
    return HunyuanVideoDiT(config, initialize(tensor=tensor).collection)


def expected_slices(rank: int, size: int) -> dict[str, torch.Tensor]:
    """This rank's part of every tensor of ours: whole heads, whole rows or columns."""
    tensors, slices = random_tensors(CONFIG), {}
    for binding in KeyMap.from_config(CONFIG).bindings:
        (whole, *more) = binding.convert([tensors[name] for name in binding.diffusers], "diffusers", "ours")
        for name, tensor in zip(binding.ours, (whole, *more), strict=True):
            slices[name] = tensor if binding.split_dim is None else tensor.chunk(size, binding.split_dim)[rank]
    return slices


def check_weights(tensor: int, hf: str, megatron: str) -> None:
    for load, directory in ((load_hf_weights, hf), (load_weights, megatron)):
        model = build(tensor)
        load(model, directory)
        found = {name: value.contiguous() for name, value in model.state_dict().items()}
        assert_identical(expected_slices(model.tp_group.rank(), tensor), found)


@pytest.mark.parametrize(("world", "tensor"), [(2, 2), (4, 4)])
def test_every_size_loads_its_slices(hf: Path, tmp_path: Path, world: int, tensor: int) -> None:
    hf_to_megatron(hf, tmp_path / "megatron")
    run_on_ranks(
        world,
        "check_weights",
        tensor=tensor,
        hf=str(hf),
        megatron=str(tmp_path / "megatron"),
    )


def save_and_export(tensor: int, hf: str, directory: str) -> None:
    model = build(tensor, sequence=tensor > 1)
    load_hf_weights(model, hf)
    save_weights(model, f"{directory}/megatron")
    export_hf(model, f"{directory}/exported", max_shard_bytes=3 * 10**6)


@pytest.mark.parametrize(("world", "tensor", "reload"), [(2, 2, 4), (4, 2, 1)])
def test_saved_at_one_size_loads_at_another(hf: Path, tmp_path: Path, world: int, tensor: int, reload: int) -> None:
    run_on_ranks(world, "save_and_export", tensor=tensor, hf=str(hf), directory=str(tmp_path))
    run_on_ranks(
        reload,
        "check_weights",
        tensor=reload,
        hf=str(tmp_path / "exported"),
        megatron=str(tmp_path / "megatron"),
    )
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for name in ("exported", "back"):
        assert_identical(random_tensors(CONFIG), read_all(tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "exported", "megatron"]


def gather_weights_and_gradients(tensor: int, hf: str) -> list[list[tuple[str, torch.Tensor | None]]]:
    model = build(tensor)
    load_hf_weights(model, hf)
    for parameter in model.parameters():
        parameter.grad = -parameter.detach()
    return [
        [(name, None if whole is None else whole.numpy()) for name, whole in gather_named(model, which)]
        for which in ("param", "grad")
    ]


def test_gather_on_rank_zero_only(hf: Path) -> None:
    expected = {name: tensor.float() for name, tensor in random_tensors(CONFIG).items()}
    ranks = run_on_ranks(4, "gather_weights_and_gradients", tensor=2, hf=str(hf))
    for sign, named in zip((1, -1), ranks[0], strict=True):
        assert [name for name, _ in named] == list(expected)
        for name, array in named:
            assert torch.equal(torch.from_numpy(array), sign * expected[name]), name
    for rank in ranks[1:]:
        assert all(whole is None for named in rank for _, whole in named)


def convert_both_ways(hf: str, directory: str) -> None:
    hf_to_megatron(hf, f"{directory}/megatron")
    megatron_to_hf(f"{directory}/megatron", f"{directory}/back", max_shard_bytes=2 * 10**6)


def test_conversion_shared_by_ranks(hf: Path, tmp_path: Path) -> None:
    run_on_ranks(2, "convert_both_ways", hf=str(hf), directory=str(tmp_path))
    assert_identical(random_tensors(CONFIG), read_all(tmp_path / "back"))
    sizes = [path.stat().st_size for path in (tmp_path / "megatron").glob("*.distcp")]
    assert len(sizes) == 2 and min(sizes) > 100_000  # each rank wrote a share (one tensor alone has 8.4 of 9 MB)


def refuse(hf: str, target: str, broken_rank: int) -> str:
    """The error that this rank sees when only `broken_rank` cannot read a tensor."""
    from megatron_sage.checkpoint.safetensors_io import SafetensorsDirectory

    plain = SafetensorsDirectory.read

    def read(self: SafetensorsDirectory, name: str, bounds: tuple | None = None) -> torch.Tensor:
        if torch.distributed.get_rank() == broken_rank:
            raise UserError(f"{name}: disk is gone")
        return plain(self, name, bounds)

    SafetensorsDirectory.read = read  # type: ignore[method-assign]
    try:
        hf_to_megatron(hf, target)
    except UserError as error:
        return str(error)
    finally:
        SafetensorsDirectory.read = plain  # type: ignore[method-assign]
    return ""


@pytest.mark.parametrize("broken_rank", [0, 1])
def test_one_ranks_error_reaches_all(hf: Path, tmp_path: Path, broken_rank: int) -> None:
    errors = run_on_ranks(
        2,
        "refuse",
        hf=str(hf),
        target=str(tmp_path / "out"),
        broken_rank=broken_rank,
    )
    assert errors[0] == errors[1] and errors[0].endswith("disk is gone")
    assert list(tmp_path.iterdir()) == []


def refuse_missing(hf: str, target: str) -> str:
    try:
        hf_to_megatron(hf, target)
    except UserError as error:
        return str(error)
    return ""


def test_a_fault_found_by_all_ranks(hf: Path, tmp_path: Path) -> None:
    errors = run_on_ranks(
        2,
        "refuse_missing",
        hf=str(tmp_path / "no"),
        target=str(tmp_path / "out"),
    )
    assert errors == [f"{tmp_path / 'no'}: no such directory"] * 2


def through_a_layout(sizes: dict[str, int], megatron: str, out: str) -> list[str]:
    """Load, save and export at a layout; the names that gather_named yields on this rank with a tensor."""
    virtual = sizes.get("virtual_pipeline")
    groups = initialize(**sizes)
    layout = {key: sizes[key] for key in ("tensor", "context", "pipeline")}
    config = HunyuanVideoConfig.from_diffusers(
        CONFIG, dtype=torch.bfloat16, sequence_parallel=True, virtual_pipeline=virtual, **layout
    )
    chunks = build_chunks(config, groups.collection)
    load_weights(chunks, megatron)
    save_weights(chunks, Path(out) / "saved")
    export_hf(chunks, Path(out) / "exported", max_shard_bytes=3 * 10**6)
    return [name for name, value in gather_named(chunks, "param") if value is not None]


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 1, "context": 1, "pipeline": 2},
        {"tensor": 2, "context": 1, "pipeline": 2},
        {"tensor": 1, "context": 2, "pipeline": 2},
        {"tensor": 1, "context": 1, "pipeline": 2, "virtual_pipeline": 2},
    ],
    ids=lambda sizes: "-".join(f"{key}{value}" for key, value in sizes.items()),
)
def test_stages_load_save_and_export_the_whole_model(hf: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    hf_to_megatron(hf, tmp_path / "megatron")
    world = sizes["tensor"] * sizes["context"] * sizes["pipeline"]
    names = run_on_ranks(world, "through_a_layout", sizes=sizes, megatron=str(tmp_path / "megatron"), out=str(tmp_path))
    assert set(names[0]) == set(random_tensors(CONFIG)) and not any(names[1:])
    megatron_to_hf(tmp_path / "saved", tmp_path / "back")
    for directory in ("exported", "back"):
        assert_identical(random_tensors(CONFIG), read_all(tmp_path / directory))
