"""CLIPScore and PickScore of small random models, against Hugging Face's processor and the definitions."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sage.config import load_config
from megatron_sage.config.reward_rules import check_reward
from megatron_sage.errors import UserError
from megatron_sage.rewards.build import build_reward
from megatron_sage.rewards.clip_score import CLIPScore, PickScore

PREPROCESSOR = {
    "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": {"shortest_edge": 32},
    "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel with its tokenizer and preprocessor_config.json, as on the hub."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    directory = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(directory)
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 77, "projection_dim": 24}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "projection_dim": 24}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    with torch.no_grad():
        for weight in clip.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
        clip.logit_scale.fill_(4.6)
    clip.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return directory


def clips(seed: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(rng.integers(1, 20), rng.integers(20, 90), rng.integers(20, 90)) for _ in range(count)]
    return [rng.integers(60, 190, (*shape, 3)).astype(np.uint8) for shape in shapes]


PROMPTS = ["a red fox jumps", "Zwei Hunde 🐕", "", "x"]


def reference(model: Path, video: np.ndarray, prompt: str, frames: int) -> np.ndarray:
    """Cosines of the sampled frames by Hugging Face's own processor and forward: logits / exp(logit_scale)."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**{k: v for k, v in PREPROCESSOR.items() if k != "image_processor_type"})
    number = min(frames, len(video))
    chosen = [video[round(i * (len(video) - 1) / max(number - 1, 1))] for i in range(number)]
    clip, words = CLIPModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    pixels = processor(images=chosen, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = clip(**words([prompt], return_tensors="pt", truncation=True, max_length=77), pixel_values=pixels)
        return (out.logits_per_image[:, 0] / clip.logit_scale.exp()).double().numpy()


def test_the_definitions(model: Path) -> None:
    videos = clips(1, 4)
    cosines = [reference(model, v, p, 5) for v, p in zip(videos, PROMPTS, strict=True)]
    means = [c.mean() for c in cosines]
    ours = CLIPScore(str(model), frames=5)(videos, PROMPTS, 8.0)
    # PIL rounds pictures between its two passes: a level of 255
    np.testing.assert_allclose(ours["CLIPScore_cosine"], means, atol=2e-3)
    np.testing.assert_allclose(ours["CLIPScore"], [2.5 * np.maximum(c, 0).mean() for c in cosines], atol=5e-3)
    assert np.ptp(means) > 0.02, "cosines that agree anyway would prove nothing"
    other = CLIPScore(str(model), frames=5, scale=100.0)(videos, PROMPTS, 8.0)
    np.testing.assert_allclose(other["CLIPScore"], ours["CLIPScore"] * 40, rtol=1e-12)
    np.testing.assert_array_equal(other["CLIPScore_cosine"], ours["CLIPScore_cosine"])
    pick = PickScore(str(model), frames=5, divisor=13.0)(videos, PROMPTS, 8.0)
    np.testing.assert_array_equal(pick["PickScore_cosine"], ours["CLIPScore_cosine"])
    np.testing.assert_allclose(pick["PickScore"], np.exp(4.6) / 13 * ours["CLIPScore_cosine"], rtol=1e-6)


def test_negative_cosines_count_as_nothing_frame_by_frame(model: Path) -> None:
    reward = CLIPScore(str(model), frames=3)
    given = [np.array([0.2, -0.4, 0.1]), np.array([-0.1])]
    reward._cosines = lambda *_: given  # type: ignore[method-assign]
    scores = reward([], [], 8.0)
    np.testing.assert_allclose(scores["CLIPScore"], [2.5 * 0.1, 0.0])
    np.testing.assert_allclose(scores["CLIPScore_cosine"], [-0.1 / 3, -0.1])


@pytest.mark.parametrize("shape", [(32, 32), (40, 71), (97, 33), (480, 848), (32, 45)])
def test_pictures_are_the_processors(model: Path, shape: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([60 + 120 * x / shape[1], 60 + 120 * y / shape[0], 128 + 40 * np.sin(x / 3)], -1).astype(np.uint8)
    processor = CLIPImageProcessorPil(**{k: v for k, v in PREPROCESSOR.items() if k != "image_processor_type"})
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    ours = CLIPScore(str(model)).preprocessor(image[None])
    assert ours.shape == expected.shape
    level = 1 / 255 / 0.26130258
    assert (ours - expected).abs().max() < 2.01 * level and (ours - expected).abs().mean() < 0.5 * level


def test_long_prompts_are_cut_counted_and_said_once(model: Path) -> None:
    reward = CLIPScore(str(model), frames=2)
    video = clips(2, 1)[0]
    long = "wolf " * 30  # 4 tokens each in this vocabulary
    with pytest.warns(UserWarning, match="77 tokens") as caught:
        scores = reward([video] * 3, [long, "fox", long + "and a bear"], 8.0)["CLIPScore_cosine"]
    assert len(caught) == 1 and reward.truncated == 2
    assert scores[0] == scores[2] != scores[1], "what comes after the 77th token cannot count"
    np.testing.assert_allclose(scores[0], reference(model, video, long, 2).mean(), atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward([video], [long], 8.0)
    assert reward.truncated == 3


def test_a_processor_elsewhere_and_other_forms(model: Path, tmp_path: Path) -> None:
    """PickScore_v1 is used with the tokenizer of the model that it was trained from; old files hold plain numbers."""
    import shutil

    bare, other = tmp_path / "bare", Path(shutil.copytree(model, tmp_path / "other"))
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare)
    (other / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"size": 32, "crop_size": 32}))
    videos = clips(3, 2)
    expected = PickScore(str(model))(videos, PROMPTS[:2], 8.0)
    found = PickScore(str(bare), processor=str(other), resident=False)(videos, PROMPTS[:2], 8.0)
    np.testing.assert_array_equal(found["PickScore"], expected["PickScore"])
    with pytest.raises(UserError, match="has no preprocessor_config.json"):
        PickScore(str(bare))
    low = PickScore(str(model), dtype="bf16")(videos, PROMPTS[:2], 8.0)
    np.testing.assert_allclose(low["PickScore_cosine"], expected["PickScore_cosine"], atol=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "expected clip"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda d: (d / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"resample": 2})),
            "resample=2",
        ),
        (
            lambda d: (d / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"crop_size": 40})),
            "crop_size",
        ),
        (
            lambda d: (d / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"crop_size": 30})),
            "pictures of 30 x 30, the model takes 32",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot be read"),
        (lambda d: altered(d, lambda s: s.pop("visual_projection.weight")), "1 keys missing .visual_projection.weight"),
        (lambda d: altered(d, lambda s: s.update(extra=torch.zeros(1))), "1 keys unknown .extra"),
        (lambda d: altered(d, lambda s: s.update({"text_projection.weight": torch.zeros(3, 3)})), "cannot be read"),
    ],
)
def test_files_that_are_not_right(model: Path, tmp_path: Path, change: Any, said: str) -> None:
    import shutil

    directory = Path(shutil.copytree(model, tmp_path / "copy"))
    change(directory)
    with pytest.raises(UserError, match=said) as caught:
        CLIPScore(str(directory))
    assert "\n" not in str(caught.value)


