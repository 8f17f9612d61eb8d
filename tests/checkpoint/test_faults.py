"""Every broken input ends in one line that names file and tensor, and leaves nothing behind."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sage.__main__ import main
from megatron_sage.checkpoint import convert
from megatron_sage.checkpoint.safetensors_io import SafetensorsDirectory
from megatron_sage.errors import UserError
from tests.checkpoint.synthetic import (
    NAME,
    edit_index,
    official_config,
    official_from_diffusers,
    random_tensors,
    tiny_config,
    write_hf,
)

SINGLE = f"{NAME}.safetensors"
SECOND = f"{NAME}-00002-of-00003.safetensors"
KEY = "transformer_blocks.1.attn.to_k.weight"
OFFICIAL_KEY = "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.bias"
CONFIG = tiny_config()
TENSORS = random_tensors(CONFIG)
OFFICIAL = official_from_diffusers(TENSORS)
Break = Callable[[Path], object]


def refused(source: Path, direction: str, *fragments: str) -> None:
    target = source.parent / "out"
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert.DIRECTIONS[direction](source, target)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert sorted(path.name for path in source.parent.iterdir()) == before


def change_config(**changes: object) -> Break:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(
    change: Callable[[dict[str, torch.Tensor]], object], tensors: dict[str, torch.Tensor] = TENSORS
) -> Break:
    def rewrite(directory: Path) -> None:
        changed = dict(tensors)
        change(changed)
        save_file(changed, directory / SINGLE)

    return rewrite


def truncate(name: str, size: int) -> Break:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


ONE_FILE: dict[str, tuple[Break, tuple[str, ...]]] = {
    "truncated data": (truncate(SINGLE, 8_000_000), (SINGLE, "truncated", "context_embedder_2.linear_2.weight")),
    "truncated header": (truncate(SINGLE, 500), (SINGLE, "not a safetensors file")),
    "empty file": (truncate(SINGLE, 0), (SINGLE, "not a safetensors file")),
    "not safetensors": (lambda d: (d / SINGLE).write_bytes(struct.pack("<Q", 2**60) + b"x" * 99), (SINGLE,)),
    "missing key": (change_tensors(lambda t: t.pop(KEY)), (KEY, "missing")),
    "extra key": (change_tensors(lambda t: t.update(surplus=torch.zeros(2))), (SINGLE, "'surplus'")),
    "wrong shape": (
        change_tensors(lambda t: t.update({KEY: t[KEY][:-1].clone()})),
        (SINGLE, KEY, "[31, 32]", "[32, 32]"),
    ),
    "integers": (change_tensors(lambda t: t.update({KEY: t[KEY].to(torch.int8)})), (SINGLE, KEY, "I8")),
    "q and k of two types": (change_tensors(lambda t: t.update({KEY: t[KEY].float()})), (SINGLE, KEY, "float32")),
    "another architecture": (
        change_config(_class_name="WanTransformer3DModel"),
        ("config.json", "WanTransformer3DModel"),
    ),
    "no architecture": (change_config(_class_name=None), ("config.json", "_class_name")),
    "another depth": (change_config(num_layers=3), ("transformer_blocks.2.", "missing")),
    "size of a wrong type": (change_config(num_layers="two"), ("config.json", "num_layers", "two")),
    "unknown setting": (change_config(window=3), ("config.json", "window")),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), ("config.json", "JSON")),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), ("config.json", "_class_name")),
    "no config": (lambda d: (d / "config.json").unlink(), ("config.json",)),
    "pickled weights": (lambda d: (d / SINGLE).rename(d / f"{NAME}.bin"), (SINGLE, f"{NAME}.bin", "only safetensors")),
}


@pytest.mark.parametrize("name", ONE_FILE)
def test_one_file(tmp_path: Path, name: str) -> None:
    break_it, fragments = ONE_FILE[name]
    source = write_hf(tmp_path / "hf", CONFIG, TENSORS)
    break_it(source)
    refused(source, "hf-to-megatron", *fragments)


def lists_in_second(index: dict) -> str:
    return min(name for name, file in index["weight_map"].items() if file == SECOND)


SEVERAL_FILES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "missing file": (lambda d: (d / SECOND).unlink(), (SECOND, "missing")),
    "file lacks a listed tensor": (
        lambda d: edit_index(d, lambda index: index["weight_map"].update(ghost=SECOND)),
        (SECOND, "'ghost'"),
    ),
    "file holds an unlisted tensor": (
        lambda d: edit_index(d, lambda index: index["weight_map"].pop(lists_in_second(index))),
        (SECOND, "does not list"),
    ),
    "index is no JSON": (lambda d: (d / f"{SINGLE}.index.json").write_text("x"), (f"{SINGLE}.index.json",)),
    "index without map": (lambda d: edit_index(d, lambda index: index.pop("weight_map")), (f"{SINGLE}.index.json",)),
    "truncated file": (truncate(SECOND, 50_000), (SECOND, "truncated")),
}


@pytest.mark.parametrize("name", SEVERAL_FILES)
def test_several_files(tmp_path: Path, name: str) -> None:
    break_it, fragments = SEVERAL_FILES[name]
    source = write_hf(tmp_path / "hf", CONFIG, TENSORS, files=3)
    break_it(source)
    refused(source, "hf-to-megatron", *fragments)


OFFICIAL_FAULTS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "diffusers instead": (
        change_config(_class_name="HunyuanVideo15Transformer3DModel"),
        ("config.json", "HunyuanVideo_1_5_DiffusionTransformer"),
    ),
    "sparse attention": (change_config(attn_param={"win_ratio": 10}), ("config.json", "attn_param")),
    "single-stream blocks": (change_config(mm_single_blocks_depth=4), ("config.json", "mm_single_blocks_depth")),
    "unknown resolution": (change_config(ideal_resolution="4k"), ("config.json", "ideal_resolution", "4k")),
    "heads do not divide": (change_config(heads_num=5), ("config.json", "heads")),
    "missing key": (change_tensors(lambda t: t.pop(OFFICIAL_KEY), OFFICIAL), (OFFICIAL_KEY, "missing")),
    "no glyph embedder": (
        change_tensors(lambda t: t.pop("byt5_in.fc1.weight"), OFFICIAL),
        ("byt5_in.fc1.weight", "missing"),
    ),
    "wrong shape": (
        change_tensors(lambda t: t.update({OFFICIAL_KEY: t[OFFICIAL_KEY][:32].clone()}), OFFICIAL),
        (SINGLE, OFFICIAL_KEY, "[32]", "[96]"),
    ),
}


@pytest.mark.parametrize("name", OFFICIAL_FAULTS)
def test_official(tmp_path: Path, name: str) -> None:
    break_it, fragments = OFFICIAL_FAULTS[name]
    source = write_hf(tmp_path / "official", official_config(), OFFICIAL)
    break_it(source)
    refused(source, "official-to-megatron", *fragments)


def test_official_config_lacks_a_size(tmp_path: Path) -> None:
    config = official_config()
    del config["hidden_size"]
    refused(write_hf(tmp_path / "official", config, OFFICIAL), "official-to-megatron", "config.json", "'hidden_size'")


MEGATRON_FAULTS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no metadata.json": (lambda d: (d / "metadata.json").unlink(), ("metadata.json",)),
    "another format": (
        lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        ("metadata.json", "zarr"),
    ),
    "no .metadata": (lambda d: (d / ".metadata").unlink(), (".metadata",)),
    "truncated .metadata": (truncate(".metadata", 100), (".metadata",)),
    "truncated data": (truncate("__0_0.distcp", 6_000_000), ("__0_0.distcp", "truncated")),
    "missing data": (lambda d: (d / "__0_0.distcp").unlink(), ("__0_0.distcp", "missing")),
    "no config": (lambda d: (d / "config.json").unlink(), ("config.json",)),
    "another depth": (change_config(num_layers=3), ("transformer_blocks.2.", "missing")),
    "fewer blocks": (change_config(num_layers=1), ("transformer_blocks.1.", "not part of")),
    "another width": (change_config(text_embed_dim=16), ("context_embedder", "[32, 12]", "[32, 16]")),
    "damaged tensor": (
        lambda d: (d / "__0_0.distcp").write_bytes(b"\0" * (d / "__0_0.distcp").stat().st_size),
        ("megatron",),
    ),
}


@pytest.mark.parametrize("name", MEGATRON_FAULTS)
def test_megatron(tmp_path: Path, name: str, megatron_checkpoint: Path) -> None:
    break_it, fragments = MEGATRON_FAULTS[name]
    source = tmp_path / "megatron"
    source.mkdir()
    for path in megatron_checkpoint.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    break_it(source)
    refused(source, "megatron-to-hf", *fragments)


@pytest.fixture(scope="module")
def megatron_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    convert.hf_to_megatron(write_hf(directory / "hf", CONFIG, TENSORS), directory / "megatron")
    return directory / "megatron"


@pytest.mark.parametrize("kind", ["file", "directory with a file"])
def test_target_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    source, target = write_hf(tmp_path / "hf", CONFIG, TENSORS), tmp_path / "out"
    precious = target if kind == "file" else target / "precious"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    refused(source, "hf-to-megatron", str(target), "not an empty directory")
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("error", [UserError("disk is gone"), KeyboardInterrupt()])
def test_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    source = write_hf(tmp_path / "hf", CONFIG, TENSORS)
    plain, seen = SafetensorsDirectory.read, []

    def read(self: SafetensorsDirectory, name: str, bounds: tuple | None = None) -> torch.Tensor:
        seen.append(name)
        if len(seen) == 30:
            raise error
        return plain(self, name, bounds)

    monkeypatch.setattr(SafetensorsDirectory, "read", read)
    with pytest.raises(type(error)):
        convert.hf_to_megatron(source, tmp_path / "out")
    assert len(seen) == 30
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_command_line_says_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "hf-to-megatron", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such directory\n"
