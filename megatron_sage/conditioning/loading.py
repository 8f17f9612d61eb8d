"""transformers' models and tokenizers out of a pipeline's folder: known classes, safetensors, nothing left random."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_sage.errors import UserError
from megatron_sage.reporting.progress import no_progress_bar

# What a broken, foreign or incomplete folder makes transformers raise.
BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError, in one line, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a HunyuanVideo-1.5 checkpoint in the diffusers layout"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__}, not a JSON object; fetch it again")
    return content


def class_of(root: Path, part: str, known: tuple[str, ...]) -> str:
    """The class that model_index.json gives `part` (config.json's architectures without one), which must be known."""
    index = root / "model_index.json"
    if index.is_file():
        source, entry = index, read_json(index).get(part)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    else:
        source = root / part / "config.json"
        names = read_json(source).get("architectures")
        name = names[0] if isinstance(names, list) and names else None
    if name not in known:
        raise UserError(f"{source}: the class of {part} is {name}, expected {' or '.join(known)}")
    return str(name)


def load_model(cls: Any, folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> torch.nn.Module:
    """A model for inference; `dtype` None: as stored. UserError where a weight is missing or does not fit.

    transformers only warns of missing weights and leaves them random.
    """
    try:
        with no_progress_bar():
            model, report = cls.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except BROKEN as error:
        raise UserError(f"{folder}: cannot be loaded ({_reason(error)}); fetch the folder again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights are missing, e.g. {missing[0]}; fetch the folder again")
    return model.to(device).eval().requires_grad_(False)


def load_processor(cls: Any, folder: Path, **settings: Any) -> Any:
    """A tokenizer or an image processor; UserError, in one line, where it cannot be read."""
    try:
        return cls.from_pretrained(folder, local_files_only=True, **settings)
    except BROKEN as error:
        raise UserError(f"{folder}: cannot be loaded ({_reason(error)}); fetch the folder again") from error


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
