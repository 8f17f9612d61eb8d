"""Round trips through files, in both Hugging Face layouts."""

import json
from pathlib import Path

import pytest
import torch

from megatron_sage.__main__ import main
from megatron_sage.checkpoint.convert import (
    hf_to_megatron,
    megatron_to_hf,
    megatron_to_official,
    official_to_megatron,
)
from tests.checkpoint.synthetic import (
    NAME,
    assert_identical,
    official_config,
    official_from_diffusers,
    random_tensors,
    read_all,
    tiny_config,
    write_hf,
)


def mixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms and biases wider than the rest, as many released checkpoints have it."""
    return {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
def test_hf_round_trip(tmp_path: Path, dtype: str, files: int) -> None:
    config = tiny_config(use_meanflow=files == 3) | {"_diffusers_version": "0.42.1"}
    tensors = random_tensors(config, torch.float32 if dtype == "fp32" else torch.bfloat16)
    if dtype == "mixed":
        tensors = mixed(tensors)
    tensors["proj_out.bias"].view(-1)[0] = float("nan")
    write_hf(tmp_path / "hf" / "transformer", config, tensors, files)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=10**9 if files == 1 else 4 * 10**6)
    assert_identical(tensors, read_all(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]


def test_diffusers_loads_a_sharded_export(tmp_path: Path) -> None:
    from diffusers import HunyuanVideo15Transformer3DModel

    config = tiny_config()
    tensors = random_tensors(config, torch.float32)
    write_hf(tmp_path / "hf", config, tensors)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    limit = 17 * 10**6  # the largest tensor has 16.8 MB
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", limit)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert [path.name for path in files] == [f"{NAME}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(path.stat().st_size < limit + 20_000 for path in files)
    index = json.loads((tmp_path / "back" / f"{NAME}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    model, info = HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_identical(tensors, dict(model.state_dict()))


@pytest.mark.parametrize("meanflow", [False, True])
def test_official_round_trip(tmp_path: Path, meanflow: bool) -> None:
    hf_config = tiny_config(use_meanflow=meanflow)
    tensors = random_tensors(hf_config)
    config, official = official_config(use_meanflow=meanflow), official_from_diffusers(tensors)
    write_hf(tmp_path / "official", config, official)
    official_to_megatron(tmp_path / "official", tmp_path / "megatron")
    megatron_to_official(tmp_path / "megatron", tmp_path / "back")
    assert_identical(official, read_all(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert_identical(tensors, read_all(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == hf_config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ideal_resolution": "720p", "ideal_task": "t2v"}, {"target_size": 960, "task_type": "t2v"}),
        ({"concat_condition": False, "in_channels": 65}, {"in_channels": 65}),
    ],
)
def test_official_config_variants(tmp_path: Path, changes: dict, expected: dict) -> None:
    tensors = official_from_diffusers(random_tensors(tiny_config()))
    write_hf(tmp_path / "official", official_config(**changes), tensors)
    official_to_megatron(tmp_path / "official", tmp_path / "megatron")
    assert json.loads((tmp_path / "megatron" / "config.json").read_text()).items() >= expected.items()


def test_command_line(tmp_path: Path) -> None:
    config = tiny_config(num_layers=1)
    tensors = random_tensors(config)
    write_hf(tmp_path / "hf", config, tensors)
    assert main(["convert", "hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "megatron")]) == 0
    argv = ["convert", "megatron-to-hf", str(tmp_path / "megatron"), str(tmp_path / "back"), "--max-shard-bytes", "8MB"]
    assert main(argv) == 0
    assert_identical(tensors, read_all(tmp_path / "back"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 3
    assert main([*argv[:-1], "-3"]) == 2


def test_an_empty_target_is_fine(tmp_path: Path) -> None:
    config = tiny_config(num_layers=1)
    write_hf(tmp_path / "hf", config, random_tensors(config))
    (tmp_path / "megatron").mkdir()
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert (tmp_path / "megatron" / "metadata.json").is_file()
