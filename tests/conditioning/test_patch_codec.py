"""The small codec behind the VAE's interface."""

import numpy as np
import pytest
import torch

from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.conditioning.patch_codec import PatchCodec


@pytest.fixture(scope="module")
def vae() -> PatchCodec:
    torch.manual_seed(0)
    return PatchCodec(hidden=16, scaling_factor=0.8)


def test_shapes_and_determinism(vae: PatchCodec) -> None:
    x = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    posterior = vae.encode(x).latent_dist
    assert posterior.mode().shape == (2, 32, 3, 2, 3)
    torch.testing.assert_close(posterior.sample(), posterior.mode(), atol=1e-5, rtol=0)
    assert vae.decode(posterior.mode()).sample.shape == x.shape


def test_latents_depend_on_their_own_frames_and_neighbouring_patches_only(vae: PatchCodec) -> None:
    x = torch.rand(1, 3, 9, 16, 64) * 2 - 1
    first = vae.encode(x).latent_dist.mode()
    x[:, :, 1:5, :, :16] += 0.5  # the second latent frame's pixels, leftmost patch
    change = (vae.encode(x).latent_dist.mode() - first).abs().amax((0, 1))[:, 0]  # [T, columns]
    assert (change[1, :2] > 0).all() and (change[1, 2:] == 0).all() and (change[[0, 2]] == 0).all()


def test_pixels_land_where_they_came_from() -> None:
    """With the patches themselves as masks between two known colours, decoding undoes encoding."""
    vae = PatchCodec()
    vae.encoder, vae.decoder = torch.nn.Identity(), torch.nn.Identity()
    seen: list[torch.Tensor] = []
    vae.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
    grey = (torch.rand(1, 1, 5, 32, 48) * 0.9 + 0.05).expand(-1, 3, -1, -1, -1)
    vae.encode(grey)
    low, high = torch.tensor([0.0, 0.1, -0.2]), torch.tensor([1.0, 0.6, 0.3])
    mask = seen[0].chunk(3, dim=1)[0].logit()
    colours = torch.cat([low, high]).reshape(1, 6, 1, 1, 1).expand(1, 6, *mask.shape[2:])
    decoded = vae.decode(torch.cat([mask, colours], dim=1)).sample
    expected = low[:, None, None, None] + grey[0] * (high - low)[:, None, None, None]
    torch.testing.assert_close(decoded[0], expected)


def test_saved_and_loaded_through_the_codec(vae: PatchCodec, tmp_path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    codec = VideoCodec.from_pretrained(tmp_path / "vae")
    assert codec.latent_shape(81, 32, 48) == (32, 21, 2, 3) and codec.scaling_factor == 0.8
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    latents = codec.encode(frames)
    x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    torch.testing.assert_close(latents, vae.encode(x).latent_dist.mode()[0].detach() * 0.8)
    assert codec.decode(latents).shape == frames.shape


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 17, 16), (1, 3, 5, 16, 8)])
def test_other_sizes_are_refused(vae: PatchCodec, shape) -> None:
    with pytest.raises(ValueError, match="needs 4n"):
        vae.encode(torch.zeros(shape))
