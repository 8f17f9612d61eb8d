"""VideoAlign's released directory: which files, which settings, and what its weights are called today.

The file holds the state dict of a PEFT model of transformers 4.45 (`base_model.model.` before every name,
`base_layer` in adapted ones, `visual.` and `model.` where Qwen2-VL now has `model.visual.` and
`model.language_model.`). A loader that skips what it does not know leaves random weights behind, and scores that look
like scores: here every key is accounted for.
"""

import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sage.errors import UserError
from megatron_sage.rewards.model import reason

CONFIG = "model_config.json"
DIMENSIONS = ("VQ", "MQ", "TA")
# of the released model; the file's own `inference_config` comes first
STATISTICS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
NOT_ADAPTED = ["lm_head", "rm_head", "embed_tokens"]
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Lora:
    """What the weights of low-rank adapters mean."""

    rank: int
    scale: float  # of B·A
    exclude: tuple[str, ...]  # parts of names of linear layers that have none
    last: int  # only that many last ones have them; -1: all


@dataclass(frozen=True)
class Settings:
    """What `model_config.json` says about the arithmetic; what it leaves out is as in the released one."""

    fps: float  # frames looked at, a second
    num_frames: int | None  # or that many of every video
    max_pixels: int  # of a frame
    output_dim: int  # numbers that the head gives for a token: 1, or one for each dimension
    statistics: dict[str, tuple[float, float]]  # dimension -> mean, standard deviation
    lora: Lora | None
    base: str | None  # what the language model was made from, as the file calls it


@dataclass(frozen=True)
class Account:
    """Where the keys of a weights file went."""

    file: str
    keys: int
    loaded: int
    merged: int  # pairs of low-rank matrices
    unused: tuple[str, ...]

    def __str__(self) -> str:
        unused = f"{len(self.unused)} not used" + (f" ({', '.join(self.unused)})" if self.unused else "")
        return f"{self.file}: {self.keys} keys: {self.loaded} loaded, {self.merged} LoRA pairs merged, {unused}"


def read_settings(directory: Path) -> Settings:
    """The settings of a VideoAlign directory. UserError, one line, for what this code would score otherwise."""
    if not directory.is_dir():
        raise UserError(f"checkpoint={directory}: no such directory; fetch KwaiVGI/VideoReward and name it")
    file = directory / CONFIG
    if not file.is_file():
        raise UserError(f"checkpoint={directory}: has no {CONFIG}; name the directory that holds it")
    found = _Reader(file, _json(file))
    for key, wanted in {
        "data_config.sample_type": "uniform",
        "data_config.prompt_template_type": "detailed_special",
        "model_config.use_special_tokens": True,
    }.items():
        value = found.get(key, wanted)
        if value != wanted:
            raise UserError(f"{file}: {key}={value}: only {wanted} is supported, another one would score otherwise")
    order = found.get("data_config.eval_dim", list(DIMENSIONS))
    if not isinstance(order, list) or [name for name in order if name in DIMENSIONS] != list(DIMENSIONS):
        raise UserError(f"{file}: data_config.eval_dim={order}: expected {', '.join(DIMENSIONS)} in this order")
    output_dim = found.number("model_config.output_dim", 1)
    if output_dim not in (1, 3):
        raise UserError(f"{file}: model_config.output_dim={output_dim}: expected 1 or 3")
    frames = found.get("data_config.num_frames", None)
    return Settings(
        fps=found.number("data_config.fps", 2.0),
        num_frames=None if frames is None else int(found.number("data_config.num_frames", 0)),
        max_pixels=int(found.number("data_config.max_frame_pixels", 448 * 448)),
        output_dim=int(output_dim),
        statistics=_statistics(found),
        lora=_lora(found),
        base=found.get("model_config.model_name_or_path", None),
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}; fetch it again") from error


class _Reader:
    """Values of a JSON file by dotted key."""

    def __init__(self, file: Path, content: Any) -> None:
        self.file, self.content = file, content
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected an object; fetch it again")

    def get(self, key: str, default: Any) -> Any:
        section, name = key.split(".")
        values = self.content.get(section)
        if values is not None and not isinstance(values, dict):
            raise UserError(f"{self.file}: {section}: expected an object; fetch the file again")
        return (values or {}).get(name, default)

    def number(self, key: str, default: float, positive: bool = True) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{self.file}: {key}={value}: expected a number")
        if positive and value <= 0:
            raise UserError(f"{self.file}: {key}={value}: must be > 0")
        return value


def _statistics(found: _Reader) -> dict[str, tuple[float, float]]:
    if found.content.get("inference_config") is None:
        return STATISTICS
    return {
        name: (
            found.number(f"inference_config.{name}_mean", math.nan, positive=False),
            found.number(f"inference_config.{name}_std", math.nan),
        )
        for name in DIMENSIONS
    }


def _lora(found: _Reader) -> Lora | None:
    section = "peft_lora_config"
    if found.content.get(section) is None or not found.get(f"{section}.lora_enable", True):
        return None
    rank = found.number(f"{section}.lora_r", math.nan)
    alpha = found.number(f"{section}.lora_alpha", math.nan)
    exclude = found.get(f"{section}.lora_namespan_exclude", None)
    exclude = [exclude] if isinstance(exclude, str) else list(NOT_ADAPTED if exclude is None else exclude)
    if not found.get(f"{section}.vision_lora", False):
        exclude.append("visual")
    scale = alpha / (math.sqrt(rank) if found.get(f"{section}.use_rslora", False) else rank)
    last = int(found.number(f"{section}.num_lora_modules", -1, positive=False))
    return Lora(int(rank), scale, tuple(exclude), last)


