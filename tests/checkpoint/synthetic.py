"""Tiny checkpoints written with the safetensors library itself, so that our writer is not its own judge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.model.config import HunyuanVideoConfig

NAME = "diffusion_pytorch_model"
Tensors = dict[str, torch.Tensor]


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A complete diffusers config: hidden 32, 4 heads of 8."""
    config = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": 12,
        "text_embed_2_dim": 10,
        "image_embed_dim": 6,
        "rope_axes_dim": [4, 2, 2],
        "target_size": 640,
    } | changes
    return HunyuanVideoConfig.from_diffusers(config).to_diffusers()


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    """Diffusers name -> random tensor."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)).to(dtype)
        for name, shape in KeyMap.from_config(config).shapes("diffusers").items()
    }


def write_hf(directory: Path, config: dict[str, Any], tensors: Tensors, files: int = 1) -> Path:
    """A transformer directory with one file, or with several and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, directory / f"{NAME}.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for number in range(files):
        part = {name: tensors[name] for name in sorted(tensors)[number::files]}
        file = f"{NAME}-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    edit_index(directory, lambda index: index.update(metadata={}, weight_map=weight_map), create=True)
    return directory


def edit_index(directory: Path, change: Callable[[dict[str, Any]], Any], create: bool = False) -> None:
    """Changes the index in place."""
    path = directory / f"{NAME}.safetensors.index.json"
    index = {} if create else json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def read_all(directory: Path) -> Tensors:
    """All tensors of a directory, by the safetensors library."""
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


def assert_identical(one: Tensors, other: Tensors) -> None:
    """Names, dtypes, shapes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(bits(tensor), bits(other[name])), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN equals NaN."""
    return tensor.contiguous().view(torch.uint8)


def official_from_diffusers(tensors: Tensors) -> Tensors:
    """Official tensors of a diffusers checkpoint: renamed by hand, independent of the key map's code."""
    pairs = {
        "time_embed.timestep_embedder.linear_1": "time_in.mlp.0",
        "time_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "time_embed.timestep_embedder_r.linear_1": "time_r_in.mlp.0",
        "time_embed.timestep_embedder_r.linear_2": "time_r_in.mlp.2",
        "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
        "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
        "context_embedder.time_text_embed.text_embedder": "txt_in.c_embedder",
        "context_embedder.proj_in": "txt_in.input_embedder",
        "context_embedder.token_refiner.refiner_blocks": "txt_in.individual_token_refiner.blocks",
        "context_embedder_2.norm": "byt5_in.layernorm",
        "context_embedder_2.linear_": "byt5_in.fc",
        "image_embedder.norm_in": "vision_in.proj.0",
        "image_embedder.linear_1": "vision_in.proj.1",
        "image_embedder.linear_2": "vision_in.proj.3",
        "image_embedder.norm_out": "vision_in.proj.4",
        "x_embedder.proj": "img_in.proj",
        "cond_type_embed": "cond_type_embedding",
        "transformer_blocks": "double_blocks",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    in_block = {
        ".norm1.linear": ".img_mod.linear",
        ".norm1_context.linear": ".txt_mod.linear",
        ".attn.to_out.0": ".img_attn_proj",
        ".attn.to_add_out": ".txt_attn_proj",
        ".attn.norm_added_q": ".txt_attn_q_norm",
        ".attn.norm_added_k": ".txt_attn_k_norm",
        ".attn.norm_q": ".img_attn_q_norm",
        ".attn.norm_k": ".img_attn_k_norm",
        ".attn.to_": ".img_attn_",
        ".attn.add_q_proj": ".txt_attn_q",
        ".attn.add_k_proj": ".txt_attn_k",
        ".attn.add_v_proj": ".txt_attn_v",
        ".ff.net.0.proj": ".img_mlp.fc1",
        ".ff.net.2": ".img_mlp.fc2",
        ".ff_context.net.0.proj": ".txt_mlp.fc1",
        ".ff_context.net.2": ".txt_mlp.fc2",
    }
    in_refiner = {
        ".attn.to_out.0": ".self_attn_proj",
        ".ff.net.0.proj": ".mlp.fc1",
        ".ff.net.2": ".mlp.fc2",
        ".norm_out.linear": ".adaLN_modulation.1",
    }
    official: Tensors = {}
    for name, tensor in tensors.items():
        prefix = next(old for old in pairs if name.startswith(old))
        inner = in_block if "transformer_blocks" in prefix else in_refiner if "refiner_blocks" in prefix else {}
        rest = name.removeprefix(prefix)
        for old, new in inner.items():
            if old in rest:
                rest = rest.replace(old, new)
                break
        if prefix == "norm_out.linear":
            tensor = torch.cat([tensor[len(tensor) // 2 :], tensor[: len(tensor) // 2]])
        if inner is in_refiner and ".attn.to_" in rest:
            if ".to_q." in rest:
                tensor = torch.cat([tensors[name.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"])
                official[pairs[prefix] + rest.replace(".attn.to_q.", ".self_attn_qkv.")] = tensor
            continue
        official[pairs[prefix] + rest] = tensor.contiguous()
    return official


def official_config(**changes: Any) -> dict[str, Any]:
    """The official config.json of `tiny_config`, as the released ones are written."""
    return {
        "_class_name": "HunyuanVideo_1_5_DiffusionTransformer",
        "attn_mode": "flash",
        "attn_param": None,
        "concat_condition": True,
        "glyph_byT5_v2": True,
        "guidance_embed": False,
        "heads_num": 4,
        "hidden_size": 32,
        "ideal_resolution": "480p",
        "ideal_task": "i2v",
        "in_channels": 32,
        "is_reshape_temporal_channels": False,
        "mlp_act_type": "gelu_tanh",
        "mlp_width_ratio": 4,
        "mm_double_blocks_depth": 2,
        "mm_single_blocks_depth": 0,
        "out_channels": 32,
        "patch_size": [1, 1, 1],
        "qk_norm": True,
        "qk_norm_type": "rms",
        "qkv_bias": True,
        "rope_dim_list": [4, 2, 2],
        "rope_theta": 256,
        "text_pool_type": None,
        "text_projection": "single_refiner",
        "text_states_dim": 12,
        "text_states_dim_2": None,
        "use_attention_mask": True,
        "use_cond_type_embedding": True,
        "use_meanflow": False,
        "vision_projection": "linear",
        "vision_states_dim": 6,
    } | changes
