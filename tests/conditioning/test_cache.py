"""The embedding cache: what is read is what was written, or an error."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from megatron_sage.conditioning.cache import CacheError, EmbeddingCache
from megatron_sage.conditioning.embedding import PromptEmbedding
from megatron_sage.conditioning.words import WordEncoder
from megatron_sage.errors import UserError

TEXT = 'a red circle beside "NaN" – ünïcode\nand a second line'
ENCODER = WordEncoder(dim=8, dim_2=4)


@pytest.fixture
def cache(tmp_path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache", ENCODER.fingerprint)


def equal(first: PromptEmbedding, second: PromptEmbedding) -> bool:
    return all(
        torch.equal(one, other) and one.dtype == other.dtype
        for one, other in zip(vars(first).values(), vars(second).values(), strict=True)
    )


@pytest.mark.parametrize("text", [TEXT, " ", "", "x" * 5000])
def test_round_trip(cache: EmbeddingCache, text: str) -> None:
    assert text not in cache
    cache.put(text, ENCODER.encode(text))
    assert text in cache and equal(cache.get(text), ENCODER.encode(text))
    assert [path.suffix for path in cache.directory.iterdir()] == [".safetensors"]  # no temporary file left


def test_other_dtypes_survive(cache: EmbeddingCache) -> None:
    embedding = ENCODER.encode(TEXT)
    embedding = replace(
        embedding,
        encoder_hidden_states=embedding.encoder_hidden_states.bfloat16(),
        encoder_attention_mask=embedding.encoder_attention_mask.long(),
    )
    cache.put(TEXT, embedding)
    assert equal(cache.get(TEXT), embedding)


def test_padded_and_cropped_embeddings_are_the_same_prompt(cache: EmbeddingCache) -> None:
    cropped = ENCODER.encode(TEXT)
    length = len(cropped.encoder_attention_mask)
    states, mask = torch.full((length + 5, 8), 7.0), torch.zeros(length + 5, dtype=torch.int64)
    states[2 : 2 + length], mask[2 : 2 + length] = cropped.encoder_hidden_states, 1  # padding on both sides
    padded = PromptEmbedding(states, mask, torch.full((9, 4), 7.0), torch.zeros(9))
    cache.put(TEXT, padded)
    valid = cache.get(TEXT).valid()
    assert torch.equal(valid.encoder_hidden_states, cropped.encoder_hidden_states)
    assert valid.encoder_hidden_states_2.shape == (0, 4)


def test_another_encoder_does_not_see_the_entry(cache: EmbeddingCache) -> None:
    cache.put(TEXT, ENCODER.encode(TEXT))
    other = EmbeddingCache(cache.directory, WordEncoder(dim=8, dim_2=5).fingerprint)
    assert TEXT not in other
    with pytest.raises(CacheError, match="no entry for prompt"):
        other.get(TEXT)


def refused(cache: EmbeddingCache, text: str, named: str) -> None:
    with pytest.raises(CacheError, match=named) as error:
        cache.get(text)
    assert "\n" not in str(error.value)


def test_an_entry_under_a_foreign_name_is_refused(cache: EmbeddingCache) -> None:
    cache.put("one", ENCODER.encode("one")).rename(cache.path("two"))
    refused(cache, "two", "holds prompt 'one'")


def test_every_flipped_byte_is_noticed(cache: EmbeddingCache) -> None:
    good = cache.put("a cat", ENCODER.encode("a cat")).read_bytes()
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 0x15
        cache.path("a cat").write_bytes(bytes(bad))
        with pytest.raises(CacheError):
            cache.get("a cat")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_entry_is_refused(cache: EmbeddingCache, keep: int) -> None:
    path = cache.put(TEXT, ENCODER.encode(TEXT))
    path.write_bytes(path.read_bytes()[:keep])
    refused(cache, TEXT, "damaged")


def test_a_foreign_safetensors_file_is_refused(cache: EmbeddingCache) -> None:
    cache.directory.mkdir()
    save_file({"weight": torch.zeros(2)}, cache.path(TEXT))
    refused(cache, TEXT, "not a prompt embedding")


def test_fetch_encodes_once_and_remakes_damage_with_a_warning(cache: EmbeddingCache) -> None:
    calls = []

    def encode(text: str) -> PromptEmbedding:
        calls.append(text)
        return ENCODER.encode(text)

    assert equal(cache.fetch(TEXT, encode), cache.fetch(TEXT, encode)) and calls == [TEXT]
    cache.path(TEXT).write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match="remade"):
        again = cache.fetch(TEXT, encode)
    assert equal(again, cache.get(TEXT)) and len(calls) == 2


def test_a_failed_write_keeps_the_old_entry_and_leaves_nothing_behind(cache: EmbeddingCache, monkeypatch) -> None:
    cache.put(TEXT, ENCODER.encode(TEXT))

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        cache.put(TEXT, ENCODER.encode("another"))
    assert equal(cache.get(TEXT), ENCODER.encode(TEXT)) and len(list(cache.directory.iterdir())) == 1


@pytest.mark.parametrize(
    ("states", "mask", "named"),
    [
        (torch.zeros(1, 3, 8), torch.ones(1, 3), "batch"),
        (torch.zeros(3, 8), torch.ones(4), "expected"),
        (torch.zeros(3, 8), torch.zeros(3), "no valid token"),
    ],
)
def test_a_malformed_embedding_is_refused(states: torch.Tensor, mask: torch.Tensor, named: str) -> None:
    with pytest.raises(UserError, match=named):
        PromptEmbedding(states, mask, torch.zeros(0, 4), torch.zeros(0))
