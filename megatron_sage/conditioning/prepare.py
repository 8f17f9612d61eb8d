"""Fills the cache of a run's embeddings, checks it, and reads it back.

Training loads no encoder when the cache is full: `fill_cache` opens the entries of its share, and only a missing or
damaged one makes it load weights. They are released before it returns.
"""

import gc
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sage.conditioning.cache import CacheError, EmbeddingCache
from megatron_sage.conditioning.codec import DTYPES
from megatron_sage.conditioning.embedding import ImageEmbedding, PromptEmbedding
from megatron_sage.conditioning.encoders import ImageEncoder, TextEncoder, open_image_encoder, open_text_encoder
from megatron_sage.conditioning.fingerprint import Fingerprinted, Record
from megatron_sage.conditioning.loading import read_json
from megatron_sage.config import Config
from megatron_sage.data.backend import open_reader
from megatron_sage.data.prompts import PromptRow
from megatron_sage.errors import UserError

NEGATIVE = PromptRow(" ")  # the unconditional branch of guidance: an empty prompt, which has no glyph text
# transformer's config key, diffusers' default, encoder's tensor
_WIDTHS = (
    ("text_embed_dim", 3584, "encoder_hidden_states"),
    ("text_embed_2_dim", 1472, "encoder_hidden_states_2"),
    ("image_embed_dim", 1152, "image_embeds"),
)


@dataclass(frozen=True)
class Conditions:
    """The encoders of a run, not loaded yet, and the cache of what they make."""

    text_encoder: TextEncoder
    texts: EmbeddingCache[PromptEmbedding]
    image_encoder: ImageEncoder | None  # None: no prompt has an image
    images: EmbeddingCache[ImageEmbedding] | None


def cache_directory(config: Config) -> Path:
    """Where a run's embeddings lie: data.embedding_cache, or inside its own directory."""
    return Path(config.data.embedding_cache or Path(config.output_dir) / "embeddings")


def open_conditions(config: Config, rows: Sequence[PromptRow], device: torch.device | str = "cpu") -> Conditions:
    """Encoders and cache for these prompts; no weights are read.

    Raises UserError for a model directory that lacks something, or whose encoders do not fit its transformer.
    """
    dtype = DTYPES[config.precision.dtype if config.encoders.dtype == "auto" else config.encoders.dtype]
    directory, root = cache_directory(config), Path(config.model.pretrained)
    record = Record(directory)
    text_encoder = open_text_encoder(root, device, dtype, record)
    texts = EmbeddingCache(directory, text_encoder.fingerprint, PromptEmbedding, text_encoder.shapes)
    image_encoder: ImageEncoder | None = None
    images: EmbeddingCache[ImageEmbedding] | None = None
    if any(row.image is not None for row in rows):
        image_encoder = open_image_encoder(root, config.video.height, config.video.width, device, dtype, record)
        images = EmbeddingCache(directory, image_encoder.fingerprint, ImageEmbedding, image_encoder.shapes)
    _check_widths(root, text_encoder.shapes | (image_encoder.shapes if image_encoder else {}))
    return Conditions(text_encoder, texts, image_encoder, images)


def fill_cache(
    config: Config,
    rows: Sequence[PromptRow],
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    on_item: Callable[[], object] | None = None,
) -> Counter[str]:
    """Encode what the cache lacks for `rows` and for the negative prompt; damaged entries are made again.

    Of the distinct texts and pictures this rank takes every `world`-th, whatever is there already: ranks need not
    agree on what is missing, which changes while others write. `on_item` is called after each. Returns how many were
    "found" and "encoded". The encoders are released.
    """
    conditions, counts = open_conditions(config, rows, device), Counter[str]()

    def each(keys: Sequence[Any], cache: Any, key_of: Callable[[Any], str], make: Callable[[Any], Any]) -> None:
        for item in keys:
            key = key_of(item)
            found = _intact(cache, key)
            if not found:
                cache.put(key, _finite(make(item), item, config))
            counts["found" if found else "encoded"] += 1
            if on_item is not None:
                on_item()

    texts, pictures = share(rows, rank, world)
    for encoder in (conditions.text_encoder, conditions.image_encoder):
        if isinstance(encoder, Fingerprinted):
            encoder.remember()
    with _released(conditions.text_encoder):
        each(texts, conditions.texts, lambda text: text, conditions.text_encoder.encode)
    image_encoder = conditions.image_encoder
    if image_encoder is not None:
        read_image = open_reader(config.data.backend).read_image
        with _released(image_encoder):
            each(pictures, conditions.images, image_key, lambda path: image_encoder.encode(read_image(path)))
    return counts


