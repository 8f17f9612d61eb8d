"""A word encoder that needs no weights, in place of Qwen2.5-VL and ByT5.

It makes what the real encoders make - two streams of embeddings, masks, a length that follows the prompt - from
hashes alone, so that a prompt's embedding is bit-identical in every process and on every machine, and a model
trained on one machine's embeddings can be prompted on another.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from megatron_sage.conditioning.embedding import PromptEmbedding
from megatron_sage.errors import UserError

CLASS_NAME = "WordEncoder"
EMPTY = "<empty>"  # the one token of a prompt without words: the unconditional branch of guidance
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")


@dataclass(frozen=True)
class WordEncoder:
    """Words of the prompt in the first stream, characters of its quoted text in the second.

    Each token is the sum of its word's vector and `position_scale` times its position's vector, rescaled to unit
    variance. `dim` and `dim_2` are the transformer's text_embed_dim and text_embed_2_dim.
    """

    dim: int = 64
    dim_2: int = 32
    position_scale: float = 0.3

    def __post_init__(self) -> None:
        for key in ("dim", "dim_2"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise UserError(f"text encoder: {key}={value!r}: expected a positive integer")
        scale = self.position_scale
        if type(scale) not in (int, float) or not 0 <= scale < float("inf"):
            raise UserError(f"text encoder: position_scale={scale!r}: expected a finite number, 0 or more")

    @property
    def fingerprint(self) -> str:
        """Names everything that an embedding depends on besides the text; part of the cache's key."""
        return f"{CLASS_NAME} v1 {json.dumps(asdict(self), sort_keys=True)}"

    @property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """What an embedding's tensors look like; None: the length follows the prompt."""
        return {"encoder_hidden_states": (None, self.dim), "encoder_hidden_states_2": (None, self.dim_2)}

    def encode(self, text: str) -> PromptEmbedding:
        """The embedding of one prompt, float32; a prompt without words (" ") is exactly one token."""
        words = TOKEN.findall(text.lower()) or [EMPTY]
        characters = [c for match in QUOTED.finditer(text) for c in (match[1] or match[2] or "")]
        states, states_2 = self._stream("word", words, self.dim), self._stream("character", characters, self.dim_2)
        mask, mask_2 = (torch.ones(len(tokens), dtype=torch.bool) for tokens in (words, characters))
        return PromptEmbedding(states, mask, states_2, mask_2)

    def _stream(self, kind: str, tokens: list[str], dim: int) -> torch.Tensor:
        scale = self.position_scale
        vectors = [
            (_hashed(f"{kind}:{token}", dim) + scale * _hashed(f"{kind} position:{index}", dim))
            / np.sqrt(1 + scale * scale)
            for index, token in enumerate(tokens)
        ]
        return torch.from_numpy(np.array(vectors, np.float64).reshape(len(tokens), dim).astype(np.float32))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, the encoder's only file."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": CLASS_NAME, **asdict(self)}, indent=2) + "\n"
        (directory / "config.json").write_text(text)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "WordEncoder":
        """Read config.json; UserError, in one line, where it is missing, broken or another encoder's."""
        path = Path(directory) / "config.json"
        try:
            config = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{path}: cannot read it ({error.strerror}); expected a saved {CLASS_NAME}") from error
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); save the encoder anew") from error
        if not isinstance(config, dict) or config.get("_class_name") != CLASS_NAME:
            found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
            raise UserError(f"{path}: _class_name is {found!r}, expected {CLASS_NAME!r}")
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        known = asdict(cls())
        if settings.keys() != known.keys():
            wrong = ", ".join(sorted(settings.keys() ^ known.keys()))
            raise UserError(f"{path}: missing or unknown keys: {wrong}; expected exactly {', '.join(known)}")
        return cls(**settings)


@lru_cache(maxsize=8192)
def _hashed(name: str, dim: int) -> np.ndarray:
    """Uniform on [-√3, √3] (mean 0, variance 1), float64 [dim], from SHA-256 in counter mode.

    Not numpy's generators: their streams may change between numpy versions.
    """
    blocks = [hashlib.sha256(f"{name}\0{block}".encode()).digest() for block in range(-(-dim // 8))]
    integers = np.frombuffer(b"".join(blocks), dtype="<u4")[:dim].astype(np.float64)
    return (integers + 0.5) * (2 * np.sqrt(3.0) / 2**32) - np.sqrt(3.0)
