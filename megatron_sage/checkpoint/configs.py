"""config.json of the two Hugging Face layouts: reading, completing, and mapping one onto the other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_sage.errors import UserError
from megatron_sage.model.config import DIFFUSERS_CLASS, HunyuanVideoConfig

OFFICIAL_CLASS = "HunyuanVideo_1_5_DiffusionTransformer"

# What the diffusers class hard-codes; an official checkpoint that says otherwise is another network.
OFFICIAL_CONSTANTS: dict[str, Any] = {
    "glyph_byT5_v2": True,
    "guidance_embed": False,
    "is_reshape_temporal_channels": False,
    "mlp_act_type": "gelu_tanh",
    "mm_single_blocks_depth": 0,
    "qk_norm": True,
    "qk_norm_type": "rms",
    "qkv_bias": True,
    "text_pool_type": None,
    "text_projection": "single_refiner",
    "text_states_dim_2": None,
    "use_attention_mask": True,
    "use_cond_type_embedding": True,
    "vision_projection": "linear",
}
_GLYPH = "byt5_in.fc1.weight"
TARGET_SIZES = {"360p": 480, "480p": 640, "720p": 960, "1080p": 1440}


def transformer_directory(source: Path) -> Path:
    """The directory that holds the transformer's config.json: `source` itself, or `transformer/` below it."""
    for directory in (source / "transformer", source):
        if (directory / "config.json").is_file():
            return directory
    if not source.is_dir():
        raise UserError(f"{source}: no such directory")
    raise UserError(f"{source}: no config.json here nor in transformer/; give the transformer's directory")


def read_config(directory: Path, expected_class: str) -> dict[str, Any]:
    """config.json of `directory`, refused in one line unless it is a JSON object of class `expected_class`."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != expected_class:
        raise UserError(f"{path}: _class_name is {name!r}; this conversion reads {expected_class!r}")
    return config


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Writes config.json as diffusers does: sorted, indented."""
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n")


def complete(config: dict[str, Any], origin: Path) -> dict[str, Any]:
    """A diffusers config with the class's defaults filled in; UserError unless it describes a model that we build."""
    try:
        return HunyuanVideoConfig.from_diffusers(config).to_diffusers()
    except UserError as error:
        raise UserError(f"{origin.parent}/{error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: a value is unusable ({error})") from error


def official_to_diffusers(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], origin: Path) -> dict[str, Any]:
    """The diffusers config of an official one.

    `shapes`: the checkpoint's tensors; the official config names neither the width of the glyph text nor the number
    of refiner layers. `in_channels` counts the noisy latents only: condition latents and mask are added here.
    """
    _check_constants(config, origin)
    if len(shapes.get(_GLYPH, ())) != 2:
        raise UserError(f"{origin.parent}: tensor {_GLYPH!r} is missing or no matrix; it gives the glyph text's width")
    try:
        hidden, heads, channels = config["hidden_size"], config["heads_num"], config["in_channels"]
        patch_t, patch_h, patch_w = config["patch_size"]
        full = {
            "_class_name": DIFFUSERS_CLASS,
            "in_channels": 2 * channels + 1 if config.get("concat_condition", True) else channels,
            "out_channels": config["out_channels"] or channels,
            "num_attention_heads": heads,
            "attention_head_dim": hidden // heads,
            "num_layers": config["mm_double_blocks_depth"],
            "num_refiner_layers": _count_refiner_layers(shapes),
            "mlp_ratio": config["mlp_width_ratio"],
            "patch_size": patch_h,
            "patch_size_t": patch_t,
            "qk_norm": "rms_norm",
            "text_embed_dim": config["text_states_dim"],
            "text_embed_2_dim": shapes[_GLYPH][1],
            "image_embed_dim": config["vision_states_dim"],
            "rope_theta": config["rope_theta"],
            "rope_axes_dim": list(config["rope_dim_list"]),
            "use_meanflow": bool(config.get("use_meanflow", False)),
        }
    except KeyError as error:
        raise UserError(f"{origin}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{origin}: a size is unusable ({error})") from error
    if patch_h != patch_w or hidden % heads:
        raise UserError(f"{origin}: patch_size must be square, and {hidden=} divisible by {heads=}")
    resolution, task = config.get("ideal_resolution"), config.get("ideal_task")
    if resolution is not None:
        if resolution not in TARGET_SIZES:
            raise UserError(f"{origin}: ideal_resolution is {resolution!r}; known are {', '.join(TARGET_SIZES)}")
        full["target_size"] = TARGET_SIZES[resolution]
    if task is not None:
        full["task_type"] = task
    return full


def diffusers_to_official(config: dict[str, Any]) -> dict[str, Any]:
    """The official config of a diffusers one; the inverse of `official_to_diffusers`.

    `ideal_resolution` is null for a `target_size` that has no name there.
    """
    target_size, task = config.get("target_size"), config.get("task_type")
    config = HunyuanVideoConfig.from_diffusers(config).to_diffusers()
    channels, concat = config["in_channels"], config["in_channels"] % 2 == 1
    resolutions: dict[int | None, str] = {size: name for name, size in TARGET_SIZES.items()}
    return OFFICIAL_CONSTANTS | {
        "_class_name": OFFICIAL_CLASS,
        "attn_mode": "flash",
        "attn_param": None,
        "concat_condition": concat,
        "heads_num": config["num_attention_heads"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "ideal_resolution": resolutions.get(target_size),
        "ideal_task": task,
        "in_channels": (channels - 1) // 2 if concat else channels,
        "mlp_width_ratio": config["mlp_ratio"],
        "mm_double_blocks_depth": config["num_layers"],
        "out_channels": config["out_channels"],
        "patch_size": [config["patch_size_t"], config["patch_size"], config["patch_size"]],
        "rope_dim_list": list(config["rope_axes_dim"]),
        "rope_theta": config["rope_theta"],
        "text_states_dim": config["text_embed_dim"],
        "use_meanflow": config["use_meanflow"],
        "vision_states_dim": config["image_embed_dim"],
    }


def _check_constants(config: dict[str, Any], origin: Path) -> None:
    for key, value in OFFICIAL_CONSTANTS.items():
        if config.get(key, value) != value:
            raise UserError(f"{origin}: {key} is {config[key]!r}; the architecture has {value!r}")
    if config.get("attn_mode") == "flex-block-attn" or config.get("attn_param"):
        # Dense attention on weights tuned for block-sparse attention runs, and is another model.
        raise UserError(f"{origin}: attn_param asks for sparse attention (SSTA); convert the dense checkpoint instead")


def _count_refiner_layers(names: Iterable[str]) -> int:
    prefix = "txt_in.individual_token_refiner.blocks."
    indices = [name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)]
    return max((int(index) for index in indices if index.isdigit()), default=-1) + 1