def check_cache(config: Config, rows: Sequence[PromptRow]) -> tuple[Counter[str], list[str]]:
    """Reads every entry that `rows` need, and writes nothing.

    Returns how many are "good", "missing" and "damaged", and a line for each that is not good.
    """
    conditions, counts, lines = open_conditions(config, rows), Counter[str](), []
    texts, pictures = share(rows)
    needed: list[tuple[Any, str, str]] = [(conditions.texts, text, text) for text in texts]
    needed += [(conditions.images, image_key(path), str(path)) for path in pictures]
    for cache, key, shown in needed:
        try:
            cache.get(key, shown)
            counts["good"] += 1
        except CacheError as error:
            counts["damaged" if key in cache else "missing"] += 1
            lines.append(str(error))
    return counts, lines


def load_prompt(
    config: Config, row: PromptRow, conditions: Conditions | None = None
) -> tuple[PromptEmbedding, ImageEmbedding | None]:
    """What the cache holds of one prompt; the image's part is None where it has none.

    Args:
        conditions: from `open_conditions`, to save opening the encoders' configurations for every prompt.

    Raises CacheError, in one line, for an entry that is missing or damaged.
    """
    conditions = conditions or open_conditions(config, [row])
    text = conditions.texts.get(row.text)
    if row.image is None:
        return text, None
    if conditions.images is None:
        raise UserError(f"{row.image}: the conditions were opened without images; open them with all prompts")
    return text, conditions.images.get(image_key(row.image), str(row.image))


def share(rows: Sequence[PromptRow], rank: int = 0, world: int = 1) -> tuple[list[str], list[Path]]:
    """The distinct texts, the negative prompt's first, and pictures of `rows` that belong to a rank."""
    texts = list(dict.fromkeys([NEGATIVE.text, *(row.text for row in rows)]))
    pictures = list(dict.fromkeys(row.image for row in rows if row.image is not None))
    first = (rank - len(texts)) % world  # go on counting after the texts: few of both are spread as well
    return texts[rank::world], pictures[first::world]


def image_key(path: Path) -> str:
    """SHA-256 of a picture's file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); restore it, or remove it from the prompts"
        ) from error


def _intact(cache: EmbeddingCache[Any], key: str) -> bool:
    if key not in cache:
        return False
    try:
        cache.get(key)
    except CacheError:
        return False
    return True


def _finite(embedding: Any, item: str | Path, config: Config) -> Any:
    """Half precision overflows in some encoders: such an embedding must never be trained on."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in vars(embedding).values()):
        dtype = config.encoders.dtype
        raise UserError(f"encoders.dtype={dtype}: the embedding of {str(item)!r} is not finite; try bf16 or fp32")
    return embedding


def _check_widths(root: Path, shapes: dict[str, tuple[int | None, ...]]) -> None:
    transformer = read_json(root / "transformer" / "config.json")
    for key, default, name in _WIDTHS:
        wanted, found = transformer.get(key, default), shapes.get(name, (None, None))[-1]
        if name in shapes and wanted != found:
            raise UserError(
                f"{root}: the transformer's {key} is {wanted}, its encoder's width is {found}; "
                "the folders belong to different checkpoints"
            )


@contextmanager
def _released(encoder: object) -> Iterator[None]:
    """Drops an encoder's weights at the end, also from the GPU's cache, for training needs the memory."""
    try:
        yield
    finally:
        if isinstance(encoder, Fingerprinted):
            encoder.release()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
