"""The encoders against diffusers' own pipelines on random tiny models of the released classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_sage.conditioning.encoders import open_image_encoder, open_text_encoder
from megatron_sage.conditioning.qwen import SYSTEM_MESSAGE, glyph_text
from megatron_sage.conditioning.words import WordEncoder
from megatron_sage.errors import UserError
from tests.hv15 import write_pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PROMPTS = {
    "plain": "a red circle moves left slowly",
    "empty": "",
    "space": " ",
    "quotes": 'a sign "OPEN" beside “Grüße”, then "OPEN" again and ""',
    "quote over two lines": 'two "lines\nof" text "one"',
    "unclosed": 'a "quote that never ends',
    "unicode": "日本の桜 🌸, ünïcode and\ttabs",
    "long": "many words " * 300,
    "long quote": '"' + "letters" * 60 + '" and "more"',
    "one token short": "x" * 580,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("hv15") / "i2v", "i2v", seed=3)


@pytest.fixture(scope="module")
def pipelines(root: Path):
    """dtype name -> diffusers' pipeline, loaded once each."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = HunyuanVideo15ImageToVideoPipeline.from_pretrained(root, dtype=DTYPES[name])
        return made[name]

    return get


@torch.no_grad()
def wanted(pipeline, text: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    states, mask, states_2, mask_2 = pipeline.encode_prompt(text, device="cpu", dtype=dtype)
    return states[0][mask[0] != 0], states_2[0][mask_2[0] != 0]


@pytest.mark.parametrize("name", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.nightly)])
def test_prompts_are_what_diffusers_makes_of_them(root: Path, pipelines, name: str) -> None:
    encoder, pipeline = open_text_encoder(root, dtype=DTYPES[name]), pipelines(name)
    for case, text in PROMPTS.items():
        states, states_2 = wanted(pipeline, text, DTYPES[name])
        found = encoder.encode(text)
        assert torch.equal(found.encoder_hidden_states, states), case
        assert torch.equal(found.encoder_hidden_states_2, states_2), case
        assert found.encoder_hidden_states.dtype == DTYPES[name] and found.encoder_attention_mask.all()
        assert found.encoder_hidden_states.shape[1:] == encoder.shapes["encoder_hidden_states"][1:]
    assert len(encoder.encode(PROMPTS["long"]).encoder_hidden_states) == 1000
    assert len(encoder.encode(PROMPTS["plain"]).encoder_hidden_states_2) == 0
    assert len(encoder.encode(PROMPTS["long quote"]).encoder_hidden_states_2) == 256


def test_the_system_message_is_the_pipelines(pipelines) -> None:
    assert SYSTEM_MESSAGE == pipelines("fp32").system_message


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("nothing quoted", None),
        ('say "a" and “b”', 'Text "a". Text "b". '),
        ('"a" “b” "a"', 'Text "a". Text "b". '),
        ('an empty ""', 'Text "". '),
        ('"x\ny"', None),
    ],
)
def test_glyph_text(prompt: str, text: str | None) -> None:
    assert glyph_text(prompt) == text


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 32)])
@pytest.mark.parametrize("picture", [(70, 50), (31, 97)])
def test_images_are_what_diffusers_makes_of_them(root: Path, pipelines, name, height, width, picture) -> None:
    dtype, pipeline = DTYPES[name], pipelines(name)
    image = np.random.default_rng(sum(picture)).integers(0, 256, (*picture, 3), dtype=np.uint8)
    encoder = open_image_encoder(root, height, width, dtype=dtype)
    found = encoder.encode(image)
    cropped = pipeline.video_processor.resize(Image.fromarray(image), height=height, width=width, resize_mode="crop")
    latents = torch.zeros(1, 32, 3, height // 16, width // 16)
    with torch.no_grad():
        tokens = pipeline.encode_image(cropped, 1, torch.device("cpu"), dtype)
        frames, _ = pipeline.prepare_cond_latents_and_mask(latents, cropped, 1, height, width, torch.float32, "cpu")
    assert torch.equal(found.image_embeds, tokens[0]) and found.image_embeds.dtype == dtype
    assert torch.equal(found.first_frame, frames[0, :, 0]) and found.first_frame.dtype == torch.float32
    assert found.first_frame.shape == encoder.shapes["first_frame"]


def copied(root: Path, target: Path, *folders: str) -> Path:
    for folder in folders:
        shutil.copytree(root / folder, target / folder)
    shutil.copy(root / "model_index.json", target / "model_index.json")
    return target


def test_a_whole_qwen_serves_as_well(root: Path, tmp_path: Path, pipelines) -> None:
    """The language model inside Qwen2_5_VLForConditionalGeneration, as some checkpoints save it."""
    copied(root, tmp_path, *ENCODER_FOLDERS)
    inner = pipelines("fp32").text_encoder
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}
    config = Qwen2_5_VLConfig(text_config=inner.config.to_dict(), vision_config=vision, image_token_id=1)
    whole = Qwen2_5_VLForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(inner.state_dict())
    shutil.rmtree(tmp_path / "text_encoder")
    whole.save_pretrained(tmp_path / "text_encoder")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["text_encoder"][1] = "Qwen2_5_VLForConditionalGeneration"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    encoder = open_text_encoder(tmp_path)
    assert encoder.shapes["encoder_hidden_states"] == (None, 24)
    for text in (PROMPTS["plain"], PROMPTS["long"]):
        assert torch.equal(
            encoder.encode(text).encoder_hidden_states, wanted(pipelines("fp32"), text, torch.float32)[0]
        )
    (tmp_path / "model_index.json").unlink()  # config.json's architectures say the same
    assert encoder.fingerprint == open_text_encoder(tmp_path).fingerprint


