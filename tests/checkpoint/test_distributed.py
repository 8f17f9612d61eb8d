"""Weights in and out of a live model on one rank."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_sage.checkpoint import saving, torch_dist
from megatron_sage.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_sage.checkpoint.distributed import export_hf, gather_named, load_hf_weights, load_weights, save_weights
from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.groups import Groups
from tests.checkpoint.synthetic import assert_identical, random_tensors, read_all, tiny_config, write_hf

CONFIG = tiny_config(use_meanflow=True)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "transformer", CONFIG, random_tensors(CONFIG), files=2)


def build(groups: Groups, dtype: torch.dtype = torch.bfloat16, **changes: object) -> HunyuanVideoDiT:
    config = HunyuanVideoConfig.from_diffusers(CONFIG | changes, dtype=dtype)
    return HunyuanVideoDiT(config, groups.collection)


def loaded(groups: Groups, hf: Path, dtype: torch.dtype = torch.bfloat16) -> HunyuanVideoDiT:
    model = build(groups, dtype)
    load_hf_weights(model, hf)
    return model


def test_every_way_in_and_out_agrees(one_rank: Groups, hf: Path, tmp_path: Path) -> None:
    direct = loaded(one_rank, hf.parent)  # the root above works as well
    save_weights(direct, tmp_path / "saved")
    hf_to_megatron(hf, tmp_path / "converted")
    for directory in ("saved", "converted"):
        other = build(one_rank)
        load_weights(other, tmp_path / directory)
        assert_identical(dict(direct.state_dict()), dict(other.state_dict()))
    export_hf(direct, tmp_path / "exported", max_shard_bytes=3 * 10**6)
    megatron_to_hf(tmp_path / "saved", tmp_path / "back")
    for directory in ("exported", "back"):
        assert_identical(random_tensors(CONFIG), read_all(tmp_path / directory))


def test_loading_casts_to_the_models_dtype(one_rank: Groups, hf: Path, tmp_path: Path) -> None:
    save_weights(loaded(one_rank, hf), tmp_path / "bf16")
    expected = loaded(one_rank, hf, torch.float32)
    model = build(one_rank, torch.float32)
    load_weights(model, tmp_path / "bf16")
    assert_identical(dict(expected.state_dict()), dict(model.state_dict()))


def test_gather_named(one_rank: Groups, hf: Path) -> None:
    model = loaded(one_rank, hf)
    expected = {name: tensor.float() for name, tensor in random_tensors(CONFIG).items()}
    assert_identical(expected, dict(gather_named(model, "param")))
    for name, parameter in model.named_parameters():
        if name.startswith("transformer_blocks.0"):
            parameter.grad = 2 * parameter.detach()
        if name.startswith("transformer_blocks.1"):
            parameter.main_grad = 3 * parameter.detach().float()
            parameter.grad = parameter.detach()
    for name, gradient in gather_named(model, "grad"):
        factor = 2.0 * name.startswith("transformer_blocks.0") + 3.0 * name.startswith("transformer_blocks.1")
        assert torch.equal(gradient, factor * expected[name]), name


def test_megatrons_own_loader_reads_our_files(one_rank: Groups, hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "converted")
    plain = dist_checkpointing.load_plain_tensors(str(tmp_path / "converted"))
    assert_identical(dict(loaded(one_rank, hf).state_dict()), plain)


def test_in_process_save_keeps_objects_and_optimizer_state(one_rank: Groups, hf: Path, tmp_path: Path) -> None:
    """A training checkpoint: weights, an optimizer's moments, sharded objects, plain values."""
    model = loaded(one_rank, hf)
    state = model.sharded_state_dict()
    moment = torch.randn(3, 4)
    state["moment"] = dist_checkpointing.ShardedTensor.from_rank_offsets("optimizer.state.m", moment)
    state["rng"] = dist_checkpointing.mapping.ShardedObject("rng", {"seed": 7}, (1,), (0,))
    state["iteration"] = 12
    saving.save(state, _new(tmp_path / "run"))
    wanted = build(one_rank).sharded_state_dict()
    wanted["moment"] = dist_checkpointing.ShardedTensor.from_rank_offsets("optimizer.state.m", torch.zeros(3, 4))
    wanted["rng"] = dist_checkpointing.mapping.ShardedObject("rng", None, (1,), (0,))
    back = dist_checkpointing.load(wanted, str(tmp_path / "run"))
    assert back["iteration"] == 12 and back["rng"] == {"seed": 7}
    assert torch.equal(back["moment"], moment)
    assert "optimizer.state.m" not in torch_dist.MegatronDirectory(tmp_path / "run").specs


def test_one_flipped_bit_of_the_weights_is_noticed(one_rank: Groups, hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "converted")
    file = max((tmp_path / "converted").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 2
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged: checksum"):
        load_weights(build(one_rank), tmp_path / "converted")
    with pytest.raises(UserError, match="damaged: checksum"):
        megatron_to_hf(tmp_path / "converted", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("source", ["hf", "megatron"])
def test_another_models_weights_are_refused(one_rank: Groups, hf: Path, tmp_path: Path, source: str) -> None:
    model = build(one_rank, num_layers=1)
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.\S+ is not part of the model"):
        if source == "hf":
            load_hf_weights(model, hf)
        else:
            hf_to_megatron(hf, tmp_path / "megatron")
            load_weights(model, tmp_path / "megatron")


def test_exports_never_overwrite(one_rank: Groups, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    for write in (save_weights, export_hf):
        with pytest.raises(UserError, match="not an empty directory"):
            write(build(one_rank), tmp_path / "x")


def _new(directory: Path) -> Path:
    directory.mkdir()
    return directory
