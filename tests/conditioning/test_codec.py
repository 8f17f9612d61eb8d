"""The codec against diffusers' own VAE, at toy size."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from safetensors.torch import load_file, save_file

from megatron_sage.conditioning.codec import DTYPES, NonFiniteVideoError, VideoCodec
from megatron_sage.conditioning.patch_codec import PatchCodec
from megatron_sage.errors import UserError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(block_out_channels=(8, 8, 8, 16, 64), layers_per_block=1, scaling_factor=0.7)
    path = tmp_path_factory.mktemp("root") / "vae"
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(directory) -> VideoCodec:
    return VideoCodec.from_pretrained(directory)


def clip(frames: int = 5, height: int = 16, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_both_directions_equal_diffusers(codec: VideoCodec, directory) -> None:
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(directory).eval()
    frames = clip()
    latents = codec.encode(frames)
    assert latents.shape == codec.latent_shape(5, 16, 32) == (32, 2, 1, 2) and latents.dtype == torch.float32
    x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        wanted = vae.encode(x).latent_dist.mode()[0] * 0.7
        pixels = vae.decode(latents[None] / 0.7).sample[0]
    torch.testing.assert_close(latents, wanted)
    decoded = codec.decode(latents)
    assert decoded.dtype == np.uint8 and decoded.shape == frames.shape and decoded.flags["C_CONTIGUOUS"]
    wanted = ((pixels.clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 3, 0).numpy()
    assert np.abs(decoded - wanted).max() <= 0.5 + 1e-3


def test_rounding_and_clamping(codec: VideoCodec, monkeypatch) -> None:
    """Level k is the pixel values within half a level of k; beyond [-1, 1] is black or white."""
    levels = torch.tensor([-3.0, -1.0, -1 + 0.499 / 127.5, -1 + 0.501 / 127.5, 0.0, 1.0, 9.0])
    sample = levels.repeat(3, 1)[None, :, None, None, :]
    monkeypatch.setattr(codec.vae, "decode", lambda z: type("Output", (), {"sample": sample})())
    decoded = codec.decode(torch.zeros(32, 1, 1, 1))
    assert decoded[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_every_level_survives_the_pixel_mapping(codec: VideoCodec, monkeypatch) -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    seen = []
    encode = codec.vae.encode
    monkeypatch.setattr(codec.vae, "encode", lambda x: seen.append(x) or encode(x))
    codec.encode(frames)
    monkeypatch.setattr(codec.vae, "decode", lambda z: type("Output", (), {"sample": seen[0]})())
    np.testing.assert_array_equal(codec.decode(torch.zeros(32, 1, 1, 1)), frames)


def test_encoding_is_deterministic_and_keeps_no_graph(codec: VideoCodec) -> None:
    first, second = codec.encode(clip()), codec.encode(clip())
    assert torch.equal(first, second) and not first.requires_grad
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_make_no_video(codec: VideoCodec, value: float) -> None:
    latents = torch.zeros(32, 1, 1, 1)
    latents[3] = value
    with pytest.raises(NonFiniteVideoError, match="latents"):
        codec.decode(latents)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ((6, 16, 16), "video.frames=6: expected 4n.1, e.g. 5"),
        ((0, 16, 16), "video.frames=0"),
        ((5, 24, 16), "video.height=24.*16"),
        ((5, 16, 0), "video.width=0"),
    ],
)
def test_sizes_that_the_vae_cannot_take_are_refused(codec: VideoCodec, size, named: str) -> None:
    with pytest.raises(UserError, match=named):
        codec.latent_shape(*size)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((5, 16, 16, 3), np.float32), np.zeros((1, 5, 16, 16, 3), np.uint8), np.zeros((5, 16, 16), np.uint8)],
)
def test_frames_of_a_wrong_kind_are_refused(codec: VideoCodec, frames: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"expected one uint8 clip \[F, H, W, 3\]"):
        codec.encode(frames)


@pytest.mark.parametrize("shape", [(1, 32, 1, 1, 1), (16, 1, 1, 1)])
def test_latents_of_a_wrong_shape_are_refused(codec: VideoCodec, shape) -> None:
    with pytest.raises(UserError, match="expected one clip"):
        codec.decode(torch.zeros(shape))


def test_directories_that_hold_no_such_vae_are_refused_in_one_line(tmp_path) -> None:
    cases = [
        (None, "not found"),
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        (json.dumps({"_class_name": "AutoencoderKLWan"}), "AutoencoderKLWan"),
        (json.dumps({"_class_name": "AutoencoderKLHunyuanVideo15"}), "weights cannot be loaded"),
    ]
    for number, (config, named) in enumerate(cases):
        path = tmp_path / str(number)
        path.mkdir()
        if config is not None:
            (path / "config.json").write_text(config)
        with pytest.raises(UserError, match=named) as error:
            VideoCodec.from_pretrained(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_weights_are_refused(directory, tmp_path) -> None:
    """diffusers would warn and go on with random ones."""
    broken = Path(shutil.copytree(directory, tmp_path / "vae"))
    file = broken / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "mid_block.attentions.0.proj_out" not in name}, file)
    with pytest.raises(UserError, match="weights are missing, e.g. decoder.mid_block.attentions.0.proj_out.bias"):
        VideoCodec.from_pretrained(broken)


@pytest.mark.parametrize(("dtype", "pixels", "latents"), [("bf16", 1.0, 0.05), ("fp16", 0.1, 0.015)])
def test_half_precision_stays_within_its_bound(directory, codec: VideoCodec, dtype: str, pixels: float, latents: float):
    """Mean of |difference| in levels of 255, and the relative norm of the latents' difference."""
    half = VideoCodec.from_pretrained(directory, dtype=DTYPES[dtype])
    z = torch.randn(codec.latent_shape(5, 32, 48), generator=torch.Generator().manual_seed(0))
    wanted, found = codec.decode(z), half.decode(z)
    assert 0 < np.abs(wanted.astype(int) - found).mean() <= pixels
    encoded, encoded_half = codec.encode(wanted), half.encode(wanted)
    assert encoded_half.dtype == torch.float32
    assert 0 < (encoded - encoded_half).norm() <= latents * encoded.norm()


