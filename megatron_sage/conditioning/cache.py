"""A directory of embeddings: the encoders run once, training reads files.

One safetensors file per prompt or picture, named by the SHA-256 of its key and of the encoder's fingerprint, so that
another encoder's entries are never mistaken for this one's. Its metadata hold both in clear and a SHA-256 of the
tensors. A prompt's key is its text; a picture's is the SHA-256 of its file.
"""

import hashlib
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_sage.conditioning.embedding import ImageEmbedding, PromptEmbedding
from megatron_sage.errors import UserError

E = TypeVar("E", PromptEmbedding, ImageEmbedding)
NOUNS = {PromptEmbedding: "prompt", ImageEmbedding: "image"}
CURE = "run `megatron-sage encode`"


class CacheError(UserError):
    """An entry is missing, damaged or another prompt's or encoder's."""


class EmbeddingCache(Generic[E]):
    """Embeddings of one encoder in one directory; many processes may read and write it at once.

    Args:
        kind: PromptEmbedding or ImageEmbedding.
        shapes: tensor -> sizes that every entry must have, None for a size that varies; tensors that are not named
            may have any.
    """

    def __init__(
        self,
        directory: str | Path,
        fingerprint: str,
        kind: type[Any] = PromptEmbedding,
        shapes: Mapping[str, tuple[int | None, ...]] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.fingerprint = fingerprint
        self.kind = kind
        self.noun = NOUNS[kind]
        self.fields = tuple(kind.__dataclass_fields__)
        self.shapes = dict(shapes or {})

    @property
    def format(self) -> str:
        """What an entry's metadata say it is."""
        return f"megatron_sage {self.noun} embedding 1"

    def path(self, key: str) -> Path:
        """Where this entry lies, whether or not it exists."""
        name = hashlib.sha256(f"{self.fingerprint}\0{key}".encode()).hexdigest()
        return self.directory / f"{name}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str, shown: str | None = None) -> E:
        """Read an entry, every byte checked; CacheError, in one line, where it cannot be trusted.

        `shown` stands for the key in that line, e.g. a picture's path.
        """
        path = self.path(key)
        if not path.is_file():
            raise CacheError(
                f"embedding cache {self.directory}: no entry for {self.noun} {(shown or key)!r} by this encoder; "
                f"{CURE}, or correct data.embedding_cache"
            )
        tensors, metadata = self._read(path, key)
        if _checksum(tensors) != metadata.get("sha256"):
            raise CacheError(f"{path}: damaged (the tensors do not match their SHA-256); {CURE}")
        try:
            embedding = self.kind(**tensors)
        except UserError as error:
            raise CacheError(f"{path}: not a {self.noun} embedding ({error}); {CURE}") from error
        for name, sizes in self.shapes.items():
            shape = tensors[name].shape
            if len(shape) != len(sizes) or any(want not in (None, size) for want, size in zip(sizes, shape)):  # noqa: B905
                wanted = ["any" if size is None else size for size in sizes]
                raise CacheError(f"{path}: {name} is {list(shape)}, this encoder's is {wanted}; {CURE}")
        return embedding

    def put(self, key: str, embedding: E) -> Path:
        """Write an entry; atomic, so that a killed writer leaves the old entry or none."""
        tensors = {name: getattr(embedding, name).detach().cpu().contiguous() for name in self.fields}
        metadata = {"format": self.format, "text": key, "fingerprint": self.fingerprint, "sha256": _checksum(tensors)}
        path = self.path(key)
        self.directory.mkdir(parents=True, exist_ok=True)
        # Not the process id: ranks of several machines may share the directory.
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(save(tensors, metadata=metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def fetch(self, key: str, encode: Callable[[str], E]) -> E:
        """The entry, made by `encode` where it is missing, and remade with a warning where it is damaged."""
        if key in self:
            try:
                return self.get(key)
            except CacheError as error:
                warnings.warn(f"remade: {error}", stacklevel=2)
        embedding = encode(key)
        self.put(key, embedding)
        return embedding

    def _read(self, path: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != self.format:
                    found = metadata.get("format")
                    raise CacheError(f"{path}: not a {self.noun} embedding (format {found!r}); {CURE}")
                if (metadata.get("text"), metadata.get("fingerprint")) != (key, self.fingerprint):
                    raise CacheError(
                        f"{path}: holds {self.noun} {metadata.get('text')!r} of another encoder or name; {CURE}"
                    )
                wrong = set(self.fields) ^ set(file.keys())
                if wrong:
                    raise CacheError(f"{path}: missing or unknown tensors: {', '.join(sorted(wrong))}; {CURE}")
                # A copy: tensors that stay mapped to the file would crash the process if it were cut off later.
                return {name: file.get_tensor(name).clone() for name in self.fields}, metadata
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path}: damaged ({error}); {CURE}") from error


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in tensors:
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
