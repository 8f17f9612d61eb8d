"""What is evaluated: the base and checkpoints of several kinds, checked before a model is built, loaded one by one."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sage.anchor import BaseModel
from megatron_sage.checkpoint import configs
from megatron_sage.checkpoint.distributed import load_hf_weights, load_weights
from megatron_sage.checkpoint.hf import open_hf
from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.checkpoint.staging import on_all_ranks
from megatron_sage.checkpoint.store import complete, opened
from megatron_sage.checkpoint.torch_dist import MANIFEST, MegatronDirectory, file_checksum, first_failure, read_object
from megatron_sage.config import Config
from megatron_sage.engine import Engine, read_transformer_config
from megatron_sage.errors import UserError
from megatron_sage.model.lora_targets import is_adapter

BASE = "base"
Kind = Literal["weights", "adapters", "diffusers"]


@dataclass(frozen=True)
class Source:
    """A model to be evaluated, under the name that tables and files have for it."""

    name: str
    path: Path
    kind: Kind  # all weights of a Megatron directory; a run's adapters; a transformer directory of diffusers
    fingerprint: str  # of the files: changed weights are other results


def find_sources(config: Config, given: Sequence[str], with_base: bool = True) -> list[Source]:
    """`base` (model.weights) and every NAME=PATH, each checked against the model. No collectives.

    Raises UserError, in one line, for a name that is taken or unusable and for a directory that does not hold this
    model, is incomplete, or has adapters that the configuration does not describe.
    """
    assert config.model.weights is not None  # validated
    ours = configs.complete(read_transformer_config(config.model.pretrained), Path(config.model.pretrained))
    found = [_source(config, ours, BASE, Path(config.model.weights))] if with_base else []
    for text in given:
        name, equals, path = text.partition("=")
        if not (equals and path) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise UserError(
                f"--checkpoint {text}: write NAME=PATH, the name of letters, digits, '.', '_', '+' or '-': it names "
                "files and a row of the table"
            )
        if name.lower() in (BASE, *(source.name.lower() for source in found)):
            taken = "is model.weights itself" if name.lower() == BASE else "is taken"
            raise UserError(f"--checkpoint {text}: the name {name} {taken}; choose another")
        found.append(_source(config, ours, name, Path(path)))
    if not found:
        raise UserError("--no-base: nothing is left to evaluate; name a checkpoint: --checkpoint NAME=PATH")
    return found


def _source(config: Config, ours: dict[str, Any], name: str, path: Path) -> Source:
    if not path.is_dir():
        raise UserError(f"{name}={path}: no such directory; name a checkpoint, e.g. RUN/checkpoints/iteration_000100")
    kind = _kind(path, name)
    if kind == "diffusers":
        files, theirs, _ = open_hf(path)
        _same_model(ours, configs.complete(theirs, path), f"{name}={path}")
        files.check(KeyMap.from_config(ours).shapes("diffusers"))
        directory = configs.transformer_directory(path)
        return Source(name, path, kind, fingerprint(directory, ["*.safetensors", "config.json"]))
    if (path / "config.json").is_file():
        theirs = configs.read_config(path, configs.DIFFUSERS_CLASS)
        _same_model(ours, configs.complete(theirs, path / "config.json"), f"{name}={path}")
    checkpoint = MegatronDirectory(path)
    if kind == "adapters":
        _same_adapters(config, read_object(path / "state.json")["identity"]["lora"], f"{name}={path}")
    else:
        checkpoint.check(KeyMap.from_config(ours).shapes("ours"))
    return Source(name, path, kind, fingerprint(path))


def _kind(path: Path, name: str) -> Kind:
    """By the files that are there; the usual slips are named."""
    if (path / "metadata.json").is_file():
        state = read_object(path / "state.json") if (path / "state.json").is_file() else {}
        return "adapters" if (state.get("identity") or {}).get("lora") else "weights"
    for directory in (path, path / "checkpoints"):
        if found := complete(directory):
            raise UserError(f"{name}={path}: holds {len(found)} checkpoints; name one of them, e.g. {found[-1]}")
    if (path / "config.json").is_file() or (path / "transformer" / "config.json").is_file():
        return "diffusers"
    if any(path.glob("pytorch_lora_weights*")):
        raise UserError(
            f"{name}={path}: an adapter file is not read here; name the run's checkpoint "
            "(RUN/checkpoints/iteration_NNNNNN), or merge it into its base: megatron-sage export"
        )
    raise UserError(
        f"{name}={path}: neither a Megatron checkpoint (metadata.json) nor a diffusers transformer (config.json)"
    )


def _same_model(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    for key in (key for key in ours if not key.startswith("_")):
        if theirs.get(key) != ours[key]:
            raise UserError(
                f"{where}: is of another model, with {key} {theirs.get(key)} where model.pretrained has {ours[key]}"
            )


def _same_adapters(config: Config, theirs: dict[str, Any], where: str) -> None:
    if config.lora.rank is None:
        raise UserError(f"{where}: holds adapters only: set lora.rank={theirs.get('rank')} and its other lora settings")
    ours = {key: value for key, value in asdict(config.lora).items() if key != "export"}
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise UserError(f"lora.{key}={ours[key]}: {where} was trained with {theirs.get(key)}: set it so")


def fingerprint(directory: Path, patterns: Sequence[str] = ("*", ".metadata")) -> str:
    """16 hex digits of a directory's files: of its manifest, or, without one, of names, sizes and contents (CRC-32)."""
    manifest = directory / MANIFEST
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    files = sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})
    said = [(file.name, file.stat().st_size, file_checksum(file)) for file in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def load_source(engine: Engine, source: Source) -> None:
    """Put a source's weights into the policy; what was there before leaves nothing behind. All ranks call."""
    chunks = engine.chunks
    if source.kind == "adapters":
        _load_adapters(engine, source)
    else:
        (load_hf_weights if source.kind == "diffusers" else load_weights)(chunks, source.path)
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if is_adapter(name) and ".lora_B." in name:  # B = 0: the model is its base
                    with torch.no_grad():
                        parameter.zero_()
    engine.quantisation.weights_changed()
    engine.quantisation.calibrated = not engine.quantisation.delayed  # scales of these weights, not of the last ones


def _load_adapters(engine: Engine, source: Source) -> None:
    """The base, which a run with adapters does not save, and the adapters."""
    assert engine.config.model.weights is not None
    load_weights(engine.chunks, engine.config.model.weights)
    _, plain = opened(source.path)
    initial = f"{BaseModel(engine.chunks, engine.groups).checksum:016x}"
    with on_all_ranks():
        if plain["identity"]["initial model"] != initial:
            raise UserError(
                f"{source.name}={source.path}: its adapters belong to another base than model.weights="
                f"{engine.config.model.weights} (checksum {plain['identity']['initial model']}, here {initial})"
            )
    shards = {
        str(number): {name: shard for name, shard in chunk.sharded_state_dict().items() if is_adapter(name)}
        for number, chunk in enumerate(engine.chunks)
    }
    try:
        dist_checkpointing.load(shards, str(source.path))  # in place, as load_weights does
    except CheckpointException as failure:
        raise first_failure(source.path, failure) from failure
