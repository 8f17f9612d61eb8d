"""The files of a model directory: all there, whole, and of the right names and shapes. No weight is read."""

from collections.abc import Iterator
from pathlib import Path

from megatron_sage.diagnosis.finding import Finding, tried
from megatron_sage.errors import UserError

SECTION = "weights"


def directory_findings(root: Path) -> Iterator[Finding]:
    """A pipeline in the diffusers layout, a Megatron checkpoint, or VideoAlign's checkpoint; by what it holds."""
    if not root.is_dir():
        yield Finding(SECTION, str(root), "failed", "no such directory; give a model directory or a configuration file")
    elif (root / "metadata.json").is_file() or (root / ".metadata").is_file():
        yield from megatron_checkpoint(root)
    elif (root / "model_config.json").is_file():
        yield from tried(SECTION, "VideoAlign", lambda: _videoalign(root))
    else:
        yield from pipeline(root)


def pipeline(root: Path) -> Iterator[Finding]:
    """transformer, vae, encoders and scheduler of a HunyuanVideo-1.5 directory."""
    yield from tried(SECTION, "transformer", lambda: _transformer(root))
    yield from tried(SECTION, "vae", lambda: _stored(root / "vae"))
    yield from tried(SECTION, "text encoders", lambda: _text_encoders(root))
    if (root / "image_encoder").is_dir() or _needs_image(root):
        yield from tried(SECTION, "image encoder", lambda: _image_encoder(root))
    if not (root / "scheduler" / "scheduler_config.json").is_file():
        yield Finding(SECTION, "scheduler", "optional", "none: sampler.shift is the configuration's")


def megatron_checkpoint(root: Path) -> Iterator[Finding]:
    """Names, shapes and sizes; its checksums are compared by `train` when it is read."""
    yield from tried(SECTION, "Megatron weights", lambda: _megatron(root))


def _transformer(root: Path) -> str:
    from megatron_sage.checkpoint.hf import open_hf

    files, config, _ = open_hf(root)
    return f"{len(files.specs)} tensors, {config.get('num_layers', 54)} blocks, task {config.get('task_type', 't2v')}"


def _megatron(root: Path) -> str:
    from megatron_sage.checkpoint import configs
    from megatron_sage.checkpoint.keymap import KeyMap
    from megatron_sage.checkpoint.torch_dist import MegatronDirectory

    config = configs.read_config(root, configs.DIFFUSERS_CLASS)
    directory = MegatronDirectory(root)
    directory.check(KeyMap.from_config(configs.complete(config, root / "config.json")).shapes("ours"))
    return f"{len(directory.specs)} tensors in {root}"


def _stored(folder: Path) -> str:
    """config.json and safetensors files whose headers can be read to their end."""
    from megatron_sage.checkpoint.safetensors_io import open_file
    from megatron_sage.conditioning.fingerprint import weight_files
    from megatron_sage.conditioning.loading import read_json

    read_json(folder / "config.json")
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder}: no safetensors weights; fetch the folder again")
    count = 0
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, its index names it; fetch it again")
        count += len(open_file(file).keys())
    return f"{count} tensors in {len(files)} file{'s' * (len(files) > 1)}"


def _text_encoders(root: Path) -> str:
    from megatron_sage.conditioning.encoders import open_text_encoder
    from megatron_sage.conditioning.words import WordEncoder

    encoder = open_text_encoder(root)  # its classes and settings; weights come later
    if isinstance(encoder, WordEncoder):
        return "the tiny world's words, no weights"
    parts = [part for part in ("text_encoder", "text_encoder_2") if (root / part).is_dir()]
    for part in ("text_encoder", "text_encoder_2"):
        if part not in parts:
            raise UserError(f"{root / part}: missing; fetch the folder again")
    for part in ("tokenizer", "tokenizer_2"):
        if not any((root / part).glob("*.json")):
            raise UserError(f"{root / part}: holds no tokenizer; fetch the folder again")
    return "; ".join(f"{part}: {_stored(root / part)}" for part in parts)


def _needs_image(root: Path) -> bool:
    from megatron_sage.config.model_defaults import is_image_to_video

    try:
        return is_image_to_video(root)
    except (UserError, OSError, ValueError):  # the transformer's own line says what is wrong with its config.json
        return False


def _image_encoder(root: Path) -> str:
    if not any((root / "feature_extractor").glob("*.json")):
        raise UserError(f"{root / 'feature_extractor'}: missing; fetch the folder again")
    return _stored(root / "image_encoder")


def _videoalign(root: Path) -> str:
    from megatron_sage.rewards.videoalign_checkpoint import read_settings, weights_file

    read_settings(root)
    file = weights_file(root)
    return f"{file}, {file.stat().st_size / 1e9:.2f} GB"