def test_a_clip_of_one_tile_is_not_cut(directory, codec: VideoCodec) -> None:
    tiled = VideoCodec.from_pretrained(directory, tiling=True)
    small = torch.randn(codec.latent_shape(1, 256, 256), generator=torch.Generator().manual_seed(0))
    frame = codec.decode(small)
    np.testing.assert_array_equal(frame, tiled.decode(small))
    assert torch.equal(codec.encode(frame), tiled.encode(frame))


def test_a_larger_clip_is_tiled_as_diffusers_does(directory, codec: VideoCodec) -> None:
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(directory).eval()
    vae.enable_tiling()
    tiled = VideoCodec.from_pretrained(directory, tiling=True)
    large = torch.randn(codec.latent_shape(1, 272, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = vae.decode(large[None] / 0.7).sample[0]
    wanted = ((wanted.clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 3, 0).numpy()
    found = tiled.decode(large)
    assert np.abs(found - wanted).max() <= 0.5 + 1e-3
    assert np.abs(found - codec.decode(large).astype(int)).max() > 1, "tiles see only themselves"


def test_the_small_codec_needs_no_tiles(tmp_path) -> None:
    PatchCodec(hidden=8).save_pretrained(tmp_path)
    tiled, whole = (VideoCodec.from_pretrained(tmp_path, tiling=tiling) for tiling in (True, False))
    latents = torch.randn(whole.latent_shape(1, 272, 32), generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(tiled.decode(latents), whole.decode(latents))


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("tiling", [True, False])
def test_the_config_says_how_the_vae_runs(directory, name: str, dtype: torch.dtype, tiling: bool) -> None:
    from megatron_sage.config import Config
    from megatron_sage.engine import load_codec

    config = Config()
    config.model.pretrained, config.vae.dtype, config.vae.tiling = str(directory.parent), name, tiling
    codec = load_codec(config)
    assert codec.vae.dtype == dtype and codec.vae.use_tiling == tiling
