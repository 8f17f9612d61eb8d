"""The word encoder: lengths, streams, and the same bits everywhere."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from megatron_sage.conditioning.words import WordEncoder
from megatron_sage.errors import UserError

TEXT = "a red circle moving left slowly"
GOLDEN = "506e72af1af9239bdb62d5502e37184ca680052a041c38eb9834d0c21289525c"  # models were trained on these bits


def digest(states: torch.Tensor) -> str:
    return hashlib.sha256(states.numpy().tobytes()).hexdigest()


def test_golden_value() -> None:
    states = WordEncoder().encode(TEXT).encoder_hidden_states
    assert states.shape == (6, 64) and states.dtype == torch.float32
    assert digest(states) == GOLDEN


def test_another_process_makes_the_same_bits() -> None:
    code = (
        "import hashlib; from megatron_sage.conditioning.words import WordEncoder; "
        f"print(hashlib.sha256(WordEncoder().encode({TEXT!r}).encoder_hidden_states.numpy().tobytes()).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
    )
    assert out.stdout.strip() == GOLDEN


@pytest.mark.parametrize(
    ("text", "length", "length_2"),
    [
        (TEXT, 6, 0),
        (" ", 1, 0),
        ("", 1, 0),
        ("stop!", 2, 0),
        ('a sign "Hi you"', 6, 6),
        ("“ab” and “c”", 7, 3),
        ('"', 1, 0),
        ("\n_", 1, 0),
        ("zwölf 12", 2, 0),
    ],
)
def test_lengths_follow_the_prompt(text: str, length: int, length_2: int) -> None:
    got = WordEncoder(dim=8, dim_2=4).encode(text)
    assert got.encoder_hidden_states.shape == (length, 8)
    assert got.encoder_hidden_states_2.shape == (length_2, 4)
    assert got.encoder_attention_mask.all() and got.encoder_attention_mask.shape == (length,)
    assert got.encoder_attention_mask_2.shape == (length_2,)


def test_vectors_have_unit_variance_and_words_are_far_apart() -> None:
    words = "red green blue yellow left right up down slowly quickly"
    states = WordEncoder(dim=512).encode(words).encoder_hidden_states
    assert states.var(dim=1) == pytest.approx(torch.ones(10), abs=0.15)
    cosine = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    assert (cosine - torch.eye(10)).abs().max() < 0.2


def test_a_word_keeps_most_of_its_vector_in_another_place_but_not_all() -> None:
    states = WordEncoder(dim=512).encode("red red").encoder_hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=0)
    assert 0.8 < cosine < 0.99
    still = WordEncoder(dim=512, position_scale=0).encode("red red").encoder_hidden_states
    assert torch.equal(still[0], still[1])


def test_case_does_not_matter_in_words_but_does_in_quotes() -> None:
    first, second = WordEncoder().encode('Sign "Hi"'), WordEncoder().encode('sign "hi"')
    assert torch.equal(first.encoder_hidden_states, second.encoder_hidden_states)
    assert not torch.equal(first.encoder_hidden_states_2, second.encoder_hidden_states_2)


def test_save_and_load(tmp_path) -> None:
    encoder = WordEncoder(dim=24, dim_2=12, position_scale=0.5)
    encoder.save_pretrained(tmp_path / "text_encoder")
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config == {"_class_name": "WordEncoder", "dim": 24, "dim_2": 12, "position_scale": 0.5}
    assert WordEncoder.from_pretrained(tmp_path / "text_encoder") == encoder


def test_the_fingerprint_tells_encoders_apart() -> None:
    prints = {WordEncoder(*settings).fingerprint for settings in ((64, 32, 0.3), (64, 32, 0.4), (64, 16), (32, 32))}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[]", "list"),
        ('{"_class_name": "Qwen2_5_VLTextModel"}', "Qwen2_5_VLTextModel"),
        ('{"_class_name": "WordEncoder", "dim": 64, "dim_2": 32}', "position_scale"),
        ('{"_class_name": "WordEncoder", "dim": 64, "dim_2": 32, "position_scale": 0.3, "heads": 2}', "heads"),
        ('{"_class_name": "WordEncoder", "dim": -1, "dim_2": 32, "position_scale": 0.3}', "dim=-1"),
        ('{"_class_name": "WordEncoder", "dim": 64, "dim_2": 32, "position_scale": "x"}', "position_scale='x'"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(tmp_path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=named) as error:
        WordEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
