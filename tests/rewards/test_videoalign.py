"""VideoAlign: the original's numbers, whatever the batch; every key of the file accounted for; faults in one line."""

import copy
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_videoalign as tiny
import torch

from megatron_sage.config import load_config
from megatron_sage.config.reward_rules import check_reward
from megatron_sage.errors import UserError
from megatron_sage.rewards import videoalign_checkpoint as files
from megatron_sage.rewards.build import accounts, build_reward
from megatron_sage.rewards.videoalign import VideoAlign, outline
from megatron_sage.rewards.videoalign_prompt import conversation, question

PROMPTS = ["a red fox {x} jumps over the fence", "two dogs", "", "Ein Bär, 大熊 🐻", "a cat runs over the grass"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(directory, PEFT model, tokenizer); the head gives one number a token, as the released one."""
    directory = tmp_path_factory.mktemp("single") / "VideoReward"
    return directory, *tiny.released(directory, output_dim=1)


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    directory = tmp_path_factory.mktemp("triple") / "VideoReward"
    return directory, *tiny.released(directory, output_dim=3, rank=3, alpha=5, seed=1, hidden=128, layers=1)


def clips(seed: int, count: int) -> list[np.ndarray]:
    """Clips of random lengths and sizes, not only noise: a random gradient under it."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        frames, height, width = rng.integers(2, 26), rng.integers(20, 330), rng.integers(20, 330)
        ramp = np.linspace(0, rng.integers(60, 200), width)[:, None] * rng.random(3)
        found.append((ramp + rng.integers(0, 56, (frames, height, width, 3))).astype(np.uint8))
    return found


def table(scores: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([scores[name] for name in ("VQ", "MQ", "TA")], axis=1)


@pytest.mark.parametrize("mrope", [False, True])
@pytest.mark.parametrize("which", ["single", "triple"])
def test_the_originals_numbers(which: str, mrope: bool, request: pytest.FixtureRequest) -> None:
    directory, peft, words = request.getfixturevalue(which)
    videos, fps = clips(3, 3), 5.0
    reward = VideoAlign(str(directory), mrope=mrope)
    scores = table(reward(videos, PROMPTS[:3], fps))
    expected = [tiny.original(peft, words, v, p, fps, mrope) for v, p in zip(videos, PROMPTS[:3], strict=True)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores, axis=0).min() > 1e-4, "clips that score alike would prove nothing"
    other = tiny.original(peft, words, videos[0], PROMPTS[0], fps, not mrope)
    assert np.abs(other - expected[0]).max() > 1e-3


def test_the_batch_does_not_matter(single: tuple[Path, Any, Any]) -> None:
    videos = clips(4, 5)
    alone = table(VideoAlign(str(single[0]))(videos, PROMPTS, 6.0))
    order = [3, 0, 4, 2, 1]
    for batch in (2, 5):
        found = table(
            VideoAlign(str(single[0]), batch=batch)([videos[i] for i in order], [PROMPTS[i] for i in order], 6.0)
        )
        np.testing.assert_allclose(found, alone[order], atol=1e-5)
    mixed = VideoAlign(str(single[0]), batch=3, mrope=True)
    one = VideoAlign(str(single[0]), mrope=True)
    np.testing.assert_allclose(table(mixed(videos, PROMPTS, 6.0)), table(one(videos, PROMPTS, 6.0)), atol=1e-5)


def test_rate_and_normalisation_and_compression_change_the_numbers(single: tuple[Path, Any, Any]) -> None:
    videos, prompts = clips(5, 2), PROMPTS[:2]
    reward = VideoAlign(str(single[0]))
    scores = table(reward(videos, prompts, 2.0))
    assert np.abs(scores - table(reward(videos, prompts, 24.0))).max() > 1e-3
    raw = table(VideoAlign(str(single[0]), normalize=False)(videos, prompts, 2.0))
    mean, std = np.array([files.STATISTICS[name] for name in ("VQ", "MQ", "TA")]).T
    np.testing.assert_allclose(scores, (raw - mean) / std, rtol=1e-12)
    compressed = table(VideoAlign(str(single[0]), h264_round_trip=True)(videos, prompts, 2.0))
    assert 0 < np.abs(compressed - scores).max() < 1
    assert reward([], [], 8.0)["VQ"].shape == (0,)


def test_bf16_rounds_as_the_original_does(single: tuple[Path, Any, Any]) -> None:
    """`model.to(bfloat16)` rounds the rotary frequencies too; the head stays in float32 so that scores do not tie."""
    videos = clips(6, 2)
    reward = VideoAlign(str(single[0]), dtype="bf16", resident=False)
    assert {x.dtype for x in [*reward.model.parameters(), *reward.model.buffers()]} == {torch.bfloat16}
    exact = VideoAlign(str(single[0]))
    assert {x.dtype for x in [*exact.model.parameters(), *exact.model.buffers()]} == {torch.float32}
    scores = table(reward(videos, PROMPTS[:2], 8.0))
    np.testing.assert_allclose(scores, table(exact(videos, PROMPTS[:2], 8.0)), atol=0.1)
    assert len(set(scores.ravel())) == 6


def test_the_question_is_the_originals() -> None:
    """The hash is that of KwaiVGI/VideoAlign's template with its blank place left in."""
    text = question("{text_prompt}")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    )
    assert conversation("x").count("<|video_pad|>") == 1
    assert [text.index(t) for t in tiny.REWARDS] == sorted(text.index(t) for t in tiny.REWARDS)


def copied(single: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(single[0], tmp_path / "copy"))


def saved(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = directory / "checkpoint-7" / "model.pth"
    state = torch.load(file, weights_only=True)
    torch.save(change(state) or state, file)


def test_other_layouts_score_the_same(single: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Today's names in safetensors, and adapters merged beforehand by PEFT."""
    from peft import PeftModel
    from safetensors.torch import save_file

    directory, peft, _ = single
    videos = clips(7, 1)
    expected = table(VideoAlign(str(directory))(videos, PROMPTS[:1], 8.0))

    new = copied(single, tmp_path)
    shutil.rmtree(new / "checkpoint-7")
    save_file({k: v.clone() for k, v in peft.state_dict().items()}, new / "weights.safetensors")
    np.testing.assert_array_equal(table(VideoAlign(str(new))(videos, PROMPTS[:1], 8.0)), expected)

    (new / "weights.safetensors").unlink()
    assert isinstance(peft, PeftModel)
    plain = copy.deepcopy(peft).merge_and_unload().state_dict()
    save_file({k: v.clone() for k, v in plain.items() if k != "lm_head.weight"}, new / "model.safetensors")
    content = json.loads((new / "model_config.json").read_text())
    content["peft_lora_config"]["lora_enable"] = False
    (new / "model_config.json").write_text(json.dumps(content))
    reward = VideoAlign(str(new))
    assert reward.account.merged == 0 and reward.account.unused == ()
    np.testing.assert_allclose(table(reward(videos, PROMPTS[:1], 8.0)), expected, atol=1e-5)


def test_the_newest_checkpoint_and_a_base_elsewhere(single: tuple[Path, Any, Any], tmp_path: Path) -> None:
    new = copied(single, tmp_path)
    shutil.copytree(new / "checkpoint-7", new / "checkpoint-12")
    (new / "checkpoint-7" / "model.pth").write_bytes(b"old")
    shutil.move(new / "qwen", tmp_path / "elsewhere")
    content = json.loads((new / "model_config.json").read_text())
    content["model_config"]["model_name_or_path"] = "Qwen/Qwen2-VL-2B-Instruct"
    (new / "model_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="fetch Qwen/Qwen2-VL-2B-Instruct"):
        VideoAlign(str(new))
    reward = VideoAlign(str(new), base=str(tmp_path / "elsewhere"))
    assert reward.account.file.endswith("checkpoint-12/model.pth")


def test_the_account(single: tuple[Path, Any, Any]) -> None:
    account = VideoAlign(str(single[0])).account
    state = torch.load(single[0] / "checkpoint-7" / "model.pth", weights_only=True)
    assert account.keys == len(state) == account.loaded + 2 * account.merged + len(account.unused)
    assert account.merged == sum("lora_A" in key for key in state) == 14 and account.unused == ("lm_head.weight",)
    assert "14 LoRA pairs merged" in str(account)


def test_the_released_sizes_give_1123_keys() -> None:
    """As many as programs that load the released file report: 1123, 196 pairs of adapters among them."""
    from transformers import Qwen2VLConfig

    config = Qwen2VLConfig(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151660, tie_word_embeddings=True, rope_theta=1e6, pad_token_id=None,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_config={"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536},
    )  # fmt: skip
    shapes, linears = outline(config, 1)
    lora = files.Lora(64, 2.0, ("lm_head", "rm_head", "embed_tokens", "visual"), -1)
    pairs = files.adapted(linears, lora)
    assert len(pairs) == 28 * 7 and len(shapes) + 1 + 2 * len(pairs) == 1123
    for old, shape in {
        "visual.patch_embed.proj.weight": [1280, 3, 2, 14, 14],
        "visual.blocks.31.attn.qkv.bias": [3840],
        "visual.merger.ln_q.weight": [1280],
        "visual.merger.mlp.2.weight": [1536, 5120],
        "model.embed_tokens.weight": [151660, 1536],
        "model.layers.27.self_attn.k_proj.base_layer.bias": [256],
        "model.layers.0.mlp.down_proj.base_layer.weight": [1536, 8960],
        "model.norm.weight": [1536],
        "rm_head.weight": [1, 1536],
    }.items():
        assert list(shapes[files.today(f"base_model.model.{old}")]) == shape
    adapter = files.today("base_model.model.model.layers.3.self_attn.o_proj.lora_B.default.weight")
    assert adapter.removesuffix(".lora_B.weight") in pairs


def without(state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if part not in key}


Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: without(s, "model.norm"), r"1 keys missing \(language_model.norm.weight\)"),
        (lambda s: without(s, Q + "lora_A"), "1 keys missing .*q_proj.lora_A.weight"),
        (lambda s: without(s, "lora_"), "28 keys missing .*, ..."),
        (lambda s: without(s, "rm_head"), "1 keys missing .*rm_head.weight"),
        (lambda s: s | {"extra": torch.zeros(1)}, r"1 keys unknown \(extra\)"),
        (lambda s: s | {Q + "weight": s[Q + "base_layer.weight"]}, "same weight as another key"),
        (lambda s: s | {Q + "base_layer.weight": torch.zeros(64, 63)}, r"shape \[64, 63\], but \[64, 64\]"),
        (
            lambda s: s | {Q + "lora_A.default.weight": torch.zeros(5, 64)},
            r"lora_A.weight: shape \[5, 64\], but \[4, 64\]",
        ),
        (
            lambda s: {k: v[:-1] if "embed_tokens" in k else v for k, v in s.items()},
            "embed_tokens.weight: shape .*tokenizer",
        ),
        (lambda s: [1], "not a state dict"),
        (lambda s: {"a": 1}, "not a state dict"),
    ],
)
def test_every_key_counts(single: tuple[Path, Any, Any], tmp_path: Path, change: Any, said: str) -> None:
    directory = copied(single, tmp_path)
    saved(directory, change)
    refused(said, str(directory))


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/videoalign_was_unpickled").touch, ())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / "model_config.json").unlink(), "has no model_config.json"),
        (lambda d: (d / "model_config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "model_config.json").write_text("[]"), "expected an object"),
        (lambda d: shutil.rmtree(d / "checkpoint-7"), "no weights"),
        (lambda d: (d / "checkpoint-7" / "model.pth").rename(d / "checkpoint-7" / "x.bin"), "no weights"),
        (lambda d: (d / "checkpoint-7" / "model.pth").write_bytes(b"PK\3\4 not a zip"), "not readable"),
        (lambda d: (d / "checkpoint-7" / "model.pth").write_bytes(b""), "not readable"),
        (lambda d: (d / "checkpoint-7" / "model.pth").write_bytes(pickle.dumps({"a": Malice()})), "not readable"),
        (lambda d: torch.save({"a": Malice()}, d / "checkpoint-7" / "model.pth"), "not readable"),
        (lambda d: (d / "qwen" / "config.json").unlink(), "has no config.json with a tokenizer"),
        (lambda d: [f.unlink() for f in (d / "qwen").glob("*token*")], "has no config.json with a tokenizer"),
        (lambda d: (d / "qwen" / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda d: (d / "qwen" / "config.json").write_text('{"model_type": "llama"}'), "expected qwen2_vl"),
    ],
)
def test_files_that_are_not_right(single: tuple[Path, Any, Any], tmp_path: Path, spoil: Any, said: str) -> None:
    directory = copied(single, tmp_path)
    content = json.loads((directory / "model_config.json").read_text())
    content["model_config"]["model_name_or_path"] = str(directory / "qwen")
    (directory / "model_config.json").write_text(json.dumps(content))
    spoil(directory)
    refused(said, str(directory))
    assert not Path("/tmp/videoalign_was_unpickled").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data_config.sample_type", "multi_pts", "only uniform is supported"),
        ("data_config.prompt_template_type", "detailed", "only detailed_special"),
        ("data_config.eval_dim", ["VQ", "TA", "MQ"], r"eval_dim=\['VQ', 'TA', 'MQ'\]: expected VQ, MQ, TA"),
        ("data_config.eval_dim", "VQ", "eval_dim=VQ: expected VQ, MQ, TA"),
        ("data_config.eval_dim", ["VQ", "MQ", "TA", "Overall"], None),
        ("data_config.fps", 0, "must be > 0"),
        ("data_config.fps", "2", "expected a number"),
        ("data_config.max_frame_pixels", None, "expected a number"),
        ("model_config.use_special_tokens", False, "only True is supported"),
        ("model_config.output_dim", 2, "expected 1 or 3"),
        ("model_config.output_dim", 3, r"rm_head.weight: shape \[1, 64\], but \[3, 64\]"),
        ("peft_lora_config.lora_r", 8, r"lora_A.weight: shape \[4, 96\], but \[8, 96\]"),
        ("peft_lora_config.lora_r", None, "lora_r=None"),
        ("peft_lora_config.lora_enable", False, "28 keys unknown"),
        ("peft_lora_config.vision_lora", True, None),  # "visual" is excluded by name, too
        ("peft_lora_config.lora_namespan_exclude", ["lm_head", "rm_head", "visual", "mlp"], "12 keys unknown"),
        ("inference_config.MQ_std", 0.0, "MQ_std=0.0: must be > 0"),
        ("inference_config.TA_mean", None, "TA_mean=None"),
        ("data_config", 3, "data_config: expected an object"),
    ],
)
def test_contradictions_are_refused(
    single: tuple[Path, Any, Any], tmp_path: Path, key: str, value: Any, said: str | None
) -> None:
    directory = copied(single, tmp_path)
    content = json.loads((directory / "model_config.json").read_text())
    section, _, name = key.partition(".")
    (content[section] if name else content)[name or section] = value
    (directory / "model_config.json").write_text(json.dumps(content))
    if said is None:
        VideoAlign(str(directory))
    else:
        refused(said, str(directory))


def test_what_the_config_may_say(single: tuple[Path, Any, Any], tmp_path: Path) -> None:
    directory = copied(single, tmp_path)
    content = json.loads((directory / "model_config.json").read_text())
    content["data_config"] |= {"fps": 4.0, "max_frame_pixels": 150000}
    content["inference_config"] = dict.fromkeys(tiny.INFERENCE, 2.0)
    content["peft_lora_config"] |= {"use_rslora": True, "lora_alpha": 4}  # 4 / sqrt(4) = 8 / 4
    (directory / "model_config.json").write_text(json.dumps(content))
    video = clips(8, 1)
    reward, before = VideoAlign(str(directory)), VideoAlign(str(single[0]), normalize=False)
    assert reward.settings.lora is not None and reward.settings.lora.scale == 2.0
    before.settings = files.Settings(4.0, None, 150000, 1, {}, None, None)
    np.testing.assert_allclose(
        table(reward(video, [""], 8.0)), table(before(video, [""], 8.0)) / 2 - 1, rtol=1e-6, atol=1e-9
    )
    content["data_config"] |= {"num_frames": 5}
    del content["inference_config"]
    (directory / "model_config.json").write_text(json.dumps(content))
    fixed = VideoAlign(str(directory))
    assert fixed.settings.statistics == files.STATISTICS
    assert len({fixed([video[0][:9]], [""], fps)["VQ"][0] for fps in (1.0, 8.0, 30.0)}) == 1
    with pytest.raises(UserError, match="asks for 4 of them"):
        fixed([video[0][:3]], [""], 8.0)


def test_calls_that_cannot_be_scored(single: tuple[Path, Any, Any]) -> None:
    reward = VideoAlign(str(single[0]))
    video = np.zeros((4, 28, 28, 3), np.uint8)
    for videos, prompt, fps, said in (
        ([video[:1]], "x", 8.0, "at least 2"),
        ([video.astype(np.float32)], "x", 8.0, "uint8"),
        ([video], "x", float("nan"), "frames per second"),
        ([video], "x", 0.0, "frames per second"),
        ([video], "a <|MQ_reward|> b", 8.0, "special tokens"),
        ([video], "<|video_pad|>", 8.0, "special tokens"),
        ([np.zeros((4, 1, 201, 3), np.uint8)], "x", 8.0, "200 times"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            reward(videos, [prompt], fps)
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_give_nan(single: tuple[Path, Any, Any], tmp_path: Path) -> None:
    directory = copied(single, tmp_path)
    saved(directory, lambda s: s | {"base_model.model.rm_head.weight": torch.full((1, 64), float("nan"))})
    assert np.isnan(table(VideoAlign(str(directory))(clips(9, 1), ["x"], 8.0))).all()


def test_a_run_is_checked_before_it_starts(single: tuple[Path, Any, Any]) -> None:
    settings = [
        "reward.function=megatron_sage.rewards.videoalign:VideoAlign",
        f"reward.settings.checkpoint={single[0]}",
    ]
    config = load_config(None, settings)
    check_reward(config)
    reward = build_reward(config.reward, "cpu")
    assert reward.dimensions == ("VQ", "MQ", "TA") and "87 keys: 58 loaded" in accounts(reward)[0]
    for override, said in (
        ("reward.settings.checkpoint=/nowhere", "reward.settings: checkpoint=/nowhere: no such directory"),
        ("reward.settings.checkpoint=3", "reward.settings.checkpoint=3: expects text"),
        ("reward.settings={}", "reward.settings.checkpoint: is missing"),
        ("reward.settings.bach=2", "did you mean batch"),
        ("reward.settings.batch=0", "batch=0: expected a whole number >= 1"),
        ("reward.settings.batch=1.5", "batch=1.5: expects a whole number"),
        ("reward.settings.mrope=1", "mrope=1: expects true or false"),
        ("reward.settings.dtype=fp16", "choose from fp32, bf16"),
        ("reward.settings.base=/nowhere", "base=/nowhere: has no config.json"),
        ("video.frames=1", "a clip of 1 frame: at least 2"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            check_reward(load_config(None, [*settings, override]))
        assert "\n" not in str(caught.value)


@pytest.mark.nightly
def test_two_processes_train_on_it(single: tuple[Path, Any, Any], tmp_path: Path) -> None:
    from tests.parallel.pool import run_on_ranks
    from tests.training import world

    run_on_ranks(1, "tests.training.world:build", root=tmp_path)
    rows = []
    for ranks in (1, 2):
        settings = world.settings(tmp_path, f"run{ranks}", **{"training.iterations": 1, "parallel.tensor": ranks})
        settings["reward.function"] = "megatron_sage.rewards.videoalign:VideoAlign"
        settings["reward.settings"] = f"{{checkpoint: {single[0]}, batch: 2}}"
        arguments = world.overrides(settings)
        found = run_on_ranks(ranks, "tests.training.world:train_job", arguments=arguments, processes=ranks)
        rows.append(found[0]["rows"][0])
    for name in ("reward/mean", "reward/VQ", "reward/MQ", "reward/TA"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4) and np.isfinite(rows[0][name])
    assert rows[0]["reward/nonfinite"] == 0 and rows[0]["reward/std"] > 0


def refused(said: str, checkpoint: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        VideoAlign(checkpoint)
    assert "\n" not in str(caught.value)
