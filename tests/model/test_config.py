"""HunyuanVideoConfig: reading and writing config.json, refusals."""

import json
from typing import Any

import pytest
import torch

from megatron_sage.errors import UserError
from megatron_sage.model import HunyuanVideoConfig, HunyuanVideoDiT
from megatron_sage.parallel.groups import Groups


def diffusers_config(**changes: Any) -> dict[str, Any]:
    """The config.json that diffusers itself writes, as read back from disk."""
    from diffusers import HunyuanVideo15Transformer3DModel

    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(**{"num_layers": 1, "target_size": 960, "task_type": "t2v", **changes})
    return json.loads(model.to_json_string())


def test_config_json_survives_the_round_trip() -> None:
    written = diffusers_config(use_meanflow=True)
    assert "_diffusers_version" in written
    assert json.loads(json.dumps(HunyuanVideoConfig.from_diffusers(written).to_diffusers())) == written


def test_absent_keys_mean_the_released_model() -> None:
    config = HunyuanVideoConfig.from_diffusers({})
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size, config.kv_channels) == (54, 2048, 8192, 128)
    assert config.layernorm_epsilon == 1e-6


def test_sequence_parallel_is_ignored_on_one_rank() -> None:
    assert not HunyuanVideoConfig.from_diffusers({}, tensor=1, sequence_parallel=True).sequence_parallel
    assert HunyuanVideoConfig.from_diffusers({}, tensor=2, sequence_parallel=True).sequence_parallel


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, {}, "'FluxTransformer2DModel'.*'HunyuanVideo15Transformer3DModel'"),
        ({"num_layer": 3}, {}, "unknown key 'num_layer'"),
        ({"num_layers": "54"}, {}, "num_layers is '54'"),
        ({"num_layers": True}, {}, "num_layers is True"),
        ({"num_layers": 0}, {}, "num_layers is 0, must be at least 1"),
        ({}, {"tensor": 3}, "16 attention heads cannot be divided over tensor=3"),
        ({"attention_head_dim": 64}, {}, r"rope_axes_dim \[16, 56, 56\].*attention_head_dim = 64"),
        ({"rope_axes_dim": [18, 55, 55]}, {}, "three even numbers"),
        ({"patch_size": 2}, {}, "patch_size 2"),
        ({"qk_norm": "layer_norm"}, {}, "qk_norm 'layer_norm'"),
        ({}, {"recompute": "some"}, "recompute: 'some' is not one of none, selective, full"),
        ({}, {"recompute": "selective", "recompute_modules": ["moe"]}, r"recompute_modules: \['moe'\]"),
    ],
)
def test_refusals_are_one_line(config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        HunyuanVideoConfig.from_diffusers(config, **options)
    assert "\n" not in str(caught.value)


def test_a_process_group_of_another_size_is_refused(one_rank: Groups) -> None:
    config = HunyuanVideoConfig.from_diffusers({"num_layers": 1}, tensor=2)
    with pytest.raises(UserError, match=r"says 2, the process group has 1 rank"):
        HunyuanVideoDiT(config, one_rank.collection)
