"""What a verification is run on: diffusers' forward arguments, read from a file or drawn at random."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sage.errors import UserError
from megatron_sage.model.conditions import TextCondition
from megatron_sage.model.config import HunyuanVideoConfig

MASKS = ("encoder_attention_mask", "encoder_attention_mask_2")
OPTIONAL = ("timestep_r", "grad_output")


@dataclass
class Inputs:
    """Arguments of `HunyuanVideo15Transformer3DModel.forward` under its names, and the gradient of its output.

    Floats are float32 (timesteps in particular: bf16 would round them), masks bool, True for a valid token.
    """

    hidden_states: Tensor  # [B, C, T, H, W]
    timestep: Tensor  # [B]
    encoder_hidden_states: Tensor  # [B, L, D]
    encoder_attention_mask: Tensor  # [B, L]
    encoder_hidden_states_2: Tensor  # [B, L2, D2]
    encoder_attention_mask_2: Tensor  # [B, L2]
    image_embeds: Tensor  # [B, L3, D3]
    timestep_r: Tensor | None = None  # [B]
    grad_output: Tensor | None = None  # [B, C_out, T, H, W]

    @property
    def batch(self) -> int:
        """Samples."""
        return self.hidden_states.shape[0]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, height, width."""
        return tuple(self.hidden_states.shape[2:])  # type: ignore[return-value]

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: t if t is None else t.to(device) for n, t in tensors.items()}
        return Inputs(**moved)

    def forward_arguments(self) -> dict[str, Tensor]:
        """Keyword arguments for diffusers' forward; masks as integers."""
        names = [field.name for field in fields(self) if field.name != "grad_output"]
        tensors = {name: getattr(self, name) for name in names}
        return {n: t.long() if n in MASKS else t for n, t in tensors.items() if t is not None}

    def micro_batches(self) -> list[tuple[list[int], TextCondition]]:
        """Samples of equal text lengths together, padding dropped: (sample indices, their condition).

        Text-to-video is decided over the WHOLE batch, as diffusers does: in a batch with one image, another sample's
        zero image embedding is an image like any other.
        """
        images = self.image_embeds if bool(self.image_embeds.any()) else self.image_embeds[:, :0]
        by_length: dict[tuple[int, int], list[int]] = defaultdict(list)
        lengths = [mask.sum(1).tolist() for mask in (self.encoder_attention_mask, self.encoder_attention_mask_2)]
        for index, length in enumerate(zip(*lengths, strict=True)):
            by_length[length].append(index)
        return [
            (
                samples,
                TextCondition(
                    qwen_BLD=_valid(self.encoder_hidden_states, self.encoder_attention_mask, samples),
                    byt5_BLD=_valid(self.encoder_hidden_states_2, self.encoder_attention_mask_2, samples),
                    image_BLD=images[samples],
                ),
            )
            for samples in by_length.values()
        ]


def _valid(tokens_BLD: Tensor, mask_BL: Tensor, samples: list[int]) -> Tensor:
    tokens, mask = tokens_BLD[samples], mask_BL[samples]
    return tokens[mask].view(len(samples), -1, tokens.shape[-1])


def read_inputs(path: Path, config: HunyuanVideoConfig) -> Inputs:
    """Reads and checks a safetensors file; UserError names the file and the tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    known = {field.name for field in fields(Inputs)}
    for name in sorted(known - set(OPTIONAL) - tensors.keys()):
        raise UserError(f"{path}: tensor {name!r} is missing")
    for name in sorted(tensors.keys() - known):
        raise UserError(f"{path}: tensor {name!r} is unknown; known are {', '.join(sorted(known))}")
    if "timestep_r" in tensors and not config.use_meanflow:
        raise UserError(f"{path}: timestep_r is given, but config.json says use_meanflow false; leave it out")
    if "timestep_r" not in tensors and config.use_meanflow:
        raise UserError(f"{path}: tensor 'timestep_r' is missing; config.json says use_meanflow true")
    _check_shapes(path, tensors, config)
    for name, tensor in tensors.items():
        tensors[name] = tensor != 0 if name in MASKS else tensor.float()
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")
    empty = ~tensors["encoder_attention_mask"].any(1)
    if empty.any():
        sample = int(empty.nonzero()[0])
        raise UserError(f"{path}: encoder_attention_mask of sample {sample} is all zero: the mean text would be 0/0")
    return Inputs(**tensors)


def _check_shapes(path: Path, tensors: dict[str, Tensor], config: HunyuanVideoConfig) -> None:
    video, text, glyph = ("T", "H", "W"), "L", "L2"
    expected: dict[str, tuple[str | int, ...]] = {
        "hidden_states": ("B", config.in_channels, *video),
        "timestep": ("B",),
        "encoder_hidden_states": ("B", text, config.text_embed_dim),
        "encoder_attention_mask": ("B", text),
        "encoder_hidden_states_2": ("B", glyph, config.text_embed_2_dim),
        "encoder_attention_mask_2": ("B", glyph),
        "image_embeds": ("B", "L3", config.image_embed_dim),
        "timestep_r": ("B",),
        "grad_output": ("B", config.out_channels, *video),
    }
    sizes: dict[str, int] = {}
    for name, dims in expected.items():
        if name not in tensors:
            continue
        shape = tuple(tensors[name].shape)
        wanted = tuple(dim if isinstance(dim, int) else sizes.get(dim, dim) for dim in dims)
        fits = len(shape) == len(wanted) and all(
            isinstance(w, str) or w == s for s, w in zip(shape, wanted, strict=True)
        )
        if not fits:
            text_of = ", ".join(str(item) for item in wanted)
            raise UserError(f"{path}: {name} has shape {list(shape)}, expected [{text_of}]")
        sizes.update({dim: size for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str)})
    if 0 in (sizes["B"], sizes["T"], sizes["H"], sizes["W"]):
        raise UserError(f"{path}: hidden_states is empty")


def random_inputs(
    config: HunyuanVideoConfig,
    grid: tuple[int, int, int],
    text_tokens: int,
    image_tokens: int,
    image_to_video: bool,
    seed: int,
) -> Inputs:
    """Three samples with different text lengths, valid tokens scattered among garbage padding."""
    generator = torch.Generator().manual_seed(seed)
    batch, glyph_tokens = 3, max(text_tokens // 2, 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def mask(length: int, valid: list[int]) -> Tensor:
        rows = [torch.randperm(length, generator=generator) < count for count in valid]
        return torch.stack(rows)

    timestep = torch.rand(batch, generator=generator) * 1000
    tensors: dict[str, Any] = {
        "hidden_states": normal(batch, config.in_channels, *grid),
        "timestep": timestep,
        "encoder_hidden_states": normal(batch, text_tokens, config.text_embed_dim),
        "encoder_attention_mask": mask(text_tokens, [text_tokens, max(text_tokens // 2, 1), text_tokens]),
        "encoder_hidden_states_2": normal(batch, glyph_tokens, config.text_embed_2_dim),
        "encoder_attention_mask_2": mask(glyph_tokens, [glyph_tokens // 2, 0, glyph_tokens // 2]),
        "image_embeds": normal(batch, image_tokens, config.image_embed_dim) * float(image_to_video),
        "timestep_r": timestep / 2 if config.use_meanflow else None,
        "grad_output": normal(batch, config.out_channels, *grid),
    }
    return Inputs(**tensors)