def weights_file(directory: Path) -> Path:
    """The one file of weights: in the newest `checkpoint-N/`, or in the directory itself."""
    steps = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    place = max(steps, key=lambda p: int(p.name.partition("-")[2]), default=directory)
    if (place / "adapter_model.safetensors").is_file() and not (place / "model.pth").is_file():
        raise UserError(f"{place}: holds adapters without the model; save the whole state dict as model.pth")
    files = sorted(p for p in place.iterdir() if p.suffix in (".pth", ".safetensors"))
    chosen = [p for p in files if p.name == "model.pth"] or files
    if len(chosen) != 1:
        what = f"{len(files)} files of weights ({', '.join(p.name for p in files)})" if files else "no weights"
        raise UserError(f"checkpoint={place}: {what}; expected checkpoint-N/model.pth or one .pth or .safetensors file")
    return chosen[0]


def base_directory(directory: Path, base: str | None, settings: Settings) -> Path:
    """Where Qwen2-VL's config.json and tokenizer are: `base`, the checkpoint's directory, or what its config names."""
    named = [base] if base is not None else [str(directory), *([settings.base] if settings.base else [])]
    for place in map(Path, named):
        if (place / "config.json").is_file() and any((place / name).is_file() for name in TOKENIZER_FILES):
            kind = _Reader(place / "config.json", _json(place / "config.json")).content.get("model_type")
            if kind != "qwen2_vl":
                raise UserError(
                    f"{place}/config.json: model_type={kind}: expected qwen2_vl; name its directory as base"
                )
            return place
    raise UserError(
        f"{'base' if base is not None else 'checkpoint'}={named[0]}: has no config.json with a tokenizer "
        f"({' or '.join(TOKENIZER_FILES)}); fetch Qwen/Qwen2-VL-2B-Instruct (without its weights) and name it as base"
    )


def read_state(file: Path) -> State:
    """The tensors of a .safetensors file or of a torch state dict; nothing else is unpickled."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        # mapped: the ranks of a host share the 5 GB
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # safetensors, pickle, zip and torch have none in common
        raise UserError(f"{file}: not readable as a state dict of tensors: {reason(error)}; fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{file}: not a state dict of tensors; save model.state_dict()")
    return state


def today(key: str) -> str:
    """A key of the file as `Qwen2VLModel` names it; the heads keep their names, adapters lose theirs."""
    key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    key = re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", key)
    if key.startswith(("model.visual.", "model.language_model.")):
        return key.removeprefix("model.")
    return re.sub(r"^model\.", "language_model.", key)


def merged(
    file: Path,
    state: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    linears: Iterable[str],
    lora: Lora | None,
    dtype: torch.dtype,
) -> tuple[State, Account]:
    """The weights by today's names with W + scale·B·A in place of adapted ones, and the account of the file's keys.

    `shapes` of every weight that there must be, `linears`: names of the linear layers, in order. The sum is taken in
    float32 and rounded to `dtype` once. Raises UserError, one
    line, for a missing, unknown or doubled key, a wrong shape, and adapters that `lora` does not describe.
    """
    named: State = {}
    for key, tensor in state.items():
        if today(key) in named:
            raise UserError(f"{file}: {key}: stands for the same weight as another key; fetch the file again")
        named[today(key)] = tensor
    unused = tuple(key for key in named if key.startswith("lm_head."))  # tied to the embedding; no score passes it
    for key in unused:
        del named[key]
    adapters = {key: named.pop(key) for key in list(named) if re.search(r"\.lora_[AB]\.weight$", key)}
    expected = {f"{name}.lora_{side}.weight" for name in adapted(linears, lora) if name != "lm_head" for side in "AB"}
    _complete(file, named.keys() | adapters.keys(), set(shapes) | expected)
    for key, shape in shapes.items():
        _shaped(file, key, named[key], list(shape))
    pairs = sorted(key.removesuffix(".lora_A.weight") for key in adapters if key.endswith(".lora_A.weight"))
    for name in pairs:
        assert lora is not None  # adapters are expected with it alone
        weight, a, b = named[f"{name}.weight"], adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]
        _shaped(file, f"{name}.lora_A.weight", a, [lora.rank, weight.shape[1]])
        _shaped(file, f"{name}.lora_B.weight", b, [weight.shape[0], lora.rank])
        named[f"{name}.weight"] = (weight.float() + lora.scale * (b.float() @ a.float())).to(dtype)
    return named, Account(str(file), len(state), len(shapes), len(pairs), unused)


def adapted(linears: Iterable[str], lora: Lora | None) -> list[str]:
    """The linear layers that have adapters, by the rule that VideoAlign's training chose them with."""
    if lora is None:
        return []
    chosen = [name for name in linears if not any(part in name for part in lora.exclude)]
    return chosen[-lora.last :] if lora.last > 0 else chosen


def _complete(file: Path, found: set[str], expected: set[str]) -> None:
    for keys, what in ((expected - found, "missing"), (found - expected, "unknown")):
        if keys:
            first = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise UserError(
                f"{file}: {len(keys)} keys {what} ({first}), {len(found & expected)} of {len(expected)} found: it is "
                f"not the whole state dict of the model that config.json and {CONFIG} describe"
            )


def _shaped(file: Path, key: str, tensor: torch.Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        given = f"config.json, {CONFIG} and the tokenizer"
        raise UserError(f"{file}: {key}: shape {list(tensor.shape)}, but {shape} by {given}")
