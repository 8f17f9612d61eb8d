"""What an encoder is called in the cache: known in milliseconds, without loading its weights.

Two parts. `settings` is a hash of every small file (configurations, vocabularies) and of what the caller adds
(template, dtype, size). `weights` is a hash of the weight files' names, sizes and headers, and of samples of their
data, so that a fine-tuned encoder of the same shapes is another encoder. Weight files may be deleted once the cache
is full: an `encoder_*.json` in the cache then says which weights belonged to these settings.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from megatron_sage.errors import UserError

SMALL = (".json", ".txt", ".jinja", ".model")  # suffixes of configurations and vocabularies
Shapes = dict[str, tuple[int | None, ...]]  # tensor -> sizes, None where they vary
_SAMPLES, _BLOCK = 64, 1024  # blocks of a weight file's data that are hashed, and their bytes
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


def settings_digest(folders: Iterable[Path], extra: Mapping[str, str | int]) -> str:
    """SHA-256 of all small files directly in `folders`, by folder and file name, and of `extra`.

    Raises UserError for a folder that is not there.
    """
    digest = hashlib.sha256(json.dumps(dict(extra), sort_keys=True).encode())
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: not found; expected a HunyuanVideo-1.5 checkpoint in the diffusers layout")
        for path in sorted(folder.iterdir()):
            if path.suffix in SMALL and path.is_file():
                content = path.read_bytes()
                digest.update(f"{folder.name}/{path.name} {len(content)}\0".encode() + content)
    return digest.hexdigest()


def weights_digest(folders: Iterable[Path]) -> str | None:
    """SHA-256 of the safetensors files of `folders`: names, sizes, headers, samples of the data; None if any is gone.

    Raises UserError for a file that is not safetensors.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = weight_files(folder)
        if not files or not all(path.is_file() for path in files):
            return None
        for path in files:
            digest.update(f"{folder.name}/{path.name} {path.stat().st_size}\0".encode())
            for block in _sampled(path):
                digest.update(block)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model: those that its index names, or those that are there."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return sorted(folder.glob("*.safetensors"))
    try:
        names = {name for index in indices for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{indices[0]}: not an index of safetensors files; fetch it again") from error
    return [folder / name for name in sorted(names)]


def _sampled(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise UserError(f"{path}: not a safetensors file, or cut off; fetch it again")
        yield file.read(length)
        data = size - 8 - length
        for number in range(_SAMPLES):
            file.seek(8 + length + data * number // _SAMPLES)
            yield file.read(_BLOCK)


class Record:
    """`encoder_*.json` in a cache, one for each encoder that has filled it: which weights belonged to its settings."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def path(self, settings: str) -> Path:
        """One file for each encoder, so that runs that fill one cache at once do not overwrite each other's."""
        return self.directory / f"encoder_{settings[:32]}.json"

    def weights(self, settings: str) -> str | None:
        """What was remembered for these settings; None where nothing was."""
        path = self.path(settings)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            if content["settings"] == settings:
                return str(content["weights"])
            problem = "other settings"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = type(error).__name__
        cure = "delete it, restore the weights and run `megatron-sage encode`"
        raise UserError(f"{path}: not what `megatron-sage encode` writes ({problem}); {cure}")

    def remember(self, settings: str, weights: str) -> None:
        """Write a pair down, whole or not at all."""
        path = self.path(settings)
        content = json.dumps({"settings": settings, "weights": weights}, indent=1) + "\n"
        if path.is_file() and path.read_bytes() == content.encode():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
        temporary.write_text(content)
        os.replace(temporary, path)


class Fingerprinted:
    """What the encoders of a pipeline's folder share: a name that is known before their weights are loaded."""

    label = ""  # first word of the name
    folders: tuple[str, ...] = ()  # whose small files count
    weight_folders: tuple[str, ...] = ()  # whose weights count
    loaded: tuple[str, ...] = ()  # cached properties that hold models

    def __init__(self, root: Path, record: Record | None, **extra: str | int) -> None:
        self.root, self.record, self.extra = root, record, extra

    @cached_property
    def settings(self) -> str:
        """Hash of all that an embedding depends on besides its input and the weights."""
        return settings_digest([self.root / name for name in self.folders], self.extra)

    @cached_property
    def weights(self) -> str | None:
        """Hash of the weight files; None where one is gone."""
        return weights_digest([self.root / name for name in self.weight_folders])

    @cached_property
    def fingerprint(self) -> str:
        """Part of the cache's key. UserError where the weights are gone and no record knows them."""
        weights = self.weights or (self.record.weights(self.settings) if self.record else None)
        if weights is None:
            where = " or ".join(self.weight_folders)
            known = f", and {self.record.directory} does not know them" if self.record else ""
            raise UserError(
                f"{self.root}: weights of {where} are missing (safetensors){known}; fetch the checkpoint again"
            )
        return f"{self.label} {self.settings[:32]} {weights[:32]}"

    def remember(self) -> None:
        """Write into the record which weights belong to these settings, so that they may be deleted."""
        if self.record is not None and self.weights is not None:
            self.record.remember(self.settings, self.weights)

    def release(self) -> None:
        """Forget what `encode` has loaded; the next one loads it again."""
        for name in self.loaded:
            self.__dict__.pop(name, None)
