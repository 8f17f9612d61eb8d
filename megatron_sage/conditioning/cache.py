"""A directory of prompt embeddings: the encoders run once, training reads files.

One safetensors file per prompt, named by the SHA-256 of the prompt and of the encoder's fingerprint, so that
another encoder's entries are never mistaken for this one's. Its metadata hold both in clear and a SHA-256 of the
tensors.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_sage.conditioning.embedding import PromptEmbedding
from megatron_sage.errors import UserError

FORMAT = "megatron_sage prompt embedding 1"
FIELDS = tuple(PromptEmbedding.__dataclass_fields__)


class CacheError(UserError):
    """An entry is missing, damaged or another prompt's or encoder's."""


class EmbeddingCache:
    """Prompt embeddings of one encoder in one directory; many processes may read and write it at once."""

    def __init__(self, directory: str | Path, fingerprint: str) -> None:
        self.directory = Path(directory)
        self.fingerprint = fingerprint

    def path(self, text: str) -> Path:
        """Where this prompt's entry lies, whether or not it exists."""
        key = hashlib.sha256(f"{self.fingerprint}\0{text}".encode()).hexdigest()
        return self.directory / f"{key}.safetensors"

    def __contains__(self, text: str) -> bool:
        return self.path(text).is_file()

    def get(self, text: str) -> PromptEmbedding:
        """Read an entry, every byte checked; CacheError, in one line, where it cannot be trusted."""
        path = self.path(text)
        if not path.is_file():
            raise CacheError(
                f"embedding cache {self.directory}: no entry for prompt {text!r} by this encoder; "
                "encode the prompts first, or correct data.embedding_cache"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CacheError(f"{path}: not a prompt embedding (format {metadata.get('format')!r}); delete it")
                if (metadata.get("text"), metadata.get("fingerprint")) != (text, self.fingerprint):
                    raise CacheError(
                        f"{path}: holds prompt {metadata.get('text')!r} of another encoder or name; "
                        "delete it and encode anew"
                    )
                missing = set(FIELDS) ^ set(file.keys())
                if missing:
                    raise CacheError(f"{path}: missing or unknown tensors: {', '.join(sorted(missing))}; delete it")
                tensors = {name: file.get_tensor(name) for name in FIELDS}
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{path}: damaged ({error}); delete it and encode anew") from error
        if _checksum(tensors) != metadata.get("sha256"):
            raise CacheError(f"{path}: damaged (the tensors do not match their SHA-256); delete it and encode anew")
        return PromptEmbedding(**tensors)

    def put(self, text: str, embedding: PromptEmbedding) -> Path:
        """Write an entry; atomic, so that a killed writer leaves the old entry or none."""
        tensors = {name: getattr(embedding, name).detach().cpu().contiguous() for name in FIELDS}
        metadata = {"format": FORMAT, "text": text, "fingerprint": self.fingerprint, "sha256": _checksum(tensors)}
        path = self.path(text)
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(save(tensors, metadata=metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def fetch(self, text: str, encode: Callable[[str], PromptEmbedding]) -> PromptEmbedding:
        """The entry, made by `encode` where it is missing, and remade with a warning where it is damaged."""
        if text in self:
            try:
                return self.get(text)
            except CacheError as error:
                warnings.warn(f"remade: {error}", stacklevel=2)
        embedding = encode(text)
        self.put(text, embedding)
        return embedding


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in FIELDS:
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