def test_a_left_padding_tokenizer_changes_nothing(root: Path, tmp_path: Path) -> None:
    copied(root, tmp_path, *ENCODER_FOLDERS)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    here, there = (open_text_encoder(place).encode("a cat") for place in (tmp_path, root))
    assert torch.equal(here.encoder_hidden_states, there.encoder_hidden_states)


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweighted(path: Path) -> None:
    """Other values, the same header and size: a fine-tuned encoder."""
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_the_fingerprint_follows_what_matters_and_nothing_else(root: Path, tmp_path: Path) -> None:
    place = copied(root, tmp_path, *ENCODER_FOLDERS)
    first = open_text_encoder(place).fingerprint
    assert first == open_text_encoder(root).fingerprint, "where the folder lies does not matter"
    seen = {first, open_text_encoder(place, dtype=torch.bfloat16).fingerprint}
    (place / "tokenizer" / "README.md").write_text("nothing")
    assert open_text_encoder(place).fingerprint == first
    changes = (
        lambda: edited(place / "text_encoder" / "config.json", rms_norm_eps=1e-6),
        lambda: edited(place / "tokenizer_2" / "tokenizer_config.json", extra_ids=0),
        lambda: (place / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}"),
        lambda: reweighted(place / "text_encoder" / "model.safetensors"),
        lambda: reweighted(place / "text_encoder_2" / "model.safetensors"),
    )
    for number, change in enumerate(changes):
        change()
        found = open_text_encoder(place).fingerprint
        assert found not in seen, number
        seen.add(found)


def test_image_fingerprints_hold_the_size(root: Path) -> None:
    names = {open_image_encoder(root, *size).fingerprint for size in ((32, 48), (48, 32), (32, 64))}
    assert len(names) == 3
    with pytest.raises(UserError, match=r"video.height=40: expected a multiple of 16"):
        open_image_encoder(root, 40, 48)


def test_the_tiny_worlds_encoder_is_recognised(tmp_path: Path) -> None:
    WordEncoder(dim=8, dim_2=4).save_pretrained(tmp_path / "text_encoder")
    assert open_text_encoder(tmp_path) == WordEncoder(dim=8, dim_2=4)
    with pytest.raises(UserError, match="has no image_encoder/; prompts with images need an image-to-video checkpoint"):
        open_image_encoder(tmp_path, 32, 32)


def without(tensor: str):
    def cut(path: Path) -> None:
        kept = {name: value for name, value in load_file(path).items() if tensor not in name}
        save_file(kept, path, metadata={"format": "pt"})

    return cut


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("text_encoder/config.json", Path.unlink, "cannot be read"),
        ("text_encoder/config.json", lambda path: path.write_text("{"), "not valid JSON"),
        ("model_index.json", lambda path: edited(path, text_encoder=["transformers", "LlamaModel"]), "LlamaModel"),
        ("model_index.json", lambda path: edited(path, text_encoder_2="T5"), "the class of text_encoder_2 is None"),
        ("tokenizer/tokenizer.json", lambda path: shutil.rmtree(path.parent), "tokenizer: not found"),
        ("tokenizer/tokenizer.json", lambda path: path.write_text("{}"), "cannot be loaded"),
        ("text_encoder/model.safetensors", Path.unlink, "weights of text_encoder or text_encoder_2 are missing"),
        ("text_encoder/model.safetensors", lambda path: path.write_bytes(b"x" * 40), "not a safetensors file"),
        ("text_encoder/model.safetensors", without("layers.1.mlp"), "3 weights are missing, e.g. layers.1.mlp"),
        ("text_encoder_2/model.safetensors", without("shared"), "weights are missing"),
        (
            "text_encoder_2/model.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            "text_encoder_2: cannot be loaded",
        ),
    ],
)
def test_broken_directories_are_refused_in_one_line(root: Path, tmp_path: Path, file: str, damage, named: str) -> None:
    damage(copied(root, tmp_path, *ENCODER_FOLDERS) / file)
    with pytest.raises(UserError, match=named) as error:
        encoder = open_text_encoder(tmp_path)
        assert encoder.fingerprint
        encoder.encode('a "cat"')
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_pictures_of_a_wrong_kind_are_refused(root: Path, image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"expected uint8 \[H, W, 3\]"):
        open_image_encoder(root, 32, 32).encode(image)