def preprocessed(directory: Path, **change: Any) -> None:
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | change))


def altered(directory: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def test_beside_the_trained_reward(model: Path) -> None:
    """Weighed with another reward, or watched only; a run is refused before it starts."""
    clip = "megatron_sage.rewards.clip_score:CLIPScore"
    pick = "megatron_sage.rewards.clip_score:PickScore"
    overrides = [
        f"reward.more=[{{function: '{pick}', settings: {{model: {model}, frames: 3}}}}]",
        "reward.weights.PickScore=0.5",
        f"reward.watch={clip}",
        f"reward.watch_settings={{model: {model}, scale: 1}}",
    ]
    config = load_config(None, overrides)
    check_reward(config)
    reward = build_reward(config.reward, "cpu")
    names = ("VQ", "MQ", "TA", "PickScore", "PickScore_cosine", "watch/CLIPScore", "watch/CLIPScore_cosine")
    assert reward.dimensions == names
    scores = reward(clips(4, 2), ["a red circle moving left slowly"] * 2, 8.0)
    assert all(np.isfinite(scores[name]).all() for name in names)
    for override, said in (
        ("reward.watch_settings.model=/nowhere", "reward.watch_settings: model=/nowhere: no such directory"),
        ("reward.watch_settings.frames=0", "frames=0: expected a whole number >= 1"),
        ("reward.watch_settings.scale=-1", "scale=-1: expected a number above 0"),
        ("reward.watch_settings.divisor=1", "no such setting"),
        ("reward.watch_settings.dtype=fp8", "choose from fp32, bf16"),
        ("reward.weights.PikScore=1", r"did you mean PickScore\?"),
        ("reward.weights.CLIPScore=1", "the reward has no such dimension"),
    ):
        with pytest.raises(UserError, match=said):
            check_reward(load_config(None, [*overrides, override]))
